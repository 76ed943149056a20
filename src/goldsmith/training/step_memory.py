"""Fitting a step into memory: what is kept for the backward pass, how many tokens at a time, and what to do where it fails."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from goldsmith import distributed
from goldsmith.data.dataset import Dataset
from goldsmith.models.checkpointing import checkpoint_layers, keep_activations
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.out_of_memory import OutOfMemoryError
from goldsmith.models.step import StepSums
from goldsmith.records import TrainingState
from goldsmith.training.memory import (
    Checkpointing,
    MemoryBudget,
    ModelShape,
    StateDtype,
    largest_microbatch,
    memory_budget,
    parse_bytes,
)

__all__ = ["StepMemory", "available_bytes", "choose_checkpointing"]

Indices = npt.NDArray[np.int64]

# Of what the machine has free: the rest is for the allocator's losses and for other programs.
USABLE_SHARE = 0.9


class StepMemory:
    """How a step is fitted into memory: what is kept for the backward pass, and how many tokens at a time.

    Args:
        model: its layers are set to be computed again, or not.
        data, batch_size, tokens_per_microbatch: what steps hold, and how they are cut.
        activation_checkpointing: `auto` is resolved here, from `memory_limit`.
        state_dtype, step_in_backward: of the optimizer.
        note: told, in a line, of what did not fit.

    Attributes:
        activation_checkpointing: resolved.
        tokens_per_microbatch, evaluation_tokens: as given, until memory does not suffice.
    """

    def __init__(
        self,
        model: LikelihoodModel,
        data: Dataset,
        *,
        batch_size: int,
        tokens_per_microbatch: int,
        activation_checkpointing: Literal["none", "layers", "auto"],
        memory_limit: int | str | None,
        state_dtype: StateDtype,
        step_in_backward: bool,
        note: Callable[[str], None],
    ) -> None:
        self._model = model
        self._given_tokens = tokens_per_microbatch
        self._state_dtype = state_dtype
        self._step_in_backward = step_in_backward
        self._note = note
        self._largest = largest_microbatch(data, batch_size=batch_size, tokens_per_microbatch=tokens_per_microbatch)
        self.tokens_per_microbatch = self.evaluation_tokens = tokens_per_microbatch
        if activation_checkpointing == "auto":
            # The parameters are there already.
            own = sum(p.numel() * p.element_size() for p in model.parameters())
            limit = own + available_bytes(model.device) if memory_limit is None else parse_bytes(memory_limit)
            activation_checkpointing = choose_checkpointing(self.budget, limit, model.device)
        self.activation_checkpointing: Checkpointing = activation_checkpointing
        if activation_checkpointing == "layers":
            checkpoint_layers(model.causal_lm)
        else:
            keep_activations(model.causal_lm)

    def budget(self, activation_checkpointing: Checkpointing | None = None) -> MemoryBudget:
        """What a step is to take, by buffer; as resolved, or with the other choice."""
        tokens, gold_tokens = self._largest
        return memory_budget(
            ModelShape.of(self._model),
            tokens=tokens,
            gold_tokens=gold_tokens,
            activation_checkpointing=activation_checkpointing or self.activation_checkpointing,
            state_dtype=self._state_dtype,
            step_in_backward=self._step_in_backward,
        )

    def fitting(self, forward_backward: Callable[[Indices], StepSums], indices: Indices) -> StepSums:
        """`forward_backward(indices)`, again with half the tokens a micro-batch where memory does not suffice.

        Raises:
            OutOfMemoryError: every micro-batch is a single row already, or the step cannot be cut.
        """
        while True:
            try:
                return forward_backward(indices)
            except OutOfMemoryError as error:
                if error.smaller_budget is None or self._step_in_backward:
                    raise
                before, self.tokens_per_microbatch = self.tokens_per_microbatch, error.smaller_budget
            self._note(
                f"out of memory: training.tokens_per_microbatch {before:,} -> {self.tokens_per_microbatch:,} from here on; "
                "the step is done again"
            )

    def evaluate_smaller(self, tokens: int) -> None:
        """An evaluation went on with so many tokens at a time, and the next ones begin with them."""
        self._note(f"out of memory: evaluation goes on with {tokens:,} tokens at a time")
        self.evaluation_tokens = tokens

    def remembered(self, state: TrainingState) -> TrainingState:
        """The state with what a resumed run has to know."""
        is_smaller = self.tokens_per_microbatch < self._given_tokens
        return replace(
            state,
            halved_tokens_per_microbatch=self.tokens_per_microbatch if is_smaller else None,
            halved_from=self._given_tokens if is_smaller else None,
        )

    def restore(self, state: TrainingState) -> None:
        """The inverse; nothing where the recipe asks for another `tokens_per_microbatch` than it did then."""
        if state.halved_tokens_per_microbatch is not None and state.halved_from == self._given_tokens:
            self.tokens_per_microbatch = state.halved_tokens_per_microbatch


def choose_checkpointing(
    budget_of: Callable[[Checkpointing], MemoryBudget], limit: int, device: torch.device
) -> Checkpointing:
    """Keep activations where they fit into `limit` bytes on every rank; else compute layers again."""
    return "layers" if distributed.agree(budget_of("none").total > limit, device) else "none"


def available_bytes(device: torch.device) -> int:
    """What this process may still take on the device, less a margin. On a CPU all processes of the machine share it."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * USABLE_SHARE)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(min(_free_of_machine(), _free_of_container()) * USABLE_SHARE) // ranks_here


def _free_of_machine() -> int:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        # Not Linux: half of all that there is.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, flags=re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def _free_of_container(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What the control group of a container leaves; without a limit more than any machine has."""
    try:
        limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), flags=re.MULTILINE)
    except OSError:
        return 1 << 62
    # Files that were read count as used, and are dropped when memory is wanted.
    used -= int(cached.group(1)) if cached else 0
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)
