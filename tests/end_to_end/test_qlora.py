"""`adapter: {kind: qlora}` from the recipe to folders that others load, on a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import goldsmith
from goldsmith import storage, workflows
from goldsmith.errors import MachineError, ModelError
from goldsmith.recipe import Recipe

pytest.importorskip("bitsandbytes", reason="waits for bitsandbytes (extra `qlora`)")

GOLD = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(16)]


@pytest.fixture(scope="module")
def base(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows of weights are multiples of 64: of 16 and 32 they are refused, see `docs/adapters.md`."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    Path("gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOLD))
    yield {
        "model": {"path": str(base), "device": "cpu"},
        "adapter": {"kind": "qlora", "rank": 4, "alpha": 8.0},
        "data": {"train": "gold.jsonl", "eval": "gold.jsonl"},
        "training": {"max_steps": 4, "batch_size": 8},
        "optimizer": {"learning_rate": 0.02},
        "evaluation": {"every_steps": 2},
        "checkpoint": {"every_steps": 1, "keep": 9},
        "report": {"examples": 0},
        "output_dir": "run",
    }
    torch.set_num_threads(threads)


def train(settings: dict[str, Any]) -> Any:
    return goldsmith.train(Recipe.from_mapping(settings), quiet=True)


def nll(model: str) -> float:
    return goldsmith.score(model, "gold.jsonl", device="cpu").nll_per_token.estimate


def test_the_plain_path_agrees(settings: dict[str, Any]) -> None:
    report = workflows.verify(Recipe.from_mapping(settings))
    assert report.holds, str(report)
    assert report.dtype == "float32"
    assert all("lora_" in cut.worst_parameter for cut in report.cuts if cut.worst_parameter)
    with pytest.raises(ModelError, match="no float64"):
        workflows.verify(Recipe.from_mapping(settings), dtype="float64")


def test_a_run_its_folders_and_its_checkpoints(settings: dict[str, Any], base: Path) -> None:
    import peft

    result = train(settings)
    assert result.training.nll_after < result.training.nll_before - 0.05
    # The result is what was trained: the factors added to the unpacked weights.
    assert result.parity.merge_difference < 1e-5
    assert abs(result.parity.rounding_cost) < 1e-6
    assert nll("run") == pytest.approx(result.training.nll_after, abs=1e-6)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    halfway = next(line["nll"] for line in lines if line["kind"] == "evaluation" and line["step"] == 2)
    assert nll("run/checkpoints/step-00000002") == pytest.approx(halfway, abs=1e-6)
    with pytest.raises(ModelError, match="4 bits know no float64"):
        goldsmith.score("run/checkpoints/step-00000002", "gold.jsonl", device="cpu", dtype="float64")
    model = AutoModelForCausalLM.from_pretrained("run/model")
    assert getattr(model.config, "quantization_config", None) is None

    # On weights in 4 bits the adapter is the same model; on the base model's own it is not quite.
    quantization: Any = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    packed = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, device_map="cpu")
    # Not in evaluation: there a CPU with bfloat16 instructions would take its products in bfloat16.
    through_peft = peft.PeftModel.from_pretrained(packed, "run/adapter").train()
    ids = AutoTokenizer.from_pretrained("run/adapter")("7 + 1 = 8", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(through_peft(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert 1e-5 < abs(nll("run/adapter") - result.training.nll_after) < 0.5


def test_a_checkpoint_is_scored_in_float32(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it trains in bfloat16, as on a GPU."""
    train(settings)
    monkeypatch.setattr("goldsmith.workflows.materials._product_dtype", lambda dtype, device: torch.bfloat16)
    assert nll("run/checkpoints/step-00000004") == pytest.approx(nll("run"), abs=1e-6)


def test_a_run_that_was_stopped_ends_the_same(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    train(settings)
    settings["output_dir"] = "other"
    monkeypatch.setenv("GOLDSMITH_FAIL_POINT", "checkpoint.begin:3!enospc")
    storage._passings.clear()
    with pytest.raises(MachineError, match="disk is full"):
        train(settings)
    monkeypatch.delenv("GOLDSMITH_FAIL_POINT")
    storage._passings.clear()
    train(settings)
    last = "checkpoints/step-00000004"
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors", "examples.jsonl"):
        assert Path("other", file).read_bytes() == Path("run", file).read_bytes(), file
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert Path("other", last, file).read_bytes() == Path("run", last, file).read_bytes(), file
    memory = json.loads(Path("run/memory.json").read_text())["bytes"]
    assert memory["weights of one projection, unpacked"] == 64 * 128 * 4
