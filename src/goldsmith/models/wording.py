"""How the refusal of a model writes what was seen: another library's message, many names, the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

__all__ = ["nearest_known", "one_line", "shortened"]


def one_line(error: BaseException, limit: int = 300) -> str:
    """What another library's error says, on one line.

    >>> one_line(ValueError("no such\\n  thing")), one_line(KeyError())
    ('no such thing', 'KeyError')
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shortened(names: Sequence[object], limit: int = 5) -> str:
    """The first of many names.

    >>> shortened("abcdefg", 3)
    'a, b, c, ... (4 more)'
    """
    rest = len(names) - limit
    return ", ".join(map(str, names[:limit])) + (f", ... ({rest} more)" if rest > 0 else "")


def nearest_known(word: str, known: Collection[str]) -> str:
    """What an error message adds where something known is spelt nearly so; else nothing.

    >>> nearest_known("lama", ["llama", "gpt2"])
    "; the nearest known one is 'llama'"
    """
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; the nearest known one is {matches[0]!r}" if matches else ""
