"""Tokens as they are shown, in a terminal and on a page: whole, and unable to act on either."""

from __future__ import annotations

import re
import string
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from goldsmith.data.tokenizer import TrainedTokenizerConfig, train_tokenizer
from goldsmith.inspection.findings import Finding, Place
from goldsmith.inspection.page import html_page
from goldsmith.inspection.report import InspectReport
from goldsmith.inspection.shown import ShownExample, ShownToken, show_example
from goldsmith.inspection.survey import RoleShare, Sample, SplitSurvey
from goldsmith.inspection.visible import token_texts, visible
from goldsmith.records import DataReport
from goldsmith.types import TokenizedExample

EVIL = "<script>alert(1)</script>\x1b[31m\u202e{{ 7 * 7 }}[bold]x[/bold]"


@given(st.text())
def test_visible_text_acts_on_nothing(text: str) -> None:
    shown = visible(text)
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\u200b\ufeff\ud800-\udfff]", shown)
    assert not shown.isascii() or shown == text
    shown.encode("utf-8")


@pytest.mark.parametrize("kind", ["bpe", "character", "unigram", "byte"])
def test_the_texts_of_tokens_are_the_text(kind: str) -> None:
    text = " a river  and\n a stone. "
    config = TrainedTokenizerConfig.model_validate(
        {"kind": kind, "vocab_size": None if kind in ("character", "byte") else 400}
    )
    tokenizer = train_tokenizer(config, [text * 3, string.printable])
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, [*ids, 1 << 20][: len(ids)])
    assert "".join(texts) == f"<s>{text}"
    assert len(texts) == len(ids)


def test_a_long_example_is_shown_by_its_ends() -> None:
    weights = [0.0] * 100 + [1.0] * 5 + [0.5] * 100
    tokens = tuple(ShownToken(token_id=n, text="x", weight=weight) for n, weight in enumerate(weights))
    example = ShownExample(example_id="a", source="b:1", example_weight=1.0, tokens=tokens)
    assert [(run.weight, len(run.tokens), run.skipped) for run in example.runs(max_tokens=205)] == [
        (0.0, 100, 0), (1.0, 5, 0), (0.5, 100, 0),
    ]  # fmt: skip
    runs = example.runs(max_tokens=60)
    assert [(run.weight, len(run.tokens), run.skipped) for run in runs] == [
        (0.0, 10, 80), (0.0, 10, 0), (1.0, 5, 0), (0.5, 10, 80), (0.5, 10, 0),
    ]  # fmt: skip
    assert runs[0].tokens[-1].token_id == 9
    assert runs[1].tokens[0].token_id == 90


def report(**fields: Any) -> InspectReport:
    tokens = tuple(
        ShownToken(token_id=n, text=text, weight=weight)
        for n, (text, weight) in enumerate([("<s>", 0), (EVIL, 0), ("gold", 1), (EVIL, 0.5)])
    )
    finding = Finding(
        kind="rejected", level="error", split="train", count=1, meaning="m", remedy="r",
        places=(Place(source=f"{EVIL}:1", detail=EVIL),),
    )  # fmt: skip
    split = SplitSurvey(
        split="train", report=DataReport(rejections={EVIL: [EVIL]}), lengths={}, roles={EVIL: RoleShare()},
        sample=Sample(), first_examples=(), findings=(finding,), bytes_a_row=30,
    )  # fmt: skip
    return InspectReport(
        output_dir=EVIL,
        splits=(split,),
        plan=None,
        measured=None,
        not_measured=EVIL,
        examples=(ShownExample(example_id=EVIL, source=f"{EVIL}:1", example_weight=2.0, tokens=tokens),),
        **fields,
    )


def test_the_terminal_obeys_nothing_of_the_data() -> None:
    console = Console(force_terminal=True, color_system="truecolor", width=4000)
    with console.capture() as captured:
        console.print(report())
    written = captured.get()
    assert "\x1b[31m\u202e" not in written
    assert "\u202e" not in written
    assert "␛[31m‹U+202E›{{ 7 * 7 }}[bold]x[/bold]" in written
    assert "⟦" in written
    assert "⟦0.5: " in re.sub("\x1b\\[[0-9;]*m", "", written)


def test_the_page_obeys_nothing_of_the_data() -> None:
    page = html_page(report())
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "49" not in page.partition("</style>")[2]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;␛[31m‹U+202E›{{ 7 * 7 }}" in page
    assert 'title="id 2, weight 1">gold</span>' in page
    assert '<span class="w">0.5</span>' in page
    assert not re.search(r"(?:src|href)=|@import|url\(", page)


def test_an_example_is_shown_with_its_weights() -> None:
    tokenizer = train_tokenizer(TrainedTokenizerConfig(kind="character"), ["ab"])
    example = TokenizedExample(
        token_ids=np.array([*tokenizer("ab")["input_ids"], 99], np.int32),
        target_weights=np.array([0, 0, 1, 0.5], np.float32),
        example_id="a", example_weight=1.0, source="b:1", num_bytes=1,
    )  # fmt: skip
    shown = show_example(tokenizer, example)
    assert [(token.text, token.weight) for token in shown.tokens] == [("<s>", 0), ("a", 0), ("b", 1), ("<id 99>", 0.5)]


def test_exit_codes() -> None:
    assert report().exit_code == 0
    assert report(strict=True).exit_code == 3
