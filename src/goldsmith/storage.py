"""Files that survive: atomic writes, hashes, manifests, locks, and the points where tests make a run fail."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from goldsmith.errors import CheckpointError, ConfigError, MachineError

__all__ = [
    "FAIL_POINTS",
    "FolderLock",
    "JsonLinesWriter",
    "fail_point",
    "format_bytes",
    "free_bytes",
    "fsync_tree",
    "replace_folder",
    "require_no_input",
    "require_ordinary_file",
    "require_space",
    "sha256_file",
    "verify_manifest",
    "write_asked_file",
    "write_atomic",
    "write_manifest",
]

MANIFEST = "MANIFEST.json"

# Every place where a run may die or the disk may fill, in the order of their passing. Tests kill at each of them.
FAIL_POINTS = (
    "checkpoint.begin",
    "checkpoint.model",
    "checkpoint.optimizer",
    "checkpoint.manifest",
    "checkpoint.rename",
    "checkpoint.renamed",
    "checkpoint.prune",
    "checkpoint.pruning",
    "checkpoint.pruned",
    "export.begin",
    "export.model",
    "export.rename",
    "export.renamed",
    "metrics.append",
)

_passings: Counter[str] = Counter()


def fail_point(name: str) -> None:
    """Die here, or meet a full disk, where the environment asks for it; otherwise do nothing.

    `GOLDSMITH_FAIL_POINT=NAME` kills this process with SIGKILL at the first passing, `NAME:3` at the third, and
    `NAME!enospc` raises what a full disk raises.
    """
    wanted = os.environ.get("GOLDSMITH_FAIL_POINT")
    if not wanted:
        return
    place, _, how = wanted.partition("!")
    place, _, passing = place.partition(":")
    if place != name:
        return
    _passings[name] += 1
    if _passings[name] != int(passing or 1):
        return
    if how == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    os.kill(os.getpid(), signal.SIGKILL)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Force every file of `folder`, and the folders, to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _fsync(path)
    _fsync(folder)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


_FILE_REMEDY = "give the name of a file in a folder that is there and may be written"


def require_ordinary_file(path: str | Path, *, option: str = "output") -> None:
    """Refuse to replace a device or a pipe, such as /dev/null or /dev/stdout: a new file would take its name.

    Raises:
        MachineError: it is a folder.
        ConfigError: it is there, and is neither a file nor a link to one, or lies in /dev.
    """
    if not Path(path).name or os.path.isdir(path):
        raise MachineError(f"{str(path)!r} cannot be written: it is a folder", remedy=_FILE_REMEDY)
    # /dev/stdout may lead to an ordinary file.
    if os.path.exists(path) and (not os.path.isfile(path) or os.path.dirname(os.path.abspath(path)) == "/dev"):
        raise ConfigError(f"{option}: {str(path)!r} is no ordinary file", remedy="give the name of a file")


def write_asked_file(path: str | Path, data: bytes | str, *, option: str = "output") -> None:
    """`write_atomic` where the user named the file, by this option.

    Raises:
        MachineError: it is a folder, its folder is not there, or may not be written.
        ConfigError: it is a device or a pipe.
    """
    file = Path(path)
    require_ordinary_file(file, option=option)
    try:
        write_atomic(file, data)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise MachineError(f"{str(path)!r} cannot be written: {reason}", remedy=_FILE_REMEDY) from error


def require_no_input(
    output: str | Path, inputs: Iterable[tuple[str, str | Path]], *, option: str = "output", writes: str
) -> None:
    """Refuse to replace a file that is read for what is written there.

    Args:
        inputs: what each is, and the file; links are followed, and what is not there cannot be replaced.
        option: how the user named the file, without its dashes.
        writes: what would be written.

    Raises:
        ConfigError: one of the inputs is the output.
    """
    if not os.path.exists(output):
        return
    for what, file in inputs:
        if os.path.exists(file) and os.path.samefile(file, output):
            raise ConfigError(
                f"{option}: {output} is {what} itself, which {writes} would replace", remedy=f"give another --{option}"
            )


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write `MANIFEST.json`: size and sha256 of every other file of the folder."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_atomic(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def verify_manifest(folder: Path, *, only: str | None = None, remedy: str | None = None) -> None:
    """Check a folder against its manifest.

    Args:
        only: this file of it alone.
        remedy: default: that of a run that would go on from it.

    Raises:
        CheckpointError: the manifest or a file is missing, or differs in size or hash.
    """
    remedy = (
        remedy or f"remove {folder}; the same command then goes on from the checkpoint before it, or from the start"
    )
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: missing or unreadable ({error})", remedy=remedy) from error
    for name, (num_bytes, digest) in expected.items():
        if only not in (None, name):
            continue
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing", remedy=remedy)
        if path.stat().st_size != num_bytes:
            seen = path.stat().st_size
            raise CheckpointError(f"{path}: {seen:,} bytes, the manifest says {num_bytes:,}", remedy=remedy)
        if sha256_file(path) != digest:
            raise CheckpointError(f"{path}: its sha256 differs from the manifest", remedy=remedy)


def replace_folder(temporary: Path, final: Path) -> None:
    """Move a finished folder into place: everything is on the disk before its name is. An old one is replaced.

    A folder cannot be exchanged in one step; should the process die between the two renames, the old content lies in
    `.NAME.old` and the new in `temporary`, and `final` does not exist.
    """
    fsync_tree(temporary)
    aside = final.with_name(f".{final.name}.old")
    if aside.exists():
        shutil.rmtree(aside)
    if final.exists():
        final.replace(aside)
    temporary.replace(final)
    _fsync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def free_bytes(folder: Path) -> int:
    """Bytes free on the file system of the nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def format_bytes(number: float) -> str:
    """A size for a person, in powers of ten.

    >>> format_bytes(41_472), format_bytes(538_000_000), format_bytes(2_152_000_000)
    ('41 kB', '538 MB', '2.15 GB')
    """
    if number < 1e6:
        return f"{number / 1e3:,.0f} kB"
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def require_space(folder: Path, num_bytes: int, purpose: str) -> None:
    """Refuse before the start what cannot fit.

    Raises:
        MachineError: fewer bytes are free than `purpose` needs.
    """
    free = free_bytes(folder)
    if free < num_bytes:
        raise MachineError(
            f"{folder}: {format_bytes(free)} free, but {purpose} needs {format_bytes(num_bytes)}",
            remedy="free disk space, choose another output_dir, or keep fewer checkpoints (checkpoint.keep)",
        )


class FolderLock:
    """One process at a time in a run folder; the lock goes with the process, however it ends.

    Raises:
        MachineError: the folder is in use, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        path = self.folder / ".lock"
        while self._file is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = path.open("a+")
            except OSError as error:
                raise MachineError(
                    f"{self.folder}: cannot be written ({error.strerror})", remedy="choose another output_dir"
                ) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise MachineError(
                    f"{self.folder} is in use by process {holder}", remedy="wait for it, or choose another output_dir"
                ) from error
            try:
                is_in_place = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                is_in_place = False
            if is_in_place:
                self._file = file
            else:  # its holder removed it between our opening and our locking: others would lock another file
                file.close()
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class JsonLinesWriter:
    """Append-only JSON Lines with a byte offset that a checkpoint can return to.

    Args:
        path: the file; made if it does not exist.
        offset: cut the file back to this many bytes first.

    Raises:
        CheckpointError: the file is shorter than `offset`.
    """

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        self.path = path
        self._file = path.open("ab")
        size = self._file.tell()
        if size < offset:
            self._file.close()
            raise CheckpointError(
                f"{path}: {size:,} bytes, but the checkpoint was written when it had {offset:,}",
                remedy="restore the file, or start again with another output_dir",
            )
        self._file.truncate(offset)
        self._file.seek(offset)

    def append(self, *records: Mapping[str, object]) -> None:
        """Write records, a line each."""
        text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        self._file.write(text.encode("utf-8", "surrogatepass"))

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()

    def sync(self) -> int:
        """Force everything to the disk and return the offset."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.offset

    def close(self) -> None:
        """Flush and close; a full disk at this point was reported before."""
        with contextlib.suppress(OSError):
            self._file.close()
