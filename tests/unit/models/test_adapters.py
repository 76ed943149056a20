from __future__ import annotations

import copy
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from small_trainer import make_examples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from goldsmith.data.packing import pack
from goldsmith.errors import ConfigError, ModelError
from goldsmith.models.adapters import (
    AdapterBase,
    AdapterConfig,
    adapter_base,
    attach_adapter,
    quantization_of,
    select_trainable,
)
from goldsmith.models.embeddings import fit_embeddings
from goldsmith.models.folder import load_config, tokenizer_folder
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.load import load_causal_lm
from goldsmith.models.precision import stored_dtype
from goldsmith.models.randomness import silence_randomness
from goldsmith.recipe import Recipe

BASE = AdapterBase(path="base", revision=None)
EXAMPLES = make_examples(6)
LLAMA: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}


def llama(**changes: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})).eval()


def gpt2() -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
        return GPT2LMHeadModel(config).eval()


def log_probs(model: PreTrainedModel) -> torch.Tensor:
    """Through packs, as training and scoring see it."""
    with torch.no_grad():
        return LikelihoodModel(model).eval()(pack(EXAMPLES, range(len(EXAMPLES)))).log_probs_K


def trained_names(model: PreTrainedModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# --- settings


def recipe(**sections: Any) -> Recipe:
    return Recipe.from_mapping({"model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}, **sections})


def test_a_recipe_has_no_adapter_unless_it_says_so() -> None:
    assert recipe().adapter is None
    settings = recipe(adapter={"target_modules": ["q_proj"], "kind": "dora"}).adapter
    assert settings == AdapterConfig(kind="dora", target_modules=("q_proj",))
    assert recipe(adapter={"alpha": 8}).adapter == AdapterConfig(alpha=8.0)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adapter": {"rnk": 8}}, "nearest known key: `rank`"),
        ({"adapter": {"target_modules": []}}, "target_modules is empty"),
        ({"adapter": {"modules_to_save": [""]}}, "an empty name"),
        ({"adapter": {"dropout": 1.0}}, "adapter.dropout"),
        ({"adapter": {}, "training": {"trainable": ["*"]}}, "both choose what is trained"),
        ({"training": {"trainable": []}}, "training.trainable"),
        ({"model": {"path": "some/model", "new_tokens": ["<a>", "<a>"]}}, "one twice"),
        (
            {"adapter": {}, "model": {"init": {"architecture": "llama"}}, "tokenizer": {"train": {"kind": "byte"}}},
            "those of model.init are random",
        ),
    ],
)
def test_settings_that_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(**sections)
    assert said in str(caught.value)


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValidationError):
        AdapterConfig().rank = 4  # type: ignore[misc]


# --- into the model


def test_only_the_adapter_is_trained_and_it_changes_nothing_yet() -> None:
    model = llama()
    before = log_probs(copy.deepcopy(model))
    state = torch.get_rng_state()
    adapter = attach_adapter(model, AdapterConfig(rank=4), base=BASE, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    names = trained_names(model)
    assert len(names) == 2 * 7 * 3
    assert all(".lora_" in name for name in names)
    assert adapter.num_modules == 21
    assert adapter.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(log_probs(model), before, atol=1e-6, rtol=1e-6)  # layers by hand before, plain ones now
    again, other = llama(), llama()
    attach_adapter(again, AdapterConfig(rank=4), base=BASE, seed=3)
    attach_adapter(other, AdapterConfig(rank=4), base=BASE, seed=4)
    first = names[0]
    assert torch.equal(dict(again.named_parameters())[first], dict(model.named_parameters())[first])
    assert not torch.equal(dict(other.named_parameters())[first], dict(model.named_parameters())[first])


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        ({}, 3),
        ({"kind": "rslora", "target_modules": ("layers.1.*",)}, 3),
        ({"modules_to_save": ("layers.1.mlp", "norm")}, 3),
        ({"modules_to_save": ("layers.1.input_layernorm",)}, 0),
        ({"kind": "dora"}, 0),
        ({"dropout": 0.1}, 0),
    ],
)
def test_layers_from_pieces_know_plain_factors_only(settings: dict[str, Any], by_hand: int) -> None:
    model = llama()
    attach_adapter(model, AdapterConfig(**settings), base=BASE)
    assert LikelihoodModel(model).num_layers_by_hand == by_hand


def test_an_adapter_comes_before_the_layers_are_replaced() -> None:
    model = llama()
    assert LikelihoodModel(model).num_layers_by_hand == 3
    with pytest.raises(AssertionError, match="replaced already"):
        attach_adapter(model, AdapterConfig(), base=BASE)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("q_proj",), {f"model.layers.{n}.self_attn.q_proj" for n in range(3)}),
        (("model.layers.[12].mlp.up*",), {"model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"}),
        (("layers.0.self_attn.?_proj", "up_proj"), None),
    ],
)
def test_modules_are_chosen_by_glob(patterns: tuple[str, ...], expected: set[str] | None) -> None:
    model = llama()
    attach_adapter(model, AdapterConfig(target_modules=patterns), base=BASE)
    chosen = {name.partition(".lora_")[0] for name in trained_names(model)}
    if expected is None:
        expected = {f"model.layers.0.self_attn.{letter}_proj" for letter in "qkvo"}
        expected |= {f"model.layers.{n}.mlp.up_proj" for n in range(3)}
    assert chosen == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ("q_prj",)}, r"'q_prj' matches no name .*nearest are 'q_proj'"),
        ({"target_modules": ("q_proj", "self_atn.k_proj")}, "'self_atn.k_proj' matches .*'self_attn.k_proj'"),
        ({"target_modules": ("lm_head",)}, "'lm_head' matches no name of a linear layer below the output layer"),
        ({"target_modules": ("embed_tokens",)}, "'embed_tokens' matches no name of a linear layer"),
        ({"modules_to_save": ("nrom",)}, "'nrom' matches no name .*'norm'"),
        ({"modules_to_save": ("model",)}, "the whole decoder"),
    ],
)
def test_modules_that_cannot_be_chosen(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attach_adapter(llama(), AdapterConfig(**settings), base=BASE)


def test_dropout_is_none_unless_it_is_asked_for() -> None:
    model = llama()
    silence_randomness(model)
    attach_adapter(model, AdapterConfig(dropout=0.5), base=BASE, at_random=True)
    likelihood, batch = LikelihoodModel(model).train(), pack(EXAMPLES, range(6))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        first, second = (likelihood(batch).log_probs_K for _ in range(2))
        assert not torch.equal(first, second)
        likelihood.eval()
        first, second = (likelihood(batch).log_probs_K for _ in range(2))
    assert torch.equal(first, second)


def test_qlora_where_its_quantiser_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdapterConfig(kind="qlora")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="bitsandbytes is not installed") as caught:
        quantization_of(config, torch.float32)
    assert caught.value.remedy is not None
    assert "kind: lora" in caught.value.remedy
    assert quantization_of(AdapterConfig(), torch.float32) is None
    assert quantization_of(None, torch.float32) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match="knows no float64"):
        quantization_of(config, torch.float64)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"peft, which is not installed\n.*goldsmith\[adapters\]"):
        attach_adapter(llama(), AdapterConfig(), base=BASE)


def test_peft_is_imported_where_it_is_used_only(tiny_model_folder: Path, repository: Path) -> None:
    """In a process of its own: this one has imported it."""
    code = (
        "import sys, goldsmith.workflows.run, goldsmith.workflows.models as models\n"
        f"models.open_model({str(tiny_model_folder)!r}, device='cpu')\n"
        "print(sorted(name for name in sys.modules if name in ('peft', 'accelerate')))"
    )
    environment = {"PYTHONPATH": str(repository / "src"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "peft" not in done.stdout


# --- merged


def adapted(model: PreTrainedModel, base: Path, folder: Path, config: AdapterConfig, **keywords: Any) -> torch.Tensor:
    """Save the base, put a random adapter in, save that; what the adapted model computes."""
    model.save_pretrained(base)
    adapter = attach_adapter(model, config, base=AdapterBase(path=str(base), revision=None), at_random=True, **keywords)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    adapter.save(folder)
    return log_probs(model)


@pytest.mark.parametrize("family", [llama, gpt2])
@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_an_adapters_folder_is_a_model(tmp_path: Path, family: Any, kind: Any) -> None:
    expected = adapted(family(), tmp_path / "base", tmp_path / "it", AdapterConfig(kind=kind, rank=3, alpha=7.0))
    assert {path.name for path in (tmp_path / "it").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    base = load_causal_lm(tmp_path / "base", device="cpu")
    merged = load_causal_lm(tmp_path / "it", device="cpu")
    assert type(merged) is type(base)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert len(trained_names(merged)) == len(trained_names(base))
    assert stored_dtype(merged) == torch.float32
    got = log_probs(merged)
    assert float((got - expected).abs().max()) < 1e-5
    assert float((got - log_probs(base)).abs().max()) > 1e-2
    assert load_config(tmp_path / "it").model_type == base.config.model_type
    assert load_causal_lm(tmp_path / "it", device="cpu", dtype="float64").dtype == torch.float64


def test_peft_loads_the_folder(tmp_path: Path) -> None:
    import peft

    config = AdapterConfig(kind="dora", modules_to_save=("lm_head", "norm"))
    expected = adapted(llama(), tmp_path / "base", tmp_path / "it", config)
    values = json.loads((tmp_path / "it" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tmp_path / "base")
    loaded: Any = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "it")
    row = torch.from_numpy(EXAMPLES[2].token_ids).long()
    with torch.no_grad():
        all_log_probs = torch.log_softmax(loaded(input_ids=row[None]).logits[0], dim=-1)
    gold = torch.from_numpy(EXAMPLES[2].target_weights > 0).nonzero().squeeze(1)
    first = sum(int((example.target_weights > 0).sum()) for example in EXAMPLES[:2])
    torch.testing.assert_close(
        all_log_probs[gold - 1, row[gold]], expected[first : first + len(gold)], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("tied", [True, False])
def test_saved_modules_are_merged_and_tied_ones_stay_tied(tmp_path: Path, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    config = AdapterConfig(modules_to_save=("embed_tokens", "lm_head", "layers.1.mlp"))
    expected = adapted(model, tmp_path / "base", tmp_path / "it", config)
    named = [name for name in trained_names(model) if "modules_to_save" in name]
    assert len(named) == (4 if tied else 5)
    merged = load_causal_lm(tmp_path / "it", device="cpu")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert float((log_probs(merged) - expected).abs().max()) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    again = load_causal_lm(tmp_path / "merged", device="cpu")
    assert float((log_probs(again) - expected).abs().max()) < 1e-5


def test_tied_embeddings_that_peft_would_take_apart() -> None:
    with pytest.raises(ConfigError, match="are one tensor, which peft would take apart"):
        attach_adapter(gpt2(), AdapterConfig(modules_to_save=("wte",)), base=BASE)


class TestFoldersThatAreRefused:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        adapted(llama(num_hidden_layers=1), tmp_path / "base", tmp_path / "it", AdapterConfig(rank=2))
        return tmp_path / "it"

    def refused(self, folder: Path, *said: str) -> None:
        with pytest.raises(ModelError) as caught:
            load_causal_lm(folder, device="cpu")
        assert all(text in str(caught.value) for text in said), str(caught.value)

    def edit(self, folder: Path, **values: Any) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def test_pickled_weights(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        self.refused(folder, "has no adapter_model.safetensors")

    def test_damaged_weights(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"no")
        self.refused(folder, "damaged or cut off")

    def test_damaged_configuration(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{")
        self.refused(folder, "not an adapter's configuration")

    def test_no_base(self, folder: Path) -> None:
        self.edit(folder, base_model_name_or_path=None)
        self.refused(folder, "names no base model")

    def test_a_base_that_is_not_there(self, folder: Path) -> None:
        self.edit(folder, base_model_name_or_path="/nowhere/base")
        self.refused(folder, "/nowhere/base: no such folder")

    def test_code_by_name(self, folder: Path) -> None:
        self.edit(folder, megatron_config={"a": 1}, megatron_core="os")
        self.refused(folder, "an adapter of the kind 'LORA'")

    @pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
    def test_weights_of_another_model(self, folder: Path, change: str) -> None:
        file = folder / "adapter_model.safetensors"
        weights = load_file(file)
        first = sorted(weights)[0]
        if change == "missing":
            del weights[first]
        elif change == "unexpected":
            weights[first.replace("layers.0", "layers.7")] = weights[first].clone()
        else:
            weights[first] = torch.zeros(3, 3)
        save_file(weights, file)
        self.refused(folder, "adapter_config.json")


def test_the_base_is_found_beside_the_adapter(tmp_path: Path) -> None:
    (tmp_path / "it" / "base").mkdir(parents=True)
    values = {"base_model_name_or_path": "base", "peft_type": "LORA", "revision": "v1"}
    (tmp_path / "it" / "adapter_config.json").write_text(json.dumps(values))
    assert adapter_base(tmp_path / "it") == AdapterBase(path=str(tmp_path / "it" / "base"), revision="v1")
    assert adapter_base(tmp_path) is None
    (tmp_path / "it" / "config.json").write_text("{}")
    assert adapter_base(tmp_path / "it") is None


def test_the_tokenizer_of_an_adapter_without_one_is_its_bases(tmp_path: Path, tiny_model_folder: Path) -> None:
    values = {"base_model_name_or_path": str(tiny_model_folder), "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    assert tokenizer_folder(str(tmp_path)) == (str(tiny_model_folder), None)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path)
    assert tokenizer_folder(str(tmp_path)) == (str(tmp_path), None)
    assert tokenizer_folder("owner/name", revision="main") == ("owner/name", "main")


# --- new tokens


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_begin_as_the_mean(tiny_model_folder: Path, tied: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<one>", "<two>"])
    models = [llama(vocab_size=size, tie_word_embeddings=tied) for _ in range(2)]
    before = copy.deepcopy(models[0])
    state = torch.get_rng_state()
    assert [fit_embeddings(model, tokenizer) for model in models] == [2, 2]
    assert torch.equal(torch.get_rng_state(), state)
    model = models[0]
    assert model.config.vocab_size == size + 2
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for embedding, old in [(model.model.embed_tokens, before.model.embed_tokens), (model.lm_head, before.lm_head)]:
        assert torch.equal(embedding.weight[:size], old.weight)
        expected = old.weight.double().mean(dim=0).float()
        assert torch.equal(embedding.weight[size:], expected.expand(2, -1))
        assert embedding.weight.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert fit_embeddings(model, tokenizer) == 0


def test_a_new_token_in_a_row_that_the_model_had_to_spare(tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.add_tokens(["<one>"])
    new, size = len(tokenizer) - 1, len(tokenizer) + 3
    model = llama(vocab_size=size)
    before = model.lm_head.weight.detach().clone()
    assert fit_embeddings(model, tokenizer) == 0
    assert torch.equal(model.lm_head.weight, before)
    assert fit_embeddings(model, tokenizer, new_token_ids=[new]) == 0
    others = [row for row in range(size) if row != new]
    assert torch.equal(model.lm_head.weight[others], before[others])
    assert torch.equal(model.lm_head.weight[new], before[others].double().mean(dim=0).float())


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_of_new_tokens_go_with_the_adapter(tmp_path: Path, tiny_model_folder: Path, tied: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    size = len(tokenizer)
    llama(vocab_size=size, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<one>", "<two>"])
    model = load_causal_lm(tmp_path / "base", device="cpu")
    fit_embeddings(model, tokenizer)
    base = AdapterBase(path=str(tmp_path / "base"), revision=None)
    adapter = attach_adapter(model, AdapterConfig(), base=base, new_token_ids=[size, size + 1], at_random=True)
    rows = [name for name in trained_names(model) if "lora_" not in name]
    assert len(rows) == (1 if tied else 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in rows:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    adapter.save(tmp_path / "it")
    tokenizer.save_pretrained(tmp_path / "it")
    merged = load_causal_lm(tmp_path / "it", device="cpu")
    assert merged.config.vocab_size == size + 2
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert float((log_probs(merged) - log_probs(model)).abs().max()) < 1e-5
    plain = load_causal_lm(tmp_path / "base", device="cpu")
    for embedding, old in [(merged.model.embed_tokens, plain.model.embed_tokens), (merged.lm_head, plain.lm_head)]:
        assert torch.equal(embedding.weight[:size], old.weight)
        assert not torch.equal(embedding.weight[size], embedding.weight[size + 1])


def test_rows_of_an_output_layer_with_a_bias_are_refused() -> None:
    model = llama()
    model.lm_head = torch.nn.Linear(16, 99)
    with pytest.raises(ModelError, match="its output layer has a bias"):
        attach_adapter(model, AdapterConfig(), base=BASE, new_token_ids=[3])


# --- parameters by name


NORMS_AND_ATTENTION = r"model\.layers\.\d\.(self_attn|\w+_layernorm)\..*"


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*"], r".*"),
        (["model.layers.2.*"], r"model\.layers\.2\..*"),
        (["model.layers.?.*", "!*.mlp.*", "*.0.mlp.up_proj.weight"], rf"{NORMS_AND_ATTENTION}|.*\.0\.mlp\.up_proj\..*"),
        (["!*norm*"], r"(?!.*norm).*"),
    ],
)
def test_trained_parameters_are_chosen_in_order(patterns: list[str], expected: str) -> None:
    model = llama(tie_word_embeddings=False)
    every = [name for name, _ in model.named_parameters()]
    number = select_trainable(model, patterns)
    assert trained_names(model) == [name for name in every if re.fullmatch(expected, name)]
    assert number == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_a_tied_tensor_has_both_names() -> None:
    model = llama(tie_word_embeddings=True)
    select_trainable(model, ["lm_head.weight"])
    assert trained_names(model) == ["model.embed_tokens.weight"]


def test_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'model.layers.2.self_atn.q_proj.weight' matches no parameter; the nearest"):
        select_trainable(llama(), ["model.layers.2.self_atn.q_proj.weight"])
    with pytest.raises(ConfigError, match=r"'!\*.bias' matches no parameter"):
        select_trainable(llama(), ["*", "!*.bias"])
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        select_trainable(llama(), ["!*"])


# --- what is not trained costs nothing


def backward(model: PreTrainedModel) -> tuple[int, int]:
    """(floating point operations of matrix products in the backward pass, elements kept for it)."""
    likelihood = LikelihoodModel(model).train()
    kept: dict[int, int] = {}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = likelihood(pack(EXAMPLES, range(6))).weighted_nll
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops(), sum(kept.values())


@pytest.mark.parametrize("family", [llama, gpt2])
def test_nothing_below_the_lowest_trained_parameter_is_differentiated_or_kept(family: Any) -> None:
    whole, top = family(), family()
    last = "model.layers.2.*" if family is llama else "transformer.h.1.*"
    select_trainable(top, [last])
    reached: dict[str, bool] = {}

    def note(name: str) -> Any:
        return lambda module, inputs, output: reached.update(
            {name: (output[0] if isinstance(output, tuple) else output).requires_grad}
        )

    for name, module in top.named_modules():
        if name.rpartition(".")[0].endswith(("layers", ".h")) or module is top.get_input_embeddings():
            module.register_forward_hook(note(name))
    flops, kept = backward(top)
    assert [name for name, is_reached in reached.items() if is_reached] == [last.removesuffix(".*")]
    assert len(reached) == (4 if family is llama else 3)
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in top.parameters())
    all_flops, all_kept = backward(whole)
    assert flops < 0.6 * all_flops
    assert kept < 0.7 * all_kept


class ProductShapes(TorchDispatchMode):
    """The shapes of all matrix products while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
            self.shapes.add(tuple(output.shape))
        return output


@pytest.mark.parametrize("kind", ["lora", "rslora", "none"])
def test_products_with_frozen_weights_have_no_weight_gradient(kind: Any) -> None:
    model = llama(hidden_size=40, intermediate_size=56)
    weights = {tuple(p.shape) for name, p in model.named_parameters() if "_proj" in name or "lm_head" in name}
    weights |= {shape[::-1] for shape in weights}
    if kind != "none":
        attach_adapter(model, AdapterConfig(rank=1, kind=kind), base=BASE)
    likelihood = LikelihoodModel(model).train()
    # The forward pass too: the objective makes its gradients there.
    with ProductShapes() as products:
        likelihood(pack(EXAMPLES, range(6))).weighted_nll.backward()
    assert len(products.shapes) > 3
    assert bool(products.shapes & weights) == (kind == "none")
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
