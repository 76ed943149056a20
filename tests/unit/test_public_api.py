"""The public surface is what this file says, and importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import goldsmith

PUBLIC = [
    "Comparison",
    "GoldsmithError",
    "Ranking",
    "Recipe",
    "ScoreSummary",
    "TokenScore",
    "TokenScores",
    "compare",
    "compare_models",
    "generate",
    "inspect",
    "load_recipe",
    "read_scores",
    "score",
    "scores_from_probabilities",
    "train",
    "verify",
]


def test_the_public_names_are_these() -> None:
    assert goldsmith.__all__ == PUBLIC
    assert sorted(goldsmith._HOME) == PUBLIC
    assert set(PUBLIC) <= set(dir(goldsmith))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_resolves_to_a_thing_of_its_name(name: str) -> None:
    assert getattr(goldsmith, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'goldsmith' has no attribute 'fit'"):
        _ = goldsmith.fit


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, goldsmith; sys.exit(len({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_comparing_does_not_load_transformers() -> None:
    code = "import sys, goldsmith; goldsmith.compare; goldsmith.read_scores; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
