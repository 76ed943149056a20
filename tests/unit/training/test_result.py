from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_trainer import make_examples
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from goldsmith.data.dataset import Dataset
from goldsmith.errors import ModelError
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.load import load_causal_lm
from goldsmith.models.randomness import silence_randomness
from goldsmith.training.result import check_parity, save_model

END = 1


@pytest.fixture
def model(tiny_model_folder: Path) -> PreTrainedModel:
    return load_causal_lm(tiny_model_folder, device="cpu")


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tied_weights_are_written_once_and_the_configuration_says_their_type(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, dtype: torch.dtype
) -> None:
    before = model.config.dtype
    save_model(model, tokenizer, tmp_path / "model", dtype=dtype, end_token_ids=[END])
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert "lm_head.weight" not in weights
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == dtype
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert model.config.dtype == before
    assert model.dtype == torch.float32
    assert not list(tmp_path.glob(".*"))


def test_an_older_result_is_replaced(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "half").write_text("")
    save_model(model, tokenizer, tmp_path / "model", dtype=torch.float32, end_token_ids=[END])
    assert {"old", "half"}.isdisjoint(path.name for path in (tmp_path / "model").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_export_leaves_the_older_result(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tokenizer, tmp_path / "model", dtype=torch.float32, end_token_ids=[END])
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def fails(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", fails)
    with pytest.raises(OSError, match="No space"):
        save_model(model, tokenizer, tmp_path / "model", dtype=torch.bfloat16, end_token_ids=[END])
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert model.config.dtype == torch.float32


@pytest.mark.parametrize(
    ("known", "ends", "expected"), [(None, [1], 1), (1, [1], 1), (5, [1, 7], [5, 1, 7]), (None, [], None)]
)
def test_generation_stops_at_every_end_of_gold(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    known: int | None,
    ends: list[int],
    expected: object,
) -> None:
    assert model.generation_config is not None
    model.generation_config.eos_token_id = known
    save_model(model, tokenizer, tmp_path / "model", dtype=torch.float32, end_token_ids=ends)
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert written.get("eos_token_id") == expected


def test_the_configuration_is_written_as_it_came(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model.config.attention_dropout = 0.1
    silenced = silence_randomness(model)
    save_model(model, tokenizer, tmp_path / "model", dtype=torch.float32, end_token_ids=[END], silenced=silenced)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["attention_dropout"] == 0.1
    assert model.config.attention_dropout == 0.0


def test_parity_is_a_comparison_with_the_folder_as_users_load_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trained = LikelihoodModel(model)
    data = Dataset(make_examples(10))
    folder = tmp_path / "model"
    save_model(model, tokenizer, folder, dtype=torch.float32, end_token_ids=[END])
    parity = check_parity(folder, trained, data)
    assert parity.examples == 8
    assert 0 <= parity.largest_difference <= 1e-5
    assert parity.rounding_cost == 0.0
    assert check_parity(folder, trained, Dataset(make_examples(3))).examples == 3

    save_model(model, tokenizer, folder, dtype=torch.bfloat16, end_token_ids=[END])
    rounded = check_parity(folder, trained, data)
    assert rounded.largest_difference <= 1e-5  # the folder against itself: rounding is no difference of paths
    assert rounded.rounding_cost != 0.0


def test_a_folder_that_says_something_else_is_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The packed path and the folder's own logits differ where its configuration means another computation."""
    folder = tmp_path / "model"
    save_model(model, tokenizer, folder, dtype=torch.float32, end_token_ids=[END])
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"its log-probabilities differ by nan"):
        check_parity(folder, LikelihoodModel(model), Dataset(make_examples(3)))
