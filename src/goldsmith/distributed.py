"""Several processes that do one step together: `torchrun` starts them, sums and decisions are agreed here.

Replicated: every rank holds the whole model. Sums over ranks, never means, so that a rank with little gold does not
weigh more. Everything is a no-op for a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from goldsmith.errors import MachineError

__all__ = ["agree", "barrier", "is_main", "process_group", "rank", "sum_gradients", "sum_tensor", "world_size"]

# Gradients travel in flat buckets of this many bytes.
BUCKET_BYTES = 64 * 2**20


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started (its environment variables say so) and leave at the end.

    Args:
        device: `cuda` without a number becomes, in each process, the GPU of its `LOCAL_RANK`.

    Raises:
        MachineError: the others cannot be reached, or one ended while this one waited for it; that one says why.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield
    except RuntimeError as error:
        # Gloo raises what every part of torch does; it names its own source file.
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise MachineError(
                f"process {rank()} of {world_size()}: another process ended, or cannot be reached",
                remedy="see what the others said, and give the same command again",
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """0 for the main process."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes share a step."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def sum_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over ranks; a parameter without one counts as zero, with a single process too."""
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if not dist.is_initialized():
            continue
        if bucket and (size >= BUCKET_BYTES or bucket[0].dtype != parameter.grad.dtype):
            _sum_bucket(bucket)
            bucket, size = [], 0
        bucket.append(parameter.grad)
        size += parameter.grad.numel() * parameter.grad.element_size()
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[torch.Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    dist.all_reduce(flat)
    offset = 0
    for tensor in bucket:
        tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()


def agree(value: bool, device: torch.device) -> bool:
    """True on every rank if it is True on any: a stop that all ranks make at the same step."""
    if not dist.is_initialized():
        return value
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
