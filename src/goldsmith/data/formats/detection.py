"""Which format the rows of a source have: found once, in its first rows, and never guessed row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from goldsmith.data.config import FormatName
from goldsmith.data.rows import Row, shorten
from goldsmith.errors import DataError

__all__ = ["SAMPLE_ROWS", "column_names", "detect_format"]

# How many rows are looked at.
SAMPLE_ROWS: Final = 20

# What a row of a format cannot be without: one field of each group.
_NEEDED: Final[Mapping[FormatName, tuple[tuple[str, ...], ...]]] = {
    "prompt_completion": (("prompt",), ("completion",)),
    "chat": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction",), ("output",)),
    "text": (("text",),),
    "tokens": (("token_ids",), ("target_weights", "labels")),
}
# The name that a field has where `columns` gives none.
OWN_NAMES: Final[Mapping[str, tuple[str, ...]]] = {"token_ids": ("token_ids", "input_ids")}


def column_names(columns: Mapping[str, str | int] | None, fields: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Field -> the columns that may hold it. A column that is mapped to one field is no longer another's by its own name."""
    mapped = {field: str(column) for field, column in (columns or {}).items()}
    taken = set(mapped.values())
    return {
        field: (mapped[field],)
        if field in mapped
        else tuple(name for name in OWN_NAMES.get(field, (field,)) if name not in taken)
        for field in fields
    }


def detect_format(rows: Sequence[Row], *, columns: Mapping[str, str | int] | None, source: str) -> FormatName:
    """The one format whose fields are found in `rows`.

    Where `columns` maps a field that belongs to a format, only formats with a mapped field are considered, if one of them fits.

    Args:
        rows: the first of a source, at least one.
        columns: field -> column.
        source: what errors call it.

    Raises:
        DataError: none fits, or several do.
    """
    names = column_names(columns, [field for groups in _NEEDED.values() for group in groups for field in group])
    asked = [form for form, groups in _NEEDED.items() if any(f in (columns or {}) for group in groups for f in group)]
    places: dict[FormatName, str] = {}
    for has_value in (True, False):  # a column that is null throughout says little; but better than nothing
        for candidates in (asked, list(_NEEDED)):
            for form in candidates:
                row = next((row for row in rows if _fits(row, form, names, has_value=has_value)), None)
                if row is not None:
                    places[form] = row.source
            if places:
                break
        if places:
            break
    if len(places) == 1:
        return next(iter(places))
    if not places:
        raise _no_format(rows[0], len(rows), names, source)
    found = " and ".join(f"{form} ({_described(form, names)}; first at {place})" for form, place in places.items())
    raise DataError(
        f"{source}: the first {len(rows)} rows fit two formats: {found}",
        remedy=f"say which with `format: {next(iter(places))}` on the source (or map a field of it with `columns`); rows of "
        "two formats belong into two files",
    )


def _fits(row: Row, form: FormatName, names: Mapping[str, tuple[str, ...]], *, has_value: bool) -> bool:
    values = row.values
    return all(
        any(
            values.get(column) is not None if has_value else column in values
            for field in group
            for column in names[field]
        )
        for group in _NEEDED[form]
    )


def _described(form: FormatName, names: Mapping[str, tuple[str, ...]]) -> str:
    """`'prompt', 'completion'`: the columns of a format."""
    groups = (" or ".join(repr(column) for field in group for column in names[field]) for group in _NEEDED[form])
    return ", ".join(groups)


def _no_format(row: Row, num_rows: int, names: Mapping[str, tuple[str, ...]], source: str) -> DataError:
    seen = ", ".join(shorten(name, 30) for name in list(row.values)[:12]) or "none"
    seen += ", ..." if len(row.values) > 12 else ""
    known = "; ".join(f"{form}: {_described(form, names)}" for form in _NEEDED)
    remedy = "name the columns, for example `columns: {prompt: ..., completion: ...}` or `columns: {messages: ...}`"
    if names["completion"] and names["completion"][0] in row.values:
        remedy += '; for text without a prompt give an empty one, `"prompt": ""`'
    return DataError(
        f"{source}: the first {num_rows} rows fit no format; {row.source} has the fields {seen}; known are {known}",
        remedy=remedy,
    )
