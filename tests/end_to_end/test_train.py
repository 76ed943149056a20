"""`goldsmith train` and `goldsmith.train`, from gold to a folder that `transformers` loads."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import goldsmith
from goldsmith.cli import app
from goldsmith.errors import ConfigError, DataError, MachineError
from goldsmith.recipe import Recipe
from goldsmith.records import MEASURED_FIELDS
from goldsmith.workflows import run_folder
from goldsmith.workflows.run_result import RunResult

GOLD = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(24)]
HELD_OUT = [{"prompt": f"{number} + 2 = ", "completion": str(number + 2)} for number in range(7)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test's own folder is the current one; one thread."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(here: Path, tiny_model_folder: Path) -> dict[str, Any]:
    """A recipe's values; a test changes some."""
    write_rows(here / "train.jsonl", GOLD)
    write_rows(here / "eval.jsonl", HELD_OUT)
    return {
        "model": {"path": str(tiny_model_folder), "device": "cpu"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "training": {"epochs": 2, "batch_size": 8},
        "optimizer": {"learning_rate": 0.01},
        "output_dir": "runs/it",
    }


def train(settings: dict[str, Any], **keywords: Any) -> RunResult:
    return goldsmith.train(Recipe.from_mapping(settings), quiet=True, **keywords)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "evaluation"]


# --- the run folder and the result


def test_the_environment_names_the_device_that_was_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device.index}")
    monkeypatch.setattr(run_folder, "_cpu_name", lambda: "a CPU")
    assert run_folder._environment(torch.device("cpu"))["device"] == "a CPU"
    assert run_folder._environment(torch.device("cuda:1"))["device"] == "a GPU, 1"


@pytest.mark.parametrize("adapter", [None, {"rank": 2, "alpha": 4.0}], ids=["full", "lora"])
def test_quiet_is_quiet(
    settings: dict[str, Any],
    adapter: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # As outside of tests: `conftest.py` keeps all progress bars off.
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    train({**settings, "adapter": adapter} if adapter else settings)
    assert capfd.readouterr() == ("", "")
    assert transformers_logging._tqdm_active


def test_the_command_writes_a_run(settings: dict[str, Any], here: Path) -> None:
    (here / "recipe.yaml").write_text(yaml.safe_dump(settings))
    outcome = CliRunner().invoke(app, ["train", "recipe.yaml", "--json"])
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    folder = here / "runs" / "it"
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "recipe.yaml",
        "report.html",
        "scores-before.jsonl",
        "scores-after.jsonl",
        "data.json",
        "environment.json",
        "memory.json",
        "metrics.jsonl",
        "examples.jsonl",
        "checkpoints",
        "tokenizer",
        "model",
        "result.json",
    }
    assert result == json.loads((folder / "result.json").read_text())
    assert result["rows"] == {"read": 24, "used": 24}
    training = result["training"]
    first, last = evaluations(folder)[0], evaluations(folder)[-1]
    assert (first["step"], last["step"]) == (0, 6)
    assert (training["nll_before"], training["nll_after"], training["steps"]) == (first["nll"], last["nll"], 6)
    assert training["nll_after"] < training["nll_before"]
    assert (training["best_step"], training["stopped_early"]) == (6, False)
    report = json.loads((folder / "data.json").read_text())
    assert sorted(report) == ["eval", "train"]
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert resolved["training"]["max_steps"] == 6
    assert resolved["data"]["max_length"] == 128
    assert resolved["model"]["device"] == "cpu"
    again = CliRunner().invoke(app, ["train", "recipe.yaml"])
    assert again.exit_code == 0
    assert "finished before, nothing done" in again.stdout


def test_text_output_says_what_was_trained(settings: dict[str, Any], here: Path) -> None:
    (here / "recipe.yaml").write_text(yaml.safe_dump(settings))
    outcome = CliRunner().invoke(app, ["train", "recipe.yaml"])
    assert outcome.exit_code == 0, outcome.output
    assert "6 steps on 24 rows" in outcome.stdout
    assert "held-out nll" in outcome.stdout
    assert "log-probabilities are equal to" in outcome.stdout
    assert "training data: 24 of 24 rows" in outcome.stderr


def test_without_held_out_gold(settings: dict[str, Any]) -> None:
    del settings["data"]["eval"]
    result = train(settings)
    assert (result.training.nll_before, result.training.best_step) == (None, None)
    assert evaluations(result.output_dir) == []
    assert result.parity is not None


# --- the model folder


def gold_log_probs(model: Any, tokenizer: Any, row: dict[str, Any]) -> list[float]:
    """What a user of `transformers` computes: the prompt's ids, the completion's, the end token."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    gold = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt, *gold]])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
    return [float(log_probs[len(prompt) - 1 + place, token]) for place, token in enumerate(gold)]


def test_the_result_is_a_model_of_transformers(settings: dict[str, Any]) -> None:
    result = train(settings)
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    assert model.dtype == torch.float32
    assert result.parity is not None
    assert result.parity.largest_difference <= 1e-5
    assert result.parity.rounding_cost == 0.0
    # The nll that was reported for the held-out gold, and `goldsmith score`, are what a user computes.
    own = [gold_log_probs(model, tokenizer, row) for row in HELD_OUT]
    nll = -sum(map(sum, own)) / sum(map(len, own))
    assert nll == pytest.approx(result.training.nll_after, abs=1e-5)
    goldsmith.score(str(result.model_dir), "eval.jsonl", with_tokens=True, output="scores.jsonl", device="cpu")
    for line, log_probs in zip(Path("scores.jsonl").read_text().splitlines(), own, strict=True):
        tokens = [token["log_prob"] for token in json.loads(line)["tokens"]]
        np.testing.assert_allclose(tokens, log_probs, atol=1e-5)


def test_the_model_is_the_last_checkpoint(settings: dict[str, Any]) -> None:
    result = train(settings)
    weights = load_file(result.model_dir / "model.safetensors")
    checkpoint = load_file(result.output_dir / "checkpoints" / "step-00000006" / "model.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(tensor, checkpoint[name])


def test_a_bfloat16_model_stays_one(settings: dict[str, Any], here: Path, tiny_model_folder: Path) -> None:
    """Trained in float32, written as it came; what the rounding cost is said."""
    shutil.copytree(tiny_model_folder, here / "half")
    weights = load_file(here / "half" / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in weights.items()},
        here / "half" / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((here / "half" / "config.json").read_text())
    (here / "half" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    settings["model"]["path"] = str(here / "half")
    result = train(settings)
    assert {t.dtype for t in load_file(result.model_dir / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((result.model_dir / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(result.model_dir).dtype == torch.bfloat16
    checkpoint = load_file(result.output_dir / "checkpoints" / "step-00000006" / "model.safetensors")
    assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}
    assert result.parity is not None
    assert result.parity.largest_difference <= 1e-5
    assert 0 < abs(result.parity.rounding_cost) < 0.1
    assert "rounding to its precision cost" in str(result)
    # Rounded once, from the trained weights, and not from weights that were rounded before.
    for name, tensor in load_file(result.model_dir / "model.safetensors").items():
        assert torch.equal(tensor, checkpoint[name].bfloat16())


def test_generation_stops_where_the_gold_ends(settings: dict[str, Any]) -> None:
    result = train(settings)
    generation = json.loads((result.model_dir / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    assert generation["eos_token_id"] == tokenizer.eos_token_id


def test_a_model_from_nothing_with_a_tokenizer_of_its_own(settings: dict[str, Any]) -> None:
    settings["model"] = {
        "device": "cpu",
        "init": {
            "architecture": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    }
    settings["tokenizer"] = {"train": {"kind": "character"}}
    settings["data"]["max_length"] = 64
    result = train(settings)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    assert tokenizer.decode(tokenizer("12 + 1 = 13", add_special_tokens=False)["input_ids"]) == "12 + 1 = 13"
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert model.config.vocab_size == len(tokenizer)
    assert result.parity is not None
    assert result.parity.largest_difference <= 1e-5
    settings["output_dir"] = "runs/again"
    again = train(settings)
    assert again.training.nll_after == result.training.nll_after
    assert (again.model_dir / "model.safetensors").read_bytes() == (result.model_dir / "model.safetensors").read_bytes()


# --- how long, how often, how fast


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules(settings: dict[str, Any], schedule: str) -> None:
    settings["optimizer"] |= {"schedule": schedule, "warmup_ratio": 0.25}
    settings["training"] = {"max_steps": 8, "batch_size": 8}
    result = train(settings)
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["kind"] == "step"]
    assert rates[:3] == [0.005, 0.01, 0.01]
    assert rates[-1] == {"constant": 0.01}.get(schedule, rates[-1])
    if schedule != "constant":
        assert 0 < rates[-1] < rates[-2] < 0.01
    if schedule == "linear":
        np.testing.assert_allclose(np.diff(rates[2:]), -0.01 / 6)


def test_early_stopping_ends_the_run_and_the_best_is_kept(settings: dict[str, Any], here: Path) -> None:
    """Gold that contradicts the held-out gold: its likelihood falls sooner or later."""
    write_rows(here / "train.jsonl", [{**row, "completion": "zzz"} for row in GOLD])
    settings["training"] = {"max_steps": 200, "batch_size": 8}
    settings["optimizer"] = {"learning_rate": 0.05, "schedule": "constant"}
    settings["evaluation"] = {"every_steps": 2, "early_stopping": 3}
    settings["checkpoint"] = {"every_steps": None, "keep": 1}
    result = train(settings)
    training = result.training
    assert training.stopped_early
    assert training.steps < 200
    seen = evaluations(result.output_dir)
    assert [record["step"] for record in seen] == list(range(0, training.steps + 1, 2))
    best = min(seen, key=lambda record: record["nll"])
    assert (training.best_step, training.best_nll) == (best["step"], best["nll"])
    assert training.steps - best["step"] == 6
    assert "(stopped early)" in str(result)
    saved = sorted(int(path.name[5:]) for path in (result.output_dir / "checkpoints").iterdir())
    assert saved == sorted({training.steps, best["step"]} - {0})
    again = train(settings)
    assert again.already_finished
    assert again.training == training


def test_time_bounds_the_number_of_steps(settings: dict[str, Any]) -> None:
    settings["training"] = {"max_steps": 10**5, "batch_size": 8, "max_seconds": 0.3}
    result = train(settings)
    assert 1 <= result.training.steps < 10**4
    resolved = yaml.safe_load((result.output_dir / "recipe.yaml").read_text())
    assert resolved["training"]["max_steps"] == result.training.steps
    assert resolved["training"]["max_seconds"] == 0.3


# --- rows in memory


def as_generator(rows: list[dict[str, Any]]) -> Any:
    return (row for row in rows)


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    datasets = pytest.importorskip("datasets", reason="waits for the `datasets` library (extra [hub])")
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("given", [list, tuple, as_generator, as_dataset])
def test_rows_in_memory(settings: dict[str, Any], here: Path, given: Callable[[Any], Any]) -> None:
    """The same numbers as from files, with ids of their own."""
    from_files = train({**settings, "output_dir": "runs/files"})
    result = train(settings, train_rows=given(GOLD), eval_rows=given(HELD_OUT))
    assert result.training.nll_before == from_files.training.nll_before
    assert result.training.nll_after == from_files.training.nll_after
    lines = [json.loads(line) for line in (result.output_dir / "examples.jsonl").read_text().splitlines()]
    assert {line["example_id"] for line in lines} == {f"train:{number}" for number in range(24)}
    report = json.loads((result.output_dir / "data.json").read_text())
    assert [file["rows_in"] for file in report["train"]["files"]] == [24]
    # Given again, it is the same run; other rows are refused.
    assert train(settings, train_rows=given(GOLD), eval_rows=given(HELD_OUT)).already_finished


def test_a_run_whose_recipe_names_no_rows_is_found_again(settings: dict[str, Any]) -> None:
    settings["data"] = {}
    result = train(settings, train_rows=GOLD)
    assert train(settings, train_rows=GOLD).already_finished
    assert goldsmith.score(str(result.output_dir), GOLD[:3]).num_examples == 3
    with pytest.raises(ConfigError, match="no rows were given"):
        train({**settings, "output_dir": "runs/other"})


def test_a_file_that_may_not_grow_is_a_full_disk(settings: dict[str, Any]) -> None:
    """A limit of the shell (`ulimit -f`) or of the file system (4 GiB on FAT): of the records, and of the weights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (2_000, 20_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(MachineError, match="File too large"):
                train({**settings, "output_dir": f"runs/{limit}"}, train_rows=GOLD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_finished_run_is_not_told_as_that_of_other_data(settings: dict[str, Any], here: Path) -> None:
    train(settings)
    write_rows(here / "eval.jsonl", HELD_OUT[:-1])
    with pytest.raises(MachineError, match=r"finished, and the data is no longer what it read: eval: .*eval\.jsonl"):
        train(settings)
    (here / "eval.jsonl").unlink()
    assert train(settings).already_finished


def test_a_file_that_came_since_a_run_was_finished_is_named(settings: dict[str, Any], here: Path) -> None:
    settings["data"]["train"] = "train*.jsonl"
    train(settings)
    assert train(settings).already_finished
    write_rows(here / "train2.jsonl", HELD_OUT)
    with pytest.raises(MachineError, match=r"no longer what it read: train: .*train2\.jsonl, which came"):
        train(settings)


def test_rows_in_memory_resume_and_other_rows_are_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from goldsmith import storage

    monkeypatch.setenv("GOLDSMITH_FAIL_POINT", "export.begin!enospc")
    storage._passings.clear()
    with pytest.raises(MachineError, match="disk is full"):
        train(settings, train_rows=as_generator(GOLD), eval_rows=HELD_OUT)
    monkeypatch.delenv("GOLDSMITH_FAIL_POINT")
    with pytest.raises(MachineError, match="the data is not what the run began with: train"):
        train(settings, train_rows=as_generator(GOLD[:-1]), eval_rows=HELD_OUT)
    with pytest.raises(MachineError, match="the data is not what the run began with: eval"):
        train(settings, train_rows=as_generator(GOLD), eval_rows=HELD_OUT[:-1])
    assert train(settings, train_rows=as_generator(GOLD), eval_rows=HELD_OUT).training.steps == 6


def test_a_bad_row_in_memory_is_named(settings: dict[str, Any], here: Path) -> None:
    with pytest.raises(DataError, match=r"train:2: .*completion"):
        train(settings, train_rows=[*GOLD[:2], {"prompt": "no gold"}])
    assert not (here / "runs").exists() or not (here / "runs" / "it").exists()


def test_recipes_from_python_are_checked_like_files(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="batch_sise"):
        train({**settings, "training": {"batch_sise": 8}})


# --- formats and sources


def test_sources_of_several_formats_are_mixed_said_and_named(
    settings: dict[str, Any], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_rows(here / "story.jsonl", [{"text": f"once {number}"} for number in range(6)])
    write_rows(here / "ids.jsonl", [{"input_ids": [0, 40 + n, 1], "labels": [-100, 40 + n, 1]} for n in range(6)])
    settings["data"] |= {
        "train": ["train.jsonl", {"path": "story.jsonl", "format": "text", "repeat": 1.5}, "ids.jsonl"],
        "eval": ["eval.jsonl", {"path": "ids.jsonl", "name": "held-out ids"}],
    }
    goldsmith.train(Recipe.from_mapping(settings))
    said = capfd.readouterr().err
    assert f"train: format prompt_completion, found in the first rows of {here}/train.jsonl" in said
    assert "story: format text, as the recipe says" in said
    assert "held-out ids: format tokens, found in the first rows" in said
    folder = here / "runs" / "it"
    assert set(evaluations(folder)[0]["nll_by_source"]) == {"eval", "held-out ids"}
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in steps if line["kind"] == "step" for name in line["nll_by_source"]} == {
        "train",
        "story",
        "ids",
    }
    examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    first_epoch = [line["source_name"] for line in examples if line["epoch"] == 0]
    assert {name: first_epoch.count(name) for name in set(first_epoch)} == {"train": 24, "story": 9, "ids": 6}
    report = json.loads((folder / "data.json").read_text())
    assert [file["format"] for file in report["train"]["files"]] == ["prompt_completion", "text", "tokens"]


def test_a_hub_data_set_is_held_to_its_commit(
    settings: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    (here / "gold").mkdir()
    write_rows(here / "gold" / "train.jsonl", GOLD)
    own = datasets.load_dataset
    asked: list[str | None] = []

    def load_dataset(path: str, *, name: str | None, split: str, revision: str | None, streaming: bool) -> Any:
        asked.append(revision)
        return own(str(here / "gold"), split=split, cache_dir=str(here / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("goldsmith.workflows.run_recipe.hub_revision", lambda source: "a" * 40)
    settings["data"] = {"train": {"path": "hf:me/gold", "split": "train"}}
    train(settings)
    folder = here / "runs" / "it"
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert resolved["data"]["train"][0]["revision"] == "a" * 40
    assert json.loads((folder / "data.json").read_text())["train"]["files"][0]["revision"] == "a" * 40
    # The hub moves on; the run does not.
    monkeypatch.setattr("goldsmith.workflows.run_recipe.hub_revision", lambda source: "b" * 40)
    (folder / "result.json").unlink()
    assert not train(settings).already_finished
    assert set(asked) == {"a" * 40}
    settings["data"]["train"]["revision"] = "v2"
    (folder / "result.json").unlink()
    with pytest.raises(MachineError, match=r"data\.train\.0\.revision"):
        train(settings)


# --- streams


def test_a_stream_that_was_stopped_goes_on_bit_identically(
    settings: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from goldsmith import storage

    write_rows(here / "a.jsonl", [*GOLD[:10], {"prompt": "no gold"}, *GOLD[10:]])
    write_rows(here / "b.jsonl", [{"text": f"once {number}"} for number in range(7)])
    settings["data"] |= {
        "train": [
            {"path": "a.jsonl", "streaming": True, "window": 5},
            {"path": "b.jsonl", "streaming": True, "window": 3, "repeat": 0.5},
        ],
        "on_bad_row": "skip",
    }
    settings["training"] = {"max_steps": 9, "batch_size": 7, "max_seconds": 1000.0}
    settings["checkpoint"] = {"every_steps": 2}

    def run(name: str) -> Path:
        goldsmith.train(Recipe.from_mapping({**settings, "output_dir": name}))
        return here / name

    whole = run("whole")
    said = capfd.readouterr().err
    assert "training data: streamed" in said
    assert "a: format prompt_completion, found in the first rows" in said
    counts = {file["name"]: file for file in json.loads((whole / "data.json").read_text())["train"]["files"]}
    assert set(counts) == {"a", "b"}
    assert counts["a"]["rows_in"] == counts["a"]["used"] + counts["a"]["rejected"]["no completion"]
    assert f"a: {counts['a']['used']} of {counts['a']['rows_in']} rows that were read" in said
    assert json.loads((whole / "result.json").read_text())["rows"]["used"] == counts["a"]["used"] + counts["b"]["used"]

    for stopped_after in (1, 5, 8):  # evaluations are written too: before step 1
        monkeypatch.setenv("GOLDSMITH_FAIL_POINT", f"metrics.append:{stopped_after + 1}!enospc")
        storage._passings.clear()
        with pytest.raises(MachineError, match="disk is full"):
            run(f"cut-{stopped_after}")
        monkeypatch.delenv("GOLDSMITH_FAIL_POINT")
        cut = run(f"cut-{stopped_after}")
        assert (cut / "examples.jsonl").read_bytes() == (whole / "examples.jsonl").read_bytes()
        weights = Path("model", "model.safetensors")
        assert (cut / weights).read_bytes() == (whole / weights).read_bytes()
        for mine, theirs in zip(*((folder / "metrics.jsonl").open() for folder in (cut, whole)), strict=True):
            ours, others = json.loads(mine), json.loads(theirs)
            for measured in MEASURED_FIELDS:
                ours.pop(measured, None), others.pop(measured, None)
            assert ours == others
        reports = [json.loads((folder / "data.json").read_text())["train"] for folder in (cut, whole)]
        assert reports[0] == reports[1]


def test_what_a_stream_needs(settings: dict[str, Any]) -> None:
    settings["data"]["train"] = {"path": "train.jsonl", "streaming": True}
    with pytest.raises(ConfigError, match=r"set training\.max_steps"):
        train(settings)
    settings["training"] = {"max_steps": 2}
    with pytest.raises(ConfigError, match="learns from all rows"):
        train({**settings, "model": {"init": {"architecture": "llama"}}, "tokenizer": {"train": {"kind": "byte"}}})
    with pytest.raises(ConfigError, match=r"train\.jsonl is streamed"):
        goldsmith.verify(Recipe.from_mapping(settings), quiet=True)
