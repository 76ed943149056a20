"""What flows between the rooms: frozen dataclasses, keyword-only. Nothing here computes anything but shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Conversation", "GoldTurn", "Message", "PackedBatch", "TokenScore", "TokenScores", "TokenizedExample"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: `user`, `assistant`, `system`, `tool`, ...; a plain prompt is `user`, its completion `assistant`.
        content: the text, exactly as the row had it; empty where an assistant only calls tools.
        weight: the weight of its tokens where the role is trained on.
        spans: weights of stretches of `content`, (begin, end, weight) in characters, ascending, apart from each other; a
            token that touches one takes its weight (the highest of several), in place of the message's.
        name: who speaks, where a role has several; of a tool's answer the tool.
        reasoning: the assistant's thoughts before its content.
        tool_calls: of the assistant, each `{"type": "function", "function": {"name", "arguments"}}` and perhaps an `id`.
        tool_call_id: of a tool's answer.
    """

    role: str
    content: str
    weight: float = 1.0
    spans: tuple[tuple[int, int, float], ...] = ()
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One row of data, whatever its format was.

    Attributes:
        messages: at least one; for a plain row exactly a `user` and an `assistant` message.
        example_id: the row's own `id`, else `source-name:ordinal` (the ordinal counts rows of the source from 0).
        source: where the row lies, `file:line`.
        is_chat: True where the tokenizer's chat template renders it, False for plain prompt/completion.
        example_weight: u_i of the objective, > 0.
        source_name: the name of its source; reports and metrics are broken down by it.
        tools: definitions of the tools that a chat may call, as a server is given them.
    """

    messages: tuple[Message, ...]
    example_id: str
    source: str
    is_chat: bool = False
    example_weight: float = 1.0
    source_name: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldTurn:
    """The gold of one message within an example.

    Attributes:
        begin: position of its first gold token; its gold goes on to where the next turn begins.
        number: of the turns of the row that have gold, from 1; the parts of a row that was split count on.
        role: the message's.
    """

    begin: int
    number: int
    role: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedExample:
    """Token ids with the weight of *predicting* each; built together, never searched for afterwards.

    Attributes:
        token_ids: int32 [T], T >= 2; position 0 is never predicted.
        target_weights: float32 [T], >= 0; 0 is context, and `target_weights[0] == 0`.
        example_id: see `Conversation`; `#part` or `@turn` is appended where a row gives several.
        example_weight: u_i, > 0.
        source: `file:line`.
        num_bytes: UTF-8 length of the gold text without the end token.
        turns: whose words the gold is, ascending, the first at the first gold token; empty where that is not known (a row that
            came tokenised).
    """

    token_ids: npt.NDArray[np.int32]
    target_weights: npt.NDArray[np.float32]
    example_id: str
    example_weight: float
    source: str
    num_bytes: int
    turns: tuple[GoldTurn, ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_target_tokens(self) -> int:
        """How many tokens are gold (weight > 0)."""
        return int(np.count_nonzero(self.target_weights))

    @property
    def weight_sum(self) -> float:
        """W(i), summed in float64."""
        return float(self.target_weights.sum(dtype=np.float64))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Examples laid end to end, no padding. Legend: N tokens, S segments, K gold tokens, E examples of the pack.

    The shift by one has already happened: `target_positions[k]` is the position in the pack whose hidden state predicts
    `target_ids[k]`. Only gold is listed; a context token is never a target.

    Attributes:
        input_ids: int64 [N].
        position_ids: int64 [N], from 0 at each segment (from the parent's length where it has a parent).
        segment_lengths: int64 [S], on the CPU; sums to N.
        segment_parents: int64 [S], on the CPU; -1 for none, else the segment whose tokens come before this one's.
        target_positions: int64 [K], example by example; may repeat where examples share a context.
        target_ids: int64 [K].
        target_weights: float32 [K], > 0.
        target_example: int64 [K], index into `example_indices`, ascending.
        example_indices: the index of each example within its data set, in pack order.
        example_weights: float64 [E], u_i.
        example_weight_sums: float64 [E], W(i) of the *whole* example.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segment_lengths: torch.Tensor
    segment_parents: torch.Tensor
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    target_weights: torch.Tensor
    target_example: torch.Tensor
    example_indices: tuple[int, ...]
    example_weights: torch.Tensor
    example_weight_sums: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_target_tokens(self) -> int:
        return int(self.target_ids.shape[0])

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same pack with its tensors on `device`; the segment table stays on the CPU, where the layout is planned."""
        on_cpu = {"segment_lengths", "segment_parents"}
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            move = isinstance(value, torch.Tensor) and field.name not in on_cpu
            values[field.name] = value.to(device, non_blocking=True) if move else value
        return PackedBatch(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScore:
    """One gold token under a model; what was not asked for, or a file leaves out, is None.

    Attributes:
        log_prob: nats.
        weight: > 0.
        rank: 1 where no token is likelier than the gold one.
        best_log_prob: of the likeliest token.
        entropy: of the model's distribution at this place, nats.
        alternatives: the likeliest tokens, most likely first: (token_id, text, log_prob).
    """

    token_id: int
    text: str
    log_prob: float
    weight: float = 1.0
    rank: int | None = None
    best_log_prob: float | None = None
    entropy: float | None = None
    alternatives: tuple[tuple[int, str, float], ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """log P(y | x) of one example under one model.

    Attributes:
        log_prob: nats; the unweighted sum over gold tokens (weight > 0), the end token among them.
        num_target_tokens: how many gold tokens.
        num_bytes: UTF-8 length of the gold text without the end token.
        tokens: the gold tokens in order; None where they were not asked for.
        source_name: of the source; empty where unknown.
        weighted_log_prob: sum of weight * log_prob over the gold tokens, times the example's own weight, as the objective
            weighs it; None where unknown (then all weights are 1).
        weight_sum: of the gold tokens, times the example's own weight; None likewise.
        context_tokens: how many tokens stand before the first gold token; None where unknown.
        context: their text, where it was asked for.
        log_prob_without_context: of the gold after the beginning token alone, where it was asked for.
        turns: whose words the gold is, as in `TokenizedExample`, but that `begin` counts gold tokens, from 0; empty where unknown.
    """

    example_id: str
    source: str
    log_prob: float
    num_target_tokens: int
    num_bytes: int
    tokens: tuple[TokenScore, ...] | None = None
    source_name: str = ""
    weighted_log_prob: float | None = None
    weight_sum: float | None = None
    context_tokens: int | None = None
    context: str | None = None
    log_prob_without_context: float | None = None
    turns: tuple[GoldTurn, ...] = ()
