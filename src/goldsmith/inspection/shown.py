"""An example as it is shown: every token's text with its weight, in runs of equal weight."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from goldsmith.inspection.visible import token_texts, visible
from goldsmith.types import TokenizedExample

__all__ = ["Run", "ShownExample", "ShownToken", "show_example"]


@dataclass(frozen=True, kw_only=True)
class ShownToken:
    """One token; `text` is as the tokenizer has it, and goes through `visible` before it is shown."""

    token_id: int
    text: str
    weight: float

    @property
    def shown(self) -> str:
        """Safe to show; a line of the text ends where it did."""
        return visible(self.text).replace("↵", "↵\n")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Consecutive tokens of one weight; `skipped` tokens of it are not shown after them."""

    weight: float
    tokens: tuple[ShownToken, ...]
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class ShownExample:
    """An example, token by token."""

    example_id: str
    source: str
    example_weight: float
    tokens: tuple[ShownToken, ...]

    def runs(self, *, max_tokens: int) -> list[Run]:
        """All of it where it has at most `max_tokens`; else its ends, and around each change from context to gold."""
        groups = [tuple(run) for _, run in itertools.groupby(self.tokens, key=lambda token: token.weight)]
        if len(self.tokens) <= max_tokens:
            return [Run(weight=group[0].weight, tokens=group) for group in groups]
        room = max(2, max_tokens // len(groups) // 2)
        runs = []
        for group in groups:
            if len(group) <= 2 * room:
                runs.append(Run(weight=group[0].weight, tokens=group))
            else:
                runs.append(Run(weight=group[0].weight, tokens=group[:room], skipped=len(group) - 2 * room))
                runs.append(Run(weight=group[0].weight, tokens=group[-room:]))
        return runs


def show_example(tokenizer: PreTrainedTokenizerBase, example: TokenizedExample) -> ShownExample:
    """The example with the text of its tokens."""
    ids = [int(token) for token in example.token_ids]
    weights = [float(weight) for weight in example.target_weights]
    tokens = zip(ids, token_texts(tokenizer, ids), weights, strict=True)
    return ShownExample(
        example_id=example.example_id,
        source=example.source,
        example_weight=example.example_weight,
        tokens=tuple(ShownToken(token_id=i, text=text, weight=weight) for i, text, weight in tokens),
    )
