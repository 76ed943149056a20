"""Models on the same gold: two are compared, more are ranked, with every pair tested."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase
from typing import Any, overload

import numpy as np

from goldsmith.errors import ConfigError, DataError
from goldsmith.scoring.compare import TIE_TOLERANCE, Comparison, by_example_id, compare_pair
from goldsmith.scoring.compare_text import plural
from goldsmith.scoring.display import data_frame, html_table, text_table
from goldsmith.scoring.files import row_of, stream_scores
from goldsmith.statistics import Interval, bootstrap_ratios, group_totals, holm, sign_flip_test
from goldsmith.types import TokenScores

__all__ = ["PairTest", "RankedModel", "Ranking", "Scores", "compare", "rank"]

# A score file, or scores in memory.
Scores = str | Path | TokenScores | Iterable[TokenScores]

_SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedModel:
    """One model on the examples that all have scored.

    Attributes:
        log_prob: nats, of all shared gold together.
        log_prob_per_example: nats, with an interval over rows.
        bits_per_byte: None unless all byte counts are known.
        nll_per_token: None unless all token counts are known and all models cut the gold into as many tokens.
    """

    name: str
    log_prob: float
    log_prob_per_example: Interval
    bits_per_byte: Interval | None
    nll_per_token: Interval | None

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "log_prob": self.log_prob,
            "log_prob_per_example": self.log_prob_per_example.to_json(),
            "bits_per_byte": None if self.bits_per_byte is None else self.bits_per_byte.to_json(),
            "nll_per_token": None if self.nll_per_token is None else self.nll_per_token.to_json(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTest:
    """The higher of two against the lower.

    Attributes:
        difference: of log P, `higher` minus `lower`, nats per example, with a paired bootstrap interval.
        p_value: two-sided, of the sign-flip test over rows.
        p_corrected: by Holm, for all pairs together.
    """

    higher: str
    lower: str
    difference: Interval
    p_value: float
    p_corrected: float

    @property
    def is_clear(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.p_corrected < _SIGNIFICANT

    def to_json(self) -> dict[str, object]:
        return {
            "higher": self.higher,
            "lower": self.lower,
            "difference": self.difference.to_json(),
            "p_value": self.p_value,
            "p_corrected": self.p_corrected,
            "is_clear": self.is_clear,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Three models or more on the examples that all have scored. `print` it for the whole story.

    Attributes:
        models: highest likelihood first.
        tests: every pair.
        num_shared: examples that all have scored.
        num_left_out: of each model, examples that some other lacks.
        num_differently_tokenized: shared examples that not all cut into as many tokens.
        notes: what was done to the rows before they were scored, a line each; see `compare_models`.
        rejected: of each model that was scored here the rows that were skipped, by reason.
    """

    models: tuple[RankedModel, ...]
    tests: tuple[PairTest, ...]
    num_shared: int
    num_left_out: Mapping[str, int]
    num_differently_tokenized: int
    notes: tuple[str, ...] = ()
    rejected: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Highest likelihood first."""
        return tuple(model.name for model in self.models)

    def to_json(self) -> dict[str, object]:
        """Every figure."""
        return {
            "notes": list(self.notes),
            "rejected": {name: dict(reasons) for name, reasons in self.rejected.items()},
            "num_shared": self.num_shared,
            "num_left_out": dict(self.num_left_out),
            "num_differently_tokenized": self.num_differently_tokenized,
            "models": [model.to_json() for model in self.models],
            "tests": [test.to_json() for test in self.tests],
        }

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, a row for each model, highest likelihood first.

        Raises:
            ConfigError: pandas is not installed.
        """
        rows: list[dict[str, object]] = []
        for model in self.models:
            row: dict[str, object] = {"name": model.name, "log_prob": model.log_prob}
            for name in ("log_prob_per_example", "bits_per_byte", "nll_per_token"):
                interval: Interval | None = getattr(model, name)
                values = {} if interval is None else interval.to_json()
                row |= {
                    name: values.get("estimate"),
                    f"{name}_low": values.get("low"),
                    f"{name}_high": values.get("high"),
                }
            rows.append(row)
        return data_frame(rows)

    def _repr_html_(self) -> str:
        """Small tables, for a notebook: the examples, the models, the pairs."""
        tables = ([[line] for line in self._row_lines()], self._model_rows(), self._test_rows())
        return "".join(html_table(table) for table in tables)

    def __str__(self) -> str:
        lines = self._row_lines()
        if self.num_differently_tokenized:
            lines.append(
                f"the gold is tokenised differently on {plural(self.num_differently_tokenized, 'example')}: "
                "compared in nats per example and bits per byte, never per token"
            )
        note = "p: sign-flip test of the mean difference, corrected for all pairs by Holm"
        return "\n\n".join(["\n".join(lines), text_table(self._model_rows()), text_table(self._test_rows()), note])

    def _row_lines(self) -> list[str]:
        """How many examples; what was done to the rows, and what is left out."""
        lines = [f"{len(self.models)} models on {plural(self.num_shared, 'example')} of the same gold", *self.notes]
        if left_out := {name: count for name, count in self.num_left_out.items() if count}:
            shown = ", ".join(f"{count:,} of {name}" for name, count in left_out.items())
            lines.append(f"left out, as not all have scored them: {shown}")
        return lines

    def _model_rows(self) -> list[list[str]]:
        shown = [name for name in ("bits_per_byte", "nll_per_token") if getattr(self.models[0], name) is not None]
        rows = [["rank", "log P per example", "", *(name.replace("_", " ") for name in shown)]]
        for place, model in enumerate(self.models, start=1):
            mean = model.log_prob_per_example
            figures = [getattr(model, name).estimate for name in shown]
            rows.append(
                [
                    f"{place}. {model.name}",
                    f"{mean.estimate:,.4f}",
                    f"({mean.low:,.4f} to {mean.high:,.4f})" if mean.is_known else "",
                    *(f"{figure:.4f}" for figure in figures),
                ]
            )
        return rows

    def _test_rows(self) -> list[list[str]]:
        rows = [["pair", "difference", "", "p", "corrected", ""]]
        for test in self.tests:
            interval = test.difference
            rows.append(
                [
                    f"{test.higher} - {test.lower}",
                    f"{interval.estimate:+,.4f}",
                    f"({interval.low:+,.4f} to {interval.high:+,.4f})" if interval.is_known else "",
                    f"{test.p_value:.2g}",
                    f"{test.p_corrected:.2g}",
                    "" if test.is_clear else "not settled",
                ]
            )
        return rows


@overload
def compare(
    a: Scores,
    b: Scores,
    *,
    names: Sequence[str] | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison: ...


@overload
def compare(
    a: Scores,
    b: Scores,
    c: Scores,
    /,
    *more: Scores,
    names: Sequence[str] | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Ranking: ...


def compare(
    a: Scores,
    b: Scores,
    *more: Scores,
    names: Sequence[str] | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison | Ranking:
    """Pair models' scores of the same gold by `example_id`; of more than two, rank them.

    Likelihood is of the whole gold: a model that starts better may still give it less, as here with gold of two tokens.

    >>> from goldsmith import compare, scores_from_probabilities
    >>> a = scores_from_probabilities({"New York": [("New", 0.6), (" York", 0.8)]})
    >>> b = scores_from_probabilities({"New York": [("New", 0.9), (" York", 0.4)]})
    >>> comparison = compare(a, b)
    >>> [round(probability, 4) for probability in comparison.probabilities]
    [0.48, 0.36]
    >>> comparison.higher, comparison.starts
    ('A', (0, 1))

    Args:
        a, b, more: score files, or the scores of one example or of many; what not all of them hold is counted and left out.
        names: what to call them, all different. By default the files' stems where all are files and their stems differ, or
            else their paths; A, B, C, ... otherwise.
        tie_tolerance: a difference of at most this many nats, on an example or in the mean, is a tie.
        num_resamples, seed: of the bootstrap.

    Raises:
        DataError: one of them is empty, holds an example twice or a log-probability that is not finite or above 0, or
            they share no example; a file that cannot be read.
        ConfigError: two names are the same, or not as many as there are scores.
    """
    given = (a, b, *more)
    if names is None:
        names = _names(given)
    if len(names) != len(given) or len(set(names)) < len(names):
        same = next((name for name in names if list(names).count(name) > 1), None)
        seen = f"both are called {same!r}" if same is not None else f"{len(given)} models, but {len(names)} names"
        raise ConfigError(seen, remedy="give each a name of its own" if more else "give them two different names")
    read = [_read(scores) for scores in given]
    if len(read) == 2:
        return compare_pair(
            read[0],
            read[1],
            names=(names[0], names[1]),
            tie_tolerance=tie_tolerance,
            num_resamples=num_resamples,
            seed=seed,
        )
    return rank(dict(zip(names, read, strict=True)), num_resamples=num_resamples, seed=seed)


def rank(scores: Mapping[str, Iterable[TokenScores]], *, num_resamples: int = 2000, seed: int = 0) -> Ranking:
    """Models by the likelihood that each gives to the gold that all have scored; errors as in `compare`.

    Args:
        scores: name -> scores.
    """
    by_id = {name: by_example_id(own, name) for name, own in scores.items()}
    first = next(iter(by_id.values()))
    shared = [example_id for example_id in first if all(example_id in own for own in by_id.values())]
    if not shared:
        counts = ", ".join(f"{len(own):,} ids such as {next(iter(own))!r} of {name}" for name, own in by_id.items())
        raise DataError(
            f"there is no example that all have scored: {counts}",
            remedy="score the same data with every model; ids come from the rows' `id`, else from the file's name",
        )
    shared.sort(key=lambda example_id: (row_of(first[example_id]), example_id))
    number_of_row: dict[tuple[str, str], int] = {}
    rows = np.array([number_of_row.setdefault(row_of(first[one]), len(number_of_row)) for one in shared])
    columns = {name: [own[example_id] for example_id in shared] for name, own in by_id.items()}
    num_other = sum(
        len({counts[place] for counts in _token_counts(columns).values() if counts[place]}) > 1
        for place in range(len(shared))
    )
    models = [
        _ranked(name, own, rows, has_same_tokens=num_other == 0, num_resamples=num_resamples, seed=seed)
        for name, own in columns.items()
    ]
    models.sort(key=lambda model: (-model.log_prob, model.name))
    return Ranking(
        models=tuple(models),
        tests=_tests([model.name for model in models], columns, rows, num_resamples=num_resamples, seed=seed),
        num_shared=len(shared),
        num_left_out={name: len(own) - len(shared) for name, own in by_id.items()},
        num_differently_tokenized=num_other,
    )


def _token_counts(columns: Mapping[str, Sequence[TokenScores]]) -> dict[str, list[int]]:
    return {name: [one.num_target_tokens for one in own] for name, own in columns.items()}


def _ranked(
    name: str, own: Sequence[TokenScores], rows: Any, *, has_same_tokens: bool, num_resamples: int, seed: int
) -> RankedModel:
    log_probs = np.array([one.log_prob for one in own])
    tokens = np.array([one.num_target_tokens for one in own], dtype=np.float64)
    num_bytes = np.array([one.num_bytes for one in own], dtype=np.float64)
    tops, bottoms = [log_probs], [np.ones_like(log_probs)]
    has_tokens, has_bytes = has_same_tokens and bool(tokens.all()), bool(num_bytes.all())
    if has_tokens:
        tops, bottoms = [*tops, -log_probs], [*bottoms, tokens]
    if has_bytes:
        tops, bottoms = [*tops, -log_probs / math.log(2)], [*bottoms, num_bytes]
    intervals = bootstrap_ratios(
        np.stack([group_totals(rows, column) for column in tops], axis=1),
        np.stack([group_totals(rows, column) for column in bottoms], axis=1),
        num_resamples=num_resamples,
        seed=seed,
    )
    return RankedModel(
        name=name,
        log_prob=math.fsum(log_probs.tolist()),
        log_prob_per_example=intervals[0],
        nll_per_token=intervals[1] if has_tokens else None,
        bits_per_byte=intervals[-1] if has_bytes else None,
    )


def _tests(
    names: Sequence[str], columns: Mapping[str, Sequence[TokenScores]], rows: Any, *, num_resamples: int, seed: int
) -> tuple[PairTest, ...]:
    """Every pair, the higher first."""
    totals = {name: group_totals(rows, [one.log_prob for one in own]) for name, own in columns.items()}
    counts = group_totals(rows, np.ones(len(rows)))
    pairs = list(combinations(names, 2))
    differences = [totals[higher] - totals[lower] for higher, lower in pairs]
    intervals = bootstrap_ratios(
        np.stack(differences, axis=1),
        np.stack([counts] * len(pairs), axis=1),
        num_resamples=num_resamples,
        seed=seed,
    )
    p_values = [sign_flip_test(difference, seed=seed) for difference in differences]
    return tuple(
        PairTest(higher=higher, lower=lower, difference=interval, p_value=p_value, p_corrected=corrected)
        for (higher, lower), interval, p_value, corrected in zip(
            pairs, intervals, p_values, holm(p_values), strict=True
        )
    )


def _read(scores: Scores) -> Iterable[TokenScores]:
    """One by one where it is a file."""
    if isinstance(scores, TokenScores):
        return [scores]
    if not isinstance(scores, str | Path):
        return scores
    if Path(scores).is_dir():
        raise ConfigError(
            f"{scores} is a folder, not a score file",
            remedy="score models first, or compare them in one go: goldsmith.compare_models(a, b, data=...)",
        )
    return stream_scores(scores)


def _names(given: Sequence[Scores]) -> list[str]:
    paths = [path for path in given if isinstance(path, str | Path)]
    if len(paths) < len(given):
        return [ascii_uppercase[place] if place < 26 else f"model {place + 1}" for place in range(len(given))]
    stems = [Path(path).stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
