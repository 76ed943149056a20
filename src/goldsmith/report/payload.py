"""Everything that the page shows, as one small block of bytes.

A thousand examples before and after training have some 300,000 gold tokens with five alternatives each: as JSON 60 MB. Here
they are columns of small whole numbers, each column split into its bytes (all low bytes, then all next ones), so that gzip
finds what is alike:

    gzip( uint32 length of the header | header: JSON | columns )

Texts are in one table, the commonest first, and columns point into it. A log-probability of a gold token is kept to 0.002 nats,
an alternative's to 0.04, an entropy to 0.02; an example's own log P is in the header and exact.
`assets/data.js` is the reader.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from goldsmith.report.calibration import calibration
from goldsmith.report.run_files import RunView
from goldsmith.scoring.files import row_of
from goldsmith.statistics import Interval, bootstrap_ratio, group_totals, paired_bootstrap
from goldsmith.types import TokenScore, TokenScores

__all__ = ["ALTERNATIVE_STEPS", "ENTROPY_STEPS", "LOG_PROB_STEPS", "Side", "build_payload"]

# Whole numbers a nat.
LOG_PROB_STEPS = 500
ALTERNATIVE_STEPS = 25
ENTROPY_STEPS = 50
WEIGHT_STEPS = 1000
_LARGEST = 2**32 - 1

# Codes of an alternative's text: none, the gold token itself, else the entry of the table + 2.
NO_ALTERNATIVE, IS_GOLD, FIRST_ENTRY = 0, 1, 2

_Entry = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class Side:
    """The scores of one model (or of one moment of a run).

    Attributes:
        name: what the page calls it.
        scores: in the order of their file.
        note: what must be known of it, shown beside it.
    """

    name: str
    scores: Sequence[TokenScores]
    note: str = ""


def build_payload(*, title: str, runs: Sequence[RunView], sides: Sequence[Side], max_examples: int) -> bytes:
    """The bytes; the same values give the same bytes.

    Args:
        max_examples: so many examples are shown token by token; sums and calibration are over all.
    """
    order = list(dict.fromkeys(score.example_id for side in sides for score in side.scores))
    shown = order[:max_examples]
    by_id = [{score.example_id: score for score in side.scores} for side in sides]
    known = [[scores.get(example_id) for example_id in shown] for scores in by_id]
    entries = _entry_table(known)
    code = {entry: index for index, entry in enumerate(entries)}

    columns = _Columns()
    header = {
        "title": title,
        "steps_a_nat": {"log_prob": LOG_PROB_STEPS, "alternative": ALTERNATIVE_STEPS, "entropy": ENTROPY_STEPS},
        "runs": [run.to_json() for run in runs],
        "num_examples": len(order),
        "examples": _example_columns(shown, known),
        "texts": [text for _, text in entries],
        "token_ids": [token_id for token_id, _ in entries],
        "sides": [_side(place, sides, known, code, columns) for place in range(len(sides))],
        "pairs": [
            _pair(first, second, by_id) for first in range(len(sides)) for second in range(first + 1, len(sides))
        ],
        "columns": columns.index,
    }
    # Escapes only: half a surrogate pair has no UTF-8.
    text = json.dumps(_finite(header), ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()
    return gzip.compress(len(text).to_bytes(4, "little") + text + columns.data(), compresslevel=9, mtime=0)


class _Columns:
    """Columns of whole numbers >= 0, laid end to end as byte planes."""

    def __init__(self) -> None:
        self.index: list[tuple[int, int]] = []  # (numbers, bytes of each)
        self._parts: list[bytes] = []

    def add(self, values: Sequence[int]) -> int:
        """Its place in the index."""
        try:
            array = np.asarray(values, dtype=np.uint32)
        except OverflowError:  # weights or ranks beyond what the page holds; sums are not made from these
            array = np.asarray([min(value, _LARGEST) for value in values], dtype=np.uint32)
        width = max(1, -(-int(array.max(initial=0)).bit_length() // 8))
        self._parts += [((array >> (8 * plane)) & 0xFF).astype(np.uint8).tobytes() for plane in range(width)]
        self.index.append((len(array), width))
        return len(self.index) - 1

    def data(self) -> bytes:
        """All of them."""
        return b"".join(self._parts)


def _entry_table(known: Sequence[Sequence[TokenScores | None]]) -> list[_Entry]:
    """Every token that is shown, the commonest first."""
    counts: Counter[_Entry] = Counter()
    for scores in known:
        for score in scores:
            for token in (score.tokens if score is not None else None) or ():
                gold = (token.token_id, token.text)
                counts[gold] += 1
                counts.update((entry[0], entry[1]) for entry in token.alternatives or () if entry[0] != token.token_id)
    return sorted(counts, key=lambda entry: (-counts[entry], entry))


def _example_columns(shown: Sequence[str], known: Sequence[Sequence[TokenScores | None]]) -> dict[str, Any]:
    first = [next(score for score in of_example if score is not None) for of_example in zip(*known, strict=True)]
    contexts = [
        next((score.context for score in of_example if score is not None and score.context is not None), None)
        for of_example in zip(*known, strict=True)
    ]
    return {
        "id": shown,
        "source": [score.source for score in first],
        "source_name": [score.source_name or _file_of(score.source) for score in first],
        "num_bytes": [score.num_bytes or None for score in first],
        "context_tokens": [score.context_tokens for score in first],
        "context": contexts,
    }


def _file_of(source: str) -> str:
    """`data/train.jsonl:12` -> `train.jsonl`."""
    path, _, line = source.rpartition(":")
    name = path if path and line.isdigit() else source
    return name.replace("\\", "/").rpartition("/")[2]


def _side(
    place: int,
    sides: Sequence[Side],
    known: Sequence[Sequence[TokenScores | None]],
    code: Mapping[_Entry, int],
    columns: _Columns,
) -> dict[str, Any]:
    side, scores = sides[place], known[place]
    gold: list[int] = []
    gold_from: list[int] = []  # the earlier side whose gold tokens are the same, else this one
    tokens: list[TokenScore] = []
    for example, score in enumerate(scores):
        own = (score.tokens if score is not None else None) or ()
        texts = [(token.token_id, token.text) for token in own]
        source = place
        for earlier in range(place):
            other = known[earlier][example]
            if other is not None and [(t.token_id, t.text) for t in other.tokens or ()] == texts:
                source = earlier
                break
        gold_from.append(source)
        if source == place:
            gold += [code[entry] for entry in texts]
        tokens += own
    return {
        "name": side.name,
        "note": side.note,
        "log_prob": [None if score is None else score.log_prob for score in scores],
        "log_prob_without_context": _or_nothing(
            [None if score is None else score.log_prob_without_context for score in scores]
        ),
        "num_target_tokens": [None if score is None else score.num_target_tokens or None for score in scores],
        "num_tokens": [len((score.tokens if score is not None else None) or ()) for score in scores],
        "gold_from": gold_from,
        "columns": {"gold": columns.add(gold), **_token_columns(tokens, code, columns)},
        "totals": _totals(side.scores),
        "calibration": calibration(side.scores).to_json(),
    }


def _token_columns(
    tokens: Sequence[TokenScore], code: Mapping[_Entry, int], columns: _Columns
) -> dict[str, int | list[int]]:
    """What is known of some token; an unknown value is 0, and known ones are counted from 1."""
    index: dict[str, int | list[int]] = {
        "log_prob": columns.add([_steps(-token.log_prob, LOG_PROB_STEPS) for token in tokens])
    }
    if any(token.weight != 1.0 for token in tokens):
        index["weight"] = columns.add([_steps(token.weight, WEIGHT_STEPS) for token in tokens])
    if any(token.rank is not None for token in tokens):
        index["rank"] = columns.add([token.rank or 0 for token in tokens])
    best = [_best(token) for token in tokens]
    if any(value is not None for value in best):
        index["best"] = columns.add(
            [
                0 if value is None else 1 + _steps(value - token.log_prob, LOG_PROB_STEPS)
                for token, value in zip(tokens, best, strict=True)
            ]
        )
    if any(token.entropy is not None for token in tokens):
        index["entropy"] = columns.add(
            [0 if token.entropy is None else 1 + _steps(token.entropy, ENTROPY_STEPS) for token in tokens]
        )
    most = max((len(token.alternatives or ()) for token in tokens), default=0)
    codes: list[list[int]] = [[] for _ in range(most)]
    gaps: list[list[int]] = [[] for _ in range(most)]
    for token, of_token in zip(tokens, best, strict=True):
        alternatives = token.alternatives or ()
        before = 0
        for slot in range(most):
            if slot >= len(alternatives):
                codes[slot].append(NO_ALTERNATIVE)
                gaps[slot].append(0)
                continue
            token_id, text, log_prob = alternatives[slot]
            codes[slot].append(IS_GOLD if token_id == token.token_id else FIRST_ENTRY + code[token_id, text])
            assert of_token is not None
            below_best = _steps(of_token - log_prob, ALTERNATIVE_STEPS)
            gaps[slot].append(max(0, below_best - before))
            before = max(before, below_best)
    index["alternatives"] = [columns.add(slot) for slot in codes]
    index["gaps"] = [columns.add(slot) for slot in gaps]
    return index


def _best(token: TokenScore) -> float | None:
    if token.best_log_prob is not None:
        return token.best_log_prob
    return token.alternatives[0][2] if token.alternatives else None


def _steps(value: float, steps_a_nat: int) -> int:
    return max(0, round(value * steps_a_nat))


def _or_nothing(values: list[float | None]) -> list[float | None] | None:
    return values if any(value is not None for value in values) else None


def _totals(scores: Sequence[TokenScores]) -> dict[str, Any]:
    """Over all examples: sums, and means with their intervals where the counts are known."""
    rows = [row_of(score) for score in scores]
    places = {row: place for place, row in enumerate(dict.fromkeys(rows))}
    groups = [places[row] for row in rows]
    totals: dict[str, Any] = {"num_examples": len(scores), "log_prob": math.fsum(score.log_prob for score in scores)}
    if not scores:
        return totals
    nll = group_totals(groups, [-score.log_prob for score in scores])
    totals["nll_per_example"] = bootstrap_ratio(nll, group_totals(groups, [1] * len(scores))).to_json()
    tokens = [score.num_target_tokens for score in scores]
    if all(tokens):
        totals["num_target_tokens"] = sum(tokens)
        totals["nll_per_token"] = bootstrap_ratio(nll, group_totals(groups, tokens)).to_json()
    num_bytes = [score.num_bytes for score in scores]
    if all(num_bytes):
        bits = bootstrap_ratio(nll, group_totals(groups, num_bytes)).scaled(1 / math.log(2))
        totals["bits_per_byte"] = bits.to_json()
    return totals


def _pair(first: int, second: int, by_id: Sequence[Mapping[str, TokenScores]]) -> dict[str, Any]:
    """log P under the second minus log P under the first, of every example that both have."""
    both = [example_id for example_id in by_id[first] if example_id in by_id[second]]
    pair: dict[str, Any] = {"sides": [first, second], "num_examples": len(both)}
    if not both:
        return pair
    before = [by_id[first][example_id].log_prob for example_id in both]
    after = [by_id[second][example_id].log_prob for example_id in both]
    labels = [row_of(by_id[first][example_id]) for example_id in both]
    places = {row: place for place, row in enumerate(dict.fromkeys(labels))}
    mean: Interval = paired_bootstrap(after, before, groups=[places[label] for label in labels])
    return {
        **pair,
        "mean": mean.to_json(),
        "higher": sum(b > a for a, b in zip(before, after, strict=True)),
        "lower": sum(b < a for a, b in zip(before, after, strict=True)),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return value
    if isinstance(value, Iterable):
        return [_finite(inner) for inner in value]
    return value
