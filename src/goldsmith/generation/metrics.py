"""What was generated against the gold: exact matches and edit rates, also where several answers are right."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from goldsmith.errors import DataError
from goldsmith.statistics import Interval, bootstrap_interval, bootstrap_ratio, edit_distance

__all__ = ["ExampleMetrics", "GenerationMetrics", "VariantEdits", "fewest_edits", "measure", "measure_example"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantEdits:
    """The right answer that is nearest: its place, its length in items, and the edits to it."""

    edits: int
    reference_length: int
    variant: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleMetrics:
    """One generation against its gold. `tokens` is None where no tokenizer was given."""

    is_exact: bool
    characters: VariantEdits
    words: VariantEdits
    tokens: VariantEdits | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationMetrics:
    """Generations against gold, over a data set; intervals are bootstrapped over examples.

    An edit rate is the sum of edits divided by the sum of the reference lengths: one division. It may exceed 1.

    Attributes:
        exact_match: the share of generations that equal a right answer, character for character.
        character_edit_rate: in characters.
        word_edit_rate: in items between whitespace: words, or phones where gold is written as phones.
        token_edit_rate: in tokens; None where no tokenizer was given.
    """

    num_examples: int
    num_exact: int
    exact_match: Interval
    character_edit_rate: Interval
    word_edit_rate: Interval
    token_edit_rate: Interval | None

    def to_json(self) -> dict[str, object]:
        return {
            "num_examples": self.num_examples,
            "num_exact": self.num_exact,
            "exact_match": self.exact_match.to_json(),
            "character_edit_rate": self.character_edit_rate.to_json(),
            "word_edit_rate": self.word_edit_rate.to_json(),
            "token_edit_rate": None if self.token_edit_rate is None else self.token_edit_rate.to_json(),
        }

    def __str__(self) -> str:
        rates = [("character edit rate", self.character_edit_rate), ("word edit rate", self.word_edit_rate)]
        if self.token_edit_rate is not None:
            rates.append(("token edit rate", self.token_edit_rate))
        lines = [f"exact match          {_percent(self.exact_match)}  ({self.num_exact:,} of {self.num_examples:,})"]
        return "\n".join(lines + [f"{label:<20} {_percent(rate)}" for label, rate in rates])


def fewest_edits(hypothesis: Sequence[Hashable], variants: Sequence[Sequence[Hashable]]) -> VariantEdits:
    """The variant that takes the fewest edits to reach, as in a phone error rate with several right pronunciations.

    Of variants with equally few edits the longest counts, and of those the first: the lowest rate, whatever the order.

    Raises:
        DataError: there is no variant.

    >>> fewest_edits("T AH M EY T OW".split(), ["T AH M AA T OW".split(), "T AH M EY T OW".split()]).edits
    0
    """
    if not variants:
        raise DataError("a generation has no gold to compare with", remedy="give at least one right answer")
    return min(
        (
            VariantEdits(edits=edit_distance(hypothesis, variant), reference_length=len(variant), variant=place)
            for place, variant in enumerate(variants)
        ),
        key=lambda found: (found.edits, -found.reference_length, found.variant),
    )


def measure_example(
    text: str, gold: str | Sequence[str], *, tokenize: Callable[[str], Sequence[Hashable]] | None = None
) -> ExampleMetrics:
    """One generation against one right answer or several.

    Args:
        text: what was generated, without the end token.
        gold: the right answer, or all of them.
        tokenize: from text to tokens, for `tokens`.

    Raises:
        DataError: there is no right answer.
    """
    variants = [gold] if isinstance(gold, str) else list(gold)
    return ExampleMetrics(
        is_exact=text in variants,
        characters=fewest_edits(text, variants),
        words=fewest_edits(text.split(), [variant.split() for variant in variants]),
        tokens=None if tokenize is None else fewest_edits(tokenize(text), [tokenize(variant) for variant in variants]),
    )


def measure(examples: Sequence[ExampleMetrics], *, num_resamples: int = 2000, seed: int = 0) -> GenerationMetrics:
    """The figures of a data set.

    Raises:
        DataError: no example, or gold without a single character, word or token: a rate of nothing is not defined.
    """
    if not examples:
        raise DataError("nothing was generated: there is no rate of no examples")

    def rate(edits: Sequence[VariantEdits]) -> Interval:
        lengths = [found.reference_length for found in edits]
        if not sum(lengths):
            raise DataError("the gold is empty on every example: an edit rate is not defined")
        return bootstrap_ratio([found.edits for found in edits], lengths, num_resamples=num_resamples, seed=seed)

    tokens = [example.tokens for example in examples if example.tokens is not None]
    if tokens and len(tokens) != len(examples):
        raise ValueError(f"{len(tokens)} of {len(examples)} examples were measured in tokens; it must be all or none")
    exact = [float(example.is_exact) for example in examples]
    return GenerationMetrics(
        num_examples=len(examples),
        num_exact=int(sum(exact)),
        exact_match=bootstrap_interval(exact, num_resamples=num_resamples, seed=seed),
        character_edit_rate=rate([example.characters for example in examples]),
        word_edit_rate=rate([example.words for example in examples]),
        token_edit_rate=rate(tokens) if tokens else None,
    )


def _percent(interval: Interval) -> str:
    text = f"{interval.estimate:.2%}"
    if interval.is_known:
        text += f"  ({interval.confidence:.0%} interval {interval.low:.2%} to {interval.high:.2%})"
    return text
