"""The page as text: one file, closed to the network, and nothing of the data read as HTML."""

from __future__ import annotations

import base64
import hashlib
import random
import re
from pathlib import Path

import pytest
from report_examples import sides, write_side

from goldsmith.errors import ConfigError, DataError
from goldsmith.report.page import _DIGITS, _as_text, page_of_payload, render_page
from goldsmith.workflows.reporting import report


def of_digits(text: str) -> bytes:
    """The plain reader of base 85."""
    length, digits = text.split(" ")
    words = [digits[place : place + 5] for place in range(0, len(digits), 5)]
    values = [sum(_DIGITS.index(digit) * 85**power for power, digit in enumerate(word)) for word in words]
    return b"".join(value.to_bytes(4, "little") for value in values)[: int(length)]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 1000])
def test_bytes_come_back_from_their_digits(length: int) -> None:
    data = b"\xff\xff\xff\xff"[:length] + random.Random(length).randbytes(max(0, length - 4))
    assert of_digits(_as_text(data)) == data


def test_the_page_holds_all_and_asks_for_nothing() -> None:
    page = render_page(sides=sides(3), title="three")
    assert page == render_page(sides=sides(3), title="three")
    without_script = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r"(?:src|href|action)=.{7}", without_script) == ['href="#main"']
    assert "@import" not in page
    assert "url(" not in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].replace("&#39;", "'").split(";"))
    assert rules["default-src"] == rules["connect-src"] == "'none'"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def test_a_served_page_may_ask_where_it_came_from() -> None:
    page = page_of_payload(b"", title="t", is_live=True)
    assert "connect-src &#39;self&#39;" in page
    assert 'data-live="yes"' in page


def test_a_title_is_text() -> None:
    page = page_of_payload(b"", title="<script>alert(1)</script> & \"'")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;&#39;" in page


def test_the_workflow_wants_something_to_show(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a run folder or --scores"):
        report()
    with pytest.raises(DataError, match="no such score file"):
        report(scores=[tmp_path / "none.jsonl"])


def test_score_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = []
    for side in sides(3):
        (tmp_path / side.name).mkdir()
        files.append(tmp_path / side.name / "scores.jsonl")
        write_side(files[-1], side)
    result = report(scores=files, output=tmp_path / "page.html")
    assert result.num_examples == 3
    assert result.num_bytes == (tmp_path / "page.html").stat().st_size
    assert str(result).startswith(str(tmp_path / "page.html"))
