"""Score files: JSON Lines, one example a line, written by `goldsmith score` or by any other tool; or Parquet, the same columns.

    {"example_id", "source", "source_name", "log_prob", "num_target_tokens", "num_bytes", "weighted_log_prob", "weight_sum",
     "context_tokens", "context", "log_prob_without_context", "turns": [[begin, number, role], ...],
     "tokens": [{"token_id", "text", "log_prob", "weight", "rank", "best_log_prob", "entropy",
                 "alternatives": [[token_id, text, log_prob], ...]}]}

A file needs no more than `example_id` and `log_prob`, or `example_id` and `tokens[].log_prob`. What it leaves out is
read as unknown: a count of 0, an empty `source` or `text`, a `token_id` of -1. Gold has at least one token and one
byte, so a count of 0 can mean nothing else.

`turns` says whose words the gold is: a turn's gold begins at gold token `begin` (from 0) and goes on to where the next one begins;
`number` counts the turns of the row that have gold, from 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from goldsmith.errors import DataError
from goldsmith.scoring.parquet import read_parquet_rows
from goldsmith.types import GoldTurn, TokenScore, TokenScores

__all__ = ["read_scores", "row_of", "score_from_json", "score_to_json", "stream_scores"]

# A log-probability that rounding has lifted above 0 by no more than this is read as 0.
_ROUNDING = 1e-6
# `log_prob` and the sum of its tokens may differ by this much, relative to the larger (a file in single precision).
_SUM_TOLERANCE = 1e-3
# What stands for a probability of 0 where a tool has no infinity, such as -1.8e308; sums of such numbers would be infinite.
_NO_LOG_PROB = -1e100
_PART_OF_A_ROW = re.compile(r"[@#]\d+$")
_OPTIONAL = ("weighted_log_prob", "weight_sum", "context_tokens", "context", "log_prob_without_context")
_OPTIONAL_OF_TOKEN = ("rank", "best_log_prob", "entropy")
_REMEDY = "a score row needs `example_id` and `log_prob` in nats (<= 0), or `example_id` and `tokens[].log_prob`"


def score_to_json(scores: TokenScores) -> dict[str, object]:
    """The row of a score file; unknown fields are left out."""
    row: dict[str, object] = {"example_id": scores.example_id}
    if scores.source:
        row["source"] = scores.source
    if scores.source_name:
        row["source_name"] = scores.source_name
    row["log_prob"] = scores.log_prob
    if scores.num_target_tokens:
        row["num_target_tokens"] = scores.num_target_tokens
    if scores.num_bytes:
        row["num_bytes"] = scores.num_bytes
    for name in _OPTIONAL:
        if (value := getattr(scores, name)) is not None:
            row[name] = value
    if scores.turns:
        row["turns"] = [[turn.begin, turn.number, turn.role] for turn in scores.turns]
    if scores.tokens is not None:
        row["tokens"] = [_token_to_json(token) for token in scores.tokens]
    return row


def _token_to_json(token: TokenScore) -> dict[str, object]:
    item: dict[str, object] = {
        "token_id": token.token_id,
        "text": token.text,
        "log_prob": token.log_prob,
        "weight": token.weight,
    }
    for name in _OPTIONAL_OF_TOKEN:
        if (value := getattr(token, name)) is not None:
            item[name] = value
    if token.alternatives is not None:
        item["alternatives"] = [list(alternative) for alternative in token.alternatives]
    return item


def score_from_json(row: object, *, place: str) -> TokenScores:
    """One row of a score file.

    Args:
        row: what the JSON of the line gave.
        place: `file:line`, for the message.

    Raises:
        DataError: naming the place, the field and the value: not an object, a field missing or of another type, a
            log-probability that is not finite or above 0, or tokens that disagree with `log_prob`.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: a JSON object was expected, not {_shown(row)}", remedy=_REMEDY)
    example_id = row.get("example_id")
    if isinstance(example_id, int) and not isinstance(example_id, bool):
        example_id = str(example_id)
    if not isinstance(example_id, str):
        seen = (
            f"is {_shown(example_id)}" if "example_id" in row else f"is missing; the fields are {sorted(map(str, row))}"
        )
        raise DataError(f"{place}: `example_id` {seen}", remedy=_REMEDY)

    tokens = None if row.get("tokens") is None else _tokens(row["tokens"], place=place)
    if row.get("log_prob") is not None:
        log_prob = _log_prob(row["log_prob"], place=place, name="log_prob")
    elif tokens:
        log_prob = math.fsum(token.log_prob for token in tokens)
    else:
        fields = sorted(map(str, row))
        raise DataError(
            f"{place}: `log_prob` is missing and there are no `tokens`; the fields are {fields}", remedy=_REMEDY
        )
    num_target_tokens = _count(row.get("num_target_tokens"), place=place, name="num_target_tokens")
    if tokens is not None:
        total = math.fsum(token.log_prob for token in tokens)
        if abs(total - log_prob) > _SUM_TOLERANCE * max(1.0, abs(total), abs(log_prob)):
            raise DataError(
                f"{place}: `log_prob` is {log_prob} but its {len(tokens)} gold tokens sum to {total}",
                remedy="`log_prob` is the sum over gold tokens (weight > 0), not a mean; `tokens` lists all of them",
            )
        if num_target_tokens not in (0, len(tokens)):
            raise DataError(
                f"{place}: `num_target_tokens` is {num_target_tokens} but {len(tokens)} gold tokens are listed",
                remedy="`tokens` lists every gold token (weight > 0), the end token among them",
            )
        num_target_tokens = len(tokens)
    texts = {name: row.get(name) for name in ("source", "source_name", "context")}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise DataError(f"{place}: `{name}` is {_shown(text)}, not text")
    without_context = row.get("log_prob_without_context")
    return TokenScores(
        example_id=example_id,
        source=texts["source"] or "",
        source_name=texts["source_name"] or "",
        weighted_log_prob=_number(row.get("weighted_log_prob"), place=place, name="weighted_log_prob"),
        weight_sum=_number(row.get("weight_sum"), place=place, name="weight_sum"),
        context_tokens=None
        if row.get("context_tokens") is None
        else _count(row["context_tokens"], place=place, name="context_tokens"),
        context=texts["context"],
        log_prob_without_context=None
        if without_context is None
        else _log_prob(without_context, place=place, name="log_prob_without_context"),
        log_prob=log_prob,
        num_target_tokens=num_target_tokens,
        num_bytes=_count(row.get("num_bytes"), place=place, name="num_bytes"),
        turns=_turns(row.get("turns"), num_target_tokens, place=place),
        tokens=tokens,
    )


def read_scores(path: str | Path) -> list[TokenScores]:
    """The rows of a score file, in its order; blank lines are passed over.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "scores.jsonl"
    >>> _ = file.write_text('{"example_id": "a", "log_prob": -1.5}\\n')
    >>> [(score.example_id, score.log_prob, score.tokens) for score in read_scores(file)]
    [('a', -1.5, None)]

    Raises:
        DataError: no such file, no rows, or a row that is wrong: invalid JSON, a field that `score_from_json` refuses,
            or an example id that an earlier line has; each names file, line, field and value.
    """
    return list(stream_scores(path))


def stream_scores(path: str | Path) -> Iterator[TokenScores]:
    """The same, row by row; of the rows that have gone by the ids are held."""
    line_of_id: dict[str, int] = {}
    rows = read_parquet_rows(path) if Path(path).suffix == ".parquet" else _json_lines(path)
    for number, row in rows:
        score = score_from_json(row, place=f"{path}:{number}")
        if score.example_id in line_of_id:
            raise DataError(
                f"{path}:{number}: `example_id` {score.example_id!r} was already on line {line_of_id[score.example_id]}",
                remedy="score each example once; give the rows of the data distinct `id`s",
            )
        line_of_id[score.example_id] = number
        yield score
    if not line_of_id:
        raise DataError(f"{path}: the score file has no rows", remedy=_REMEDY)


def _json_lines(path: str | Path) -> Iterator[tuple[int, object]]:
    """Line number and value of each line that is not blank."""
    try:
        lines = open(path, "rb")  # noqa: SIM115 (what follows must not be taken for an error of opening)
    except OSError as error:
        raise DataError(f"{path}: the score file cannot be read: {error.strerror}") from error
    with lines:
        for number, raw in enumerate(lines, start=1):
            place = f"{path}:{number}"
            if not raw.strip():
                continue
            try:
                yield number, json.loads(_decoded(raw, is_first=number == 1))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place}: not UTF-8 (byte {error.start}: {raw[error.start : error.start + 4]!r})"
                ) from error
            except (RecursionError, OverflowError) as error:
                raise DataError(f"{place}: invalid JSON: nested too deep, or a number too large") from error
            except json.JSONDecodeError as error:
                shown = _shown(_decoded(raw, is_first=number == 1).rstrip("\n"))
                raise DataError(
                    f"{place}: invalid JSON: {error.msg} at column {error.colno}: {shown}",
                    remedy="a score file is JSON Lines: one object a line",
                ) from error


def row_of(scores: TokenScores) -> tuple[str, str]:
    """What the examples of one row have in common: its source, and the id without `#part` or `@turn`.

    They are not independent, and are resampled together. Where no source is known each example stands for itself.
    """
    return scores.source, _PART_OF_A_ROW.sub("", scores.example_id) if scores.source else scores.example_id


def _decoded(raw: bytes, *, is_first: bool) -> str:
    # An id may hold half a surrogate pair, which JSON can escape but UTF-8 proper cannot write.
    return raw.removeprefix(b"\xef\xbb\xbf" if is_first else b"").decode("utf-8", "surrogatepass")


def _tokens(value: object, *, place: str) -> tuple[TokenScore, ...]:
    """The gold tokens (weight > 0) of a row."""
    if not isinstance(value, list):
        raise DataError(f"{place}: `tokens` is {_shown(value)}, not a list", remedy=_REMEDY)
    tokens = []
    for index, item in enumerate(value):
        name = f"tokens[{index}]"
        if not isinstance(item, Mapping):
            raise DataError(f"{place}: `{name}` is {_shown(item)}, not an object", remedy=_REMEDY)
        weight = item.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise DataError(f"{place}: `{name}.weight` is {_shown(weight)}, not a number >= 0")
        if weight == 0:
            continue
        if "log_prob" not in item:
            raise DataError(f"{place}: `{name}.log_prob` is missing", remedy=_REMEDY)
        token_id, text = item.get("token_id", -1), item.get("text", "")
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise DataError(f"{place}: `{name}.token_id` is {_shown(token_id)}, not a whole number")
        if not isinstance(text, str):
            raise DataError(f"{place}: `{name}.text` is {_shown(text)}, not text")
        log_prob = _log_prob(item["log_prob"], place=place, name=f"{name}.log_prob")
        best, rank = item.get("best_log_prob"), item.get("rank")
        best = None if best is None else _log_prob(best, place=place, name=f"{name}.best_log_prob")
        if best is not None and best < log_prob - _SUM_TOLERANCE * max(1.0, -log_prob):
            raise DataError(f"{place}: `{name}.best_log_prob` is {best}, below `log_prob`, {log_prob}", remedy=_REMEDY)
        entropy = _number(item.get("entropy"), place=place, name=f"{name}.entropy")
        if entropy is not None and entropy < -_ROUNDING:
            raise DataError(
                f"{place}: `{name}.entropy` is {entropy}, below 0", remedy="write nats, of the whole distribution"
            )
        tokens.append(
            TokenScore(
                token_id=token_id,
                text=text,
                log_prob=log_prob,
                weight=float(weight),
                rank=None if rank is None else _rank(rank, place=place, name=f"{name}.rank"),
                best_log_prob=best,
                entropy=entropy,
                alternatives=_alternatives(item.get("alternatives"), place=place, name=f"{name}.alternatives"),
            )
        )
    if not tokens:
        raise DataError(f"{place}: `tokens` lists no gold token (weight > 0)", remedy=_REMEDY)
    return tuple(tokens)


def _turns(value: object, num_target_tokens: int, *, place: str) -> tuple[GoldTurn, ...]:
    if value is None:
        return ()
    found: list[GoldTurn] = []
    items: list[Any] = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, Mapping):  # Parquet
            item = [item.get("begin"), item.get("number"), item.get("role")]
        if not isinstance(item, list) or [type(part) for part in item] != [int, int, str]:
            raise DataError(f"{place}: `turns` holds {_shown(item)}, not [begin, number, role]")
        turn = GoldTurn(begin=item[0], number=item[1], role=item[2])
        is_next = turn.begin > found[-1].begin and turn.number > found[-1].number if found else turn.begin == 0
        if not is_next or turn.number < 1 or turn.begin >= (num_target_tokens or math.inf):
            raise DataError(
                f"{place}: `turns` is {_shown(value)}, of {num_target_tokens} gold tokens",
                remedy="`begin` counts gold tokens, from 0 for the first turn; `number` counts turns, from 1; both ascend",
            )
        found.append(turn)
    return tuple(found)


def _alternatives(value: object, *, place: str, name: str) -> tuple[tuple[int, str, float], ...] | None:
    if value is None:
        return None
    found = []
    items: list[Any] = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, Mapping):  # Parquet
            item = [item.get("token_id"), item.get("text"), item.get("log_prob")]
        is_right = isinstance(item, list) and [type(part) for part in item[:2]] == [int, str] and len(item) == 3
        if not is_right:
            raise DataError(f"{place}: `{name}` holds {_shown(item)}, not [token_id, text, log_prob]")
        found.append((item[0], item[1], _log_prob(item[2], place=place, name=name)))
    return tuple(found)


def _number(value: object, *, place: str, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise DataError(f"{place}: `{name}` is {_shown(value)}, not a finite number")
    return float(value)


def _log_prob(value: object, *, place: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{place}: `{name}` is {_shown(value)}, not a number", remedy=_REMEDY)
    if not _is_finite(value) or value < _NO_LOG_PROB:
        raise DataError(
            f"{place}: `{name}` is {_shown(value)}; a log-probability must be finite, and above {_NO_LOG_PROB:g}",
            remedy="look at this example under the model that scored it: neither a probability of 0 nor NaN compares",
        )
    if value > _ROUNDING:
        raise DataError(
            f"{place}: `{name}` is {value}, above 0: the logarithm of a probability never is",
            remedy="write natural log-probabilities, not probabilities and not the negated nll",
        )
    return min(float(value), 0.0)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floating-point ones
        return False


def _count(value: object, *, place: str, name: str) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{place}: `{name}` is {_shown(value)}, not a whole number >= 0")
    return value


def _rank(value: object, *, place: str, name: str) -> int:
    rank = _count(value, place=place, name=name)
    if rank < 1:
        raise DataError(f"{place}: `{name}` is 0", remedy="a rank counts from 1, which is the likeliest token's")
    return rank


def _shown(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
