"""A table of numbers that grows without being copied: a few bytes a row, in blocks of a fixed size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Columns"]

Array = npt.NDArray[Any]

# A column that grows by copying holds itself twice while it does, and leaves holes behind in the heap. A block is never moved.
_ROWS_A_BLOCK = 1 << 16


class Columns:
    """Named columns of one length.

    >>> table = Columns({"tokens": np.int32})
    >>> table.append(tokens=7)
    0
    >>> table.append(tokens=9)
    1
    >>> len(table), table.value("tokens", 1)
    (2, 9)
    """

    def __init__(self, kinds: Mapping[str, npt.DTypeLike], *, rows_a_block: int = _ROWS_A_BLOCK) -> None:
        """
        Args:
            kinds: the type of each column.
            rows_a_block: rows that are laid down at a time.
        """
        self._kinds = dict(kinds)
        self._rows_a_block = rows_a_block
        self._blocks: list[dict[str, Array]] = []
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    @property
    def bytes_a_row(self) -> int:
        """Of all columns together."""
        return sum(np.dtype(kind).itemsize for kind in self._kinds.values())

    def append(self, **values: int) -> int:
        """Add a row; its number."""
        place = self._num_rows % self._rows_a_block
        if place == 0:
            self._blocks.append({name: np.zeros(self._rows_a_block, dtype=kind) for name, kind in self._kinds.items()})
        block = self._blocks[-1]
        for name, value in values.items():
            block[name][place] = value
        self._num_rows += 1
        return self._num_rows - 1

    def value(self, name: str, row: int) -> int:
        """One number."""
        return int(self._blocks[row // self._rows_a_block][name][row % self._rows_a_block])

    def blocks(self, name: str) -> Iterator[tuple[int, Array]]:
        """The column, block by block: (number of its first row, a view of its values)."""
        for index, block in enumerate(self._blocks):
            first = index * self._rows_a_block
            yield first, block[name][: self._num_rows - first]

    def set_bits(self, name: str, rows: npt.NDArray[np.int64], bits: int) -> None:
        """Or `bits` into the column at `rows`."""
        for first, block in self.blocks(name):
            own = rows[(rows >= first) & (rows < first + block.shape[0])]
            block[own - first] |= block.dtype.type(bits)

    def rows_where(self, name: str, bits: int, *, limit: int) -> tuple[int, list[int]]:
        """How many rows have one of `bits` set, and the first `limit` of them."""
        count = 0
        rows: list[int] = []
        for first, block in self.blocks(name):
            found = np.flatnonzero(block & block.dtype.type(bits))
            count += int(found.shape[0])
            if len(rows) < limit:
                rows.extend((found[: limit - len(rows)] + first).tolist())
        return count, rows

    def first_row(self, name: str, value: int) -> int | None:
        """The first row that has `value`."""
        for first, block in self.blocks(name):
            found = np.flatnonzero(block == block.dtype.type(value))
            if found.shape[0]:
                return first + int(found[0])
        return None
