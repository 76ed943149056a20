"""The result of a run: a Hugging Face folder that anything can load, and the proof that it says what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from goldsmith.data.dataset import Dataset
from goldsmith.data.packing import pack
from goldsmith.errors import ModelError
from goldsmith.models.adapters import Adapter
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.quantized import products_in_float32
from goldsmith.models.quiet import quiet_transformers
from goldsmith.storage import fail_point, replace_folder

__all__ = ["Parity", "check_merged", "check_parity", "save_adapter", "save_model"]

# Largest difference of a log-probability between the loaded folder and the packed path, both float32.
PARITY_TOLERANCE = 1e-5
# Between a model with its adapter beside the weights and with the adapter added into them, both float32: other products.
MERGE_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How the saved model compares with the one that was trained.

    Attributes:
        examples: how many were compared.
        largest_difference: of a token's log-probability, between the folder as `transformers` loads it, one example at a
            time through its own logits, and the same weights through the packed path; float32, nats.
        rounding_cost: nll a token of the saved weights minus that of the trained ones: what the precision of the files cost.
        merge_difference: largest difference of a log-probability between the adapter added into the weights, before these are
            rounded, and the adapter as it was trained; None without an adapter.
    """

    examples: int
    largest_difference: float
    rounding_cost: float
    merge_difference: float | None = None


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    end_token_ids: list[int],
    silenced: Mapping[str, object] | None = None,
) -> None:
    """Write weights (in `dtype`), configuration, generation configuration and tokenizer, then move them into place.

    Args:
        end_token_ids: what ends the gold; generation stops there.
        silenced: what `silence_randomness` changed; the configuration is written as it was.
    """
    fail_point("export.begin")
    temporary = folder.with_name(f".{folder.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    weights = _state_in(dtype, model)
    trained_dtype = model.config.dtype
    as_trained = _set_config(model, silenced or {})
    try:
        if model.generation_config is not None:
            known = model.generation_config.eos_token_id
            known_ids = [] if known is None else known if isinstance(known, list) else [known]
            ids = list(dict.fromkeys([*known_ids, *end_token_ids]))
            model.generation_config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
        with quiet_transformers(progress_bar=False):
            model.save_pretrained(temporary, state_dict=weights)
        # It wrote the dtype of the parameters; who loads the folder goes by the configuration, so it says the files'.
        model.config.dtype = dtype
        model.config.save_pretrained(temporary)
        fail_point("export.model")
        tokenizer.save_pretrained(temporary)
        fail_point("export.rename")
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        model.config.dtype = trained_dtype
        _set_config(model, as_trained)
    fail_point("export.renamed")


def save_adapter(adapter: Adapter, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter as `peft` loads it, with the tokenizer, which may have tokens that the base model's lacks."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        adapter.save(temporary)
        tokenizer.save_pretrained(temporary)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _state_in(dtype: torch.dtype, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every tensor by name, floating ones in `dtype`; tied ones stay one tensor, so that they are written once."""
    cast: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in cast:
            cast[id(tensor)] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        state[name] = cast[id(tensor)]
    return state


def _set_config(model: PreTrainedModel, values: Mapping[str, object]) -> dict[str, object]:
    """Set settings of the configuration, named as `silence_randomness` names them; returns what they were."""
    before: dict[str, object] = {}
    for path, value in values.items():
        root, *parts = path.split(".")
        if root != "config":  # a module copied it out of the configuration
            continue
        holder: Any = model.config
        for part in parts[:-1]:
            holder = getattr(holder, part)
        before[path] = getattr(holder, parts[-1])
        setattr(holder, parts[-1], value)
    return before


@torch.no_grad()
def check_merged(merged: PreTrainedModel, trained: LikelihoodModel, data: Dataset, *, examples: int = 8) -> float:
    """The largest difference of a log-probability between the merged model and the one with its adapter beside the weights.

    Raises:
        ModelError: it is more than rounding.
    """
    batch = pack(data, range(min(examples, len(data)))).to(trained.device)
    own_K = LikelihoodModel(merged.to(trained.device))(batch).log_probs_K  # type: ignore[arg-type]
    with products_in_float32(trained):
        trained_K = trained(batch).log_probs_K
    difference = float((own_K.double() - trained_K.double()).abs().max())
    if not difference <= MERGE_TOLERANCE * max(1.0, float(trained_K.abs().max())):
        raise ModelError(
            f"merging the adapter changes log-probabilities by {difference:.1e}",
            remedy="please report this; the adapter itself is saved, and its base model is where it was loaded from",
        )
    return difference


@torch.no_grad()
def check_parity(folder: Path, trained: LikelihoodModel, data: Dataset, *, examples: int = 8) -> Parity:
    """Load the folder as a user would and compare log-probabilities of the first examples.

    Raises:
        ModelError: they differ by more than 1e-5.
    """
    auto_model: Any = AutoModelForCausalLM
    with quiet_transformers(progress_bar=False):
        loaded = auto_model.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    loaded = loaded.to(trained.device).eval()
    chosen = list(range(min(examples, len(data))))
    batch = pack(data, chosen).to(trained.device)
    own = []
    for index in chosen:
        example = data[index]
        ids = torch.from_numpy(example.token_ids).long().to(trained.device)
        log_probs = torch.log_softmax(loaded(input_ids=ids[None], use_cache=False).logits[0].float(), dim=-1)
        gold = torch.from_numpy(example.target_weights > 0).nonzero().squeeze(1).to(trained.device)
        own.append(log_probs[gold - 1, ids[gold]])
    own_K = torch.cat(own)
    packed_K = LikelihoodModel(loaded)(batch).log_probs_K
    difference = float((own_K - packed_K).abs().max())
    if not difference <= PARITY_TOLERANCE * max(1.0, float(own_K.abs().max())):
        raise ModelError(
            f"{folder}: its log-probabilities differ by {difference:.1e} from those of the packed path",
            remedy="please report this: the saved model is not the trained one",
        )
    with products_in_float32(trained):
        rounding_cost = float(trained(batch).log_probs_K.double().mean() - packed_K.double().mean())
    return Parity(examples=len(chosen), largest_difference=difference, rounding_cost=rounding_cost)
