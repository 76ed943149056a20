"""The budget of a step against the sizes worked out by hand, and against what a step was seen to take."""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_trainer import build_model, build_trainer, make_examples
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from goldsmith.data.dataset import Dataset
from goldsmith.models import decoder_layers
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.storage import format_bytes
from goldsmith.training import step_memory
from goldsmith.training.memory import (
    ModelShape,
    largest_microbatch,
    memory_budget,
    parse_bytes,
)
from goldsmith.training.trainer import TrainingConfig
from goldsmith.types import TokenizedExample

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h

# SmolLM2-135M in float32.
SMOLLM2_135M = ModelShape(
    parameters=134_515_008,
    trainable=134_515_008,
    largest_parameter=49_152 * 576,
    layers=30,
    width=576,
    inner=1536,
    query_width=576,
    key_width=192,
    heads=9,
    vocabulary=49_152,
    is_output_trained=True,
    by_hand=True,
    element_bytes=4,
    product_bytes=4,
)


def budget(shape: ModelShape = SMOLLM2_135M, **settings: Any) -> Any:
    return memory_budget(shape, **{"tokens": 4096, "gold_tokens": 2048, "activation_checkpointing": "none", **settings})


def test_every_term_of_the_135m_shape() -> None:
    none = budget()
    parameters = 134_515_008 * 4
    assert none.bytes_of("parameters") == none.bytes_of("gradients") == parameters
    assert none.bytes_of("optimizer state") == 2 * parameters
    assert none.bytes_when("always") == pytest.approx(2.15e9, rel=1e-2)
    assert none.bytes_of("inputs of all layers") == 30 * 576 * 4096 * 4
    assert none.bytes_of("queries, keys, values, in all layers") == 30 * (576 + 2 * 192) * 4096 * 4
    assert none.bytes_of("gate and up projections, in all layers") == 30 * 2 * 1536 * 4096 * 4
    assert none.bytes_of("logits of a chunk") == (64 * 2**20 // (49_152 * 4)) * 49_152 * 4
    assert none.bytes_of("weights before the update") == parameters
    assert none.total == none.bytes_when("always") + none.bytes_when("gradient")
    assert none.to_json()["total_bytes"] == none.total
    assert sum(none.to_json()["bytes"].values()) == sum(term.bytes for term in none.terms)
    assert "parameters 538 MB, gradients 538 MB, optimizer state 1.08 GB" in str(none)


def test_what_each_setting_saves() -> None:
    none, layers = budget(), budget(activation_checkpointing="layers")
    kept = sum(term.bytes for term in none.terms if term.name.endswith("in all layers"))
    once = sum(term.bytes for term in layers.terms if term.name.endswith("in one layer"))
    assert kept == 30 * once
    assert none.total - layers.total == kept - once
    parameters = 134_515_008
    assert budget(state_dtype="bfloat16").bytes_of("optimizer state") == 4 * parameters
    assert budget(state_dtype="int8").bytes_of("optimizer state") == pytest.approx(2 * parameters, rel=0.02)
    assert budget(step_in_backward=True).bytes_of("gradients") == 49_152 * 576 * 4
    assert budget(measures_update=False).bytes_when("update") == 0
    # With few tokens the update is what takes the most.
    few = budget(tokens=10, gold_tokens=5)
    assert few.total == few.bytes_when("always") + max(few.bytes_when("gradient"), few.bytes_when("update"))


def test_half_precision_and_eager_layers() -> None:
    eager = budget(replace(SMOLLM2_135M, by_hand=False))
    assert eager.bytes_when("gradient") > 1.5 * budget().bytes_when("gradient")
    half = budget(replace(SMOLLM2_135M, by_hand=False, product_bytes=2))
    assert half.bytes_of("parameters in half precision") == 2 * 134_515_008
    names = [f"{name}, in all layers" for name in ("queries, keys, values", "gate and up projections")]
    assert 2 * half.bytes_of(*names) == eager.bytes_of(*names)
    frozen = budget(replace(SMOLLM2_135M, trainable=10**6, largest_parameter=10**4, is_output_trained=False))
    assert frozen.bytes_of("gradients") == 4 * 10**6
    assert frozen.bytes_of("gradient of the output embedding") == 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2), (2, 16, 64, 16, 16, False)),
        (
            MixtralConfig(
                vocab_size=50,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
                num_experts_per_tok=2,
            ),
            (1, 16, 48, 16, 8, False),
        ),
    ],
    ids=["gpt2", "mixtral"],
)
def test_the_shape_of_a_model(config: Any, expected: tuple[Any, ...]) -> None:
    shape = ModelShape.of(LikelihoodModel(AutoModelForCausalLM.from_config(config)))
    assert (
        shape.layers,
        shape.width,
        shape.inner,
        shape.query_width,
        shape.key_width,
        shape.by_hand,
    ) == expected
    assert shape.parameters == shape.trainable


def data_of(lengths: list[int], repeats: list[float] | None = None) -> Dataset:
    examples = [
        TokenizedExample(
            token_ids=np.ones(length, dtype=np.int32),
            target_weights=np.eye(1, length, length - 1, dtype=np.float32)[0],
            example_id=str(number),
            example_weight=1.0,
            source="rows",
            num_bytes=0,
        )
        for number, length in enumerate(lengths)
    ]
    return Dataset(examples, repeats=repeats)


def test_the_largest_microbatch() -> None:
    data = data_of([10, 3, 20, 5])
    assert largest_microbatch(data, batch_size=2, tokens_per_microbatch=1000) == (30, 2)
    assert largest_microbatch(data, batch_size=2, tokens_per_microbatch=25) == (25, 2)
    assert largest_microbatch(data, batch_size=2, tokens_per_microbatch=5) == (20, 2)  # a row longer than the budget
    assert largest_microbatch(data, batch_size=9, tokens_per_microbatch=1000) == (38, 4)
    repeated = data_of([10, 3], repeats=[2.5, 1.0])
    assert largest_microbatch(repeated, batch_size=4, tokens_per_microbatch=1000) == (33, 4)


# --- the choice


def test_auto_computes_layers_again_where_they_do_not_fit(tmp_path: Path) -> None:
    examples = make_examples(8)
    plenty = build_trainer(tmp_path, examples, memory_limit="1GB")
    none, layers = plenty.memory.budget("none").total, plenty.memory.budget("layers").total
    assert plenty.memory.activation_checkpointing == "none"
    assert layers < none
    tight = build_trainer(tmp_path, examples, memory_limit=none - 1)
    assert tight.memory.activation_checkpointing == "layers"
    assert tight.memory.budget().total == layers
    assert build_trainer(tmp_path, examples, memory_limit=none).memory.activation_checkpointing == "none"
    asked = build_trainer(tmp_path, examples, memory_limit=1, activation_checkpointing="none")
    assert asked.memory.activation_checkpointing == "none"
    for one, other in zip(plenty.train_step(1), tight.train_step(1), strict=True):
        if not isinstance(one, list):
            assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)


def test_without_a_limit_it_is_what_the_machine_has_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    free = step_memory.available_bytes(cpu)
    assert 0 < free < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert step_memory.available_bytes(cpu) < free / 3
    monkeypatch.setattr(step_memory, "available_bytes", lambda _device: 0)
    model = build_model()
    assert build_trainer(tmp_path, make_examples(8), model=model).memory.activation_checkpointing == "layers"


def test_the_limit_of_a_container(tmp_path: Path) -> None:
    assert step_memory._free_of_container(tmp_path) == 1 << 62
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("500\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 300\n")
    assert step_memory._free_of_container(tmp_path) == 1 << 62
    (tmp_path / "memory.max").write_text("1000\n")
    assert step_memory._free_of_container(tmp_path) == 800


@pytest.mark.parametrize("text", ["8 apples", "-1", "0", "GB", "1e9GB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="not a size in memory"):
        TrainingConfig(memory_limit=text)


def test_sizes() -> None:
    assert TrainingConfig(memory_limit="8GB").memory_limit == "8GB"
    assert parse_bytes("2 KiB") == 2048
    assert format_bytes(999_000_000) == "999 MB"


# --- against what is taken


def peak_of(work: Any) -> int:
    """Bytes that resident memory grew by at most while this ran: every buffer taken from the system, and given back to it."""
    library = ctypes.CDLL(None)
    gc.collect()
    library.malloc_trim(0)
    library.mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    finally:
        library.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # where it goes by itself in time


def _status(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="waits for a system that measures the peak of a part of a process")
@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "transformers"])
def test_the_estimate_is_near_what_a_step_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, by_hand: bool
) -> None:
    """A model whose activations outweigh it; the process is warm, so that only the step's own buffers are counted."""
    if not by_hand:
        monkeypatch.setattr(decoder_layers, "LAYERS", {})
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    for activation_checkpointing in ("none", "layers"):
        trainer = build_trainer(
            tmp_path,
            data_of([256] * 16),
            model=LikelihoodModel(AutoModelForCausalLM.from_config(config)),
            batch_size=16,
            shared_context="off",
            activation_checkpointing=activation_checkpointing,
        )
        assert bool(trainer.model.num_layers_by_hand) == by_hand
        estimate = trainer.memory.budget()
        assert estimate.tokens == 4096
        own = estimate.total - estimate.bytes_of("parameters")
        if activation_checkpointing == "none":
            assert estimate.bytes_when("gradient") > 5 * estimate.bytes_when("always")
        peak = peak_of(lambda trainer=trainer: trainer.train_step(1))
        print(f"{activation_checkpointing}: estimate {own / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB")
        assert 0.75 * peak < own < 1.6 * peak, (activation_checkpointing, own, peak)
