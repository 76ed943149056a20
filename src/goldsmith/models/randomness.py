"""What makes the loss of a model random, or adds to it, and how to turn it off."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["silence_randomness"]

_RANDOMNESS = re.compile(r"dropout|pdrop|layerdrop|drop_path|jitter")


def silence_randomness(model: PreTrainedModel) -> dict[str, float | bool]:
    """Turn off everything that makes the loss random or adds to it: dropout, layer drop, router jitter, router losses.

    Both the configuration (some models read it while they run) and what the modules copied out of it are changed.

    Returns:
        What was changed: name to the value it had, configuration as `config.NAME`, modules by their path; empty where
        nothing was on.
    """
    changed: dict[str, float | bool] = {}
    configs: list[tuple[str, PreTrainedConfig]] = [("config", model.config)]
    for key in getattr(model.config, "sub_configs", {}) or {}:
        sub_config = getattr(model.config, key, None)
        if isinstance(sub_config, PreTrainedConfig):
            configs.append((f"config.{key}", sub_config))
    for prefix, config in configs:
        for key, value in list(vars(config).items()):
            if _is_randomness(key, value):
                changed[f"{prefix}.{key}"] = value
                setattr(config, key, 0.0)
            elif key == "output_router_logits" and value:
                changed[f"{prefix}.{key}"] = value
                setattr(config, key, False)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            if module.p > 0:
                changed[f"{path}.p"] = module.p
                module.p = 0.0
            continue
        for key, value in list(vars(module).items()):
            if _is_randomness(key, value):
                changed[f"{path}.{key}"] = value
                setattr(module, key, 0.0)
    return changed


def _is_randomness(key: str, value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and value != 0 and _RANDOMNESS.search(key) is not None
