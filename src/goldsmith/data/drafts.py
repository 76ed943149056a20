"""What plain rows and chats both become before they are examples: ids with the weight of each, or the reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from goldsmith.data.formats.checks import WEIGHT_RANGE, is_weight
from goldsmith.data.rendering_config import RenderingConfig
from goldsmith.data.rows import Rejection
from goldsmith.types import Conversation, GoldTurn

__all__ = ["Draft", "Region", "RejectedError", "no_gold", "token_weights", "turn_weights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """An example but for what its row says of it.

    Attributes:
        example_id: the conversation's, with `@turn` where it was expanded.
        token_ids: context and gold, in order.
        target_weights: float32, one a token; 0 is context.
        num_bytes: UTF-8 length of the gold text without the end token.
        turns: see `TokenizedExample`.
    """

    example_id: str
    token_ids: list[int]
    target_weights: npt.NDArray[np.float32]
    num_bytes: int
    turns: tuple[GoldTurn, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """Characters [begin, end) of a text, and the weight of what touches them."""

    begin: int
    end: int
    weight: float


class RejectedError(Exception):
    """Carries a rejection out of the rendering of one conversation; never leaves this room."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def of(self, conversation: Conversation) -> Rejection:
        return Rejection(source=conversation.source, reason=self.reason, detail=self.detail)


def no_gold(conversation: Conversation) -> Rejection:
    return Rejection(
        source=conversation.source,
        reason="no gold token",
        detail="no token of the row is gold: its weights are 0, or the tokenizer knows no character of the completion",
    )


def token_weights(
    offsets: Sequence[tuple[int, int]], weight: float, regions: Sequence[Region]
) -> npt.NDArray[np.float32]:
    """The weight of each token: that of the regions it touches (the highest of several), else `weight`."""
    weights = np.full(len(offsets), weight, dtype=np.float32)
    if not regions:
        return weights
    for index, (begin, end) in enumerate(offsets):
        touched = [region.weight for region in regions if begin < region.end and region.begin < end]
        if touched:
            weights[index] = max(touched)
    return weights


def turn_weights(
    weights: npt.NDArray[np.float32], config: RenderingConfig, *, has_end: bool, end_weight: float
) -> npt.NDArray[np.float32]:
    """The weights of a turn's gold tokens as the recipe changes them: its first ones, and the one that ends it.

    Args:
        weights: of the turn's gold tokens, without the end.
        has_end: whether one token more ends the turn; the result holds it then.
        end_weight: what that token weighs, if it is trained on.

    Raises:
        RejectedError: a weight becomes so large or small that float32 would lose it.
    """
    end = [end_weight if config.train_on_end_token else 0.0] if has_end else []
    result = np.concatenate([weights, np.array(end, dtype=np.float32)])
    if config.first_tokens:
        gold = np.flatnonzero(result > 0)[: config.first_tokens]
        products = result[gold].astype(np.float64) * config.first_tokens_weight
        if wrong := [weight for weight in products.tolist() if not is_weight(weight)]:
            raise RejectedError(
                "bad weight",
                f"rendering.first_tokens_weight makes a weight of {wrong[0]:g}; a weight is 0, or {WEIGHT_RANGE}",
            )
        result[gold] = products
    return result
