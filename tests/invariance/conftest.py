"""Every test here computes in float64 throughout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lift import lifted


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """Norms and rotary embeddings would round to float32; one thread, for so small a model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with lifted():
        yield
    torch.set_num_threads(threads)
