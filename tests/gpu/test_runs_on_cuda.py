"""Whole runs on a CUDA device: trained from a recipe, stopped, out of memory, in lower precision, with an adapter, verified.

**Not yet run on any GPU**: written on a machine without one, for the first person who has one. What these tests are for is listed
as never run in `design/0003-cuda.md`; whoever runs them should bring that list, `docs/exactness.md`, `docs/memory.md` and
`docs/adapters.md` up to date.

    python -m pytest tests/gpu -ra            # bitsandbytes and torchao installed: nothing of it is skipped then

Bounds are those of bfloat16 products (8 significant bits) unless said otherwise; bits are not compared: on CUDA no two runs need be
equal to the bit.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import goldsmith
from goldsmith import storage, workflows
from goldsmith.data.dataset import Dataset
from goldsmith.errors import MachineError
from goldsmith.models.adapters import AdapterBase, AdapterConfig, attach_adapter, quantization_of
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.load import load_causal_lm
from goldsmith.models.quantized import copy_unpacked
from goldsmith.models.step import forward_backward
from goldsmith.recipe import Recipe
from goldsmith.types import TokenizedExample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a CUDA device")

STEPS = 6
ADAPTERS = ["none", "lora", "dora", "qlora"]


@pytest.fixture(scope="module")
def base(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with heads of 64, as the kernels want them, and one character a token."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(48)]
    Path("gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(base), "device": "cuda"},
        "data": {"train": "gold.jsonl", "eval": "gold.jsonl"},
        "training": {"max_steps": STEPS, "batch_size": 16, "tokens_per_microbatch": 128},
        "optimizer": {"learning_rate": 2e-3},
        "checkpoint": {"every_steps": 2, "keep": 9},
        "report": {"examples": 4},
        "output_dir": "run",
    }


def with_adapter(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    if kind == "none":
        return settings
    pytest.importorskip("peft", reason="waits for peft (extra `adapters`)")
    if kind == "qlora":
        pytest.importorskip("bitsandbytes", reason="waits for bitsandbytes (extra `qlora`)")
    return {**settings, "adapter": {"kind": kind, "rank": 8, "alpha": 16.0}, "optimizer": {"learning_rate": 1e-2}}


def changed(settings: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """`changed(settings, training={...})`: these keys of a section are others."""
    return {
        **settings,
        **{key: {**settings.get(key, {}), **new} if isinstance(new, dict) else new for key, new in sections.items()},
    }


def train(settings: dict[str, Any], *, quiet: bool = True) -> Any:
    gc.collect()  # of the run before this one
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return goldsmith.train(Recipe.from_mapping(settings), quiet=quiet)


def steps_of(folder: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def losses(folder: str) -> list[float]:
    return [line["loss"] for line in steps_of(folder)]


def nll(model: str, device: str) -> float:
    """In float32, as scoring has it."""
    return goldsmith.score(model, "gold.jsonl", device=device).nll_per_token.estimate


# --- goldsmith train, from a recipe to a result


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_run(settings: dict[str, Any], base: Path, kind: str, dtype: str) -> None:
    """The run proves by itself that its result says what was trained: in float32, whatever it trained in."""
    result = train(changed(with_adapter(settings, kind), model={"dtype": dtype}))
    tolerance = 2e-2 if dtype == "auto" else 1e-4
    assert result.training.nll_after < result.training.nll_before - 0.1
    assert result.parity.largest_difference < 1e-4
    assert (result.parity.merge_difference is None) == (kind == "none")
    assert json.loads(Path("run/environment.json").read_text())["device"] == torch.cuda.get_device_name()
    if kind != "qlora":  # which begins with other weights: those of 4 bits
        assert result.training.nll_before == pytest.approx(nll(str(base), "cpu"), rel=tolerance)
    for device in ("cpu", "cuda"):
        assert nll("run", device) == pytest.approx(result.training.nll_after, rel=tolerance)
    checkpoint = f"run/checkpoints/step-{STEPS:08d}"
    assert nll(checkpoint, "cuda") == pytest.approx(result.training.nll_after, rel=2e-2)
    assert all(line["peak_memory_bytes"] > 0 for line in steps_of("run"))
    answers = goldsmith.generate("run", prompts=["3 + 1 = "], max_new_tokens=3, device="cuda")
    assert len(answers.answers) == 1


def test_the_precision_of_products_is_the_recipes(settings: dict[str, Any]) -> None:
    """The first step's loss is before any update: float32 is the CPU's, bfloat16 is near it and another number."""
    names = {
        "cpu": ("cpu", "float32"),
        "full": ("cuda", "float32"),
        "half": ("cuda", "auto"),
        "named": ("cuda", "bfloat16"),
    }
    first = {}
    for name, (device, dtype) in names.items():
        train(changed(settings, model={"device": device, "dtype": dtype}, output_dir=name))
        first[name] = losses(name)[0]
    assert first["full"] == pytest.approx(first["cpu"], rel=1e-5)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        assert first["half"] == pytest.approx(first["cpu"], rel=1e-2)
        assert abs(first["half"] / first["cpu"] - 1) > 1e-6
        assert first["named"] == pytest.approx(first["half"], rel=1e-4)
    # And float32 stays the CPU's over the steps.
    assert losses("full") == pytest.approx(losses("cpu"), rel=1e-3)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_verify(settings: dict[str, Any], kind: str, dtype: Any) -> None:
    report = workflows.verify(Recipe.from_mapping(with_adapter(settings, kind)), dtype=dtype)
    assert report.holds, str(report)
    assert report.dtype == ("float64" if dtype == "auto" and kind != "qlora" else "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_factors_beside_packed_weights(base: Path, dtype: torch.dtype) -> None:
    """In 4 bits on the GPU, against the unpacked weights in float64 on the CPU."""
    pytest.importorskip("bitsandbytes", reason="waits for bitsandbytes (extra `qlora`)")
    config, place = AdapterConfig(kind="qlora", rank=8), AdapterBase(path=str(base), revision=None)
    packed = load_causal_lm(base, device="cuda", quantization=quantization_of(config, dtype))
    truth = load_causal_lm(base, device="cpu")
    assert copy_unpacked(packed, truth) == 7 * 6
    attach_adapter(packed, config, base=place, at_random=True)
    attach_adapter(truth, config.model_copy(update={"kind": "lora"}), base=place, at_random=True)
    factors = {name: p for name, p in packed.named_parameters() if p.requires_grad}
    for name, parameter in factors.items():
        if "lora_B" in name:
            parameter.data.mul_(0.1)  # so that they are no larger than the weights, and rounding counts for no more
    for name, parameter in truth.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(factors[name].data)
    truth = truth.double()

    draw = np.random.default_rng(0)
    examples = [
        TokenizedExample(
            token_ids=draw.integers(3, 99, length).astype(np.int32),
            target_weights=np.where(np.arange(length) < 5, 0.0, 1.0).astype(np.float32),
            example_id=str(length),
            example_weight=1.0,
            source="",
            num_bytes=0,
        )
        for length in (30, 200, 7, 64)
    ]
    data, indices = Dataset(examples, groups=list(range(4))), np.arange(4)
    sums = {}
    for model, compute_dtype in ((packed, dtype), (truth, torch.float64)):
        likelihood = LikelihoodModel(model, compute_dtype=compute_dtype)
        sums[model] = forward_backward(likelihood, data, indices, normalization="token", tokens_per_microbatch=220)
    assert sums[packed].loss == pytest.approx(sums[truth].loss, rel=2e-3 if dtype == torch.bfloat16 else 1e-5)
    true_gradients = {name: p.grad for name, p in truth.named_parameters() if p.requires_grad}
    assert factors.keys() == true_gradients.keys()
    found, wanted = (
        torch.cat([gradients[name].detach().double().cpu().flatten() for name in sorted(gradients)])
        for gradients in ({name: p.grad for name, p in factors.items()}, true_gradients)
    )
    assert float((found - wanted).norm() / wanted.norm()) < (3e-2 if dtype == torch.bfloat16 else 1e-4)


# --- a run that was stopped


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_run_that_was_stopped_goes_on(
    settings: dict[str, Any], kind: str, state_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the bit, which is promised for CPUs only; whether it was to the bit is printed (`-s`)."""
    if state_dtype == "int8":
        pytest.importorskip("torchao", reason="waits for torchao (extra `quantized`)")
    settings = changed(with_adapter(settings, kind), optimizer={"state_dtype": state_dtype})
    whole = train(settings)
    assert whole.training.nll_after < whole.training.nll_before - 0.1
    monkeypatch.setenv("GOLDSMITH_FAIL_POINT", "checkpoint.begin:2!enospc")
    storage._passings.clear()
    with pytest.raises(MachineError, match="disk is full"):
        train(changed(settings, output_dir="other"))
    monkeypatch.delenv("GOLDSMITH_FAIL_POINT")
    storage._passings.clear()
    resumed = train(changed(settings, output_dir="other"))
    assert resumed.training.steps == STEPS
    assert losses("other") == pytest.approx(losses("run"), rel=2e-2)
    assert resumed.training.nll_after == pytest.approx(whole.training.nll_after, rel=2e-2)
    same = Path("other/model/model.safetensors").read_bytes() == Path("run/model/model.safetensors").read_bytes()
    print(f"{kind}, {state_dtype}: resumed {'equal to the bit' if same else 'equal to rounding'}")


# --- memory


@pytest.fixture
def long_settings(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows so long, and so many in a step, that activations outweigh the model by far."""
    rows = [{"prompt": f"{number}: ", "completion": (f"{number} and " * 80)[:400]} for number in range(64)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield {
        **settings,
        "data": {"train": "long.jsonl"},
        "training": {
            "max_steps": 2,
            "batch_size": 64,
            "tokens_per_microbatch": 32768,
            "activation_checkpointing": "none",
            "shared_context": "off",
        },
        "checkpoint": {"every_steps": None},
        "report": {"examples": 0},
    }
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_a_step_that_runs_out_of_memory_is_done_again(
    long_settings: dict[str, Any], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch may take half way between what the whole step takes and what an eighth of it does."""
    settings = with_adapter(long_settings, kind)
    train(changed(settings, output_dir="whole"))
    train(changed(settings, training={"tokens_per_microbatch": 4096}, output_dir="small"))
    most, least = (max(line["peak_memory_bytes"] for line in steps_of(name)) for name in ("whole", "small"))
    assert least < most / 2, "the rows are too few to show anything"
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((most + least) / 2 / total)
    train(changed(settings, output_dir="tight"), quiet=False)
    said = capsys.readouterr().err
    assert "out of memory: training.tokens_per_microbatch" in said
    assert "the step is done again" in said
    records = steps_of("tight")
    assert [line["step"] for line in records] == [1, 2]
    assert all(line["tokens_per_microbatch"] < 32768 and line["microbatches"] > 1 for line in records)
    assert losses("tight") == pytest.approx(losses("whole"), rel=1e-2)


@pytest.mark.parametrize("kind", ["none", "lora", "qlora"])
def test_layers_that_are_computed_again(long_settings: dict[str, Any], kind: str) -> None:
    settings = with_adapter(long_settings, kind)
    train(changed(settings, output_dir="kept"))
    train(changed(settings, training={"activation_checkpointing": "layers"}, output_dir="again"))
    assert losses("again") == pytest.approx(losses("kept"), rel=1e-2)
    norms = [[line["grad_norm"] for line in steps_of(name)] for name in ("again", "kept")]
    assert norms[0] == pytest.approx(norms[1], rel=5e-2)
    kept, again = (max(line["peak_memory_bytes"] for line in steps_of(name)) for name in ("kept", "again"))
    assert again < 0.8 * kept
    # What the formula planned is no less than what was taken, where all is trained; how much more, is printed (`-s`).
    for name, taken in (("kept", kept), ("again", again)):
        planned = json.loads(Path(name, "memory.json").read_text())["total_bytes"]
        print(f"{kind}, {name}: planned {planned / 1e6:.0f} MB, taken {taken / 1e6:.0f} MB")
        assert kind != "none" or taken < 1.2 * planned


# --- several GPUs


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="waits for two CUDA devices")
def test_two_processes_are_one(settings: dict[str, Any], repository: Path) -> None:
    train(changed(settings, output_dir="one"))
    Path("recipe.yaml").write_text(Recipe.from_mapping(changed(settings, output_dir="two")).to_yaml())
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*words, "-m", "goldsmith.cli", "train", "recipe.yaml"],
        env={**os.environ, "PYTHONPATH": str(repository / "src")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert losses("two") == pytest.approx(losses("one"), rel=2e-2)
