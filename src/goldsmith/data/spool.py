"""Examples on the disk: written once while rows are read and checked, then read in order, a block at a time.

The file has no name, so that nothing is left of it however the process ends. A block is a header, what is known of its examples
beside their tokens as JSON, their token ids end to end, and their weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from goldsmith.errors import MachineError
from goldsmith.records import DataReport
from goldsmith.types import GoldTurn, TokenizedExample

__all__ = ["ExampleSpool"]

# A block ends at either: what is held of a file is one block while it is written, and one while it is read.
_ROWS_A_BLOCK = 1024
_TOKENS_A_BLOCK = 1 << 18
# Tokens, and bytes of the JSON.
_HEADER = struct.Struct("<qq")


class ExampleSpool:
    """The examples of a data set, in order; in memory are 24 bytes a block of them.

    Attributes:
        num_rows: rows that have an example.
        longest: tokens of the longest example; 0 where there is none.
        report: what became of every row; set by who fills the spool.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """
        Args:
            folder: where there is room for 8 bytes a token and the ids and places of the examples; None: `TMPDIR`, else `/tmp`.

        Raises:
            MachineError: no file can be made there.
        """
        self._folder = folder
        try:
            # Finding one for temporary files fails where none is left that can be written.
            self._folder = Path(tempfile.gettempdir()) if folder is None else folder
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="goldsmith-")  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise self._refused(error) from error
        self.num_rows = self.longest = 0
        self.report = DataReport()
        self._num_examples = 0
        self._digest = hashlib.sha256()
        # Rows that wait for their block to be full, their facts as JSON.
        self._pending: list[tuple[str, Sequence[TokenizedExample]]] = []
        self._pending_tokens = 0
        # Of each block: where it begins in the file, its first example, its first row (of those with an example).
        self._offsets, self._first_examples, self._first_rows = array("q"), array("q"), array("q")
        self._size = self._written_examples = self._written_rows = 0

    def __enter__(self) -> ExampleSpool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the room on the disk back."""
        with suppress(OSError):  # a full disk has been reported by then
            self._file.close()

    def add(self, row_id: str, place: str, examples: Sequence[TokenizedExample]) -> None:
        """Keep the examples of a row; a row without any is remembered by its id.

        Raises:
            MachineError: the disk is full.
        """
        facts = json.dumps([row_id, place, [_facts(example) for example in examples]])
        self._digest.update(f"{facts}\n".encode("ascii"))
        for example in examples:
            self._digest.update(np.ascontiguousarray(example.token_ids, dtype="<i4").data)
            self._digest.update(np.ascontiguousarray(example.target_weights, dtype="<f4").data)
            self.longest = max(self.longest, example.num_tokens)
            self._pending_tokens += example.num_tokens
        self._num_examples += len(examples)
        self.num_rows += bool(examples)
        self._pending.append((facts, examples))
        if len(self._pending) >= _ROWS_A_BLOCK or self._pending_tokens >= _TOKENS_A_BLOCK:
            self._write_block()

    def __len__(self) -> int:
        return self._num_examples

    def fingerprint(self) -> str:
        """SHA-256, in hex, over every row in order: ids, places, weights, token ids; blocks do not matter."""
        return self._digest.hexdigest()

    def numbered(self, first: int = 0) -> Iterator[tuple[int, TokenizedExample]]:
        """The examples from number `first` on, each with the number of its row, which counts rows that have one from 0."""
        self._write_block()
        begin = max(0, bisect_right(self._first_examples, first) - 1)
        for block in range(begin, len(self._offsets)):
            skip = first - self._first_examples[block]
            for place, numbered in enumerate(self._read_block(block)):
                if place >= skip:
                    yield numbered

    def place(self, example_id: str) -> str | None:
        """Where the first row lies that has the id, or a part that has it; reads the file up to there."""
        blocks = (self._facts_of(block)[0] for block in range(len(self._offsets)))
        pending: list[Any] = [json.loads(facts) for facts, _ in self._pending]
        for rows in (*blocks, pending):
            for row_id, place, examples in rows:
                if row_id == example_id or any(known == example_id for known, *_ in examples):
                    return str(place)
        return None

    def _write_block(self) -> None:
        if not self._pending:
            return
        examples = [example for _, own in self._pending for example in own]
        facts = f"[{','.join(facts for facts, _ in self._pending)}]".encode("ascii")
        arrays = [np.ascontiguousarray(example.token_ids, dtype="<i4").tobytes() for example in examples]
        arrays += [np.ascontiguousarray(example.target_weights, dtype="<f4").tobytes() for example in examples]
        block = b"".join([_HEADER.pack(self._pending_tokens, len(facts)), facts, *arrays])
        try:
            self._file.write(block)
            self._file.flush()
        except OSError as error:
            raise self._refused(error) from error
        self._offsets.append(self._size)
        self._first_examples.append(self._written_examples)
        self._first_rows.append(self._written_rows)
        self._size += len(block)
        self._written_examples, self._written_rows = self._num_examples, self.num_rows
        self._pending, self._pending_tokens = [], 0

    def _facts_of(self, block: int) -> tuple[list[Any], int, int]:
        """The rows of a block, where its arrays begin, its tokens."""
        offset = self._offsets[block]
        num_tokens, num_bytes = _HEADER.unpack(self._read(offset, _HEADER.size))
        rows: list[Any] = json.loads(self._read(offset + _HEADER.size, num_bytes))
        return rows, offset + _HEADER.size + num_bytes, num_tokens

    def _read_block(self, block: int) -> Iterator[tuple[int, TokenizedExample]]:
        rows, offset, num_tokens = self._facts_of(block)
        arrays = self._read(offset, 8 * num_tokens)
        token_ids = np.frombuffer(arrays, dtype="<i4", count=num_tokens)
        target_weights = np.frombuffer(arrays, dtype="<f4", offset=4 * num_tokens)
        number, begin = self._first_rows[block], 0
        for _, place, examples in rows:
            for example_id, length, weight, num_bytes, turns in examples:
                yield (
                    number,
                    TokenizedExample(
                        token_ids=token_ids[begin : begin + length],
                        target_weights=target_weights[begin : begin + length],
                        example_id=example_id,
                        example_weight=weight,
                        source=place,
                        num_bytes=num_bytes,
                        turns=tuple(GoldTurn(begin=begun, number=turn, role=role) for begun, turn, role in turns),
                    ),
                )
                begin += length
            number += bool(examples)

    def _read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise self._refused(error) from error
        assert len(data) == size, f"{len(data)} bytes of {size} at {offset}"
        return data

    def _refused(self, error: OSError) -> MachineError:
        rows = "the tokenised rows cannot be kept"
        what = rows if self._folder is None else f"{self._folder}: {rows} there"
        return MachineError(
            f"{what} while they are scored: {error.strerror}",
            remedy="free disk space, or name a folder that has more: --output, else TMPDIR",
        )


def _facts(example: TokenizedExample) -> list[Any]:
    turns = [(turn.begin, turn.number, turn.role) for turn in example.turns]
    return [example.example_id, example.num_tokens, example.example_weight, example.num_bytes, turns]
