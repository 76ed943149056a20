"""Tables: as text for a terminal, as HTML for a notebook, as a data frame."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from goldsmith.errors import ConfigError

__all__ = ["data_frame", "html_table", "text_table"]


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under a heading row: the first column and columns without a heading to the left, numbers to the right.

    Unprintable characters show as their codes.
    """
    rows = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for column, cell in enumerate(row[1:], start=1):
            is_text = not rows[0][column]
            cells.append(cell.ljust(widths[column]) if is_text else cell.rjust(widths[column]))
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under a heading row; every cell is escaped, and unprintable characters show as their codes.

    >>> html_table([["name"], ["<b>"]])
    '<table><thead><tr><th>name</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table>'
    """

    def line(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{_escaped(cell)}</{kind}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f"<table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>"


def data_frame(rows: Sequence[Mapping[str, object]]) -> Any:
    """A `pandas.DataFrame` of these rows.

    Raises:
        ConfigError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ConfigError("to_pandas needs pandas, which is not installed", remedy="pip install pandas") from error
    return pandas.DataFrame.from_records([dict(row) for row in rows])


def _escaped(text: str) -> str:
    return html.escape(_printable(text, but="\n"))


def _printable(text: str, *, but: str = "") -> str:
    # Marks that turn the direction of writing, control characters and lone surrogates would reach beyond their cell.
    return "".join(
        character if character.isprintable() or character in but else f"\\x{ord(character):02x}" for character in text
    )
