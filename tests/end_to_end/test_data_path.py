"""`data.cache` and `data.order` of a recipe, in whole runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import goldsmith
from goldsmith.data import cache as cache_module
from goldsmith.errors import ConfigError, MachineError
from goldsmith.recipe import Recipe, load_recipe
from goldsmith.records import MEASURED_FIELDS
from goldsmith.training.trainer import Trainer
from goldsmith.workflows.materials import row_cache_of

QUESTION = "{} or {}: which of these two numbers is the larger one? "
ROWS = [
    {"prompt": QUESTION.format(number, number + 1), "completion": f"{word} {number + 1}."}
    for word in ("It is", "I say", "Surely")
    for number in range(6)
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def settings(here: Path, tiny_model_folder: Path) -> dict[str, Any]:
    (here / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "model": {"path": str(tiny_model_folder), "device": "cpu"},
        "data": {"train": "train.jsonl", "eval": [{"path": "train.jsonl", "limit": 4}], "cache": "kept"},
        "training": {"epochs": 1, "batch_size": 3},
        "optimizer": {"learning_rate": 0.01},
        "checkpoint": {"every_steps": 2},
        "output_dir": "run",
    }


def train(settings: dict[str, Any], output: str, **data: Any) -> None:
    changed = {**settings, "output_dir": output, "data": {**settings["data"], **data}}
    goldsmith.train(Recipe.from_mapping(changed))


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED_FIELDS} for line in lines]


def test_a_run_from_the_cache_is_the_same_run(
    settings: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings, "uncached", cache=False)
    assert not (here / "kept").exists()
    train(settings, "first")
    assert "from the cache" not in capsys.readouterr().err
    assert len(list((here / "kept").iterdir())) == 2
    # The second run reads no row, and a run that was stopped goes on from the cache.
    monkeypatch.setattr(cache_module, "load_dataset", None)
    step = Trainer.train_step

    def until_step_4(trainer: Trainer, number: int) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return step(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", until_step_4)
        with pytest.raises(KeyboardInterrupt):
            train(settings, "second")
    train(settings, "second", cache="kept")
    said = capsys.readouterr().err
    assert said.count("training data: from the cache") == 2
    assert said.count("held-out data: from the cache") == 2
    assert metrics(here / "second") == metrics(here / "first") == metrics(here / "uncached")
    for name in ("data.json", "examples.jsonl"):
        assert (here / "second" / name).read_text() == (here / "uncached" / name).read_text()


def test_grouped_rows_share_more(settings: dict[str, Any], here: Path) -> None:
    shared = {}
    for order in ("shuffled", "grouped"):
        train(settings, order, order=order)
        steps = [line for line in metrics(here / order) if line["kind"] == "step"]
        shared[order] = sum(step["shared_tokens"] for step in steps)
        examples = [
            json.loads(line)["example_id"] for line in (here / order / "examples.jsonl").read_text().splitlines()
        ]
        assert sorted(examples) == sorted(f"train:{number}" for number in range(18))
    assert shared["grouped"] > shared["shuffled"]
    # Another order is another run.
    (here / "grouped" / "result.json").unlink()
    with pytest.raises(MachineError, match=r"data\.order"):
        train(settings, "grouped")


def test_where_rows_are_kept(settings: dict[str, Any], here: Path) -> None:
    def cache_of(**changes: Any) -> Any:
        values = {**settings, **{key: value for key, value in changes.items() if key != "data"}}
        values["data"] = {**settings["data"], **changes.get("data", {})}
        return row_cache_of(Recipe.from_mapping(values), print)

    assert cache_of().folder == here / "kept"
    assert cache_of(data={"cache": False}) is None
    own = cache_of(data={"cache": True})
    assert own.folder == Path(os.environ["XDG_CACHE_HOME"]) / "goldsmith" / "rows"
    assert own.min_source_bytes == cache_module.MIN_SOURCE_BYTES
    with pytest.raises(ConfigError, match="lies in the run folder"):
        cache_of(data={"cache": "run/kept"})
    from_nothing = {"model": {"init": {"architecture": "llama"}}, "tokenizer": {"train": {"kind": "character"}}}
    assert cache_of(**from_nothing) is None


def test_the_folder_of_a_recipe_is_beside_it(here: Path) -> None:
    (here / "deeper").mkdir()
    path = here / "deeper" / "recipe.yaml"
    path.write_text("model: {path: some/model}\ndata: {train: a.jsonl, cache: kept, order: grouped}\n")
    recipe = load_recipe(path)
    assert (recipe.data.cache, recipe.data.order) == (str(here / "deeper" / "kept"), "grouped")
    assert load_recipe(path, ["data.cache=false"]).data.cache is False
    assert load_recipe(path, ["data.cache=true"]).data.cache is True
    with pytest.raises(ConfigError, match="grouped needs all rows at hand"):
        load_recipe(path, ["data.train=[{path: a.jsonl, streaming: true}]", "training.max_steps=3"])
    with pytest.raises(ConfigError, match=r"data\.cache"):
        load_recipe(path, ["data.cache=3"])
