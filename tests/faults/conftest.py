"""A run that nothing happened to, and folders for the same run to be broken in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import forked
from runs import TrainingRun


@pytest.fixture(scope="session")
def gold_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the gold of all runs lies: their recipes name the same files."""
    return tmp_path_factory.mktemp("gold")


@pytest.fixture(scope="session")
def small_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """One layer of the tiny model: a command that trains it takes about half a second."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(tiny_model_folder, folder)
    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    forked().prove(folder)
    return folder


@pytest.fixture(scope="session")
def reference(
    tmp_path_factory: pytest.TempPathFactory, gold_folder: Path, small_model_folder: Path
) -> Callable[..., TrainingRun]:
    """`reference(changes)`: the uninterrupted run of a recipe; trained once a session."""
    known: dict[str, TrainingRun] = {}

    def make(changes: dict[str, Any] | None = None) -> TrainingRun:
        key = json.dumps(changes or {}, sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp("reference")
            run = TrainingRun(folder, data=gold_folder, model=small_model_folder, changes=changes)
            run.finish()
            known[key] = run
        return known[key]

    return make


@pytest.fixture
def new_run(tmp_path: Path, gold_folder: Path, small_model_folder: Path) -> Callable[..., TrainingRun]:
    """`new_run(changes, name="a")`: the same recipe in a folder of this test."""

    def make(changes: dict[str, Any] | None = None, *, name: str = "a", data: Path | None = None) -> TrainingRun:
        return TrainingRun(tmp_path / name, data=data or gold_folder, model=small_model_folder, changes=changes)

    return make
