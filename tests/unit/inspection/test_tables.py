"""The table of rows, rows that say the same, and lengths: each against a plain computation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldsmith.inspection import duplicates
from goldsmith.inspection.columns import Columns
from goldsmith.inspection.duplicates import find_in_other, find_repeated, find_same_input, row_hashes
from goldsmith.inspection.lengths import bars_svg, bars_text, summarise
from goldsmith.types import Conversation, Message, TokenizedExample


def table(pairs: list[tuple[int, int]], *, rows_a_block: int = 7) -> Columns:
    columns = Columns({"input": np.uint64, "whole": np.uint64, "bits": np.uint32}, rows_a_block=rows_a_block)
    for given_input, gold in pairs:
        # Spread over all 64 bits, as a hash is.
        given_hash = (given_input + 1) * 0x9E3779B97F4A7C15 % 2**64
        columns.append(input=given_hash, whole=(given_hash ^ (gold + 1) * 0xC2B2AE3D27D4EB4F) % 2**64)
    return columns


PAIRS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), max_size=40)


@settings(deadline=None)
@given(PAIRS, PAIRS, st.sampled_from([1, 64]))
def test_rows_that_say_the_same(pairs: list[tuple[int, int]], others: list[tuple[int, int]], groups: int) -> None:
    columns, other = table(pairs), table(others)
    seen: set[tuple[int, int]] = set()
    repeated = [row for row, pair in enumerate(pairs) if pair in seen or seen.add(pair)]
    golds: dict[int, set[int]] = {}
    for given_input, gold in pairs:
        golds.setdefault(given_input, set()).add(gold)
    before, duplicates._SMALL = duplicates._SMALL, 0 if groups > 1 else 1 << 20
    try:
        assert find_repeated(columns, "whole").tolist() == repeated
        assert find_same_input(columns, given="input", whole="whole").tolist() == [
            row for row, (given_input, _) in enumerate(pairs) if len(golds[given_input]) > 1
        ]
        assert find_in_other(columns, other, "whole").tolist() == [
            row for row, pair in enumerate(pairs) if pair in set(others)
        ]
    finally:
        duplicates._SMALL = before


def test_bits_and_rows_over_the_edges_of_blocks() -> None:
    columns = table([(row, 0) for row in range(20)])
    columns.set_bits("bits", np.array([0, 6, 7, 13, 14, 19]), 4)
    columns.set_bits("bits", np.array([7]), 1)
    assert columns.rows_where("bits", 4, limit=4) == (6, [0, 6, 7, 13])
    assert columns.rows_where("bits", 1, limit=4) == (1, [7])
    assert columns.value("bits", 7) == 5
    assert columns.first_row("input", columns.value("input", 15)) == 15
    assert columns.first_row("input", 1) is None
    assert sum(block.shape[0] for _, block in columns.blocks("input")) == len(columns) == 20


def chat(*contents: str, **fields: object) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[n % 2], content=content) for n, content in enumerate(contents))
    return Conversation(messages=messages, example_id="a", source="b:1", **fields)  # type: ignore[arg-type]


def test_the_hashes_tell_input_from_gold() -> None:
    conversations = [
        chat("ab", "c"), chat("a", "bc"), chat("ab", "d"), chat("ab", "c", "x", "c"), chat("ab", "c", tools=({"name": "f"},)),
        chat("abc", ""), chat("ab\xffc", ""),
    ]  # fmt: skip
    inputs, wholes = zip(*map(row_hashes, conversations), strict=True)
    assert len(set(wholes)) == len(wholes)
    assert inputs[0] == inputs[2]
    assert len(set(inputs)) == len(inputs) - 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000) | st.integers(0, 20), min_size=1, max_size=60))
def test_lengths(lengths: list[int]) -> None:
    found = summarise(Counter(lengths))
    assert found is not None
    assert (found.count, found.total, found.minimum, found.maximum) == (
        len(lengths), sum(lengths), min(lengths), max(lengths),
    )  # fmt: skip
    assert found.mean == pytest.approx(np.mean(lengths))
    for percent, value in found.percentiles.items():
        assert value == np.percentile(lengths, percent, method="inverted_cdf")
    assert sum(bar.count for bar in found.bars) == len(lengths)
    assert 1 <= len(found.bars) <= 16
    assert found.bars[0].low <= min(lengths)
    assert found.bars[-1].high >= max(lengths)
    for bar in found.bars[:-1]:
        assert bar.count == sum(bar.low <= length <= bar.high for length in lengths)
    assert len(bars_text(found.bars)) == bars_svg(found.bars, title="t").count("<rect") == len(found.bars)


def test_no_lengths() -> None:
    assert summarise(Counter()) is None


def test_the_hashes_of_rows_that_came_tokenised() -> None:
    def tokenised(ids: list[int], weights: list[float]) -> TokenizedExample:
        return TokenizedExample(
            token_ids=np.array(ids, np.int32), target_weights=np.array(weights, np.float32),
            example_id="a", example_weight=1.0, source="b:1", num_bytes=1,
        )  # fmt: skip

    rows = [
        tokenised([1, 2, 3, 4], [0, 1, 0, 1]),
        tokenised([1, 2, 3, 5], [0, 1, 0, 1]),
        tokenised([1, 2, 3, 4], [0, 1, 1, 1]),
    ]
    inputs, wholes = zip(*map(row_hashes, rows), strict=True)
    assert inputs[0] == inputs[1] != inputs[2]
    assert len(set(wholes)) == 3
