"""Rows that were rendered beforehand: found in the first rows, counted, and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from goldsmith.data.config import DataConfig, SourceConfig
from goldsmith.data.spelt_controls import spelt_controls

MARKED: dict[str, Any] = {"prompt": "<s>user: hello</s>", "completion": "hi</s>"}
PLAIN: dict[str, Any] = {"prompt": "hello", "completion": "hi"}


def test_rows_and_tokens_are_counted(bpe: PreTrainedTokenizerFast) -> None:
    [found] = spelt_controls([MARKED, PLAIN, MARKED], config=DataConfig(), tokenizer=bpe)
    assert (found.source, found.num_rows, found.num_spelling) == ("rows", 3, 2)
    assert found.tokens == {"</s>": 2, "<s>": 2}
    assert "rows: 2 of the first 3 rows spell control tokens (</s> in 2, <s> in 2)" in str(found)
    assert spelt_controls([PLAIN], config=DataConfig(), tokenizer=bpe) == []


def test_what_is_allowed_is_no_finding(bpe: PreTrainedTokenizerFast) -> None:
    own = [{"prompt": "hello", "completion": "hi</s>"}]
    assert len(spelt_controls(own, config=DataConfig(), tokenizer=bpe)) == 1
    assert spelt_controls(own, config=DataConfig(), tokenizer=bpe, allowed="assistant") == []
    assert len(spelt_controls([MARKED], config=DataConfig(), tokenizer=bpe, allowed="assistant")) == 1
    assert spelt_controls([MARKED], config=DataConfig(), tokenizer=bpe, allowed="all") == []


def test_chats_are_left_to_their_template(bpe: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "</s>"}, {"role": "assistant", "content": "</s>"}]
    assert spelt_controls([{"messages": messages}], config=DataConfig(), tokenizer=bpe) == []


def test_only_the_first_rows_of_each_source_are_read(
    tmp_path: Path, write_rows: Callable[..., Path], bpe: PreTrainedTokenizerFast
) -> None:
    write_rows([PLAIN] * 4 + [MARKED], "late.jsonl")
    write_rows([MARKED, {"prompt": 3}, PLAIN], "early.jsonl")
    sources = [
        SourceConfig(path="late.jsonl"),
        SourceConfig(path="early.jsonl"),
        SourceConfig(path="hf:a/b", split="x"),
    ]
    [found] = spelt_controls(sources, config=DataConfig(train=sources), tokenizer=bpe, base_folder=tmp_path, num_rows=4)
    assert (found.source, found.num_rows, found.num_spelling) == ("early", 2, 1)
