"""What products are taken in: as the recipe says, on every device. A GPU is played by a model that says it is on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import goldsmith
from goldsmith import workflows
from goldsmith.errors import ConfigError
from goldsmith.models import likelihood
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.step import autocast
from goldsmith.recipe import Recipe
from goldsmith.training.memory import ModelShape
from goldsmith.workflows import run
from goldsmith.workflows.materials import compute_dtype_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 128,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture
def new_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that has bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)


def model_on(device: torch.device, dtype: torch.dtype | None, *, parameters: torch.dtype = torch.float32) -> Any:
    class Placed(LikelihoodModel):
        @property
        def device(self) -> torch.device:
            return device

    return Placed(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).to(parameters), compute_dtype=dtype)


@pytest.mark.usefixtures("new_gpu")
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, None),
    ],
)
def test_on_a_gpu(dtype: torch.dtype | None, expected: torch.dtype | None) -> None:
    model = model_on(CUDA, dtype)
    assert model.autocast_dtype == expected
    # The kernels for shared contexts take half precision only, and the budget counts what products take.
    assert model.shares_contexts(100) is (expected is not None)
    assert ModelShape.of(model).product_bytes == (4 if expected is None else 2)


@pytest.mark.usefixtures("new_gpu")
def test_float64_is_left_alone() -> None:
    model = model_on(CUDA, None, parameters=torch.float64)
    assert model.autocast_dtype is None
    assert ModelShape.of(model).product_bytes == 8


def test_a_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert model_on(CUDA, None).autocast_dtype is None


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_autocast_is_the_models(dtype: torch.dtype | None) -> None:
    with autocast(model_on(CPU, dtype)):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (dtype or torch.float32)


@pytest.mark.usefixtures("new_gpu")
def test_the_recipes_names() -> None:
    def of(dtype: str, device: torch.device) -> torch.dtype:
        return compute_dtype_of(Recipe.from_mapping({"model": {"path": "m", "dtype": dtype}, "data": {}}), device)

    assert of("auto", CUDA) == of("bfloat16", CUDA) == torch.bfloat16
    assert of("float32", CUDA) == of("auto", CPU) == of("bfloat16", CPU) == torch.float32
    assert of("float64", CUDA) == torch.float64
    with pytest.raises(ConfigError, match="float16"):
        of("float16", CUDA)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """On a machine where `auto` means bfloat16: here the CPU, so that its products can be seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(likelihood, "resolve_dtype", lambda dtype, device: torch.bfloat16)
    rows = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"architecture": "llama", **{key: value for key, value in SIZES.items() if key != "vocab_size"}}
    return {
        "model": {"init": shape, "device": "cpu", "dtype": "float32"},
        "tokenizer": {"train": {"kind": "character"}},
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl"},
        "training": {"max_steps": 1, "batch_size": 6},
        "output_dir": "run",
    }


def test_verify_compares_float32_with_float32(recipe: dict[str, Any]) -> None:
    report = workflows.verify(Recipe.from_mapping(recipe), dtype="float32")
    assert report.dtype == "float32"
    # bfloat16 on one side differs by 1e-3 and more.
    assert max(cut.loss_difference for cut in report.cuts) < 1e-5
    assert max(cut.log_prob_difference for cut in report.cuts) < 1e-5


def test_training_and_evaluation_compute_in_what_the_recipe_names(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    own = LikelihoodModel.gold_states

    def gold_states(self: LikelihoodModel, batch: Any) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return own(self, batch)

    monkeypatch.setattr(LikelihoodModel, "gold_states", gold_states)
    workflows.train(Recipe.from_mapping(recipe), quiet=True)
    assert len(seen) > 3
    assert not any(seen)
    seen.clear()
    monkeypatch.setattr(run, "compute_dtype_of", lambda recipe, device: torch.bfloat16)
    workflows.train(Recipe.from_mapping({**recipe, "output_dir": "half"}), quiet=True)
    assert any(seen)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scoring_in_half_precision_on_a_cpu(tiny_model_folder: Path, dtype: Any) -> None:
    rows = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1) * 9} for number in range(6)]
    exact, half = (
        goldsmith.score(str(tiny_model_folder), rows, device="cpu", dtype=name).nll_per_token.estimate
        for name in ("float32", dtype)
    )
    assert half != exact
    assert half == pytest.approx(exact, rel=2e-3)


def test_verify_asks_for_the_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from goldsmith.workflows import verifying

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=7))
    assert verifying._memory_bytes(CUDA) == 7
    assert verifying._memory_bytes(CPU) > 2**27
