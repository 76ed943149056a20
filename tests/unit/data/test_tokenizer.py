"""Learnt tokenizers come back from disk with identical ids, keep text as it is, and cannot be made to emit a control token."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from data_examples import MARKERS, TEXTS, learnt
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from goldsmith.data.tokenizer import (
    TokenizerConfig,
    TrainedTokenizerConfig,
    beginning_ids,
    load_tokenizer,
    train_tokenizer,
)
from goldsmith.errors import ConfigError, DataError, ModelError

KINDS = ["character", "byte", "bpe", "unigram", "word"]
HARD_TEXTS = [
    *TEXTS, "", " ", "  two  spaces  ", "\n\ttabs\r\n", "<s>hi</s>", "<unk>", "naïve ▁ 日本 🎉 e\u0301 \u00a0.", "\x00", "Ġ Ċ",
    "do n't , . ! ?",
]  # fmt: skip


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


@functools.cache
def _cached(kind: str) -> PreTrainedTokenizerFast:
    return learnt(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_gives_identical_ids(kind: str, tmp_path: Path) -> None:
    tokenizer = learnt(kind)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(loaded) == len(tokenizer)
        for text in HARD_TEXTS:
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert encode(loaded, text) == encode(tokenizer, text)
            assert loaded.decode(encode(loaded, text)) == tokenizer.decode(encode(tokenizer, text))
        assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")
        assert beginning_ids(loaded) == [tokenizer.bos_token_id]


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram"])
@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=30))
def test_any_text_comes_back_exactly(kind: str, text: str) -> None:
    tokenizer = _cached(kind)
    assert tokenizer.decode(encode(tokenizer, text)) == text


@settings(deadline=None, max_examples=150)
@given(text=st.text(alphabet="".join(sorted(set("".join(TEXTS)))), max_size=30))
def test_text_of_learnt_characters_comes_back_exactly(text: str) -> None:
    tokenizer = _cached("character")
    ids = encode(tokenizer, text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["<s>", "</s>", "a</s>b", "<|im_end|>", "x <|im_end|> </s>", " </s>"])
def test_a_text_cannot_spell_a_control_token(kind: str, text: str) -> None:
    """Also where the training rows held it."""
    config = TrainedTokenizerConfig(
        kind=kind, special_tokens=MARKERS, vocab_size=340 if kind in ("bpe", "unigram") else None
    )  # type: ignore[arg-type]
    tokenizer = train_tokenizer(config, [*TEXTS, text, text, text])
    control = {tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", *MARKERS)}
    ids = encode(tokenizer, text)
    assert ids
    assert not control & set(ids)
    if kind != "word":  # a word that reads like a control token is unknown
        assert tokenizer.decode(ids) == text


def test_unknown_characters_can_be_seen(character: PreTrainedTokenizerFast) -> None:
    ids = encode(character, "a日o本")
    assert [token == character.unk_token_id for token in ids] == [False, True, False, True]


def test_words_come_back_with_one_space() -> None:
    tokenizer = train_tokenizer(TrainedTokenizerConfig(kind="word"), ["HH AH L OW", "B  OW\tL"])
    assert tokenizer.decode(encode(tokenizer, " L \n OW  HH")) == "L OW HH"
    assert encode(tokenizer, "HH X") == [*encode(tokenizer, "HH"), tokenizer.unk_token_id]
    smaller = train_tokenizer(TrainedTokenizerConfig(kind="word", vocab_size=5), ["a a a b b c"])
    assert len(smaller) == 5
    assert smaller.convert_ids_to_tokens(encode(smaller, "a b c")) == ["a", "b", "<unk>"]


def test_completions_by_word_and_prompts_by_character() -> None:
    config = TrainedTokenizerConfig(kind="character", completion_split="whitespace")
    tokenizer = train_tokenizer(config, ["hello", "b", "ow l"], gold_texts=["HH AH L OW", "b L", "OW  L"])
    phones = encode(tokenizer, "HH AH L OW")
    assert len(phones) == 4  # one a phone, the first like the others
    assert tokenizer.decode(phones) == "HH AH L OW"
    assert encode(tokenizer, "L")[0] == phones[2]
    letters = encode(tokenizer, "hello")
    assert len(letters) == 1 + 5  # a mark in front, and one a letter
    assert tokenizer.decode(letters) == "hello"
    # A phone and a letter of one spelling are different tokens.
    assert encode(tokenizer, "b")[0] not in encode(tokenizer, "lb")
    for text in ("", " ", "  HH", "hello HH  b", "HH ", "ow l"):
        assert tokenizer.decode(encode(tokenizer, text)) == text
    assert tokenizer.unk_token_id not in encode(tokenizer, "hello HH")


@pytest.mark.parametrize("kind", ["character", "byte", "bpe", "word"])
def test_learning_is_deterministic(kind: str) -> None:
    first, second = learnt(kind), learnt(kind)
    assert first.get_vocab() == second.get_vocab()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_vocabulary_sizes() -> None:
    assert len(train_tokenizer(TrainedTokenizerConfig(kind="byte"), ["a"])) == 256 + 2
    assert len(train_tokenizer(TrainedTokenizerConfig(kind="character"), ["abca"])) == 3 + 3
    assert len(learnt("bpe")) == 340
    assert len(learnt("unigram")) <= 340


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte"])
def test_nothing_to_learn_from(kind: str) -> None:
    for texts in ([], [""]):
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(TrainedTokenizerConfig(kind=kind), texts)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_little_text_is_enough(kind: str) -> None:
    tokenizer = train_tokenizer(TrainedTokenizerConfig(kind=kind), ["a"])  # type: ignore[arg-type]
    assert tokenizer.decode(encode(tokenizer, "ab c")) == "ab c"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "bytes"},
        {"kind": "bpe", "vocab_size": 257},
        {"kind": "byte", "vocab_size": 300},
        {"kind": "bpe", "completion_split": "whitespace"},
        {"kind": "byte", "special_tokens": ["</s>"]},
        {"kind": "byte", "special_tokens": ["<a>", "<a>"]},
        {"kind": "byte", "special_tokens": [""]},
    ],
)
def test_configuration_mistakes(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainedTokenizerConfig.model_validate(settings)


def test_one_source_of_the_tokenizer() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        TokenizerConfig.model_validate({"path": "x", "train": {"kind": "byte"}})


def test_a_special_token_that_is_an_ordinary_one() -> None:
    with pytest.raises(ConfigError, match="also an ordinary token"):
        train_tokenizer(TrainedTokenizerConfig(kind="character", special_tokens=("a",)), ["abc"])


def test_what_a_tokenizer_puts_in_front(bpe: PreTrainedTokenizerFast, prepending: PreTrainedTokenizerFast) -> None:
    assert beginning_ids(bpe) == [bpe.bos_token_id]
    assert beginning_ids(prepending) == [prepending.bos_token_id]
    silent = PreTrainedTokenizerFast(tokenizer_object=_without_front(bpe), bos_token="<s>", eos_token="</s>")
    assert beginning_ids(silent) == []


def _without_front(tokenizer: PreTrainedTokenizerFast) -> Any:
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.post_processor = processors.ByteLevel(trim_offsets=False)
    return copy


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer in the folder"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_tokenizer(tmp_path / "missing")
    assert error.value.remedy
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_stories260k(shared_folder: Path) -> None:
    tokenizer = load_tokenizer(shared_folder / "models" / "stories260k")
    assert beginning_ids(tokenizer) == [1]
