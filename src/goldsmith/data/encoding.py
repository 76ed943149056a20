"""Texts to ids, with control tokens recognised or not, and the character where each token ends."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from goldsmith.data.control_tokens import ControlTokens, Notation

__all__ = ["Encoded", "Encoder"]

_HEADER_LENGTH: Final = 64
_HEADERS_KEPT: Final = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Ids, and for each the characters [begin, end) of the text that its token stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Encoder:
    """Texts to ids, without the tokens that a tokenizer puts around them, never cut or padded.

    A tokenizer of the `tokenizers` library is called directly, as `transformers` does, but without the dictionary it builds a
    text: half the time. It is a copy, so that the caller's keeps its settings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: ControlTokens) -> None:
        self._tokenizer = tokenizer
        self._controls = controls
        self._backend: Tokenizer | None = None
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            # A backend with parts written in Python cannot be copied; then the slower way below gives the same ids.
            with contextlib.suppress(Exception):
                self._backend = _copy(tokenizer.backend_tokenizer.to_str())
        if self._backend is not None:
            self._backend.encode_special_tokens = tokenizer.split_special_tokens
        # Short stretches, such as a turn's header, by notation: (whether the first, text) -> ids.
        self._headers: dict[bool, dict[tuple[bool, str], list[int]]] = {False: {}, True: {}}

    @property
    def has_offsets(self) -> bool:
        return self._backend is not None

    @property
    def can_encode_as_text(self) -> bool:
        """Whether words that spell control tokens of every kind can be kept from becoming those."""
        return self._backend is not None

    def text(self, texts: list[str]) -> list[list[int]]:
        """No control token is recognised: words that spell one are words."""
        if not texts:
            return []
        if self._backend is None:
            return self._slowly(texts, split_special_tokens=True)
        found = [encoding.ids for encoding in self._text_backend.encode_batch_fast(texts, add_special_tokens=False)]
        controls = self._controls.id_set
        again = [index for index, ids in enumerate(found) if not controls.isdisjoint(ids)]
        if again:  # one that is not marked special, or that the model's own vocabulary holds
            for index, encoded in zip(again, self._coded([texts[index] for index in again]), strict=True):
                found[index] = encoded.ids
        return found

    def text_with_offsets(self, texts: list[str]) -> list[Encoded]:
        """As `text`."""
        found = [_encoded(encoding) for encoding in self._text_backend.encode_batch(texts, add_special_tokens=False)]
        controls = self._controls.id_set
        again = [index for index, encoded in enumerate(found) if not controls.isdisjoint(encoded.ids)]
        for index, encoded in zip(again, self._coded([texts[index] for index in again]), strict=True):
            found[index] = encoded
        return found

    def __call__(self, texts: list[str], notation: Notation) -> list[list[int]]:
        """The control tokens of the notation are recognised, and no others."""
        if not texts:
            return []
        if self._backend is None:
            if notation.is_coded:
                raise TypeError("a tokenizer without a tokenizer.json cannot keep control tokens apart")
            return self._slowly(texts, split_special_tokens=False)
        if self._splits_at_control_tokens:
            return self._piecewise(texts, notation)
        if notation.is_coded:
            return [encoded.ids for encoded in self._coded(texts)]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def with_offsets(self, texts: list[str], notation: Notation) -> list[Encoded]:
        """As a call."""
        if self._backend is None:
            raise TypeError("the tokenizer knows no character offsets")
        if notation.is_coded:
            return self._coded(texts)
        return [_encoded(encoding) for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]

    # ------------------------------------------------------------------------------------------------- piece by piece

    def _piecewise(self, texts: list[str], notation: Notation) -> list[list[int]]:
        """What stands between control tokens is encoded once however many texts hold it: a conversation's turns share most.

        A tokenizer does the same: it takes the control tokens out first and encodes the rest stretch by stretch.
        """
        split = [_split(text, notation) for text in texts]
        kept = self._headers[notation.is_coded]
        keys = dict.fromkeys((index == 0, piece) for _, pieces in split for index, piece in enumerate(pieces) if piece)
        known = {key: kept[key] for key in keys if key in kept}
        new = [key for key in keys if key not in known]
        # Behind a control token, as a stretch that is not the first is: some tokenizers mark the first one only.
        name = self._controls.names[0]
        lead = self._controls.code_of(name) if notation.is_coded else name
        backend = self._coded_backend if notation.is_coded else self._backend
        assert backend is not None
        encodings = backend.encode_batch_fast(
            [piece if is_first else lead + piece for is_first, piece in new], add_special_tokens=False
        )
        for (is_first, piece), encoding in zip(new, encodings, strict=True):
            ids = self._own_ids(encoding.ids) if notation.is_coded else encoding.ids
            known[is_first, piece] = ids = ids if is_first else ids[1:]
            if len(piece) <= _HEADER_LENGTH and len(kept) < _HEADERS_KEPT:
                kept[is_first, piece] = ids
        results: list[list[int]] = []
        for controls, pieces in split:
            result: list[int] = []
            for index, piece in enumerate(pieces):
                if index:
                    result.append(controls[index - 1])
                if piece:
                    result.extend(known[index == 0, piece])
            results.append(result)
        return results

    @functools.cached_property
    def _splits_at_control_tokens(self) -> bool:
        """Whether every control token is found in the text as it stands, and takes nothing of what is beside it."""
        if self._backend is None or not self._controls.names or self._tokenizer.split_special_tokens:
            return False
        normalises = self._backend.normalizer is not None
        for token in self._tokenizer.added_tokens_decoder.values():
            is_control = str(token) in self._controls.ids
            if is_control and (token.lstrip or token.rstrip or token.single_word or (token.normalized and normalises)):
                return False
        return True

    # ----------------------------------------------------------------------------------------------------------- coded

    @functools.cached_property
    def _text_backend(self) -> Tokenizer:
        assert self._backend is not None
        backend = _copy(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _coded_backend(self) -> Tokenizer:
        """The same tokenizer, but the name of every control token is its code: so no word of a text can spell one."""
        assert self._backend is not None
        parts = json.loads(self._backend.to_str())
        _rename(parts, {name: self._controls.code_of(name) for name in self._controls.names})
        return _copy(json.dumps(parts))

    @functools.cached_property
    def _id_changes(self) -> dict[int, int]:
        """Ids that the coded tokenizer gives otherwise."""
        changes: dict[int, int] = {}
        for name, index in self._controls.ids.items():
            found = self._coded_backend.token_to_id(self._controls.code_of(name))
            assert found is not None, name
            if found != index:
                changes[found] = index
        return changes

    def _own_ids(self, ids: list[int]) -> list[int]:
        changes = self._id_changes
        return [changes.get(index, index) for index in ids] if changes else ids

    def _coded(self, texts: list[str]) -> list[Encoded]:
        found = [_encoded(encoding) for encoding in self._coded_backend.encode_batch(texts, add_special_tokens=False)]
        return [Encoded(ids=self._own_ids(encoded.ids), offsets=encoded.offsets) for encoded in found]

    def _slowly(self, texts: list[str], *, split_special_tokens: bool) -> list[list[int]]:
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=split_special_tokens,
            truncation=False,
            padding=False,
            verbose=False,
        )
        return [[int(token) for token in ids] for ids in encoded["input_ids"]]


def _copy(text: str) -> Tokenizer:
    backend = Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    # What a post-processor would add is not wanted; and some take the space off a token's offsets.
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return backend


def _encoded(encoding: Any) -> Encoded:
    return Encoded(ids=encoding.ids, offsets=encoding.offsets)


def _split(text: str, notation: Notation) -> tuple[list[int], list[str]]:
    """The ids of the control tokens in a text, and what stands before, between and after them."""
    controls: list[int] = []
    pieces: list[str] = []
    begin = 0
    for found in notation.pattern.finditer(text):
        pieces.append(text[begin : found.start()])
        controls.append(notation.token_id(found.group()))
        begin = found.end()
    pieces.append(text[begin:])
    return controls, pieces


def _rename(parts: dict[str, Any], names: dict[str, str]) -> None:
    """Rename tokens throughout a tokenizer as JSON, keeping ids; merges that would spell a renamed one are dropped."""
    for token in parts["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    parts["post_processor"] = None
    model: dict[str, Any] = parts["model"]
    vocabulary: Sequence[Any] | dict[str, int] = model.get("vocab", {})
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(name, name): index for name, index in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        kept = []
        for merge in model["merges"]:
            left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
            if left not in names and right not in names and left + right not in names:
                kept.append(merge)
        model["merges"] = kept
