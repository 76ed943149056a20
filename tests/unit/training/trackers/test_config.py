"""`trackers:` of a recipe."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from goldsmith.errors import ConfigError
from goldsmith.recipe import Recipe, load_recipe
from goldsmith.training.trackers.config import TensorboardConfig, WandbConfig, require_installed


def recipe(trackers: Any) -> Recipe:
    return Recipe.from_mapping({"model": {"path": "a/b"}, "data": {"train": "x.jsonl"}, "trackers": trackers})


def test_names_and_mappings() -> None:
    found = recipe(["tensorboard", {"name": "wandb", "project": "legal", "mode": "offline"}]).trackers
    assert found == [TensorboardConfig(), WandbConfig(project="legal", mode="offline")]
    assert recipe("wandb").trackers == recipe([{"name": "wandb"}]).trackers == [WandbConfig()]
    assert recipe([]).trackers == []


@pytest.mark.parametrize(
    ("trackers", "part"),
    [
        (
            ["wandbb"],
            "trackers.0: unknown tracker 'wandbb'; nearest: `wandb`; known: tensorboard, wandb, mlflow, trackio",
        ),
        (["mlflow", {"name": "ml-flow"}], "trackers.1: unknown tracker 'ml-flow'; nearest: `mlflow`"),
        ([{"name": "wandb", "projet": "x"}], "trackers.0.projet: unknown key; nearest known key: `project`"),
        ([{"name": "tensorboard", "project": "x"}], "trackers.0.project: unknown key"),
        ([{"project": "x"}], "trackers.0"),
        ([3], "trackers.0"),
        (["wandb", "wandb"], "trackers: wandb is named 2 times"),
    ],
)
def test_what_is_wrong_is_named(trackers: Any, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(trackers)
    assert part in caught.value.message


def test_to_yaml_and_back(tmp_path: Path) -> None:
    before = recipe(["trackio", {"name": "mlflow", "experiment": "e"}])
    (tmp_path / "recipe.yaml").write_text(before.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml").trackers == before.trackers
    assert yaml.safe_load(before.to_yaml())["trackers"][1]["experiment"] == "e"
    assert before.settings()["trackers.1.experiment"] == "e"


def test_what_is_not_installed_is_said_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder.__module__ != "__editable__"])
    # What an earlier run of wandb leaves in the current directory is no library.
    (tmp_path / "wandb").mkdir()
    with pytest.raises(ConfigError, match="trackers: wandb is not installed") as caught:
        require_installed([WandbConfig()])
    assert caught.value.remedy is not None
    assert "pip install 'goldsmith[wandb]'" in caught.value.remedy
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None, origin="a file")
    monkeypatch.setitem(sys.modules, "wandb", module)
    require_installed([WandbConfig()])
