"""Texts of tokens: so cut that the texts of a run of tokens, joined, are the text of the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from goldsmith.types import TokenizedExample

__all__ = ["TokenTexts", "gold_token_texts", "num_context_tokens"]

Decode = Callable[[tuple[int, ...]], str]


class TokenTexts:
    """A tokenizer's texts, remembered: of the gold tokens of an example, of single tokens, and of a context."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

        @lru_cache(maxsize=65536)
        def decode(token_ids: tuple[int, ...]) -> str:
            text = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return str(text)

        self._decode: Decode = decode
        self._of_token: dict[int, str] = {}

    def of_gold(self, example: TokenizedExample) -> list[str]:
        """See `gold_token_texts`."""
        return gold_token_texts(self._decode, example)

    def of_token(self, token_id: int) -> str:
        """One token by itself; a token that is no whole character has the replacement character."""
        if token_id not in self._of_token:
            # Some decoders drop the space that the first token begins with, so a single token is decoded behind another.
            letters = self._tokenizer("a", add_special_tokens=False)["input_ids"]
            before = tuple(int(letter) for letter in letters[-1:])
            known, whole = self._decode(before), self._decode((*before, token_id))
            text = whole[len(known) :] if whole.startswith(known) else self._decode((token_id,))
            self._of_token[token_id] = text
        return self._of_token[token_id]

    def of_context(self, example: TokenizedExample) -> str:
        """What stands before the first gold token, control tokens included."""
        ids = example.token_ids[: num_context_tokens(example)].tolist()
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


def num_context_tokens(example: TokenizedExample) -> int:
    """How many tokens stand before the first gold one."""
    return int(np.flatnonzero(example.target_weights > 0)[0])


def gold_token_texts(decode: Decode, example: TokenizedExample) -> list[str]:
    """A text for each gold token, so that the texts of a run of gold joined are the text of the run.

    A token that ends within a character has the text "", and the one that completes the character has the whole of it.

    Args:
        decode: from token ids to text.
    """
    gold = np.flatnonzero(example.target_weights > 0)
    texts: list[str] = []
    for run in np.split(gold, np.flatnonzero(np.diff(gold) > 1) + 1):
        texts += _texts_of_run(decode, example.token_ids[run].tolist())
    return texts


def _texts_of_run(decode: Decode, token_ids: list[int]) -> list[str]:
    # A token's text may depend on the token before it (a leading space that decoders drop), so each is decoded
    # together with the tokens since the last one that ended on a whole character.
    texts: list[str] = []
    before, start = 0, 0  # token_ids[before:start] were decoded as whole characters; start is the first not given out
    for end in range(1, len(token_ids) + 1):
        known = decode(tuple(token_ids[before:start]))
        whole = decode(tuple(token_ids[before:end]))
        is_cut = whole.endswith("\N{REPLACEMENT CHARACTER}") and end < len(token_ids)
        if is_cut or not whole.startswith(known):
            texts.append("")
            continue
        texts.append(whole[len(known) :])
        before, start = start, end
    return texts
