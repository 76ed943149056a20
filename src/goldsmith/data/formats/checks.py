"""What every format asks of a value: that it is text, a number, a weight; and how it is said where it is not."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from goldsmith.data.rows import shorten

__all__ = [
    "WEIGHT_RANGE",
    "BadRowError",
    "checked_id",
    "checked_json",
    "checked_row_weight",
    "checked_spans",
    "checked_text",
    "checked_weight",
    "is_weight",
    "parsed_json",
    "wrong_type",
]

Span = tuple[int, int, float]

# A value nested more deeply than this is no definition of a tool, and would end in Python's own limit further on.
_MAX_DEPTH = 64


class BadRowError(Exception):
    """Carries a rejection out of the checks; never leaves the formats."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def wrong_type(value: object, name: str, wanted: str) -> BadRowError:
    return BadRowError(
        "wrong type", f"the field {name!r} must be {wanted}, but is of type {type(value).__name__}: {shorten(value)}"
    )


def checked_text(value: object, name: str, what: str) -> str:
    """`value`, if it is text that UTF-8 can write."""
    if isinstance(value, str):
        if not value.isascii():
            _check_unicode(value, name)
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        shown = "null" if value is None else "NaN"
        raise BadRowError(f"{what} is null", f"the field {name!r} is {shown}; give text or remove the row")
    raise wrong_type(value, name, "text")


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = shorten(text[max(0, error.start - 10) : error.end + 10])
        raise BadRowError(
            "not Unicode text",
            f"the field {name!r} has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start + 1}, "
            f"at {around}; it is half of a character, write the whole one",
        ) from None


def checked_id(value: object, name: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 128:
        return str(value)
    if not isinstance(value, str):
        raise wrong_type(value, name, "text or an integer (map `columns: {id: ...}` where the id has another name)")
    if not value:
        raise BadRowError("empty id", f"the field {name!r} is empty; give an id, or null for none")
    _check_unicode(value, name)
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong_type(value, name, "a number (map `columns: {weight: ...}` where the weight has another name)")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRowError("bad weight", f"the field {name!r} is {shorten(value)}; a weight is a finite number")
    return number


# A row's weight times a token's is then neither 0 nor infinite in float32, nor is a sum of them.
_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 1e-15, 1e15
WEIGHT_RANGE = f"from {_SMALLEST_WEIGHT:g} to {_LARGEST_WEIGHT:g}"


def is_weight(value: float) -> bool:
    """Of a message, a span or a token: 0, which is context, or in `WEIGHT_RANGE`.

    >>> is_weight(0), is_weight(1e-16), is_weight(float("nan"))
    (True, False, False)
    """
    return value == 0 or _SMALLEST_WEIGHT <= value <= _LARGEST_WEIGHT


def checked_row_weight(value: object, name: str, *, source_weight: float = 1.0) -> float:
    """Times its source's; 1 where the row has none."""
    own = 1.0 if value is None or value == "" else _number(value, name)
    if own <= 0:
        raise BadRowError("bad weight", f"the field {name!r} is {shorten(value)}; a row's weight is above 0")
    weight = own * source_weight
    if weight == 0 or not is_weight(weight):
        raise BadRowError(
            "bad weight",
            f"{own:g}, the row's weight, times {source_weight:g}, that of its source, is {weight:g}; "
            f"a row's weight is {WEIGHT_RANGE}",
        )
    return weight


def checked_weight(value: object, name: str) -> float:
    """Of a message or a span: 0 is context; 1 where there is none."""
    if value is None:
        return 1.0
    weight = _number(value, name)
    if not is_weight(weight):
        raise BadRowError("bad weight", f"the field {name!r} is {shorten(value)}; this weight is 0, or {WEIGHT_RANGE}")
    return weight


def checked_spans(value: object, name: str, text: str) -> tuple[Span, ...]:
    """(begin, end, weight) in characters of `text`, ascending; none where the value is null."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise wrong_type(value, name, "a list of spans, each {begin, end, weight} in characters")
    spans = sorted(_span(item, f"{name}[{index}]", text) for index, item in enumerate(value))
    for (_, end, _), (begin, _, _) in itertools.pairwise(spans):
        if begin < end:
            raise BadRowError(
                "overlapping spans",
                f"the field {name!r} has one span that ends at {end} and another that begins at {begin}; give each "
                "character one weight at most",
            )
    return tuple(spans)


def _span(value: object, place: str, text: str) -> Span:
    if not isinstance(value, Mapping):
        raise wrong_type(value, place, "an object with begin, end and weight")
    if set(value) != {"begin", "end", "weight"}:
        seen = ", ".join(shorten(key, 30) for key in list(value)[:8]) or "none"
        raise BadRowError("bad span", f"the keys of {place} must be begin, end and weight, but are {seen}")
    begin, end = value["begin"], value["end"]
    for key, number in (("begin", begin), ("end", end)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise wrong_type(number, f"{place}.{key}", "a character position, counted from 0")
    if not 0 <= begin < end <= len(text):
        raise BadRowError(
            "bad span",
            f"{place} reaches from {shorten(begin)} to {shorten(end)}, but its text has {len(text)} characters; a span lies "
            "within it and is not empty",
        )
    if value["weight"] is None:
        raise wrong_type(None, f"{place}.weight", "a number")
    return begin, end, checked_weight(value["weight"], f"{place}.weight")


def parsed_json(text: str, name: str) -> Any:
    """The value of a field that holds JSON as text."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRowError(
            "invalid JSON in a field", f"the field {name!r} is not JSON: {shorten(str(error), 80)}, in {shorten(text)}"
        ) from None


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def checked_json(value: object, name: str, depth: int = 0) -> Any:
    """`value`, if a template can write it as JSON: texts, finite numbers, booleans, nulls, lists and objects of these."""
    if depth > _MAX_DEPTH:
        raise BadRowError("nested too deeply", f"the field {name!r} is nested more than {_MAX_DEPTH} deep; flatten it")
    if isinstance(value, str):
        return checked_text(value, name, "text")
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [checked_json(item, f"{name}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {
            checked_text(key, name, "key"): checked_json(item, f"{name}[{shorten(key, 30)}]", depth + 1)
            for key, item in value.items()
        }
    raise wrong_type(value, name, "what JSON can write (a text, a finite number, a list, an object, ...)")
