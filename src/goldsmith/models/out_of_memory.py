"""Out of memory: what says so on which device, and what is raised in its place so that smaller parts can be tried."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch

from goldsmith.data.dataset import Dataset
from goldsmith.errors import MachineError

__all__ = ["OutOfMemoryError", "is_out_of_memory", "release_memory"]

SHOWN_ROWS = 3


class OutOfMemoryError(MachineError):
    """The rows of a pack do not fit into memory together.

    Attributes:
        smaller_budget: the `tokens_per_microbatch` to try next; None where every micro-batch is a single row already.
    """

    def __init__(
        self, data: Dataset, indices: Iterable[int], device: torch.device, *, smaller_budget: int | None = None
    ) -> None:
        rows = [int(index) for index in indices]
        self.smaller_budget = smaller_budget
        named = ", ".join(
            f"{data.example_ids[row]} ({data.sources[row]}), {int(data.lengths[row]):,} tokens"
            for row in rows[:SHOWN_ROWS]
        )
        more = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        super().__init__(
            f"out of memory on {device}: {'a single row does' if len(rows) == 1 else f'{len(rows)} rows do'} not fit: "
            f"{named}{more}",
            remedy="set training.activation_checkpointing: layers, optimizer.state_dtype: int8 or a smaller "
            "data.max_length, or use a machine with more memory",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, in PyTorch's allocator of the CPU, or in Python."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release_memory(device: torch.device) -> None:
    """Give back what a failed attempt left behind. Call it outside of the `except` block, whose traceback holds tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
