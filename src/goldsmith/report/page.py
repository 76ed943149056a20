"""The page: a template, its style and its scripts, and the packed data, in one file that asks the network for nothing.

The browser holds it to that: its content security policy allows the page's own script and style by their hashes, and no
connection at all (while a run is served live: to where the page came from). Nothing of the data is ever read as HTML: it
travels as digits in a data block, and the scripts set it as text.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files

import jinja2
import numpy as np
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from goldsmith.report.payload import Side, build_payload
from goldsmith.report.run_files import RunView

__all__ = ["MAX_EXAMPLES", "ReportConfig", "page_of_payload", "payload_of", "render_page"]

# Shown token by token, unless asked for otherwise.
MAX_EXAMPLES = 1000

STYLES = ("uPlot.min.css", "page.css", "gold.css")
SCRIPTS = (
    "uPlot.iife.min.js",
    "data.js",
    "format.js",
    "charts.js",
    "overview.js",
    "gold.js",
    "differing.js",
    "compare.js",
    "page.js",
)


class ReportConfig(BaseModel):
    """`report:` of a recipe: what a run scores before its first step and after its last, to show both token by token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    examples: int = Field(200, ge=0, description="the first so many held-out examples; 0: none")
    alternatives: int = Field(5, ge=0, le=20, description="the likeliest tokens that are kept at each gold token")


def payload_of(
    *, runs: Sequence[RunView] = (), sides: Sequence[Side] = (), title: str, max_examples: int = MAX_EXAMPLES
) -> bytes:
    """What the page shows, packed; see `payload.build_payload`."""
    return build_payload(title=title, runs=runs, sides=sides, max_examples=max_examples)


def render_page(
    *, runs: Sequence[RunView] = (), sides: Sequence[Side] = (), title: str, max_examples: int = MAX_EXAMPLES
) -> str:
    """The whole page as one HTML text; the same values give the same text."""
    return page_of_payload(payload_of(runs=runs, sides=sides, title=title, max_examples=max_examples), title=title)


def page_of_payload(payload: bytes, *, title: str, is_live: bool = False) -> str:
    """The page around packed data.

    Args:
        is_live: the page asks where it came from for newer data (`payload`), every few seconds.
    """
    style, script = _assets(STYLES), _assets(SCRIPTS)
    connections = "'self'" if is_live else "'none'"
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        f"connect-src {connections}; base-uri 'none'; form-action 'none'"
    )
    return _template().render(
        title=title,
        version=version("goldsmith"),
        policy=policy,
        is_live=is_live,
        style=Markup(style),
        script=Markup(script),
        payload=_as_text(payload),
    )


# Every printable character of ASCII but those that have a meaning in HTML, in templates or in text: <, &, >, ", ', `, \\, { and }.
_DIGITS = "".join(chr(code) for code in range(33, 127) if chr(code) not in "<&>\"'`\\{}")
assert len(_DIGITS) == 85


def _as_text(data: bytes) -> str:
    """Five digits of base 85 for each four bytes, low digit first, after the number of bytes and a space.

    A quarter more than the bytes, where base64 takes a third.
    """
    words = np.frombuffer(data + b"\0" * (-len(data) % 4), dtype="<u4").astype(np.int64)
    digits = (words[:, None] // 85 ** np.arange(5)) % 85
    characters: bytes = np.frombuffer(_DIGITS.encode(), dtype=np.uint8)[digits].tobytes()
    return f"{len(data)} " + characters.decode("ascii")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(_asset("page.html"))


@cache
def _assets(names: tuple[str, ...]) -> str:
    text = "\n".join(_asset(name) for name in names)
    # Our own files, but a closing tag inside of one would end the element.
    assert not re.search(r"</(script|style)", text, re.IGNORECASE)
    return text


def _asset(name: str) -> str:
    return (files("goldsmith.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
