"""Verifying: the recipe's own model and first rows through the plain path and through the fast one."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch

from goldsmith.errors import ConfigError
from goldsmith.inspection.verify import VerifyReport
from goldsmith.inspection.verify import verify as verify_model
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.precision import resolve_device
from goldsmith.models.proof import prove
from goldsmith.models.quantized import has_packed_weights
from goldsmith.models.randomness import silence_randomness
from goldsmith.recipe import Recipe, require_recipe
from goldsmith.workflows.materials import (
    causal_lm_of,
    choose_trained,
    dataset_of,
    own_limit_of,
    renderer_of,
    tokenizer_of,
)

__all__ = ["verify"]


def verify(
    recipe: Recipe,
    *,
    num_rows: int = 8,
    dtype: Literal["auto", "float32", "float64"] = "auto",
    quiet: bool = True,
) -> VerifyReport:
    """Prove on one's own model and rows that the fast path gives what a plain loop gives. Nothing is trained or written.

    Args:
        num_rows: rows of the step that both run, from the beginning of the training data.
        dtype: what both compute in; `auto` is float64 where weights, gradients and their copies fit into half of the memory, and
            float32 for weights in 4 bits.
        quiet: as for the other workflows; there is nothing to say on the way.

    Raises:
        ConfigError: no recipe, fewer than two rows, or another dtype.
        GoldsmithError: bad data, or a model that cannot be loaded or fails the proof.
    """
    require_recipe(recipe)
    if num_rows < 2:
        raise ConfigError(f"num_rows is {num_rows}, but verify packs at least two rows", remedy="give it 8, say")
    if dtype not in ("auto", "float32", "float64"):
        raise ConfigError(
            f"dtype is {dtype!r}, whose rounding would hide a fault", remedy="use auto, float32 or float64"
        )
    if not recipe.data.train:
        raise ConfigError("data.train: missing", remedy="name the files whose first rows are to be run")
    device = resolve_device(recipe.model.device)
    own_limit = own_limit_of(recipe)
    tokenizer = tokenizer_of(recipe, None)
    renderer = renderer_of(recipe, tokenizer, recipe.data.max_length or own_limit)
    data = dataset_of(recipe, renderer, "train", None)
    causal_lm: Any = causal_lm_of(recipe, tokenizer, device, dtype="float32" if dtype == "auto" else dtype)
    silence_randomness(causal_lm)
    # A factor that is still zero would make the gradient of the other one zero, too, and hide a fault in it.
    choose_trained(recipe, causal_lm, tokenizer, at_random=True)
    if dtype == "auto" and not has_packed_weights(causal_lm):
        # Weights and two sets of gradients, eight bytes each.
        needed = 3 * 8 * sum(parameter.numel() for parameter in causal_lm.parameters())
        if needed < _memory_bytes(device) / 2:
            causal_lm = causal_lm.to(torch.float64)
    if causal_lm.dtype == torch.float64 and causal_lm._can_set_experts_implementation():
        # The grouped products of experts know no float64.
        causal_lm.set_experts_implementation("eager")
    name = recipe.model.path or f"a new {causal_lm.config.model_type}"
    proof = prove(causal_lm.config, name=name)
    # No autocast, whatever the recipe trains in: half precision would be no yardstick.
    model = LikelihoodModel(causal_lm, label_smoothing=recipe.objective.label_smoothing, compute_dtype=causal_lm.dtype)
    return verify_model(
        model,
        data,
        name=name,
        objective=recipe.objective,
        num_rows=num_rows,
        can_share_contexts=proof.shares_contexts,
    )


def _memory_bytes(device: torch.device) -> int:
    """Of the device, all of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
