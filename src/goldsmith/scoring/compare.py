"""Two models on the same gold, paired: which gives it the higher likelihood, by how much, and where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from goldsmith.errors import ConfigError, DataError
from goldsmith.scoring.files import read_scores, row_of
from goldsmith.statistics import Interval, paired_bootstrap
from goldsmith.types import TokenScore, TokenScores

__all__ = ["Comparison", "PairedExample", "compare", "compare_files", "scores_from_probabilities"]

# Two scores of one model, computed in another batching, differ by rounding; this near, in nats, is a tie.
TIE_TOLERANCE = 1e-4

_SHOWN_TOKENS = 24
_FEW_EXAMPLES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedExample:
    """One example under both models; `difference` is log P under the first minus log P under the second, in nats."""

    a: TokenScores
    b: TokenScores

    @property
    def example_id(self) -> str:
        return self.a.example_id

    @property
    def difference(self) -> float:
        return self.a.log_prob - self.b.log_prob

    @property
    def has_same_tokens(self) -> bool:
        """Whether both list the gold tokens, as many, with no text that is known to differ."""
        if self.a.tokens is None or self.b.tokens is None or len(self.a.tokens) != len(self.b.tokens):
            return False
        return all(map(_may_be_same, self.a.tokens, self.b.tokens))

    @property
    def start_difference(self) -> float | None:
        """The difference on the first gold token alone; None where the first tokens are unknown or not the same."""
        if not self.a.tokens or not self.b.tokens or not _may_be_same(self.a.tokens[0], self.b.tokens[0]):
            return None
        return self.a.tokens[0].log_prob - self.b.tokens[0].log_prob

    @property
    def has_same_length(self) -> bool:
        """False where the two are known to have scored gold of different byte lengths."""
        return not (self.a.num_bytes and self.b.num_bytes) or self.a.num_bytes == self.b.num_bytes

    def to_json(self) -> dict[str, object]:
        return {
            "example_id": self.example_id,
            "source": self.a.source or self.b.source,
            "log_prob": [self.a.log_prob, self.b.log_prob],
            "difference": self.difference,
            "start_difference": self.start_difference,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models on the examples that both have scored. `print` it for the whole story.

    Attributes:
        names: what the two are called.
        pairs: the shared examples, in the order of the first.
        num_only_a, num_only_b: examples that only one of them has, which are left out.
        mean_difference: log P under the first minus log P under the second, nats an example, with a paired bootstrap
            interval over examples (the parts of one row are drawn together).
        tie_tolerance: a difference of at most this many nats is a tie.
        num_resamples, seed: of the interval.
    """

    names: tuple[str, str]
    pairs: tuple[PairedExample, ...]
    num_only_a: int
    num_only_b: int
    mean_difference: Interval
    tie_tolerance: float
    num_resamples: int
    seed: int

    @property
    def num_shared(self) -> int:
        return len(self.pairs)

    @property
    def log_probs(self) -> tuple[float, float]:
        """Total log P of the shared gold under each, in nats."""
        return (math.fsum(pair.a.log_prob for pair in self.pairs), math.fsum(pair.b.log_prob for pair in self.pairs))

    @property
    def probabilities(self) -> tuple[float, float]:
        """P of all the shared gold under each, exp of `log_probs`; 0.0 where it is below the smallest float."""
        a, b = self.log_probs
        return math.exp(a), math.exp(b)

    @property
    def num_target_tokens(self) -> tuple[int, int] | None:
        """Gold tokens of each; None unless all are known."""
        counts = [(pair.a.num_target_tokens, pair.b.num_target_tokens) for pair in self.pairs]
        if not all(a and b for a, b in counts):
            return None
        return sum(a for a, _ in counts), sum(b for _, b in counts)

    @property
    def mean_nll(self) -> tuple[float, float] | None:
        """nll per gold token of each, one division each; None unless all token counts are known."""
        counts = self.num_target_tokens
        if counts is None:
            return None
        a, b = self.log_probs
        return -a / counts[0], -b / counts[1]

    @property
    def bits_per_byte(self) -> tuple[float, float] | None:
        """The measure that does not depend on the tokenizer; None unless all byte counts are known."""
        num_bytes = sum(pair.a.num_bytes for pair in self.pairs), sum(pair.b.num_bytes for pair in self.pairs)
        if not all(pair.a.num_bytes and pair.b.num_bytes for pair in self.pairs):
            return None
        a, b = self.log_probs
        return -a / math.log(2) / num_bytes[0], -b / math.log(2) / num_bytes[1]

    @property
    def num_differently_tokenized(self) -> int:
        """Shared examples whose two token counts are known and differ."""
        counts = ((pair.a.num_target_tokens, pair.b.num_target_tokens) for pair in self.pairs)
        return sum(1 for a, b in counts if a and b and a != b)

    @property
    def higher(self) -> str | None:
        """The name of the one that gives the shared gold the higher likelihood; None for a tie."""
        if abs(self.mean_difference.estimate) <= self.tie_tolerance:
            return None
        return self.names[0] if self.mean_difference.estimate > 0 else self.names[1]

    @property
    def is_clear(self) -> bool | None:
        """Whether the interval of the mean difference leaves out 0; None where one example gives no interval."""
        interval = self.mean_difference
        return interval.low > 0 or interval.high < 0 if interval.is_known else None

    @property
    def wins(self) -> int:
        """Examples on which the first has the higher likelihood."""
        return sum(pair.difference > self.tie_tolerance for pair in self.pairs)

    @property
    def losses(self) -> int:
        """Examples on which the second has the higher likelihood."""
        return sum(pair.difference < -self.tie_tolerance for pair in self.pairs)

    @property
    def ties(self) -> int:
        return self.num_shared - self.wins - self.losses

    @property
    def num_starts_known(self) -> int:
        """Examples whose first gold token is known, and the same, under both."""
        return sum(pair.start_difference is not None for pair in self.pairs)

    @property
    def starts(self) -> tuple[int, int]:
        """On how many examples the first, and the second, gives the first gold token the higher probability."""
        known = [pair.start_difference for pair in self.pairs if pair.start_difference is not None]
        return sum(d > self.tie_tolerance for d in known), sum(d < -self.tie_tolerance for d in known)

    @property
    def comebacks(self) -> tuple[int, int]:
        """On how many examples the first, and the second, wins although the other starts better."""
        tie = self.tie_tolerance
        known = [(pair.start_difference, pair.difference) for pair in self.pairs if pair.start_difference is not None]
        return (
            sum(start < -tie and whole > tie for start, whole in known),
            sum(start > tie and whole < -tie for start, whole in known),
        )

    def largest(self, count: int = 5) -> tuple[tuple[PairedExample, ...], tuple[PairedExample, ...]]:
        """The examples with the largest differences: those the first wins, and those the second wins."""
        ordered = sorted(self.pairs, key=lambda pair: (pair.difference, pair.example_id))
        return (
            tuple(pair for pair in reversed(ordered[-count:]) if pair.difference > self.tie_tolerance),
            tuple(pair for pair in ordered[:count] if pair.difference < -self.tie_tolerance),
        )

    def to_json(self) -> dict[str, object]:
        """Every figure, and the examples with the largest differences; pairs of values are in the order of `names`."""
        for_a, for_b = self.largest()
        return {
            "names": list(self.names),
            "num_shared": self.num_shared,
            "num_only": [self.num_only_a, self.num_only_b],
            "log_prob": list(self.log_probs),
            "num_target_tokens": None if self.num_target_tokens is None else list(self.num_target_tokens),
            "nll_per_token": None if self.mean_nll is None else list(self.mean_nll),
            "bits_per_byte": None if self.bits_per_byte is None else list(self.bits_per_byte),
            "mean_difference": self.mean_difference.to_json(),
            "higher": self.higher,
            "is_clear": self.is_clear,
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "tie_tolerance": self.tie_tolerance,
            "num_starts_known": self.num_starts_known,
            "starts": list(self.starts),
            "comebacks": list(self.comebacks),
            "largest": [[pair.to_json() for pair in for_a], [pair.to_json() for pair in for_b]],
        }

    def __str__(self) -> str:
        return _render(self)


def compare(
    a: TokenScores | Iterable[TokenScores],
    b: TokenScores | Iterable[TokenScores],
    *,
    names: tuple[str, str] = ("A", "B"),
    tie_tolerance: float = TIE_TOLERANCE,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Pair two models' scores of the same gold by `example_id`.

    Likelihood is of the whole gold: a model that starts better may still give it less, as here with gold of two tokens.

    >>> from goldsmith.scoring.compare import compare, scores_from_probabilities
    >>> a = scores_from_probabilities({"New York": [("New", 0.6), (" York", 0.8)]})
    >>> b = scores_from_probabilities({"New York": [("New", 0.9), (" York", 0.4)]})
    >>> comparison = compare(a, b)
    >>> [round(probability, 4) for probability in comparison.probabilities]
    [0.48, 0.36]
    >>> comparison.higher
    'A'

    Args:
        a, b: the scores of one example or of many; what only one of them holds is counted and left out.
        names: what to call them; two different names.
        tie_tolerance: a difference of at most this many nats, on an example or in the mean, is a tie.
        num_resamples, seed: of the paired bootstrap.

    Raises:
        DataError: one of them is empty, holds an example twice or a log-probability that is not finite or above 0, or
            they share no example.
        ConfigError: the two names are the same.
    """
    if names[0] == names[1]:
        raise ConfigError(f"both are called {names[0]!r}", remedy="give them two different names")
    by_id_a, by_id_b = _by_id(a, names[0]), _by_id(b, names[1])
    shared = [example_id for example_id in by_id_a if example_id in by_id_b]
    if not shared:
        raise DataError(
            f"{names[0]} and {names[1]} share no example: {len(by_id_a):,} ids such as {next(iter(by_id_a))!r} against "
            f"{len(by_id_b):,} such as {next(iter(by_id_b))!r}",
            remedy="score the same data with both models; ids come from the rows' `id`, else from the file's name",
        )
    pairs = tuple(PairedExample(a=by_id_a[example_id], b=by_id_b[example_id]) for example_id in shared)
    # The order of the files must not move the interval, so pairs are resampled in the order of their names.
    in_order = sorted(pairs, key=lambda pair: (row_of(pair.a), pair.example_id))
    group_of_row: dict[tuple[str, str], int] = {}
    interval = paired_bootstrap(
        [pair.a.log_prob for pair in in_order],
        [pair.b.log_prob for pair in in_order],
        groups=[group_of_row.setdefault(row_of(pair.a), len(group_of_row)) for pair in in_order],
        num_resamples=num_resamples,
        seed=seed,
    )
    return Comparison(
        names=names,
        pairs=pairs,
        num_only_a=len(by_id_a) - len(shared),
        num_only_b=len(by_id_b) - len(shared),
        mean_difference=interval,
        tie_tolerance=tie_tolerance,
        num_resamples=num_resamples,
        seed=seed,
    )


def compare_files(a: str | Path, b: str | Path, *, names: tuple[str, str] | None = None) -> Comparison:
    """`compare` on two score files, called by their stems where those differ, else by their paths.

    Raises:
        DataError: as `read_scores` and `compare`.
    """
    if names is None:
        names = Path(a).stem, Path(b).stem
        if names[0] == names[1]:
            names = str(a), str(b)
    return compare(read_scores(a), read_scores(b), names=names)


def scores_from_probabilities(
    examples: Mapping[str, Sequence[float | tuple[str, float]]],
) -> tuple[TokenScores, ...]:
    """Scores from the probabilities of gold tokens, for a case worked by hand.

    Args:
        examples: example id -> the probability of each gold token given all before it, or (text, probability) pairs.

    Returns:
        Scores with token id -1 (unknown); bytes are counted where every text is given.

    Raises:
        DataError: no example, no token, or a probability that is not in (0, 1].

    >>> scores_from_probabilities({"New York": [0.6, 0.8]})[0].num_target_tokens
    2
    """
    scores = []
    for example_id, gold in examples.items():
        tokens = []
        for item in gold:
            text, probability = item if isinstance(item, tuple) else ("", item)
            if not 0 < probability <= 1:
                raise DataError(
                    f"{example_id!r}: the probability {probability} is not in (0, 1]",
                    remedy="give probabilities here, not log-probabilities",
                )
            tokens.append(TokenScore(token_id=-1, text=text, log_prob=math.log(probability)))
        if not tokens:
            raise DataError(f"{example_id!r}: no gold token")
        scores.append(
            TokenScores(
                example_id=example_id,
                source="",
                log_prob=math.fsum(token.log_prob for token in tokens),
                num_target_tokens=len(tokens),
                num_bytes=sum(len(t.text.encode()) for t in tokens) if all(t.text for t in tokens) else 0,
                tokens=tuple(tokens),
            )
        )
    if not scores:
        raise DataError("no example was given")
    return tuple(scores)


def _by_id(scores: TokenScores | Iterable[TokenScores], name: str) -> dict[str, TokenScores]:
    by_id: dict[str, TokenScores] = {}
    for score in [scores] if isinstance(scores, TokenScores) else scores:
        if score.example_id in by_id:
            raise DataError(f"{name}: example {score.example_id!r} is scored twice")
        if not math.isfinite(score.log_prob) or score.log_prob > 0:
            raise DataError(f"{name}: example {score.example_id!r}: log_prob is {score.log_prob}, not finite and <= 0")
        by_id[score.example_id] = score
    if not by_id:
        raise DataError(f"{name}: no example was scored")
    return by_id


def _may_be_same(a: TokenScore, b: TokenScore) -> bool:
    return not a.text or not b.text or a.text == b.text


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


def _render(comparison: Comparison) -> str:
    paragraphs = [_heading(comparison)]
    if comparison.num_shared == 1:
        paragraphs += [_table(_rows_of_one(comparison)), _verdict_of_one(comparison)]
    else:
        paragraphs += [
            _table(_rows_of_many(comparison)),
            _counts(comparison),
            *_largest(comparison),
            _verdict_of_many(comparison),
        ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _heading(comparison: Comparison) -> str:
    name_a, name_b = comparison.names
    lines = [f"{name_a} and {name_b} on {_plural(comparison.num_shared, 'example')} of the same gold"]
    if comparison.num_shared == 1:
        lines[0] = f"{name_a} and {name_b} on the gold of {comparison.pairs[0].example_id!r}"
    if comparison.num_only_a or comparison.num_only_b:
        lines.append(
            f"left out: {_plural(comparison.num_only_a, 'example')} only in {name_a}, "
            f"{comparison.num_only_b:,} only in {name_b}"
        )
    num_other_gold = sum(not pair.has_same_length for pair in comparison.pairs)
    if num_other_gold:
        lines.append(f"careful: the gold differs in byte length on {_plural(num_other_gold, 'example')}")
    if comparison.num_differently_tokenized:
        lines.append(
            f"the gold is tokenised differently on {_plural(comparison.num_differently_tokenized, 'example')}: "
            "compare log P or bits per byte, not nll per token"
        )
    return "\n".join(lines)


def _rows_of_one(comparison: Comparison) -> list[list[str]]:
    pair = comparison.pairs[0]
    rows = [["", *comparison.names]]
    if pair.has_same_tokens and pair.a.tokens is not None and pair.b.tokens is not None:
        tokens = list(enumerate(zip(pair.a.tokens, pair.b.tokens, strict=True), start=1))
        if len(tokens) > _SHOWN_TOKENS:
            by_difference = sorted(tokens, key=lambda item: -abs(item[1][0].log_prob - item[1][1].log_prob))
            rows[0][0] = f"the {_SHOWN_TOKENS} of {len(tokens):,} tokens that differ most"
            tokens = sorted(by_difference[:_SHOWN_TOKENS])
        for index, (a, b) in tokens:
            label = f"P(token {index})" + (f"  {a.text or b.text!r}" if a.text or b.text else "")
            rows.append([label, _probability(a.log_prob), _probability(b.log_prob)])
    (log_a, log_b), mean_nll, bits = comparison.log_probs, comparison.mean_nll, comparison.bits_per_byte
    rows.append(["P(gold), their product" if len(rows) > 1 else "P(gold)", _probability(log_a), _probability(log_b)])
    rows.append(["log P(gold)", f"{log_a:.4f}", f"{log_b:.4f}"])
    if mean_nll is not None:
        rows.append(["mean nll per token", f"{mean_nll[0]:.4f}", f"{mean_nll[1]:.4f}"])
    if bits is not None:
        rows.append(["bits per byte", f"{bits[0]:.4f}", f"{bits[1]:.4f}"])
    return rows


def _verdict_of_one(comparison: Comparison) -> str:
    pair, (name_a, name_b) = comparison.pairs[0], comparison.names
    if comparison.higher is None:
        return f"{name_a} and {name_b} give the gold the same likelihood (within {comparison.tie_tolerance:g} nats)."
    factor = _factor(abs(pair.difference))
    sentence = f"{comparison.higher} gives the gold the higher likelihood, {factor} times that of {_other(comparison)}"
    if any(comparison.comebacks) and pair.a.tokens and pair.b.tokens:
        low, high = map(_probability, sorted(tokens[0].log_prob for tokens in (pair.a.tokens, pair.b.tokens)))
        sentence += f", though {_other(comparison)} starts better ({high} against {low} on the first token)"
    return sentence + "."


def _rows_of_many(comparison: Comparison) -> list[list[str]]:
    name_a, name_b = comparison.names
    (log_a, log_b), size = comparison.log_probs, comparison.num_shared
    rows = [["", name_a, name_b, f"{name_a} - {name_b}"]]
    rows.append(["log P, total", f"{log_a:,.2f}", f"{log_b:,.2f}", f"{log_a - log_b:+,.2f}"])
    mean_a, mean_b = log_a / size, log_b / size
    rows.append(["log P per example", f"{mean_a:,.4f}", f"{mean_b:,.4f}", f"{mean_a - mean_b:+,.4f}"])
    for label, values in (("nll per token", comparison.mean_nll), ("bits per byte", comparison.bits_per_byte)):
        if values is not None:
            rows.append([label, f"{values[0]:.4f}", f"{values[1]:.4f}", f"{values[0] - values[1]:+.4f}"])
    counts = comparison.num_target_tokens
    if counts is not None:
        rows.append(["gold tokens", f"{counts[0]:,}", f"{counts[1]:,}", f"{counts[0] - counts[1]:+,}"])
    return rows


def _counts(comparison: Comparison) -> str:
    name_a, name_b = comparison.names
    interval = comparison.mean_difference
    lines = [f"mean difference of log P, {name_a} - {name_b}: {interval.estimate:+.4f} nats per example"]
    if interval.is_known:
        lines[0] += (
            f", {interval.confidence:.0%} interval {interval.low:+.4f} to {interval.high:+.4f}"
            f" (paired bootstrap, {comparison.num_resamples:,} resamples)"
        )
        if comparison.num_shared < _FEW_EXAMPLES:
            lines.append(f"the interval comes from {comparison.num_shared} examples only and is likely too narrow")
    lines.append(
        f"higher likelihood: {name_a} on {comparison.wins:,}, {name_b} on {comparison.losses:,}, "
        f"{_plural(comparison.ties, 'tie')} (within {comparison.tie_tolerance:g} nats)"
    )
    if comparison.num_starts_known:
        (start_a, start_b), (back_a, back_b) = comparison.starts, comparison.comebacks
        of = (
            ""
            if comparison.num_starts_known == comparison.num_shared
            else f" (of {comparison.num_starts_known:,} known)"
        )
        lines.append(f"better first token: {name_a} on {start_a:,}, {name_b} on {start_b:,}{of}")
        lines.append(f"starts worse but wins: {name_a} on {back_a:,}, {name_b} on {back_b:,}")
    return "\n".join(lines)


def _largest(comparison: Comparison) -> list[str]:
    blocks = []
    for name, pairs in zip(comparison.names, comparison.largest(), strict=True):
        if not pairs:
            continue
        rows = [[f"furthest ahead: {name}", *comparison.names, "difference", "on token 1", ""]]
        has_starts = any(pair.start_difference is not None for pair in pairs)
        for pair in pairs:
            start = pair.start_difference
            row = [
                _shortened(pair.example_id),
                f"{pair.a.log_prob:,.4f}",
                f"{pair.b.log_prob:,.4f}",
                f"{pair.difference:+,.4f}",
                "" if start is None else f"{start:+.4f}",
                _shortened(pair.a.source or pair.b.source),
            ]
            rows.append(row)
        if not has_starts:
            rows = [row[:4] + row[5:] for row in rows]
        blocks.append(_table(rows))
    return blocks


def _verdict_of_many(comparison: Comparison) -> str:
    name_a, name_b = comparison.names
    if comparison.higher is None:
        return f"{name_a} and {name_b} give the gold the same likelihood (within {comparison.tie_tolerance:g} nats)."
    sentence = f"{comparison.higher} gives the gold the higher likelihood"
    winner = comparison.names.index(comparison.higher)
    starts = comparison.starts
    if starts[1 - winner] > starts[winner]:
        sentence += f", though {_other(comparison)} starts better on more examples"
    if comparison.is_clear is False:
        sentence += "; the interval holds 0, so these examples do not settle it"
    return sentence + "."


def _other(comparison: Comparison) -> str:
    return comparison.names[1] if comparison.higher == comparison.names[0] else comparison.names[0]


def _table(rows: list[list[str]]) -> str:
    """Rows under a heading row: the first column and columns without a heading to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for column, cell in enumerate(row[1:], start=1):
            is_text = not rows[0][column]
            cells.append(cell.ljust(widths[column]) if is_text else cell.rjust(widths[column]))
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def _probability(log_prob: float) -> str:
    """exp(log_prob) in four digits, also where no float could hold it."""
    if log_prob > -700:
        return f"{math.exp(log_prob):.4g}"
    exponent = math.floor(log_prob / math.log(10))
    return f"{10 ** (log_prob / math.log(10) - exponent):.3f}e{exponent}"


def _factor(nats: float) -> str:
    """exp(nats), a factor above 1."""
    return f"{math.exp(nats):.4g}" if nats < 700 else f"e^{nats:.0f}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _shortened(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
