"""Rows that say the same, found by 64-bit hashes of their input and of their input with its gold.

The hashes are gone through in groups by their highest bits, so that what is sorted at a time is a small part of them. Among a
million rows two different texts have one hash once in 37 million data sets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from goldsmith.inspection.columns import Columns
from goldsmith.types import Conversation, Message, TokenizedExample

__all__ = ["find_in_other", "find_repeated", "find_same_input", "row_hashes"]

Rows = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_GROUPS = 64
# So few rows are one group.
_SMALL = 1 << 12


def row_hashes(conversation: Conversation | TokenizedExample) -> tuple[int, int]:
    """(of the input, of input and gold). The gold is the last message of the assistant, the input all that stands before it.

    Of a row that came tokenised they are the last run of gold, and the ids before it.
    """
    if isinstance(conversation, TokenizedExample):
        return _hashes_of_ids(conversation)
    messages = conversation.messages
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=len(messages))
    digest = hashlib.blake2b(digest_size=8)
    if conversation.tools:
        digest.update(json.dumps(conversation.tools, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    for message in messages[:last]:
        digest.update(_bytes_of(message))
    given = int.from_bytes(digest.digest(), "little")
    for message in messages[last:]:
        digest.update(b"\xff")  # no UTF-8 text holds it: input and gold cannot run into each other
        digest.update(_bytes_of(message))
    return given, int.from_bytes(digest.digest(), "little")


def _hashes_of_ids(example: TokenizedExample) -> tuple[int, int]:
    gold = np.flatnonzero(example.target_weights)
    breaks = np.flatnonzero(np.diff(gold) > 1)
    first = int(gold[breaks[-1] + 1] if breaks.size else gold[0])
    digest = hashlib.blake2b(example.token_ids[:first].tobytes(), digest_size=8)
    given = int.from_bytes(digest.digest(), "little")
    digest.update(b"\xff" + example.token_ids[first:].tobytes())
    return given, int.from_bytes(digest.digest(), "little")


def _bytes_of(message: Message) -> bytes:
    parts = [message.role, message.content]
    if message.reasoning is not None or message.tool_calls or message.name is not None:
        calls = json.dumps(message.tool_calls, sort_keys=True, default=str)
        parts += [message.name or "", message.reasoning or "", calls]
    return "\x00".join(parts).encode("utf-8", "surrogatepass") + b"\xfe"


def find_repeated(table: Columns, name: str) -> Rows:
    """Rows whose hash an earlier row has already, ascending."""
    found = []
    for rows, hashes in _groups(table, name):
        order = np.argsort(hashes, kind="stable")  # rows of one hash stay in order
        same = hashes[order][1:] == hashes[order][:-1]
        found.append(rows[order[1:][same]])
    return _sorted(found)


def find_same_input(table: Columns, *, given: str, whole: str) -> Rows:
    """Rows that share their input with a row of another gold, ascending."""
    found = []
    for rows, hashes in _groups(table, given):
        wholes = _take(table, whole, rows)
        order = np.lexsort((wholes, hashes))
        sorted_hashes, sorted_wholes = hashes[order], wholes[order]
        starts = np.flatnonzero(np.concatenate([[True], sorted_hashes[1:] != sorted_hashes[:-1]]))
        ends = np.append(starts[1:], order.shape[0])
        differs = sorted_wholes[starts] != sorted_wholes[ends - 1]
        found.append(rows[order[np.repeat(differs, ends - starts)]])
    return _sorted(found)


def find_in_other(table: Columns, other: Columns, name: str) -> Rows:
    """Rows of `table` whose hash some row of `other` has too, ascending."""
    found = []
    both = zip(_groups(table, name, keep_empty=True), _groups(other, name, keep_empty=True), strict=True)
    for (rows, hashes), (_, others) in both:
        found.append(rows[np.isin(hashes, others)])
    return _sorted(found)


def _groups(table: Columns, name: str, *, keep_empty: bool = False) -> Iterator[tuple[Rows, Hashes]]:
    """Rows and their hashes, group by group; all rows of one hash are in one group."""
    num_groups = 1 if len(table) < _SMALL and not keep_empty else _GROUPS
    shift = np.uint64(58)  # the highest six bits: 64 groups
    for group in range(num_groups):
        rows, hashes = [], []
        for first, block in table.blocks(name):
            places = np.arange(block.shape[0]) if num_groups == 1 else np.flatnonzero(block >> shift == group)
            rows.append((places + first).astype(np.int64))
            hashes.append(block[places])
        if rows and (keep_empty or sum(part.shape[0] for part in rows)):
            yield np.concatenate(rows), np.concatenate(hashes)
        elif keep_empty:
            yield np.zeros(0, np.int64), np.zeros(0, np.uint64)


def _take(table: Columns, name: str, rows: Rows) -> Hashes:
    """The column's values at ascending `rows`."""
    parts = []
    for first, block in table.blocks(name):
        own = rows[(rows >= first) & (rows < first + block.shape[0])]
        parts.append(block[own - first])
    return np.concatenate(parts)


def _sorted(found: list[Rows]) -> Rows:
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)
