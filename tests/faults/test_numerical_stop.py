"""A loss that is not finite: exit code 5, the step and the example by name, nothing updated, the last checkpoint whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import EVAL, TRAIN, TrainingRun, checkpoint_steps, read_metrics, valid_checkpoints, without_measures
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

# An untied model, and a character that one example alone has: what is wrong with its embedding touches nothing else.
RARE = "Z"


@pytest.fixture
def run(tmp_path: Path, small_model_folder: Path) -> Callable[..., TrainingRun]:
    """`run(value, split="train")`: the embedding of `Z` holds `value`; one row of the split has a `Z`."""

    def make(value: float, split: str = "train") -> TrainingRun:
        model, data = tmp_path / "model", tmp_path / "data"
        shutil.copytree(small_model_folder, model)
        config = LlamaConfig.from_pretrained(model)
        config.tie_word_embeddings = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(model)
        vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
        weights = load_file(model / "model.safetensors")
        weights["model.embed_tokens.weight"][vocabulary[RARE]] = value
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        data.mkdir()
        bad = {"id": "the bad one", "prompt": f"{RARE} = ", "completion": "26"}
        train = [*TRAIN[:5], bad, *TRAIN[6:]] if split == "train" else TRAIN
        evaluation = [*EVAL, bad] if split == "eval" else EVAL
        for name, rows in (("train.jsonl", train), ("eval.jsonl", evaluation)):
            (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"checkpoint.every_steps": 1, "evaluation.every_steps": None, "training.seed": 1}
        return TrainingRun(tmp_path / "a", data=data, model=model, changes=changes)

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite(run: Callable[..., TrainingRun], value: float) -> None:
    broken = run(value)
    outcome = broken.train()
    assert outcome.exit_code == 5, outcome.stderr
    assert "Traceback" not in outcome.stderr
    records = [record for record in read_metrics(broken.metrics) if record["kind"] == "step"]
    done = len(records)
    assert 0 < done < 4, "the seed of this test must put the bad row into a later step of the first epoch"
    assert f"step {done + 1}: " in outcome.stderr
    assert f"as they were after step {done}" in outcome.stderr
    named = outcome.stderr.partition("not finite because of")[2]
    assert "the bad one (" in named
    assert f"{broken.folder.parent / 'data' / 'train.jsonl'}:6" in named
    assert not any(f"{row['id']} (" in named for row in TRAIN), "no other example is blamed"
    # The step that failed left no trace: the checkpoint after the last good step is the newest, and it is whole.
    assert valid_checkpoints(broken)[-1] == done
    weights = load_file(broken.checkpoint(done) / "model.safetensors")
    changed = weights["model.embed_tokens.weight"]
    assert int(changed.isfinite().all(dim=1).logical_not().sum()) == 1
    for name, tensor in load_file(broken.checkpoint(done) / "optimizer.safetensors").items():
        assert tensor.isfinite().all(), name
    examples = [json.loads(line) for line in (broken.output / "examples.jsonl").read_text().splitlines()]
    assert max(example["step"] for example in examples) == done
    # The same command meets the same step again.
    before = without_measures(read_metrics(broken.metrics))
    again = broken.train()
    assert again.exit_code == 5
    assert f"step {done + 1}: " in again.stderr
    assert without_measures(read_metrics(broken.metrics)) == before


def test_an_evaluation_that_is_not_finite(run: Callable[..., TrainingRun]) -> None:
    broken = run(float("nan"), "eval")
    outcome = broken.train()
    assert outcome.exit_code == 5, outcome.stderr
    assert "step 0" in outcome.stderr
    assert "the bad one" in outcome.stderr
    assert "eval.jsonl:6" in outcome.stderr
    assert checkpoint_steps(broken) == []
