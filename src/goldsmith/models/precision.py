"""Where a model computes, and in what: the device, the type of products, that of the master weights, and that of the files."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from goldsmith.errors import ConfigError, MachineError

__all__ = ["DtypeName", "parameter_dtype", "place", "resolve_device", "resolve_dtype", "stored_dtype"]

DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_DEVICE_REMEDY = "use auto, cpu, cuda or cuda:N"


def resolve_device(device: str = "auto") -> torch.device:
    """The device by name; `auto` is the current CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: not the name of a device.
        MachineError: a device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"model.device: {device!r} is not a device", remedy=_DEVICE_REMEDY) from error
    if resolved.type == "cuda":
        num_devices = torch.cuda.device_count()
        if (resolved.index or 0) >= num_devices:
            raise MachineError(
                f"model.device: {device!r}, but PyTorch sees {num_devices} CUDA devices here",
                remedy="use `device: auto`, or install a PyTorch build that matches the GPU driver",
            )
    elif resolved.type != "cpu":
        raise ConfigError(f"model.device: {device!r} is not supported", remedy=_DEVICE_REMEDY)
    return resolved


def resolve_dtype(dtype: DtypeName, device: torch.device) -> torch.dtype:
    """What the forward pass computes in: `auto` is float32 on a CPU, bfloat16 (autocast) on a GPU that has it.

    Raises:
        ConfigError: another name.
    """
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype: {dtype!r} is not known", remedy=f"use auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def parameter_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The master weights' dtype: float32, or float64 where float64 is computed in."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that the weights had in their files (a new model: its parameters'); the result is exported in it."""
    stored = getattr(model, "stored_dtype", None)
    return stored if isinstance(stored, torch.dtype) else model.dtype


def place(model: Any, device: torch.device, stored: torch.dtype, *, is_placed: bool = False) -> PreTrainedModel:
    """On its device (where it `is_placed` already it is left there), in evaluation mode, with its files' dtype remembered."""
    try:
        model = (model if is_placed else model.to(device)).eval()
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"{model.num_parameters():,} parameters in {model.dtype} do not fit into the memory of {device}",
            remedy="use a smaller model or a device with more memory",
        ) from error
    model.stored_dtype = stored
    ready: PreTrainedModel = model
    return ready
