"""Writing a score file so that an interrupted run goes on and ends with the same bytes as one that was not interrupted.

Rows go to `OUTPUT.partial`, which begins with what the run depends on and marks the end of each window of examples, with a digest
of the window. The same command finds it, takes up after the last mark up to which every window is as it was written, and computes
the rest in the same windows. When the last window is done the rows are copied to the output in its own form, and the partial file
goes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from goldsmith.errors import MachineError
from goldsmith.scoring.files import score_from_json, score_to_json
from goldsmith.scoring.parquet import write_parquet_rows
from goldsmith.scoring.tally import Parts, parts_from_json, parts_to_json
from goldsmith.types import TokenScores

__all__ = ["ScoreWriter"]

_FORMAT = "goldsmith partial scores 4"


class ScoreWriter:
    """The file that a run of scoring writes, and what of it a former run has done.

    Args:
        path: the output; JSON Lines, or Parquet where its suffix is `.parquet`.
        run: what the rows depend on, name to value; a partial file of another run is refused.
        how: what changes them by rounding only; a partial file that began otherwise is gone on with, and `changed` says so.

    Attributes:
        num_done: examples that a former run has written.
        changed: names of `how` that are not as when the partial file was begun.

    Raises:
        MachineError: the file cannot be written, is being written by another process, or its partial file belongs to
            another run.
    """

    def __init__(self, path: str | Path, run: Mapping[str, object], *, how: Mapping[str, object] | None = None) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._run, self._how = dict(run), dict(how or {})
        self.changed: tuple[str, ...] = ()
        self._file: IO[bytes] | None = None
        self.num_done = 0

    def __enter__(self) -> ScoreWriter:
        with self._naming_the_file():
            self._file = self.partial.open("a+b")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise MachineError(
                    f"{self.partial}: another process is writing it", remedy="wait for it, or give another --output"
                ) from error
            self._take_up()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk has been reported by then
                self._file.close()

    def done(self) -> Iterator[tuple[TokenScores, Parts]]:
        """The examples of the windows that are done, in order."""
        for item in self._items():
            yield score_from_json(item["row"], place=str(self.partial)), parts_from_json(item["parts"])

    def write_window(self, examples: Sequence[tuple[TokenScores, Parts]]) -> None:
        """Append a window and force it to the disk: from now on it is done."""
        lines = [
            json.dumps(
                {"row": score_to_json(scores), "parts": parts_to_json(parts)}, ensure_ascii=False, allow_nan=False
            )
            for scores, parts in examples
        ]
        self.num_done += len(examples)
        lines.append(json.dumps({"done": self.num_done, "digest": _digest(_encoded(lines))}))
        self._append(lines)

    def finish(self) -> None:
        """Write the output whole, in place of what was there, and remove the partial file."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        rows = (item["row"] for item in self._items())
        with self._naming_the_file():
            try:
                if self.path.suffix == ".parquet":
                    write_parquet_rows(temporary, rows)
                else:
                    _write_json_lines(temporary, rows)
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
                self.partial.unlink()
            finally:
                temporary.unlink(missing_ok=True)

    def _take_up(self) -> None:
        """Check whose the partial file is, and cut it back to its last good mark; begin it where there is none."""
        assert self._file is not None
        self._file.seek(0)
        header = self._file.readline()
        if not header.endswith(b"\n"):  # new, or died before its first line was whole
            with self._naming_the_file():
                self._file.truncate(0)
            self._append([json.dumps({"format": _FORMAT, "run": self._run, "how": self._how}, ensure_ascii=False)])
            return
        self._require_same_run(header)
        end = self._file.tell()
        digest, num_rows = hashlib.blake2b(digest_size=16), 0
        while (line := self._file.readline()).endswith(b"\n"):
            if not line.startswith(b'{"done"'):
                digest.update(line)
                num_rows += 1
                continue
            if line != _encoded([json.dumps({"done": num_rows, "digest": digest.hexdigest()})]):
                break  # damaged: computed again from here
            self.num_done, end = num_rows, self._file.tell()
            digest = hashlib.blake2b(digest_size=16)
        with self._naming_the_file():
            self._file.truncate(end)

    def _require_same_run(self, header: bytes) -> None:
        remedy = f"go on with the command that began it, or remove {self.partial}"
        try:
            values = json.loads(header)
            before, how = (values["run"], values["how"]) if values["format"] == _FORMAT else (None, {})
        except (ValueError, KeyError, TypeError):
            before, how = None, {}
        if before is None:
            raise MachineError(f"{self.partial}: not a partial score file of this goldsmith", remedy=remedy)
        now = json.loads(json.dumps(self._run))
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        self.changed = tuple(sorted(key for key, value in self._how.items() if how.get(key) != value))
        if differing:
            shown = "".join(f"\n  {key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in differing)
            raise MachineError(f"{self.partial}: left by a run that differs in:{shown}", remedy=remedy)

    def _items(self) -> Iterator[dict[str, Any]]:
        assert self._file is not None
        self._file.flush()
        with self.partial.open("rb") as file:
            file.readline()
            for line in file:
                if not line.startswith(b'{"done"'):
                    yield json.loads(line.decode("utf-8", "surrogatepass"))

    def _append(self, lines: Sequence[str]) -> None:
        assert self._file is not None
        with self._naming_the_file():
            self._file.write(_encoded(lines))
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise MachineError(
                f"{self.path}: the score file cannot be written: {error.strerror}",
                remedy="free disk space and give the same command again"
                if is_full
                else "name a file in a folder that is there and may be written: --output",
            ) from error


def _encoded(lines: Iterable[str]) -> bytes:
    return "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _write_json_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    with path.open("wb") as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            file.write(line.encode("utf-8", "surrogatepass"))
