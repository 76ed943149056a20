"""Decoding: what a model says after a context, greedily or sampled, many contexts at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from goldsmith.errors import DataError, NumericalError

__all__ = ["Generation", "GenerationConfig", "decode_text", "end_token_ids", "generate"]

# Contexts are sorted by length within a window of so many batches, which saves padding.
_WINDOW_BATCHES = 16


class GenerationConfig(BaseModel):
    """How to decode. Nothing is taken from the model's own generation settings, such as a repetition penalty."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(default=256, ge=1, description="Stop after so many tokens, the end token among them.")
    temperature: float = Field(
        default=0.0, ge=0.0, allow_inf_nan=False, description="0: the likeliest token; else sample."
    )
    top_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Sample from the likeliest tokens that hold this much probability."
    )
    seed: int = Field(default=0, ge=0, description="Of the sampling.")
    batch_size: int = Field(default=16, ge=1, description="Contexts that are decoded at once; a memory choice.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What was decoded after one context.

    Attributes:
        index: the place of the context in the input.
        token_ids: without the end token.
        text: the decoded `token_ids`.
        stop_reason: `end` (an end token was chosen) or `length` (out of `max_new_tokens` or of the model's positions).
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    stop_reason: Literal["end", "length"]


def generate(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[Sequence[int] | npt.NDArray[np.int32]],
    config: GenerationConfig,
    *,
    end_ids: Collection[int] | None = None,
) -> Iterator[Generation]:
    """Decode after each context, with a cache, in batches padded on the left; results in the order of contexts.

    Which contexts share a batch changes nothing but rounding: greedy decoding chooses what an argmax without batch and
    cache chooses, unless two tokens are within rounding of each other. A sampled token is the inverse of the
    distribution at a number in [0, 1) that depends on the seed, the place of the context and the step alone.

    Args:
        causal_lm: on its device. While a batch is decoded its attention is the plain one of `transformers` and it is in
            evaluation mode; whenever this generator has handed over, it is as it was.
        tokenizer: decodes the texts.
        contexts: token ids, at least one each, as the training rows' contexts are.
        config: greedy or sampled, and how long.
        end_ids: tokens that end a generation; `end_token_ids(causal_lm, tokenizer)` by default.

    Raises:
        DataError: a context is empty, or fills all the positions that the model has; raised before anything is decoded.
        NumericalError: the model's scores are NaN.
    """
    ends = frozenset(end_token_ids(causal_lm, tokenizer) if end_ids is None else end_ids)
    budgets = _budgets(causal_lm, contexts, config.max_new_tokens)
    return _generate(causal_lm, tokenizer, contexts, config, ends, budgets)


def end_token_ids(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    gold: Iterable[Sequence[int] | npt.NDArray[np.int32]] = (),
) -> tuple[int, ...]:
    """The tokens that end a generation, ascending.

    The tokenizer's end token; those that the model's settings name and that gold ends with, where the tokenizer knows
    them as special. (A configuration's untouched default may name an ordinary token, which must not end anything; and
    a chat template may end its turns with a token that no setting names.)

    Args:
        gold: gold token ids, whose last tokens are looked at.
    """
    special = set(tokenizer.all_special_ids)
    special |= {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    named: set[int] = {int(ids[-1]) for ids in gold if len(ids)}
    for settings in (causal_lm.generation_config, causal_lm.config.get_text_config()):
        value = getattr(settings, "eos_token_id", None)
        named |= set(value if isinstance(value, list | tuple) else [] if value is None else [value])
    ends = named & special
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return tuple(sorted(ends))


def decode_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int] | npt.NDArray[np.int32], end_ids: Collection[int] = ()
) -> str:
    """The text of token ids up to the first of `end_ids`; special tokens before it are shown, not dropped."""
    kept = _until_end([int(token_id) for token_id in token_ids], end_ids)
    return str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _generate(
    causal_lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[Sequence[int] | npt.NDArray[np.int32]],
    config: GenerationConfig,
    ends: frozenset[int],
    budgets: Sequence[int],
) -> Iterator[Generation]:
    window = config.batch_size * _WINDOW_BATCHES
    for first in range(0, len(contexts), window):
        places = range(first, min(first + window, len(contexts)))
        chosen: dict[int, list[int]] = {}
        for batch in _batches(places, contexts, budgets, config.batch_size, may_pad=_may_pad(causal_lm)):
            rows = [[int(token_id) for token_id in contexts[place]] for place in batch]
            decoded = _decode_batch(causal_lm, rows, batch, config, ends, budgets[batch[0]])
            chosen.update(zip(batch, decoded, strict=True))
        for place in places:
            token_ids = chosen.pop(place)
            kept = _until_end(token_ids, ends)
            yield Generation(
                index=place,
                token_ids=tuple(kept),
                text=decode_text(tokenizer, kept),
                stop_reason="end" if len(kept) < len(token_ids) else "length",
            )


def _budgets(
    causal_lm: PreTrainedModel, contexts: Sequence[Sequence[int] | npt.NDArray[np.int32]], max_new_tokens: int
) -> list[int]:
    """How many tokens may follow each context, at most `max_new_tokens`."""
    limit = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    budgets = []
    for index, context in enumerate(contexts):
        if len(context) == 0:
            raise DataError(f"context {index} has no token", remedy="begin with the beginning token, as training does")
        if limit is not None and len(context) >= limit:
            raise DataError(
                f"context {index} has {len(context):,} tokens, the model {limit:,} positions: nothing can follow",
                remedy="leave this row out, or shorten its prompt",
            )
        budgets.append(max_new_tokens if limit is None else min(max_new_tokens, limit - len(context)))
    return budgets


def _batches(
    places: Sequence[int],
    contexts: Sequence[Sequence[int] | npt.NDArray[np.int32]],
    budgets: Sequence[int],
    batch_size: int,
    *,
    may_pad: bool,
) -> Iterator[list[int]]:
    """Places by length, longest first; a batch has one budget, so that no row runs out of positions before it."""

    def kind(place: int) -> tuple[int, int]:
        return budgets[place], 0 if may_pad else len(contexts[place])

    batch: list[int] = []
    for place in sorted(places, key=lambda place: (kind(place), -len(contexts[place]), place)):
        if batch and (len(batch) == batch_size or kind(place) != kind(batch[0])):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _decode_batch(
    causal_lm: Any,
    rows: list[list[int]],
    places: list[int],
    config: GenerationConfig,
    ends: frozenset[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """The new tokens of each row, up to and including its end token where it has one."""
    width = max(map(len, rows))
    # What stands in the padding is never read: the attention mask leaves it out.
    padding = min(ends, default=0)
    input_ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows])
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device = causal_lm.get_input_embeddings().weight.device
    settings = _settings(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=padding,
        use_cache=True,
    )
    processors = LogitsProcessorList([_FiniteScores()])
    if config.temperature > 0:
        uniform = np.stack([_uniform(config.seed, place, max_new_tokens) for place in places])
        processors.append(
            _SeededChoice(uniform, prompt_width=width, temperature=config.temperature, top_p=config.top_p)
        )
    with _plain_decoding(causal_lm):
        output = causal_lm.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=settings,
            logits_processor=processors,
        )
    decoded = []
    for new in output[:, width:].tolist():
        kept = _until_end(new, ends)
        decoded.append(new[: len(kept) + 1])
    return decoded


def _uniform(seed: int, place: int, count: int) -> npt.NDArray[np.float64]:
    """float64 [count] in [0, 1), the same for the same seed and place, whatever `count` is."""
    return np.random.default_rng([seed, place]).random(count)


class _FiniteScores(LogitsProcessor):
    """An argmax over NaN would be token 0, and nobody would know."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores [rows, vocabulary] as they are.

        Raises:
            NumericalError: a row holds NaN, or no finite score at all.
        """
        if bool(torch.isnan(scores).any()) or not bool(torch.isfinite(scores.amax(dim=-1)).all()):
            raise NumericalError(
                "the model's scores for the next token are not finite",
                remedy="compute in float32, and look at the model's weights",
            )
        return scores


class _SeededChoice(LogitsProcessor):
    """Sampling as an argmax: all scores but that of the sampled token become -inf.

    Args:
        uniform: float64 [rows, steps] in [0, 1).
        prompt_width: tokens before the first step, padding included.
        temperature: > 0; the logits are divided by it.
        top_p: keep the fewest likeliest tokens whose probabilities sum to at least this.
    """

    def __init__(
        self, uniform: npt.NDArray[np.float64], *, prompt_width: int, temperature: float, top_p: float
    ) -> None:
        self.uniform = torch.from_numpy(uniform)
        self.prompt_width = prompt_width
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary] in, 0 for the sampled token and -inf for all others out."""
        uniform_R1 = self.uniform[:, input_ids.shape[1] - self.prompt_width, None].to(scores.device)
        probability_RV = torch.softmax(scores.double() / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered_RV, order_RV = probability_RV.sort(dim=-1, descending=True, stable=True)
            before_RV = ordered_RV.cumsum(dim=-1) - ordered_RV
            ordered_RV = ordered_RV.masked_fill(before_RV >= self.top_p, 0.0)
            probability_RV = torch.zeros_like(probability_RV).scatter(1, order_RV, ordered_RV)
        cumulative_RV = probability_RV.cumsum(dim=-1)
        total_R1 = cumulative_RV[:, -1:].contiguous()
        # Strictly below the total, so that the search ends at a token of positive probability.
        threshold_R1 = torch.minimum(uniform_R1 * total_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
        chosen_R1 = torch.searchsorted(cumulative_RV, threshold_R1, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_R1, 0.0)


def _settings(**values: Any) -> Any:
    untyped: Any = transformers.GenerationConfig
    return untyped(**values)


@contextmanager
def _plain_decoding(causal_lm: Any) -> Iterator[None]:
    """Plain attention, evaluation mode and neutral generation settings; everything as it was afterwards."""
    attention = causal_lm.config._attn_implementation
    own_settings = causal_lm.generation_config
    was_training = [module for module in causal_lm.modules() if module.training]
    try:
        causal_lm.eval()
        # `generate` would fill what is not set from the model's own settings: penalties, suppressed tokens.
        causal_lm.generation_config = _settings()
        causal_lm.set_attn_implementation(_plain_attention(causal_lm))
        yield
    finally:
        causal_lm.set_attn_implementation(attention)
        causal_lm.generation_config = own_settings
        for module in was_training:
            module.training = True


def _plain_attention(causal_lm: Any) -> str:
    """`sdpa`, but `eager` where the attention's scores are soft-capped, which sdpa does not do."""
    is_soft_capped = getattr(causal_lm.config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if is_soft_capped or not causal_lm._supports_sdpa else "sdpa"


def _may_pad(causal_lm: PreTrainedModel) -> bool:
    """Eager attention masks with the lowest float64, which its float32 softmax takes for -inf: padding becomes NaN."""
    return not (_plain_attention(causal_lm) == "eager" and causal_lm.dtype == torch.float64)


def _until_end(token_ids: list[int], ends: Collection[int]) -> list[int]:
    return next((token_ids[:place] for place, token_id in enumerate(token_ids) if token_id in ends), token_ids)
