"""What to do where no row is left: by what the rows were rejected for."""

from __future__ import annotations

from collections.abc import Iterable

from goldsmith.data.config import FIELDS
from goldsmith.data.truncation import TOO_LONG, LengthOptions

__all__ = ["remedy_of"]

_OF_COLUMNS = frozenset({"wrong type", *(f"no {field}" for field in FIELDS)})
_OF_FILES = frozenset(
    {
        "duplicate key",
        "invalid CSV",
        "invalid JSON",
        "not an object",
        "not UTF-8",
        "unreadable value",
        "wrong number of columns",
    }
)
_OF_TEMPLATES = frozenset(
    {
        "control token in content",
        "not written by the chat template",
        "refused by the chat template",
        "serving mismatch",
        "turns cannot be trained together",
        "words without a place",
    }
)


def remedy_of(reasons: Iterable[str], options: LengthOptions = LengthOptions()) -> str:  # noqa: B008 - frozen
    """The remedy for rows that were rejected for these reasons, each remedy once.

    >>> remedy_of(["no completion"])
    'name the columns with `columns`, or mend the rows'
    >>> remedy_of(["longer than max_length", "empty completion"])
    'raise data.max_length where the model can take more, or cut rows with data.on_too_long; mend the rows'
    """
    return "; ".join(dict.fromkeys(_remedy(reason, options) for reason in reasons))


def _remedy(reason: str, options: LengthOptions) -> str:
    if reason in _OF_COLUMNS or reason.endswith(" is null"):
        return "name the columns with `columns`, or mend the rows"
    if reason in _OF_FILES:
        return "write the file again, so that each row can be read"
    if reason == TOO_LONG and options.max_length is not None and options.on_too_long is not None:
        return f"raise {options.max_length} where the model can take more, or cut rows with {options.on_too_long}"
    if reason == TOO_LONG:
        return "shorten the rows"
    if reason in _OF_TEMPLATES:
        return "use another chat template, or mend the rows"
    return "mend the rows"
