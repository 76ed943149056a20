"""log P(y | x) of gold under a model: example by example, and summed up with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from goldsmith.data.loader import Dataset
from goldsmith.errors import DataError
from goldsmith.models.evaluate import iterate_log_probs
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.scoring.files import row_of
from goldsmith.statistics import Interval, bootstrap_ratio, group_totals
from goldsmith.types import TokenizedExample, TokenScore, TokenScores

__all__ = ["ScoreSummary", "ScoreTally", "gold_token_texts", "score_dataset", "summarize"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSummary:
    """A data set's gold under one model. Intervals are bootstrapped over rows (the parts of a row together).

    Attributes:
        log_prob: nats, of all gold together; the tokens are not weighted.
        nll_per_token: nats; -log_prob / num_target_tokens.
        nll_per_example: nats; -log_prob / num_examples.
        bits_per_byte: -log_prob / ln 2 / num_bytes; None where the bytes are not known.
    """

    num_examples: int
    num_target_tokens: int
    num_bytes: int
    log_prob: float
    nll_per_token: Interval
    nll_per_example: Interval
    bits_per_byte: Interval | None

    @property
    def perplexity(self) -> float:
        """exp(nll_per_token); infinite where no float holds it."""
        return math.exp(self.nll_per_token.estimate) if self.nll_per_token.estimate < 709 else math.inf

    def to_json(self) -> dict[str, object]:
        """Figures only; an infinite perplexity is null."""
        return {
            "num_examples": self.num_examples,
            "num_target_tokens": self.num_target_tokens,
            "num_bytes": self.num_bytes,
            "log_prob": self.log_prob,
            "nll_per_token": self.nll_per_token.to_json(),
            "nll_per_example": self.nll_per_example.to_json(),
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": None if self.bits_per_byte is None else self.bits_per_byte.to_json(),
        }

    def __str__(self) -> str:
        examples = "example" if self.num_examples == 1 else "examples"
        tokens = "token" if self.num_target_tokens == 1 else "tokens"
        lines = [
            f"{self.num_examples:,} {examples}, {self.num_target_tokens:,} gold {tokens}",
            f"log P, total     {self.log_prob:,.4f} nats",
            f"nll per token    {_figure(self.nll_per_token)} nats",
            f"nll per example  {_figure(self.nll_per_example)} nats",
            f"perplexity       {self.perplexity:,.4g} per token",
        ]
        if self.bits_per_byte is not None:
            lines.append(f"bits per byte    {_figure(self.bits_per_byte)}")
        return "\n".join(lines)


class ScoreTally:
    """Sums up scores as they stream by; keeps three numbers an example."""

    def __init__(self) -> None:
        self._log_probs: list[float] = []
        self._num_target_tokens: list[int] = []
        self._num_bytes: list[int] = []
        self._rows: list[int] = []
        self._row_numbers: dict[tuple[str, str], int] = {}

    def add(self, scores: TokenScores) -> None:
        """Count one example."""
        self._log_probs.append(scores.log_prob)
        self._num_target_tokens.append(scores.num_target_tokens)
        self._num_bytes.append(scores.num_bytes)
        self._rows.append(self._row_numbers.setdefault(row_of(scores), len(self._row_numbers)))

    def summary(self, *, num_resamples: int = 2000, seed: int = 0) -> ScoreSummary:
        """The figures so far.

        Raises:
            DataError: nothing was scored, or the number of gold tokens is not known for some example.
        """
        if not self._log_probs:
            raise DataError("nothing was scored: there is no mean of no examples")
        if not all(self._num_target_tokens):
            raise DataError("some examples do not say how many gold tokens they have, so nll per token is not defined")
        nll = group_totals(self._rows, -np.array(self._log_probs))

        def per(counts: Sequence[int]) -> Interval:
            return bootstrap_ratio(nll, group_totals(self._rows, counts), num_resamples=num_resamples, seed=seed)

        return ScoreSummary(
            num_examples=len(self._log_probs),
            num_target_tokens=sum(self._num_target_tokens),
            num_bytes=sum(self._num_bytes),
            log_prob=math.fsum(self._log_probs),
            nll_per_token=per(self._num_target_tokens),
            nll_per_example=per([1] * len(self._log_probs)),
            bits_per_byte=per(self._num_bytes).scaled(1 / math.log(2)) if all(self._num_bytes) else None,
        )


def summarize(scores: Iterable[TokenScores], *, num_resamples: int = 2000, seed: int = 0) -> ScoreSummary:
    """The figures of a finished list of scores; errors as in `ScoreTally.summary`."""
    tally = ScoreTally()
    for score in scores:
        tally.add(score)
    return tally.summary(num_resamples=num_resamples, seed=seed)


def score_dataset(
    model: LikelihoodModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    tokens_per_microbatch: int,
    with_tokens: bool = False,
    device: torch.device | str | None = None,
) -> Iterator[TokenScores]:
    """log P(y | x) of every example, in data-set order, as a stream.

    `log_prob` is the plain sum, in float64, of the log-probabilities of the gold tokens (weight > 0); weights do not
    enter it. How examples are packed changes it by rounding only.

    Args:
        model, dataset, tokens_per_microbatch, device: as in `models.evaluate.iterate_log_probs`.
        tokenizer: gives the texts of tokens.
        with_tokens: list every gold token with its text.

    Raises:
        NumericalError: a log-probability is not finite.
    """
    decode = _cached_decode(tokenizer)
    for index, log_probs in iterate_log_probs(
        model, dataset, tokens_per_microbatch=tokens_per_microbatch, device=device
    ):
        example = dataset[index]
        tokens = None
        if with_tokens:
            is_gold = example.target_weights > 0
            tokens = tuple(
                TokenScore(token_id=token_id, text=text, log_prob=log_prob, weight=weight)
                for token_id, text, log_prob, weight in zip(
                    example.token_ids[is_gold].tolist(),
                    gold_token_texts(decode, example),
                    log_probs.tolist(),
                    example.target_weights[is_gold].tolist(),
                    strict=True,
                )
            )
        yield TokenScores(
            example_id=example.example_id,
            source=example.source,
            log_prob=math.fsum(log_probs.tolist()),
            num_target_tokens=len(log_probs),
            num_bytes=example.num_bytes,
            tokens=tokens,
        )


def gold_token_texts(decode: Callable[[tuple[int, ...]], str], example: TokenizedExample) -> list[str]:
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


def _texts_of_run(decode: Callable[[tuple[int, ...]], str], token_ids: list[int]) -> list[str]:
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


def _cached_decode(tokenizer: PreTrainedTokenizerBase) -> Callable[[tuple[int, ...]], str]:
    @lru_cache(maxsize=65536)
    def decode(token_ids: tuple[int, ...]) -> str:
        text = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    return decode


def _figure(interval: Interval) -> str:
    text = f"{interval.estimate:,.4f}"
    if interval.is_known:
        text += f"  ({interval.confidence:.0%} interval {interval.low:,.4f} to {interval.high:,.4f})"
    return text
