"""Fixtures of the data room: tokenizers learnt once a session."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

# Tests are imported by file, so the module that they share has to be put in reach.
sys.path.append(str(Path(__file__).parent))

from data_examples import learnt, prepending_tokenizer


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return learnt("bpe")


@pytest.fixture(scope="session")
def character() -> PreTrainedTokenizerFast:
    return learnt("character")


@pytest.fixture(scope="session")
def prepending() -> PreTrainedTokenizerFast:
    return prepending_tokenizer()


@pytest.fixture
def template_file(tmp_path: Path) -> Callable[[str], str]:
    """`template_file(text)` -> the path of a jinja file."""

    def write(text: str) -> str:
        path = tmp_path / "template.jinja"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write
