"""From a folder or a hub id to a causal language model to be trained, or a named refusal.

`transformers` would initialise missing weights at random in silence: what it found, and what it did not, is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from goldsmith.data.tokenizer import load_tokenizer
from goldsmith.errors import ModelError
from goldsmith.models.adapters import adapter_base, merge_adapter
from goldsmith.models.embeddings import fit_embeddings
from goldsmith.models.folder import check_weight_files, has_tokenizer, load_config, resolve_model_folder, weight_files
from goldsmith.models.precision import DtypeName, parameter_dtype, place, resolve_device, resolve_dtype
from goldsmith.models.quantized import copy_unpacked, keep_as_packed
from goldsmith.models.quiet import quiet_transformers
from goldsmith.models.wording import one_line, shortened

__all__ = ["ModelConfig", "load_causal_lm"]

# Typed as Any: its classmethods return different things for different flags, or are not annotated.
_auto_model: Any = AutoModelForCausalLM

_PROGRESS_BAR_BYTES = 1 << 30


class ModelConfig(BaseModel):
    """The model of a recipe: either published weights (`path`) or a new model (`init`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(default=None, min_length=1, description="A folder, or an id on the Hugging Face hub.")
    revision: str | None = Field(default=None, description="Branch, tag or commit; for hub ids only.")
    dtype: DtypeName = Field(
        default="auto",
        description="What is computed in; `auto`: float32 on a CPU, bfloat16 on a GPU. On a CPU no training is in half precision. "
        "Master weights stay in float32.",
    )
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda`, `cuda:1`, ...")
    init: dict[str, Any] | None = Field(
        default=None,
        description="A new model with random weights: `architecture` (such as llama) and its own settings.",
    )
    new_tokens: tuple[str, ...] = Field(
        default=(),
        description="Texts that become one token each; their embeddings begin as the mean of all others, and are trained.",
    )

    @model_validator(mode="after")
    def _exactly_one_source(self) -> ModelConfig:
        if (self.path is None) == (self.init is None):
            seen = "neither" if self.path is None else "both"
            raise ValueError(f"give exactly one of `path` and `init`, {seen} given")
        if self.init is not None and self.revision is not None:
            raise ValueError("`revision` goes with `path`, not with `init`")
        if self.init is not None and not isinstance(self.init.get("architecture"), str):
            raise ValueError("`init` needs `architecture`, such as `llama`")
        if self.init is not None and self.new_tokens:
            raise ValueError("`new_tokens` goes with `path`; with `init` set `tokenizer.train.special_tokens`")
        if any(not token for token in self.new_tokens) or len(set(self.new_tokens)) != len(self.new_tokens):
            raise ValueError("`new_tokens` holds an empty text, or one twice")
        return self


def load_causal_lm(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: DtypeName = "auto",
    device: str | torch.device = "auto",
    quantization: Any | None = None,
    frozen_weights: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A published causal language model: all of its weights and nothing but them, from safetensors only.

    The parameters are float32 (master weights; float64 for `dtype="float64"`), in evaluation mode, on `device`. What
    dtype the files hold is kept: see `stored_dtype`. Randomness is not touched: see `models.randomness`.
    The folder of an adapter gives its base model with the adapter merged into it.

    Args:
        quantization: how weights that stay frozen are stored (a quantisation configuration of `transformers`).
        frozen_weights: for an adapter's folder: the model that it was trained in. What that keeps in 4 bits is merged into as it
            is there, unpacked, and not as the base model's files have it.

    Raises:
        ModelError: no such folder or hub id; no configuration or safetensors; remote code; not a causal language model;
            quantised; damaged files; weights that are missing, unexpected or of another shape; an adapter that does not
            fit its base model.
    """
    folder = resolve_model_folder(path, revision=revision)
    base = adapter_base(folder, name=str(path))
    if base is not None:
        model = load_causal_lm(base.path, revision=base.revision, dtype=dtype, device=device)
        if has_tokenizer(folder):
            fit_embeddings(model, load_tokenizer(folder))
        if frozen_weights is not None:
            copy_unpacked(frozen_weights, model)
        return merge_adapter(model, folder, name=str(path))
    config = load_config(folder, name=str(path))
    files = weight_files(folder, name=str(path))
    stored = check_weight_files(files)
    resolved_device = device if isinstance(device, torch.device) else resolve_device(device)
    num_bytes = sum(file.stat().st_size for file in files)
    # Weights of few bits cannot be moved afterwards.
    quantized = (
        {} if quantization is None else {"quantization_config": quantization, "device_map": {"": resolved_device}}
    )
    try:
        with quiet_transformers(progress_bar=num_bytes > _PROGRESS_BAR_BYTES):
            loaded, loading_info = _auto_model.from_pretrained(
                str(folder),
                config=config,
                dtype=parameter_dtype(resolve_dtype(dtype, resolved_device)),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                # Listed in the loading info, by name and shape, and refused there.
                ignore_mismatched_sizes=True,
                **quantized,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{path}: the weights do not fit the configuration: {one_line(error)}",
            remedy="check that config.json and the safetensors files belong together, or fetch the model again",
        ) from error
    _check_loading_info(loading_info, name=str(path))
    keep_as_packed(loaded)
    return place(loaded, resolved_device, stored, is_placed=quantization is not None)


def _check_loading_info(info: Mapping[str, Any], *, name: str) -> None:
    """Refuse a model of which anything was initialised at random, or left behind.

    Tied weights, and those that the architecture declares as safe to lack or to ignore, are not in the info.
    """
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} weights are missing from the files and would be random: {shortened(missing)}",
            remedy="fetch the model again; a backbone without its output layer is not a causal language model",
        )
    mismatched = sorted(
        f"{key} ({tuple(in_file)}, not {tuple(in_model)})"
        for key, in_file, in_model in info.get("mismatched_keys") or ()
    )
    if mismatched:
        raise ModelError(
            f"{name}: {len(mismatched)} weights have another shape than config.json asks for: {shortened(mismatched)}",
            remedy="check that config.json and the weights belong together",
        )
    unexpected = sorted(info.get("unexpected_keys") or ())
    if unexpected:
        raise ModelError(
            f"{name}: {len(unexpected)} weights in the files have no place in the model: {shortened(unexpected)}",
            remedy="check that config.json (layers, biases, model_type) belongs to these weights",
        )
    if info.get("error_msgs"):
        raise ModelError(f"{name}: {shortened(info['error_msgs'])}", remedy="fetch the model again")
