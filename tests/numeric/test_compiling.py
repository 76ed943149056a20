"""Compiled layers: the gradient of uncompiled ones, one compilation for packs of all sizes, also where they are computed again."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config, LlamaConfig

import goldsmith
from goldsmith import storage
from goldsmith.data.packing import pack
from goldsmith.errors import ConfigError, MachineError
from goldsmith.models import compiling
from goldsmith.models.checkpointing import checkpoint_layers
from goldsmith.models.compiling import compile_layers, require_compilable
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.recipe import Recipe
from goldsmith.types import TokenizedExample

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
CONFIGS = {
    # Norms that round to float32 inside, soft caps, and a window on every other layer.
    "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=6, sliding_window=8),
    "gpt2": GPT2Config(vocab_size=53, n_embd=24, n_layer=2, n_head=4, n_positions=64),
}
# Of the rows of each pack.
PACKS = [[9, 28, 5], [14, 11, 7, 30], [50], [3, 2], [20, 21, 22, 23, 24]]

wants_compiler = pytest.mark.skipif(not compiling._has_cpp_compiler(), reason="waits for a C++ compiler")


def build(name: str) -> LikelihoodModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Dropout off, as training has it.
        return LikelihoodModel(AutoModelForCausalLM.from_config(CONFIGS[name]).double().eval())


def example(length: int, number: int) -> TokenizedExample:
    generator = np.random.default_rng(number)
    return TokenizedExample(
        token_ids=generator.integers(0, 53, size=length).astype(np.int32),
        target_weights=np.array([0.0] + [1.0] * (length - 1), dtype=np.float32),
        example_id=str(number),
        example_weight=1.0,
        source="",
        num_bytes=0,
    )


def gradient_of(model: LikelihoodModel, lengths: list[int]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(
        pack([example(length, number) for number, length in enumerate(lengths)], range(len(lengths)))
    ).weighted_nll.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ["gemma2"])
def test_the_gradient_in_one_compilation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the compiler but its last stage, which only writes the same operations as C++ and takes half a minute."""
    monkeypatch.setattr(compiling.torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = build(name), build(name)
    assert compile_layers(compiled.causal_lm) == 2
    assert compile_layers(compiled.causal_lm) == 2
    counters.clear()
    graphs = set()
    for is_checkpointed in (False, True):
        if is_checkpointed:
            checkpoint_layers(compiled.causal_lm)
        for lengths in PACKS:
            expected, got = gradient_of(plain, lengths), gradient_of(compiled, lengths)
            assert expected.keys() == got.keys()
            total = float(torch.nn.utils.get_total_norm(list(expected.values())))
            for key, gradient in expected.items():
                assert float((got[key] - gradient).norm()) <= 1e-6 * total, (lengths, key)
            graphs.add(counters["stats"]["unique_graphs"])
    assert len(graphs) == 1
    assert min(graphs) > 0


def test_layers_by_hand_are_not_compiled() -> None:
    model = LikelihoodModel(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)))
    with pytest.raises(ConfigError, match="computed by hand"):
        require_compilable(model.causal_lm)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_has_cpp_compiler", lambda: False)
    with pytest.raises(MachineError, match=r"C\+\+ compiler") as error:
        require_compilable(build("gpt2").causal_lm)
    assert error.value.exit_code == 7


@wants_compiler
def test_a_compiled_run_that_was_stopped_ends_the_same(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, "model")
    tokenizer = AutoTokenizer.from_pretrained("model")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    rows = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(16)]
    settings: dict[str, Any] = {
        "model": {"path": "model", "device": "cpu"},
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl"},
        "training": {"max_steps": 6, "batch_size": 5, "compile": "layers", "activation_checkpointing": "layers"},
        "optimizer": {"learning_rate": 0.02},
        "checkpoint": {"every_steps": 2},
    }
    Path("rows.jsonl").write_text("".join(f"{row}\n".replace("'", '"') for row in rows))

    def train(folder: str, compile_: str = "layers") -> Any:
        training = {**settings["training"], "compile": compile_}
        return goldsmith.train(Recipe.from_mapping({**settings, "training": training, "output_dir": folder}))

    whole = train("whole")
    monkeypatch.setenv("GOLDSMITH_FAIL_POINT", "checkpoint.begin:2!enospc")
    for folder in ("stopped", "changed"):
        storage._passings.clear()
        with pytest.raises(MachineError, match="disk is full"):
            train(folder)
    monkeypatch.delenv("GOLDSMITH_FAIL_POINT")
    storage._passings.clear()
    resumed = train("stopped")
    for file in ("model/model.safetensors", "examples.jsonl"):
        assert (resumed.output_dir / file).read_bytes() == (whole.output_dir / file).read_bytes()
    capsys.readouterr()
    changed = train("changed", "off")
    assert "training.compile: layers before, off now; the result will be equal to rounding" in capsys.readouterr().err
    assert changed.training.nll_after == pytest.approx(whole.training.nll_after, rel=1e-4)
