"""The twenty hard cases of benchmarks/hard_cases: goldsmith gives the answer that is written there, and the judge can tell."""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
FOLDER = REPOSITORY / "benchmarks" / "hard_cases"


def _programs() -> dict[str, ModuleType]:
    """As they import each other; none of them is left importable by its short name."""
    sys.path.insert(0, str(FOLDER))
    try:
        return {name: importlib.import_module(name) for name in ("cases", "compare", "run_goldsmith")}
    finally:
        sys.path.remove(str(FOLDER))
        for name in ("cases", "compare", "run_goldsmith"):
            sys.modules.pop(name, None)


PROGRAMS = _programs()
CASES: dict[str, Any] = {case.name: case for case in PROGRAMS["cases"].CASES}


@pytest.fixture(scope="module")
def observed() -> dict[str, Any]:
    """What goldsmith makes of each case."""
    return {name: PROGRAMS["run_goldsmith"].observe(case) for name, case in CASES.items()}


def verdict(name: str, seen: dict[str, Any]) -> str:
    return str(PROGRAMS["compare"].judge(CASES[name], seen).name)


@pytest.mark.parametrize("name", CASES)
def test_goldsmith_is_right(name: str, observed: dict[str, Any]) -> None:
    judged = PROGRAMS["compare"].judge(CASES[name], observed[name])
    assert judged.name == "right", judged.shown


# Of the others the last digits are the machine's.
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if not isinstance(case.right, PROGRAMS["cases"].Same)]
)
def test_the_page_says_what_goldsmith_does(name: str, observed: dict[str, Any]) -> None:
    shown = PROGRAMS["compare"].judge(CASES[name], observed[name]).shown
    assert f"**right**. {shown}" in (REPOSITORY / "docs" / "hard_cases.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_the_judge_tells_a_wrong_answer(name: str, observed: dict[str, Any]) -> None:
    case, seen = CASES[name], observed[name]
    assert verdict(name, {"refused": "KeyError: 'messages'"}) == "stops"
    if "number" in seen:
        assert verdict(name, {"number": 2 * case.right.tolerance, "shown": ""}) == "wrong"
        return
    if "refused" in seen:
        others = [case.ids_and_weights(pieces) for pieces in case.right.others]
        rest = [{"ids": ids, "weights": weights} for ids, weights in others]
        assert verdict(name, {"examples": rest}) == "wrong"  # in silence
        assert verdict(name, {"examples": rest, "messages": ["row left out"]}) == "right"
        assert verdict(name, {"examples": [*rest, {"ids": [11, 12], "weights": [0, 1]}]}) == "wrong"
        return
    *first, last = seen["examples"]
    end = max(place for place, weight in enumerate(last["weights"]) if weight)
    without_end = {**last, "weights": [*last["weights"][:end], 0, *last["weights"][end + 1 :]]}
    doubled = {"ids": [last["ids"][0], *last["ids"]], "weights": [0, *last["weights"]]}
    for changed in (without_end, doubled):
        assert verdict(name, {"examples": [*first, changed]}) == "wrong"
        assert verdict(name, {"examples": [*first, changed], "messages": ["beware"]}) == "warns"
    assert verdict(name, {"examples": first}) == "wrong"


def test_twenty_cases_and_a_page_of_them(observed: dict[str, Any]) -> None:
    assert len(PROGRAMS["cases"].CASES) == len(CASES) == 20
    failed, attempted = doctest.testmod(PROGRAMS["cases"])
    assert failed == 0 < attempted
    written = (REPOSITORY / "docs" / "hard_cases.md").read_text(encoding="utf-8")
    versions = {"trl": "1", "transformers": "2", "datasets": "3"}
    page = PROGRAMS["compare"].page(observed, observed, versions)
    for case in CASES.values():
        assert f"## {case.title}\n" in written, "run benchmarks/hard_cases/compare.py"
        assert f"## {case.title}\n" in page
        assert f"[{case.title}](#{case.name}) | {PROGRAMS['compare']._short_right(case)} | right |" in written
