"""log P(y | x) of gold under a model, example by example, as a stream."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from goldsmith.data.dataset import Dataset
from goldsmith.data.gold_turns import turn_indices
from goldsmith.models.evaluate import GoldStatistics, statistics_of
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.records import DataReport
from goldsmith.scoring.texts import TokenTexts, num_context_tokens
from goldsmith.types import GoldTurn, TokenizedExample, TokenScore, TokenScores

__all__ = [
    "Asked",
    "Examples",
    "GoldTokens",
    "ScoredExample",
    "gold_roles",
    "score_dataset",
    "score_windows",
    "turn_numbers",
    "windows",
    "without_context",
]

# Examples are sorted by length within a window, and an interrupted run goes on from the end of one. In float32 a number may
# depend on the pack by its last digit, so windows depend on the data and the budget alone.
_WINDOW_PACKS = 8
_WINDOW_EXAMPLES = 512

_TURN = re.compile(r"@(\d+)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is to be told of each example beside its sums.

    Attributes:
        tokens: every gold token, with rank, best token and entropy; and the text of the context.
        alternatives: the likeliest tokens at each place, so many.
        without_context: log P of the gold after `beginning` alone.
        beginning: the ids that stand for an empty context.
    """

    tokens: bool = False
    alternatives: int = 0
    without_context: bool = False
    beginning: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldTokens:
    """The gold tokens of an example in order, as the breakdowns need them. Legend: K gold tokens.

    Attributes:
        log_probs: float64 [K].
        is_best: bool [K], no token is likelier.
        turns: int64 [K], the gold turn that each belongs to, from 1.
        roles: role -> bool [K], whether a token is of its words; empty where that is not known.
    """

    log_probs: npt.NDArray[np.float64]
    is_best: npt.NDArray[np.bool_]
    turns: npt.NDArray[np.int64]
    roles: Mapping[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredExample:
    """A row of a score file, and its gold tokens for the sums; `row` is the number of the data's row that it is of."""

    scores: TokenScores
    gold: GoldTokens
    row: int


class Examples(Protocol):
    """What is scored: a `Dataset`, or an `ExampleSpool`, of which only a window is in memory."""

    @property
    def longest(self) -> int: ...

    @property
    def report(self) -> DataReport: ...

    def numbered(self, first: int = 0) -> Iterator[tuple[int, TokenizedExample]]: ...


def score_dataset(
    model: LikelihoodModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Examples,
    *,
    tokens_per_microbatch: int,
    with_tokens: bool = False,
    device: torch.device | str | None = None,
) -> Iterator[TokenScores]:
    """log P(y | x) of every example, in data-set order, as a stream; see `score_windows`."""
    scored = score_windows(
        model,
        TokenTexts(tokenizer),
        dataset,
        Asked(tokens=with_tokens),
        tokens_per_microbatch=tokens_per_microbatch,
        device=device,
    )
    for window in scored:
        for example in window:
            yield example.scores


def score_windows(
    model: LikelihoodModel,
    texts: TokenTexts,
    dataset: Examples,
    asked: Asked,
    *,
    tokens_per_microbatch: int,
    shares_contexts: bool = False,
    first: int = 0,
    device: torch.device | str | None = None,
    note_halved: Callable[[int], None] | None = None,
) -> Iterator[list[ScoredExample]]:
    """log P(y | x) of every example, in data-set order, a window of some hundred at a time.

    `log_prob` is the plain sum, in float64, of the log-probabilities of the gold tokens (weight > 0); weights do not
    enter it. `weighted_log_prob` and `weight_sum` are those of the objective: token weights times the example's. How
    examples are packed changes a number by rounding only.

    Args:
        model, tokens_per_microbatch, device, note_halved: as in `models.evaluate.statistics_of`.
        dataset: the gold; read from `first` on, once.
        texts: of the model's tokenizer.
        asked: what is told of each example.
        shares_contexts: the proof found that this model may carry a shared context once; done where it saves.
        first: begin with this example; where it is the end of a window, all numbers are those of a whole run to the bit.

    Raises:
        NumericalError: a log-probability is not finite.
        OutOfMemoryError: an example by itself does not fit.
    """
    if tokens_per_microbatch < 1:
        raise ValueError(f"tokens_per_microbatch must be at least 1, not {tokens_per_microbatch}")
    names = {file.path: file.name for file in dataset.report.files}
    can_share = shares_contexts and model.shares_contexts(dataset.longest)
    # What fits: windows go on as they began, their packs are cut finer.
    budget = tokens_per_microbatch

    def note(smaller: int) -> None:
        nonlocal budget
        budget = smaller
        if note_halved is not None:
            note_halved(smaller)

    def statistics(examples: list[TokenizedExample], *, top: int, detailed: bool, share: bool) -> list[GoldStatistics]:
        return statistics_of(
            model,
            Dataset(examples),
            range(len(examples)),
            tokens_per_microbatch=budget,
            top=top,
            detailed=detailed,
            shares_contexts=share,
            device=device,
            note_halved=note,
        )

    for window in windows(dataset.numbered(first), tokens_per_microbatch):
        examples = [example for _, example in window]
        found = statistics(examples, top=asked.alternatives, detailed=asked.tokens, share=can_share)
        alone: list[GoldStatistics] | None = None
        if asked.without_context:
            bare = [without_context(example, asked.beginning) for example in examples]
            alone = statistics(bare, top=0, detailed=False, share=False)
        yield [
            _scored(row, example, found[place], texts, asked, names, None if alone is None else alone[place])
            for place, (row, example) in enumerate(window)
        ]


def windows(
    numbered: Iterable[tuple[int, TokenizedExample]], tokens_per_microbatch: int
) -> Iterator[list[tuple[int, TokenizedExample]]]:
    """Stretches within which examples may be sorted by length.

    Each holds at least one, ends at so many examples or at so many packs' worth of tokens, and depends on nothing but the lengths
    from its first example on.
    """
    window: list[tuple[int, TokenizedExample]] = []
    num_tokens = 0
    for row, example in numbered:
        is_full = (
            len(window) == _WINDOW_EXAMPLES or num_tokens + example.num_tokens > _WINDOW_PACKS * tokens_per_microbatch
        )
        if window and is_full:
            yield window
            window, num_tokens = [], 0
        window.append((row, example))
        num_tokens += example.num_tokens
    if window:
        yield window


def without_context(example: TokenizedExample, beginning: tuple[int, ...]) -> TokenizedExample:
    """The example's gold tokens after `beginning` alone; where gold comes in several turns, one after the other."""
    gold = example.target_weights > 0
    return TokenizedExample(
        token_ids=np.concatenate([np.array(beginning, dtype=np.int32), example.token_ids[gold]]),
        target_weights=np.concatenate([np.zeros(len(beginning), dtype=np.float32), example.target_weights[gold]]),
        example_id=example.example_id,
        example_weight=example.example_weight,
        source=example.source,
        num_bytes=example.num_bytes,
    )


def turn_numbers(example: TokenizedExample) -> npt.NDArray[np.int64]:
    """Which gold turn each gold token belongs to, from 1.

    Where the row came tokenised that is not known: then the `@turn` of the id, else stretches of gold are counted.
    """
    gold = np.flatnonzero(example.target_weights > 0)
    if example.turns:
        return np.array([turn.number for turn in example.turns])[turn_indices(example, gold)]
    if (turn := _TURN.search(example.example_id)) is not None:
        return np.full(len(gold), int(turn.group(1)), dtype=np.int64)
    return 1 + np.concatenate([[0], np.cumsum(np.diff(gold) > 1)]).astype(np.int64)


def gold_roles(example: TokenizedExample) -> dict[str, npt.NDArray[np.bool_]]:
    """Of each role which gold tokens are its words; empty where that is not known."""
    roles = [turn.role for turn in example.turns]
    if len(set(roles)) <= 1:
        return {role: np.ones(example.num_target_tokens, dtype=np.bool_) for role in roles[:1]}
    indices = turn_indices(example, np.flatnonzero(example.target_weights > 0))
    return {role: np.array([one == role for one in roles])[indices] for role in dict.fromkeys(roles)}


def _turns_of_gold(example: TokenizedExample) -> tuple[GoldTurn, ...]:
    """The example's turns, their beginnings counted in gold tokens."""
    gold = np.flatnonzero(example.target_weights > 0)
    begins = np.searchsorted(gold, [turn.begin for turn in example.turns]).tolist()
    return tuple(replace(turn, begin=begin) for turn, begin in zip(example.turns, begins, strict=True))


def _scored(
    row: int,
    example: TokenizedExample,
    found: GoldStatistics,
    texts: TokenTexts,
    asked: Asked,
    names: Mapping[str, str],
    alone: GoldStatistics | None,
) -> ScoredExample:
    weights = example.target_weights[example.target_weights > 0].astype(np.float64)
    scores = TokenScores(
        example_id=example.example_id,
        source=example.source,
        source_name=names.get(example.source.rpartition(":")[0], ""),
        log_prob=math.fsum(found.log_probs.tolist()),
        num_target_tokens=len(found.log_probs),
        num_bytes=example.num_bytes,
        weighted_log_prob=example.example_weight * float(np.dot(weights, found.log_probs)),
        weight_sum=example.example_weight * float(weights.sum()),
        context_tokens=num_context_tokens(example),
        context=texts.of_context(example) if asked.tokens else None,
        log_prob_without_context=None if alone is None else math.fsum(alone.log_probs.tolist()),
        tokens=_tokens(example, found, texts) if asked.tokens else None,
        turns=_turns_of_gold(example),
    )
    gold = GoldTokens(
        log_probs=found.log_probs, is_best=found.is_best, turns=turn_numbers(example), roles=gold_roles(example)
    )
    return ScoredExample(scores=scores, gold=gold, row=row)


def _tokens(example: TokenizedExample, found: GoldStatistics, texts: TokenTexts) -> tuple[TokenScore, ...]:
    is_gold = example.target_weights > 0
    count = len(found.log_probs)
    alternatives: list[tuple[tuple[int, str, float], ...] | None] = [None] * count
    if found.top_ids is not None and found.top_log_probs is not None:
        alternatives = [
            tuple(
                (token_id, texts.of_token(token_id), min(log_prob, 0.0))
                for token_id, log_prob in zip(ids, log_probs, strict=True)
            )
            for ids, log_probs in zip(found.top_ids.tolist(), found.top_log_probs.tolist(), strict=True)
        ]
    return tuple(
        TokenScore(
            token_id=token_id,
            text=text,
            log_prob=log_prob,
            weight=weight,
            rank=rank,
            best_log_prob=min(best, 0.0),
            entropy=entropy,
            alternatives=listed,
        )
        for token_id, text, log_prob, weight, rank, best, entropy, listed in zip(
            example.token_ids[is_gold].tolist(),
            texts.of_gold(example),
            found.log_probs.tolist(),
            example.target_weights[is_gold].tolist(),
            [None] * count if found.ranks is None else found.ranks.tolist(),
            found.best_log_probs.tolist(),
            [None] * count if found.entropies is None else found.entropies.tolist(),
            alternatives,
            strict=True,
        )
    )
