"""Tokenizers: loading a published one, or learning a small one from the training rows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from goldsmith.errors import ConfigError, DataError, ModelError

__all__ = [
    "TokenizerConfig",
    "TrainedTokenizerConfig",
    "add_words",
    "beginning_ids",
    "load_tokenizer",
    "train_tokenizer",
    "words_of",
]

BEGINNING: Final = "<s>"
END: Final = "</s>"
UNKNOWN: Final = "<unk>"

_DEFAULT_VOCAB_SIZE: Final = 8192

# Where a tokenizer's configuration lists the added tokens that are words of a text.
_WORDS: Final = "goldsmith_words"


class TrainedTokenizerConfig(BaseModel):
    """A tokenizer learnt from the training rows.

    Every kind puts `<s>` in front of a text by itself and ends gold with `</s>`. Text is neither normalised nor stripped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["character", "byte", "bpe", "unigram", "word"] = Field(
        description="character: one a Unicode character; byte: one a byte; bpe, unigram: pieces of bytes, learnt; "
        "word: one a word between white space (its text comes back with one space between words)"
    )
    vocab_size: int | None = Field(
        default=None,
        ge=4,
        description="tokens in all, special ones included: for bpe and unigram (default 8192), for word (default: all words)",
    )
    completion_split: Literal["none", "whitespace"] = Field(
        default="none",
        description="kind character only. whitespace: what stands between spaces in the completions (phones such as `HH AH L OW`) "
        "is one token each, apart from the characters; a text is read with a space in front, which decoding takes off again",
    )
    special_tokens: tuple[str, ...] = Field(
        default=(),
        description="further control tokens, such as the markers of a chat template; never made by a user's text",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.vocab_size is not None and self.kind in ("character", "byte"):
            raise ValueError(f"vocab_size is for bpe, unigram and word; kind {self.kind} takes what there is")
        least = 256 + 2 + len(self.special_tokens)
        if self.vocab_size is not None and self.kind in ("bpe", "unigram") and self.vocab_size < least:
            raise ValueError(f"vocab_size {self.vocab_size} is below {least}: all bytes and the special tokens")
        if self.completion_split != "none" and self.kind != "character":
            raise ValueError(f"completion_split is for kind character, not {self.kind}")
        if any(not token or token in (BEGINNING, END, UNKNOWN) for token in self.special_tokens):
            raise ValueError(f"special_tokens are further ones: not empty, and none of {BEGINNING} {END} {UNKNOWN}")
        if len(set(self.special_tokens)) != len(self.special_tokens):
            raise ValueError("special_tokens names one twice")
        return self


class TokenizerConfig(BaseModel):
    """Where the tokenizer comes from: by default from the model's own folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: TrainedTokenizerConfig | None = Field(default=None, description="learn one from the training rows")
    path: str | None = Field(default=None, min_length=1, description="another folder or hub id than the model's")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train is not None and self.path is not None:
            raise ValueError("tokenizer.train and tokenizer.path exclude each other; remove one")
        return self


def train_tokenizer(
    config: TrainedTokenizerConfig, texts: Iterable[str], *, gold_texts: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Learn a tokenizer. The same texts in the same order give the same one, but for `unigram`, which is not deterministic.

    `decode(encode(text)) == text` holds for byte, bpe and unigram on any text, for character on any text of learnt characters
    (another is `<unk>`); word joins by one space.

    Args:
        config: what kind.
        texts: what to learn from, such as the prompts. A separator that rendering puts in belongs here too.
        gold_texts: learnt from as well; with `completion_split: whitespace` what stands between spaces in them becomes one token.

    Raises:
        DataError: there is no text to learn from.
        ConfigError: a special token is already an ordinary one.
    """
    if config.kind == "character":
        tokenizer = _character_tokenizer(config, texts, gold_texts)
    elif config.kind == "word":
        tokenizer = _word_tokenizer(config, itertools.chain(texts, gold_texts))
    else:
        tokenizer = _byte_level_tokenizer(config, itertools.chain(texts, gold_texts))
    # Special tokens are added behind the model's own vocabulary, so that no text can spell one.
    has_unknown = config.kind in ("character", "word")
    for token in (BEGINNING, END, *config.special_tokens):
        if tokenizer.token_to_id(token) is not None:
            raise ConfigError(
                f"the special token {token!r} is also an ordinary token of this {config.kind} tokenizer",
                remedy="choose a special token that the texts cannot hold, such as `<|im_start|>`",
            )
    tokenizer.add_special_tokens([*([UNKNOWN] if has_unknown else []), BEGINNING, END, *config.special_tokens])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGINNING} $A",
        pair=f"{BEGINNING} $A $B",
        special_tokens=[(BEGINNING, tokenizer.token_to_id(BEGINNING))],
    )
    specials: dict[str, Any] = {"unk_token": UNKNOWN} if has_unknown else {}
    if config.special_tokens:
        specials["additional_special_tokens"] = list(config.special_tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGINNING,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        **specials,
    )


def _require_text(is_there: object) -> None:
    if not is_there:
        raise DataError("there is no text to learn a tokenizer from", remedy="check data.train")


def _character_tokenizer(config: TrainedTokenizerConfig, texts: Iterable[str], gold_texts: Iterable[str]) -> Tokenizer:
    """A BPE model without merges: what is not in the vocabulary as a whole falls apart into characters."""
    characters: set[str] = set()
    words: set[str] = set()
    for text in texts:
        characters.update(text)
    for text in gold_texts:
        if config.completion_split == "whitespace":
            words.update(word for word in text.split(" ") if word)
        else:
            characters.update(text)
    _require_text(characters or words)
    tokens = sorted(characters | ({" "} if words else set()))
    # A word is known by the space in front of it, so a phone `B` (" B") and a letter `B` are different tokens.
    tokens += [f" {word}" for word in sorted(words)]
    vocabulary = {token: index for index, token in enumerate([UNKNOWN, *tokens])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, fuse_unk=False, ignore_merges=True)
    )
    # Split before every space: each piece is looked up as a whole first. (Without words it only keeps the pieces short.)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    if words:
        tokenizer.normalizer = normalizers.Prepend(" ")
        tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _word_tokenizer(config: TrainedTokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    counts = Counter(word for text in texts for word in text.split())
    _require_text(counts)
    specials = (UNKNOWN, BEGINNING, END, *config.special_tokens)
    # A word that reads like a special token must not become one: it stays unknown.
    ranked = sorted((word for word in counts if word not in specials), key=lambda word: (-counts[word], word))
    if config.vocab_size is not None:
        ranked = ranked[: max(1, config.vocab_size - len(specials))]
    vocabulary = {word: index for index, word in enumerate([UNKNOWN, *ranked])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _byte_level_tokenizer(config: TrainedTokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Over the 256 bytes, each written as a printable character; so any text can be encoded, and comes back as it was."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if config.kind == "byte":
        tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
    size = (config.vocab_size or _DEFAULT_VOCAB_SIZE) - 2 - len(config.special_tokens)
    trainer: trainers.BpeTrainer | trainers.UnigramTrainer
    if config.kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    # Words keep the space before them, and pieces never reach over a word's edge.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    is_empty = True

    def watched() -> Iterator[str]:
        nonlocal is_empty
        for text in texts:
            is_empty = is_empty and not text
            yield text

    tokenizer.train_from_iterator(watched(), trainer=trainer)
    _require_text(not is_empty)
    return tokenizer


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a hub id; no remote code is run.

    Raises:
        ModelError: there is none, it cannot be reached, or its files are damaged.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(
            f"no tokenizer in the folder {path}: neither tokenizer.json nor tokenizer_config.json",
            remedy="copy the tokenizer's files beside the model, or set `tokenizer.path`",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many kinds here, bare `Exception` among them
        raise ModelError(
            f"the tokenizer {path} cannot be loaded: {type(error).__name__}: {str(error).strip()[:400]}",
            remedy="give a folder with tokenizer.json and tokenizer_config.json, or the id of a model on the hub",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"the tokenizer {path} could not be loaded", remedy="set `tokenizer.path` to one that can")
    return tokenizer


def add_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> None:
    """Add tokens that a text may hold, unlike control tokens; which they are is saved with the tokenizer."""
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    if words:
        tokenizer.init_kwargs[_WORDS] = [*tokenizer.init_kwargs.get(_WORDS, ()), *words]


def words_of(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The added tokens that are words of a text, not control tokens."""
    return frozenset(tokenizer.init_kwargs.get(_WORDS, ()))


def beginning_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts in front of a text: nothing, or its beginning token, once.

    Found by encoding, not by believing `add_bos_token`, which many tokenizers carry without heeding it.

    Raises:
        ModelError: the tokenizer changes a text's own ids when it adds special tokens.
    """
    probe = "a"
    plain = _ids(tokenizer, probe, add_special_tokens=False)
    whole = _ids(tokenizer, probe, add_special_tokens=True)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            front = whole[:start]
            # Two rules that both add the beginning token (a post-processor and a flag) still mean one.
            return front[:1] if front and set(front) == {tokenizer.bos_token_id} else front
    raise ModelError(
        f"the tokenizer gives {probe!r} the ids {plain}, but {whole} when it adds its special tokens",
        remedy="set `tokenizer.path` to a tokenizer that only puts tokens in front of a text",
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> list[int]:
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, truncation=False, padding=False, verbose=False)
    return [int(token) for token in encoded["input_ids"]]
