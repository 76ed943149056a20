"""Training a part of a model, from the recipe to folders that `peft` and `transformers` load: adapters, new tokens, globs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import goldsmith
from goldsmith import storage, workflows
from goldsmith.cli import app
from goldsmith.errors import ConfigError, ModelError
from goldsmith.recipe import Recipe
from goldsmith.workflows.run_result import RunResult

GOLD = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(24)]
HELD_OUT = [{"prompt": f"{number} + 2 = ", "completion": str(number + 2)} for number in range(7)]
ADAPTER = {"rank": 4, "alpha": 8.0}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test's own folder is the current one; one thread."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def settings(here: Path, tiny_model_folder: Path) -> dict[str, Any]:
    write_rows(here / "train.jsonl", GOLD)
    write_rows(here / "eval.jsonl", HELD_OUT)
    return {
        "model": {"path": str(tiny_model_folder), "device": "cpu"},
        "adapter": ADAPTER,
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "training": {"epochs": 2, "batch_size": 8},
        "optimizer": {"learning_rate": 0.02},
        "checkpoint": {"every_steps": 2},
        "output_dir": "runs/it",
    }


def train(settings: dict[str, Any]) -> RunResult:
    return goldsmith.train(Recipe.from_mapping(settings), quiet=True)


def nll(model: Any) -> float:
    """Of the held-out gold, as `goldsmith score` has it."""
    return goldsmith.score(str(model), "eval.jsonl", device="cpu").nll_per_token.estimate


def last_checkpoint(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.output_dir / "checkpoints" / f"step-{result.training.steps:08d}" / "model.safetensors")


def interrupted(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose disk was full after the fourth step's checkpoint."""
    monkeypatch.setenv("GOLDSMITH_FAIL_POINT", "checkpoint.begin:3!enospc")
    storage._passings.clear()
    with pytest.raises(goldsmith.errors.MachineError, match="disk is full"):
        train(settings)
    monkeypatch.delenv("GOLDSMITH_FAIL_POINT")
    storage._passings.clear()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_run_with_an_adapter(settings: dict[str, Any], tiny_model_folder: Path, kind: str) -> None:
    import peft

    settings["adapter"] = {**ADAPTER, "kind": kind}
    result = train(settings)
    assert result.training.nll_before is not None
    assert result.training.nll_after is not None
    assert result.training.nll_after < result.training.nll_before - 0.05
    assert result.parity is not None
    assert result.parity.merge_difference is not None
    assert result.parity.merge_difference < 1e-5
    assert result.parity.largest_difference < 1e-5
    assert "merged into the model above" in str(result)

    # A checkpoint holds what is trained, and nothing of the base.
    checkpoint = last_checkpoint(result)
    assert all(".lora_" in name for name in checkpoint)
    assert len(checkpoint) == 14 * (3 if kind == "dora" else 2)

    # The merged folder is a plain model; the adapter's folder is one of peft; both say what was trained.
    folder = result.output_dir
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    values = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tiny_model_folder)
    through_peft: Any = peft.PeftModel.from_pretrained(base, str(folder / "adapter"))
    ids = AutoTokenizer.from_pretrained(folder / "adapter")("7 + 2 = 9", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(through_peft(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    for name in ("", "model", "adapter"):
        assert nll(folder / name) == pytest.approx(result.training.nll_after, abs=1e-6)

    outcome = CliRunner().invoke(app, ["generate", str(folder / "adapter"), "-p", "3 + 1 = ", "--max-new-tokens", "3"])
    assert outcome.exit_code == 0, outcome.output


@pytest.mark.parametrize("adapter", [{**ADAPTER, "dropout": 0.3}, None])
@pytest.mark.parametrize("new_tokens", [(), ("<plus>",)])
def test_a_checkpoint_is_scored(settings: dict[str, Any], adapter: Any, new_tokens: tuple[str, ...]) -> None:
    settings["model"] = {**settings["model"], "new_tokens": new_tokens}
    settings["adapter"] = adapter
    if adapter is None:
        settings["training"]["trainable"] = ["model.layers.1.*", "*embed*", "lm_head.*"]
    result = train({**settings, "evaluation": {"every_steps": 2}, "checkpoint": {"every_steps": 2, "keep": 9}})
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["nll"] for line in lines if line["kind"] == "evaluation"}
    assert expected[2] != expected[4]
    for step in (2, 4):
        checkpoint = str(result.output_dir / "checkpoints" / f"step-{step:08d}")
        assert nll(checkpoint) == pytest.approx(expected[step], abs=1e-6)
    in_float64 = goldsmith.score(checkpoint, "eval.jsonl", device="cpu", dtype="float64").nll_per_token.estimate
    assert in_float64 == pytest.approx(expected[4], abs=1e-6)
    assert goldsmith.generate(checkpoint, prompts=["3 + 1 = "], max_new_tokens=2, device="cpu").answers


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_that_was_stopped_ends_the_same(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dropout: float
) -> None:
    settings["adapter"] = {**ADAPTER, "dropout": dropout}
    whole = goldsmith.train(Recipe.from_mapping(settings))
    said = capsys.readouterr().err
    assert said.count("equal in distribution only") == (1 if dropout else 0)
    assert "trained: 2,048 parameters; frozen: " in said
    settings["output_dir"] = "runs/other"
    interrupted(settings, monkeypatch)
    assert sorted(path.name for path in Path("runs/other/checkpoints").glob("step-*"))[-1] == "step-00000004"
    resumed = train(settings)
    assert resumed.training.nll_after == whole.training.nll_after
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors", "examples.jsonl"):
        assert (resumed.output_dir / file).read_bytes() == (whole.output_dir / file).read_bytes()
    a, b = last_checkpoint(whole), last_checkpoint(resumed)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


NEW = ["<plus>", "<is>"]


@pytest.fixture
def new_token_settings(settings: dict[str, Any], here: Path) -> dict[str, Any]:
    """Gold that is written with two tokens of its own."""

    def spelt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {**row, "prompt": row["prompt"].replace("+", NEW[0]), "completion": NEW[1] + row["completion"]}
            for row in rows
        ]

    write_rows(here / "train.jsonl", spelt(GOLD))
    write_rows(here / "eval.jsonl", spelt(HELD_OUT))
    settings["model"] = {**settings["model"], "new_tokens": NEW}
    return settings


@pytest.mark.parametrize("adapter", [ADAPTER, None])
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_trained_and_saved(
    new_token_settings: dict[str, Any], tiny_model_folder: Path, here: Path, adapter: Any, tied: bool
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    size = base.config.vocab_size
    if not tied:
        config = base.config
        config.tie_word_embeddings = False
        with torch.random.fork_rng():
            torch.manual_seed(1)
            base = type(base)(config)
    base.save_pretrained(here / "base")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(here / "base")
    new_token_settings["model"]["path"] = str(here / "base")
    new_token_settings["adapter"] = adapter
    result = train(new_token_settings)
    assert result.training.nll_after is not None
    assert result.training.nll_before is not None
    assert result.training.nll_after < result.training.nll_before - 0.3

    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    assert tokenizer.convert_tokens_to_ids(NEW) == [size, size + 1]
    assert tokenizer("3 <plus> 1", add_special_tokens=False)["input_ids"][2] == size
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert model.config.vocab_size == size + 2
    inputs, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (inputs is output) == tied
    for trained, old in ((inputs, base.get_input_embeddings().weight), (output, base.get_output_embeddings().weight)):
        mean = old.detach().mean(dim=0)
        assert all(float((row - mean).norm()) > 1e-3 for row in trained[size:].detach())
        assert torch.equal(trained[:size], old) == (adapter is not None)
    for name in ["model", "adapter"] if adapter else ["model"]:
        assert nll(result.output_dir / name) == pytest.approx(result.training.nll_after, abs=1e-6)


def test_new_tokens_that_would_stay_untrained_are_refused(new_token_settings: dict[str, Any]) -> None:
    new_token_settings["adapter"] = None
    new_token_settings["training"]["trainable"] = ["model.layers.*"]
    with pytest.raises(ConfigError, match=r"2 tokens are new to the model .* such as '<plus>'"):
        train(new_token_settings)
    new_token_settings["training"]["trainable"] = ["model.layers.*", "lm_head.weight"]
    assert train(new_token_settings).training.steps == 6


def test_a_new_token_that_is_known_is_refused(settings: dict[str, Any]) -> None:
    settings["model"]["new_tokens"] = ["a"]
    with pytest.raises(ConfigError, match="'a' is a token of the model already"):
        train(settings)


def test_parameters_chosen_by_glob(
    settings: dict[str, Any], tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["adapter"] = None
    settings["training"]["trainable"] = ["model.layers.1.*", "!*.self_attn.*"]
    result = train(settings)
    trained = load_file(result.model_dir / "model.safetensors")
    base = load_file(tiny_model_folder / "model.safetensors")
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, base[name])}
    assert changed == {name for name in base if name.startswith("model.layers.1.") and "self_attn" not in name}
    assert last_checkpoint(result).keys() == changed
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    ratios = next(line["update_to_weight"] for line in lines if line["kind"] == "step")
    assert ratios.keys() == {"layer 1"}
    assert nll(result.output_dir) == pytest.approx(result.training.nll_after, abs=1e-6)
    settings["output_dir"] = "runs/other"
    interrupted(settings, monkeypatch)
    resumed = train(settings)
    assert (resumed.model_dir / "model.safetensors").read_bytes() == (
        result.model_dir / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("trained", "by_hand"),
    [
        ({"adapter": {"kind": "dora", "dropout": 0.2}}, 0),
        ({"adapter": {"kind": "lora"}}, 2),
        ({"training": {"trainable": ["*norm*"]}}, 2),
    ],
)
def test_verify_runs_what_is_trained(
    settings: dict[str, Any], here: Path, trained: dict[str, Any], by_hand: int
) -> None:
    prompt = "one long prompt before every row, so that it is shared: "
    write_rows(here / "train.jsonl", [{**row, "prompt": prompt + row["prompt"]} for row in GOLD])
    report = workflows.verify(Recipe.from_mapping({**settings, "adapter": None, **trained}))
    assert report.holds, str(report)
    assert report.layers_by_hand == by_hand
    assert report.cuts[2].computed_tokens < report.tokens
    worst = {cut.worst_parameter for cut in report.cuts} - {""}  # empty where not a bit differs
    assert worst
    assert all(("lora_" in name) == ("adapter" in trained) for name in worst)


def test_what_cannot_be_is_refused_before_training(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings["adapter"] = {"kind": "qlora"}
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
        with pytest.raises(ModelError, match=r"4 bits .* not installed"):
            train(settings)
    settings["model"] = {**settings["model"], "dtype": "float64"}
    with pytest.raises(ModelError, match="no float64" if found("bitsandbytes") else "not installed"):
        train(settings)
    settings["adapter"] = {"target_modules": ["qproj"]}
    with pytest.raises(ConfigError, match=r"'qproj' matches no name .*'q_proj'"):
        train(settings)
    assert not Path("runs/it").exists()


def test_an_adapter_on_an_adapter_is_refused(settings: dict[str, Any]) -> None:
    folder = train(settings).output_dir / "adapter"
    settings |= {"model": {"path": str(folder), "device": "cpu"}, "output_dir": "runs/more"}
    with pytest.raises(ConfigError, match="is an adapter itself"):
        train(settings)
    # In full it goes on from the merged weights.
    settings["adapter"] = None
    result = train(settings)
    assert result.training.nll_before == pytest.approx(nll(folder), abs=1e-6)
