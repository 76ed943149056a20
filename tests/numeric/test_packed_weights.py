"""Factors beside weights in 4 bits: the model is the one with the unpacked weights, to float32's own rounding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapter_gradients import ALPHA, BASE, CONFIGS, EXAMPLES, RANK, largest_error, packed, plain
from transformers import AutoModelForCausalLM, PreTrainedModel

from goldsmith.data.packing import pack
from goldsmith.errors import ConfigError, ModelError
from goldsmith.models.adapters import AdapterConfig, attach_adapter, quantization_of
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.load import load_causal_lm
from goldsmith.models.quantized import copy_unpacked, num_weights, packed_bytes, packed_parts, products_in_float32
from goldsmith.training.checkpoint import _frozen_fingerprint

bitsandbytes = pytest.importorskip("bitsandbytes", reason="waits for bitsandbytes (extra `qlora`)")

QLORA = AdapterConfig(kind="qlora", rank=RANK, alpha=ALPHA)
ROUNDING = 2.0**-24


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base model of a family, with biases that are no zeros."""
    config = copy.deepcopy(CONFIGS[request.param])
    # Rows of 32 or 96 weights are unpacked wrongly by a CPU with AVX-512, and refused.
    config.update({"n_inner": 128} if request.param == "gpt2" else {"intermediate_size": 64})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, compute_dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_causal_lm(folder, device="cpu", quantization=quantization_of(QLORA, compute_dtype))


def linears(model: torch.nn.Module) -> dict[str, Any]:
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


def unpacked_by_hand(folder: Path, model: torch.nn.Module) -> Any:
    """The plain model in float64 with the numbers that the codes stand for."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    for name, layer in linears(model).items():
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        target = whole.get_submodule(name)
        weight = weight if isinstance(target, torch.nn.Linear) else weight.T
        error = (weight - target.weight).norm() / target.weight.norm()
        assert 0.01 < float(error.detach()) < 0.2  # 4 bits of it
        target.weight.data.copy_(weight)
    return whole


def with_factors_of(model: PreTrainedModel, base: Any, family: str) -> Any:
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear", fan_in_fan_out=family == "gpt2"
    )
    wrapped = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    own = dict(model.named_parameters())
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = own[name.removeprefix("base_model.model.")].detach().to(parameter.dtype)
    return wrapped


@pytest.mark.parametrize(("folder", "family"), [(f, f) for f in ("llama", "qwen2", "gpt2")], indirect=["folder"])
def test_gradient_of_every_factor(folder: Path, family: str) -> None:
    model = load(folder)
    attach_adapter(model, QLORA, base=BASE, at_random=True)
    frozen = _frozen_fingerprint(model)
    # An evaluation before it, as every run has: it must leave the weights and the way to their gradients as they were.
    with torch.no_grad():
        LikelihoodModel(model).eval()(pack(EXAMPLES, range(4)))
    loss, gradients = packed(model)
    assert _frozen_fingerprint(model) == frozen
    assert gradients.keys() == {name for name, _ in model.named_parameters() if "lora_" in name}
    true_loss, truth = plain(with_factors_of(model, unpacked_by_hand(folder, model), family))

    for parameter in model.parameters():
        parameter.grad = None
    model.set_attn_implementation("sdpa")
    plain_loss, plain_gradients = plain(model)
    assert abs(loss - true_loss) <= (2 * abs(plain_loss - true_loss) / true_loss + 4 * ROUNDING) * true_loss
    assert largest_error(gradients, truth) <= 2 * largest_error(plain_gradients, truth) + 16 * ROUNDING
    # The unrounded weights are another model, and the bound tells them apart.
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    assert largest_error(gradients, plain(with_factors_of(model, whole, family))[1]) > 1e-2


@pytest.mark.parametrize("folder", ["qwen2", "gpt2"], indirect=True)
def test_unpacked_weights_in_a_plain_model(folder: Path) -> None:
    """Also of one that takes its products in bfloat16, as on a GPU: nothing frozen changes, and in float32 both agree."""
    model = load(folder, torch.bfloat16)
    assert {layer.bias.dtype for layer in linears(model).values() if layer.bias is not None} == {torch.bfloat16}
    batch, frozen = pack(EXAMPLES, range(4)), _frozen_fingerprint(model.requires_grad_(False))
    whole = load_causal_lm(folder, device="cpu")
    assert copy_unpacked(model, whole) == len(linears(model)) > 0
    with torch.no_grad():
        likelihood = LikelihoodModel(model).train()
        in_half = likelihood(batch).log_probs_K
        assert _frozen_fingerprint(model) == frozen
        with products_in_float32(model):
            exact = likelihood(batch).log_probs_K
        assert _frozen_fingerprint(model) == frozen
        expected = LikelihoodModel(whole).train()(batch).log_probs_K
    torch.testing.assert_close(exact, expected, atol=1e-5, rtol=0)
    assert float((in_half - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_what_is_counted_and_what_is_refused(folder: Path) -> None:
    model, whole = load(folder), load_causal_lm(folder, device="cpu")
    assert (
        sum(map(num_weights, model.parameters())) == sum(map(num_weights, whole.parameters())) == whole.num_parameters()
    )
    weight = linears(model)["model.layers.0.mlp.up_proj"].weight
    assert 0.5 < packed_bytes(weight) / num_weights(weight) < 2  # a small one: the table of its scales is a kilobyte
    assert packed_parts(whole.lm_head.weight) == {}
    with pytest.raises(ConfigError, match=r"'model.layers.1.mlp' has weights in 4 bits"):
        attach_adapter(model, QLORA.model_copy(update={"modules_to_save": ("layers.1.mlp",)}), base=BASE)
    # Twice the weights have the same codes, and another scale.
    before = _frozen_fingerprint(model.requires_grad_(False))
    with torch.no_grad():
        for layer in whole.model.layers:
            layer.mlp.up_proj.weight.mul_(2.0)
    whole.save_pretrained(folder)
    doubled = load(folder).requires_grad_(False)
    assert torch.equal(linears(doubled)["model.layers.0.mlp.up_proj"].weight.data, weight.data)
    assert _frozen_fingerprint(doubled) != before


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_shape_that_is_unpacked_wrongly_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = bitsandbytes.functional.dequantize_4bit

    def wrong(packed: torch.Tensor, state: Any) -> torch.Tensor:
        """The second half of the wide rows by the scale of the first."""
        weight = own(packed, state)
        return weight * torch.linspace(1, 1.1, weight.shape[1]) if tuple(state.shape) == (24, 64) else weight

    load(folder)
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", wrong)
    with pytest.raises(ModelError, match=r"layers.0.mlp.down_proj: bitsandbytes unpacks .* \[24, 64\] on cpu to other"):
        load(folder)
