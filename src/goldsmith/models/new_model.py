"""A new causal language model with random weights, as `init` of a recipe describes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from goldsmith.errors import ConfigError
from goldsmith.models.precision import DtypeName, parameter_dtype, place, resolve_device, resolve_dtype
from goldsmith.models.quiet import quiet_transformers
from goldsmith.models.wording import nearest_known, one_line

__all__ = ["init_causal_lm", "own_positions"]

# Typed as Any: its classmethods are not annotated.
_auto_model: Any = AutoModelForCausalLM

# Keys that `transformers` moves into `rope_parameters`, on every architecture that has it.
_ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"})
# Known to every config, but decided elsewhere in the recipe or by goldsmith itself.
_NOT_FOR_INIT = {
    "dtype": "set `model.dtype`",
    "torch_dtype": "set `model.dtype`",
    "attn_implementation": "goldsmith brings its own attention",
    "architectures": "set `architecture`",
    "model_type": "set `architecture`",
}


def own_positions(init: Mapping[str, Any]) -> int | None:
    """The positions of a new model, by whatever name its configuration has for them, or as many as that has by itself.

    None where it has none, or where `init_causal_lm` refuses the settings.
    """
    settings = dict(init)
    architecture = settings.pop("architecture", None)
    try:
        return getattr(CONFIG_MAPPING[architecture](**settings), "max_position_embeddings", None)
    except Exception:  # see there
        return None


def init_causal_lm(
    init: Mapping[str, Any],
    *,
    vocab_size: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    seed: int = 0,
    dtype: DtypeName = "auto",
    device: str | torch.device = "auto",
) -> PreTrainedModel:
    """A new model with random weights: the same for the same arguments, on every device.

    The global random state is left as it was.

    Args:
        init: `architecture` (a model type of transformers, such as llama) and settings of its configuration class.
        vocab_size: how many tokens the tokenizer has; `init["vocab_size"]` may be larger (padding), not smaller.
        bos_token_id, eos_token_id, pad_token_id: of the tokenizer, None where it has none.
        seed: of the random weights.

    Raises:
        ConfigError: an unknown architecture or setting (the nearest known one is named), or a value that it refuses.
    """
    settings = dict(init)
    architecture = settings.pop("architecture", None)
    own_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(architecture) if isinstance(architecture, str) else None
    if own_class is None or own_class.endswith("ForConditionalGeneration"):
        raise ConfigError(
            f"model.init.architecture: {architecture!r} is not a causal language model of transformers"
            + nearest_known(str(architecture), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
            remedy="use a model type such as llama, qwen3, mistral or gpt2",
        )
    config_class = CONFIG_MAPPING[architecture]
    known = {field.name for field in dataclasses.fields(config_class) if field.init} | set(config_class.attribute_map)
    if "rope_parameters" in known:
        known |= _ROPE_KEYS
    known -= _NOT_FOR_INIT.keys()
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"model.init.{key}: not a setting of {architecture!r}{nearest_known(key, known)}",
                remedy=_NOT_FOR_INIT.get(key, f"the settings are those of transformers' {config_class.__name__}"),
            )
    own_vocab_size = settings.setdefault("vocab_size", vocab_size)
    if not isinstance(own_vocab_size, int) or own_vocab_size < vocab_size:
        raise ConfigError(
            f"model.init.vocab_size: {own_vocab_size!r}, but the tokenizer has {vocab_size} tokens",
            remedy="leave it out, or give a larger number",
        )
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    for key, value in ids.items():
        # None must be said, too: the class's own default would be an id of another tokenizer.
        settings.setdefault(key, value)
    resolved_device = device if isinstance(device, torch.device) else resolve_device(device)
    compute_dtype = resolve_dtype(dtype, resolved_device)
    try:
        config = config_class(**settings)
        with quiet_transformers(progress_bar=False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Drawn on the CPU and in float32, so that device and dtype do not change the weights.
            model: Any = _auto_model.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # validators and constructors of transformers raise many kinds
        raise ConfigError(
            f"model.init: {architecture!r} cannot be built so: {one_line(error)}",
            remedy=f"the settings are those of transformers' {config_class.__name__}",
        ) from error
    model = model.to(parameter_dtype(compute_dtype))
    model.config.dtype = model.dtype
    model.config.architectures = [type(model).__name__]
    return place(model, resolved_device, model.dtype)
