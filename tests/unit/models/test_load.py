"""Loading a model: what is accepted, and hostile folders one by one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from goldsmith.errors import ConfigError, ModelError
from goldsmith.models.load import ModelConfig, load_causal_lm
from goldsmith.models.precision import stored_dtype

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
IDS = torch.tensor([[1, 5, 9, 2]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, not tied, as save_pretrained writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def save_sharded(folder: Path) -> list[str]:
    """Write the weights of `folder` again as several files with an index; returns the files' names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, key in enumerate(tensors):
        shard = f"model-{number % 2 + 1:05d}-of-00002.safetensors"
        weight_map[key] = shard
    for shard in set(weight_map.values()):
        save_file({k: v for k, v in tensors.items() if weight_map[k] == shard}, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sorted(set(weight_map.values()))


class TestLoading:
    def test_weights_are_the_files_and_float32(self, folder: Path) -> None:
        model = load_causal_lm(folder)
        expected = load_file(folder / "model.safetensors")
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not model.training

    def test_sharded_files_are_the_same_model(self, folder: Path) -> None:
        before = load_causal_lm(folder)(IDS).logits
        save_sharded(folder)
        assert torch.equal(before, load_causal_lm(folder)(IDS).logits)

    def test_stored_dtype_is_that_of_the_files_and_masters_are_float32(self, folder: Path) -> None:
        half = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
        save_file(half, folder / "model.safetensors", {"format": "pt"})
        model = load_causal_lm(folder)
        assert stored_dtype(model) == torch.bfloat16
        assert model.dtype == torch.float32
        assert torch.equal(model.lm_head.weight, half["lm_head.weight"].float())

    def test_float64(self, folder: Path) -> None:
        model = load_causal_lm(folder, dtype="float64")
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert stored_dtype(model) == torch.float32

    def test_tied_output_embedding_is_not_missing(self, tmp_path: Path) -> None:
        LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)).save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        model = load_causal_lm(tmp_path)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def test_gpt2(self, tmp_path: Path) -> None:
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16)).save_pretrained(
            tmp_path
        )
        assert load_causal_lm(tmp_path)(IDS).logits.shape == (1, 4, 40)

    def test_gpt2_as_it_was_first_published(self, tmp_path: Path) -> None:
        # Names without the prefix, no output layer (it is tied), and the causal masks among the weights.
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16))
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        assert torch.equal(load_causal_lm(tmp_path)(IDS).logits, model.eval()(IDS).logits)

    def test_published_model(self, shared_folder: Path) -> None:
        model = load_causal_lm(shared_folder / "models" / "stories260k")
        assert stored_dtype(model) == torch.float32
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


class TestHostileFolders:
    def refused(self, path: str | Path, *parts: str) -> ModelError:
        with pytest.raises(ModelError) as caught:
            load_causal_lm(path)
        for part in parts:
            assert part in str(caught.value)
        assert caught.value.exit_code == 4
        assert caught.value.remedy
        return caught.value

    def test_no_such_folder(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "nowhere", "nowhere", "no such folder")

    def test_a_relative_path_is_not_taken_for_a_hub_id(self) -> None:
        self.refused("./runs/nowhere/model", "no such folder")

    def test_file_instead_of_folder(self, folder: Path) -> None:
        self.refused(folder / "config.json", "is a file")

    def test_folder_without_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        self.refused(folder, "no config.json")

    def test_empty_folder(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "no config.json")

    def test_config_is_not_json(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "llama",')
        self.refused(folder, "config.json is not valid JSON", "line 1")

    def test_config_is_not_utf8(self, folder: Path) -> None:
        (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')
        self.refused(folder, "config.json is not valid JSON")

    def test_config_is_not_an_object(self, folder: Path) -> None:
        (folder / "config.json").write_text("[1, 2]")
        self.refused(folder, "holds a list")

    def test_config_with_a_value_of_the_wrong_type(self, folder: Path) -> None:
        edit_config(folder, lambda values: values.update(hidden_size="sixteen"))
        self.refused(folder, "hidden_size", "sixteen")

    def test_pickled_weights_only(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        self.refused(folder, "pytorch_model.bin", "pickled", "convert them to safetensors")

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        self.refused(folder, "has no weights")

    def test_remote_code(self, folder: Path) -> None:
        auto_map = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
        edit_config(folder, lambda values: values.update(model_type="mine", auto_map=auto_map))
        (folder / "modeling_mine.py").write_text("raise SystemExit('remote code ran')")
        self.refused(folder, "auto_map", "runs no code")

    def test_remote_code_of_a_known_architecture(self, folder: Path) -> None:
        edit_config(folder, lambda values: values.update(auto_map={"AutoModelForCausalLM": "mine.Mine"}))
        self.refused(folder, "auto_map", "LlamaForCausalLM", "delete `auto_map`")

    def test_encoder_decoder(self, tmp_path: Path) -> None:
        BartConfig(architectures=["BartForConditionalGeneration"]).save_pretrained(tmp_path)
        self.refused(tmp_path, "encoder-decoder", "'bart'")

    def test_encoder_only(self, tmp_path: Path) -> None:
        config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        BertForMaskedLM(config).save_pretrained(tmp_path)
        self.refused(tmp_path, "BertForMaskedLM", "not the causal language model")

    def test_not_a_language_model(self, folder: Path) -> None:
        edit_config(folder, lambda values: values.update(model_type="vit", architectures=["ViTModel"]))
        self.refused(folder, "'vit' is not a causal language model")

    def test_more_than_text(self, folder: Path) -> None:
        name = "Gemma3ForConditionalGeneration"
        edit_config(folder, lambda values: values.update(model_type="gemma3", architectures=[name]))
        self.refused(folder, name, "more than text")

    def test_backbone_without_output_layer(self, folder: Path) -> None:
        edit_config(folder, lambda values: values.update(architectures=["LlamaModel"]))
        self.refused(folder, "LlamaModel")

    def test_quantised(self, folder: Path) -> None:
        edit_config(folder, lambda values: values.update(quantization_config={"quant_method": "gptq", "bits": 4}))
        self.refused(folder, "quantised", "gptq")

    def test_adapter_of_another_family(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "IA3"}')
        self.refused(folder, "'IA3'", "merge it")

    def test_adapter_beside_the_model_is_not_attached_in_silence(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
        self.refused(folder, "adapter beside the model")

    def test_unknown_model_type_names_the_nearest(self, folder: Path) -> None:
        edit_config(folder, lambda values: values.update(model_type="lama"))
        self.refused(folder, "'lama' is unknown", "'llama'")

    def test_no_model_type(self, folder: Path) -> None:
        edit_config(folder, lambda values: values.pop("model_type"))
        self.refused(folder, "no model_type")

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated_safetensors(self, folder: Path, keep: int) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        self.refused(folder, "model.safetensors", "damaged or cut off")

    def test_weights_that_are_no_safetensors(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"
        )
        self.refused(folder, "model.safetensors", "damaged or cut off")

    def test_index_names_a_missing_file(self, folder: Path) -> None:
        shards = save_sharded(folder)
        (folder / shards[1]).unlink()
        self.refused(folder, shards[1], "1 of 2 files that are not there")

    def test_index_is_not_json(self, folder: Path) -> None:
        save_sharded(folder)
        (folder / "model.safetensors.index.json").write_text("{")
        self.refused(folder, "model.safetensors.index.json is not valid JSON")

    def test_index_without_weight_map(self, folder: Path) -> None:
        save_sharded(folder)
        (folder / "model.safetensors.index.json").write_text("{}")
        self.refused(folder, "no weight_map")

    def test_index_points_out_of_the_folder(self, folder: Path) -> None:
        save_sharded(folder)
        index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(folder, "../elsewhere.safetensors")

    def test_index_names_a_pickle(self, folder: Path) -> None:
        save_sharded(folder)
        (folder / "pytorch_model.bin").write_bytes(b"")
        index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        self.refused(folder, "pytorch_model.bin", "not a safetensors file")

    def test_missing_weights(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        self.refused(folder, "1 weights are missing", "model.layers.1.mlp.up_proj.weight")

    def test_output_layer_missing_and_not_tied(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        self.refused(folder, "lm_head.weight")

    def test_unexpected_weights(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        self.refused(folder, "no place", "model.layers.0.self_attn.q_proj.bias")

    def test_more_layers_in_the_files_than_in_the_config(self, folder: Path) -> None:
        edit_config(folder, lambda values: values.update(num_hidden_layers=1))
        self.refused(folder, "no place", "model.layers.1.")

    def test_weights_of_another_shape(self, folder: Path) -> None:
        edit_config(folder, lambda values: values.update(vocab_size=41))
        self.refused(folder, "40", "41")

    def test_integer_weights(self, folder: Path) -> None:
        tensors = {k: v.to(torch.int8) for k, v in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        self.refused(folder, "no floating point type", "I8")

    def test_revision_with_a_folder(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="is a folder"):
            load_causal_lm(folder, revision="main")

    def test_unreachable_hub(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        self.refused("nobody/no-such-model", "nobody/no-such-model: no such folder", "hub could not be reached")

    def test_hub_says_not_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        def not_found(*_: object, **__: object) -> None:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

        monkeypatch.setattr("huggingface_hub.snapshot_download", not_found)
        self.refused("nobody/no-such-model", "no such folder", "the hub has no such model")

    def test_hub_copy_without_safetensors(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
        self.refused("somebody/model", "somebody/model: has no weights")

    @pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
    def test_random_state_and_logging_are_left_alone(self, folder: Path) -> None:
        from transformers.utils import logging as transformers_logging

        for has_bar in (True, False):
            switch = transformers_logging.enable_progress_bar if has_bar else transformers_logging.disable_progress_bar
            switch()
            random_state, verbosity = torch.get_rng_state(), transformers_logging.get_verbosity()
            load_causal_lm(folder)
            assert torch.equal(random_state, torch.get_rng_state())
            assert transformers_logging.get_verbosity() == verbosity
            assert transformers_logging.is_progress_bar_enabled() == has_bar


class TestConfig:
    def test_exactly_one_source(self) -> None:
        assert ModelConfig(path="x").dtype == "auto"
        with pytest.raises(ValidationError, match="neither given"):
            ModelConfig()
        with pytest.raises(ValidationError, match="both given"):
            ModelConfig(path="x", init={"architecture": "llama"})

    def test_init_needs_an_architecture(self) -> None:
        with pytest.raises(ValidationError, match="architecture"):
            ModelConfig(init={"hidden_size": 3})

    def test_unknown_key(self) -> None:
        with pytest.raises(ValidationError, match="trust_remote_code"):
            ModelConfig(path="x", trust_remote_code=True)  # type: ignore[call-arg]
