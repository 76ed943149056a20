"""Devices and types by name."""

from __future__ import annotations

import pytest
import torch

from goldsmith.errors import ConfigError, MachineError
from goldsmith.models.precision import parameter_dtype, resolve_device, resolve_dtype


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device().type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="'gpu' is not a device"):
        resolve_device("gpu")
    with pytest.raises(MachineError, match="CUDA devices"):
        resolve_device("cuda:97")


def test_dtypes() -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16
    assert parameter_dtype(torch.bfloat16) == torch.float32
    assert parameter_dtype(torch.float64) == torch.float64
