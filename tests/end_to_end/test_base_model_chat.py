"""A base model without a chat template learns to chat: the recipe's template and its control tokens come with the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import goldsmith
from goldsmith import storage
from goldsmith.errors import ConfigError, MachineError
from goldsmith.recipe import Recipe, load_recipe
from goldsmith.workflows.run_result import RunResult

CONTROL = ["<|im_end|>", "<|im_start|>"]
# As published templates do that tell the model which day it is.
DATED = (
    "{{- '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' -}}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test's own folder is the current one; one thread."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def write_chats(path: str, numbers: range) -> None:
    chats = (
        [{"role": "user", "content": f"{number} + 1?"}, {"role": "assistant", "content": str(number + 1)}]
        for number in numbers
    )
    Path(path).write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


@pytest.fixture
def settings(here: Path, tiny_model_folder: Path) -> dict[str, Any]:
    write_chats("train.jsonl", range(24))
    write_chats("eval.jsonl", range(30, 36))
    return {
        "model": {"path": str(tiny_model_folder), "device": "cpu"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "rendering": {"chat_template": "chatml"},
        "training": {"epochs": 2, "batch_size": 8},
        "optimizer": {"learning_rate": 0.02},
        "checkpoint": {"every_steps": 2},
        "report": {"examples": 2},
        "output_dir": "runs/it",
    }


def train(settings: dict[str, Any]) -> RunResult:
    return goldsmith.train(Recipe.from_mapping(settings), quiet=True)


def interrupted(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose disk was full after the fourth step's checkpoint."""
    monkeypatch.setenv("GOLDSMITH_FAIL_POINT", "checkpoint.begin:3!enospc")
    storage._passings.clear()
    with pytest.raises(MachineError, match="disk is full"):
        train(settings)
    monkeypatch.delenv("GOLDSMITH_FAIL_POINT")
    storage._passings.clear()


@pytest.mark.parametrize("adapter", [None, {"rank": 4, "alpha": 8.0}])
@pytest.mark.parametrize("num_spare", [0, 5])
def test_control_tokens_are_added_trained_and_saved(
    settings: dict[str, Any],
    tiny_model_folder: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapter: dict[str, Any] | None,
    num_spare: int,
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    size = base.config.vocab_size
    if num_spare:  # as published models are that have more rows than their tokenizer has tokens
        with torch.random.fork_rng():
            base.resize_token_embeddings(size + num_spare, mean_resizing=False)
        base.save_pretrained(here / "base")
        AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(here / "base")
        settings["model"]["path"] = str(here / "base")
    settings["adapter"] = adapter
    result = train(settings)
    assert result.training.nll_before is not None
    assert result.training.nll_after is not None
    assert result.training.nll_after < result.training.nll_before - 0.3
    assert result.parity is not None
    assert result.parity.largest_difference < 1e-5

    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    assert tokenizer.convert_tokens_to_ids(CONTROL) == [size, size + 1]
    served = tokenizer.apply_chat_template([{"role": "user", "content": "1?"}], add_generation_prompt=True)
    assert served["input_ids"][0] == size + 1
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert model.config.vocab_size == size + max(2, num_spare)
    assert size in model.generation_config.eos_token_id  # <|im_end|>
    old = base.get_input_embeddings().weight.detach()
    mean = old[:size].mean(dim=0)
    rows = model.get_input_embeddings().weight.detach()
    # They began at the mean of the known ones, and were trained; with an adapter, they alone.
    assert all(1e-3 < float((row - mean).norm()) < 0.5 for row in rows[size : size + 2])
    assert torch.equal(rows[:size], old[:size]) == (adapter is not None)

    # A run that was stopped takes the same tokens up again, and ends the same.
    settings["output_dir"] = "runs/other"
    interrupted(settings, monkeypatch)
    resumed = train(settings)
    for file in ("model/model.safetensors", "model/tokenizer.json", "model/generation_config.json", "examples.jsonl"):
        assert (resumed.output_dir / file).read_bytes() == (result.output_dir / file).read_bytes()
    assert (
        load_file(resumed.model_dir / "model.safetensors").keys()
        == load_file(result.model_dir / "model.safetensors").keys()
    )


def test_a_control_token_is_no_word(settings: dict[str, Any]) -> None:
    settings["model"]["new_tokens"] = ["<|im_end|>"]
    with pytest.raises(ConfigError, match=r"new_tokens: '<\|im_end\|>' is a control token"):
        train(settings)
    assert not Path("runs/it").exists()


def test_a_template_of_a_file_that_is_gone_renders_a_finished_run(settings: dict[str, Any], here: Path) -> None:
    file = here / "turns.jinja"
    file.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    settings["rendering"] = {"chat_template": str(file), "control_tokens": ["[end]", "[user]", "[assistant]"]}
    result = train(settings)
    file.unlink()
    checkpoint = sorted((result.output_dir / "checkpoints").glob("step-*"))[-1]
    for opened in (result.output_dir, checkpoint):
        found = goldsmith.score(str(opened), "eval.jsonl", device="cpu").nll_per_token.estimate
        assert found == pytest.approx(result.training.nll_after, abs=1e-6)
    answers = goldsmith.workflows.generate(str(result.output_dir), prompts=["3 + 1?"], max_new_tokens=4, device="cpu")
    assert len(answers.answers) == 1


def test_the_date_is_resolved_once(
    settings: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Day:
        today = "2026-02-03"

    monkeypatch.setattr("goldsmith.workflows.run.today", lambda device: Day.today)
    plain = train(settings)
    assert load_recipe(plain.output_dir / "recipe.yaml").rendering.date is None  # chatml writes no date

    (here / "dated.jinja").write_text(DATED)
    settings["rendering"] = {"chat_template": str(here / "dated.jinja")}
    settings["output_dir"] = "runs/whole"
    whole = goldsmith.train(Recipe.from_mapping(settings))
    assert "rendering.date is 2026-02-03" in capsys.readouterr().err
    assert load_recipe(whole.output_dir / "recipe.yaml").rendering.date == "2026-02-03"

    settings["output_dir"] = "runs/other"
    interrupted(settings, monkeypatch)
    Day.today = "2026-02-04"
    resumed = train(settings)
    assert load_recipe(resumed.output_dir / "recipe.yaml").rendering.date == "2026-02-03"
    for file in ("model/model.safetensors", "examples.jsonl"):
        assert (resumed.output_dir / file).read_bytes() == (whole.output_dir / file).read_bytes()
    # Another day is another text: a run that begins on it sees other data.
    settings["output_dir"] = "runs/tomorrow"
    tomorrow = train(settings)
    fingerprints = [json.loads((run.output_dir / "data.json").read_text()) for run in (whole, tomorrow)]
    assert fingerprints[0]["train"]["fingerprint"] != fingerprints[1]["train"]["fingerprint"]

    settings["rendering"]["date"] = "2026-02-05"
    settings["output_dir"] = "runs/other"
    with pytest.raises(MachineError, match=r"rendering\.date"):
        train(settings)
