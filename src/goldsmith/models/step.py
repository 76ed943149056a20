"""The gradient of one step: micro-batches that contribute sums, over all ranks. Training and verifying both run this."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from goldsmith import distributed
from goldsmith.data.dataset import Dataset
from goldsmith.data.packing import pack, plan_microbatches
from goldsmith.data.shared_context import pack_shared, plan_shared_microbatches, shareable_length
from goldsmith.errors import ConfigError
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.out_of_memory import OutOfMemoryError, is_out_of_memory, release_memory
from goldsmith.objective.cross_entropy import ObjectiveSums
from goldsmith.objective.normalization import Normalization, step_denominator, token_coefficients
from goldsmith.types import PackedBatch

__all__ = ["StepSums", "autocast", "forward_backward", "microbatches", "plan_step"]

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """What the micro-batches of a step add up to, over all ranks. Legend: E examples of the step, in its order.

    Attributes:
        loss: what was differentiated: normalised, smoothed where asked for.
        weighted_nll: sum_i u_i nll(i), nats.
        nll_E: unweighted nll of each example's gold, nats.
        weighted_nll_E: nll(i) of each example, nats: token weights are in it, the example's weight is not.
        microbatches: forward passes.
        computed_tokens: tokens of all packs; fewer than the rows have where contexts are shared.
        data_seconds: what cutting and packing took on this rank.
    """

    loss: float
    weighted_nll: float
    nll_E: npt.NDArray[np.float64]
    weighted_nll_E: npt.NDArray[np.float64]
    microbatches: int
    computed_tokens: int
    data_seconds: float


def autocast(model: LikelihoodModel) -> torch.autocast:
    """Products in the half precision that the model computes in; without effect where it computes in its parameters' own."""
    dtype = model.autocast_dtype
    return torch.autocast(model.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def plan_step(data: Dataset, indices: Indices, *, tokens_per_microbatch: int, shares_contexts: bool) -> list[list[int]]:
    """The micro-batches of a step, of all ranks: for each the places of its examples within `indices`."""
    budget = _budget(data, indices, tokens_per_microbatch)
    if not shares_contexts:
        return plan_microbatches(data.lengths[indices], budget)
    examples = [data[int(index)] for index in indices]
    shareable = [shareable_length(example.target_weights) for example in examples]
    return plan_shared_microbatches([example.token_ids for example in examples], shareable, budget)


def _budget(data: Dataset, indices: Indices, tokens_per_microbatch: int) -> int:
    """Enough micro-batches for every rank, where the examples can be divided."""
    lengths = data.lengths[indices]
    share = max(math.ceil(int(lengths.sum()) / distributed.world_size()), int(lengths.max()))
    return min(tokens_per_microbatch, share)


def microbatches(
    data: Dataset, indices: Indices, *, tokens_per_microbatch: int, shares_contexts: bool
) -> Iterator[tuple[PackedBatch, Indices]]:
    """This rank's share of a step, packed; with each pack the places of its examples within `indices`."""
    plan = plan_step(data, indices, tokens_per_microbatch=tokens_per_microbatch, shares_contexts=shares_contexts)
    return _packs(data, indices, plan[distributed.rank() :: distributed.world_size()], shares_contexts=shares_contexts)


def _packs(
    data: Dataset, indices: Indices, plan: list[list[int]], *, shares_contexts: bool
) -> Iterator[tuple[PackedBatch, Indices]]:
    for members in plan:
        chosen = indices[members]
        yield pack_shared(data, chosen) if shares_contexts else pack(data, chosen), np.asarray(members)


def forward_backward(
    model: LikelihoodModel,
    data: Dataset,
    indices: Indices,
    *,
    normalization: Normalization,
    tokens_per_microbatch: int,
    shares_contexts: bool = False,
    updates_in_backward: bool = False,
) -> StepSums:
    """Add the gradient of a step's loss to the parameters' `grad` and return its sums, over all ranks.

    The denominator is that of the whole step, counted before the first forward pass; nothing is divided afterwards.

    Args:
        indices: the examples of the step, all ranks the same.
        tokens_per_microbatch: tokens in memory at a time; changes no number.
        shares_contexts: carry a context that several rows of a micro-batch begin with once; changes no number.
        updates_in_backward: gradients are used and freed within the backward pass, which therefore is the only one, and
            is not begun where the loss is not finite.

    Raises:
        OutOfMemoryError: a micro-batch of any rank does not fit; raised on all of them, with the gradients discarded.
        ConfigError: more than one micro-batch where parameters are updated in the backward pass.
    """
    denominator = step_denominator(data.example_weights[indices], data.weight_sums[indices], normalization)
    num_microbatches = computed_tokens = 0
    losses: list[torch.Tensor] = []
    log_prob_sums: list[torch.Tensor] = []
    weighted_sums: list[torch.Tensor] = []
    weighted: list[torch.Tensor] = []
    places: list[Indices] = []
    started = time.perf_counter()
    plan = plan_step(data, indices, tokens_per_microbatch=tokens_per_microbatch, shares_contexts=shares_contexts)
    data_seconds = time.perf_counter() - started
    if updates_in_backward and len(plan) > 1:
        raise ConfigError(
            f"optimizer.step_in_backward: a step of {int(data.lengths[indices].sum()):,} tokens makes {len(plan)} "
            f"micro-batches of {tokens_per_microbatch:,}, and the first would be applied before the second is computed",
            remedy="set a larger training.tokens_per_microbatch or a smaller training.batch_size",
        )
    own = plan[distributed.rank() :: distributed.world_size()]
    failed: Indices | None = None
    packs = _packs(data, indices, own, shares_contexts=shares_contexts)
    while True:
        started = time.perf_counter()
        packed, members = next(packs, (None, None))
        data_seconds += time.perf_counter() - started
        if packed is None or members is None:
            break
        try:
            batch = packed.to(model.device)
            sums = _differentiate(
                model,
                batch,
                token_coefficients(batch, normalization, denominator=denominator),
                only_if_finite=updates_in_backward,
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = members
            break
        num_microbatches += 1
        computed_tokens += batch.num_tokens
        log_probs = sums.log_probs_K.double()
        per_example = torch.zeros(len(members), dtype=torch.float64, device=model.device)
        weighted_sums.append(per_example.index_add(0, batch.target_example, log_probs * batch.target_weights.double()))
        log_prob_sums.append(per_example.index_add_(0, batch.target_example, log_probs))
        weighted.append((log_probs * token_coefficients(batch, "token")).sum())
        losses.append(sums.weighted_nll.detach().double())
        places.append(members)

    size = len(indices)
    # Of each example: log P, weighted log P, whether it ran out of memory; then four sums.
    totals = torch.zeros(3 * size + 4, dtype=torch.float64)
    if failed is not None:
        # The others learn of it with the sums, and do not wait for gradients that never come.
        totals[2 * size + failed] = 1.0
    elif num_microbatches:
        members = np.concatenate(places)
        totals[members] = torch.cat(log_prob_sums).cpu()
        totals[size + members] = torch.cat(weighted_sums).cpu()
        totals[-4] = torch.stack(losses).sum().cpu()
        totals[-3] = torch.stack(weighted).sum().cpu()
    totals[-2], totals[-1] = num_microbatches, computed_tokens
    totals = distributed.sum_tensor(totals.to(model.device)).cpu()
    failed_E = totals[2 * size : -4].numpy() > 0
    if failed_E.any():
        model.zero_grad(set_to_none=True)
        release_memory(model.device)
        blamed = min((members for members in plan if failed_E[members].any()), key=len)
        can_be_cut = any(len(members) > 1 for members in plan)
        budget = _budget(data, indices, tokens_per_microbatch)
        raise OutOfMemoryError(
            data, indices[blamed], model.device, smaller_budget=max(1, budget // 2) if can_be_cut else None
        )
    if not updates_in_backward:
        distributed.sum_gradients(p for p in model.parameters() if p.requires_grad)
    return StepSums(
        loss=float(totals[-4]),
        weighted_nll=-float(totals[-3]),
        nll_E=-totals[:size].numpy(),
        weighted_nll_E=-totals[size : 2 * size].numpy(),
        microbatches=int(totals[-2]),
        computed_tokens=int(totals[-1]),
        data_seconds=data_seconds,
    )


def _differentiate(
    model: LikelihoodModel, batch: PackedBatch, coefficients_K: torch.Tensor, *, only_if_finite: bool
) -> ObjectiveSums:
    """Forward and backward pass of one pack."""
    with autocast(model):
        sums = model(batch, coefficients_K)
    if not only_if_finite or math.isfinite(float(sums.weighted_nll.detach())):
        sums.weighted_nll.backward()
    return ObjectiveSums(
        weighted_nll=sums.weighted_nll.detach(), weight_sum=sums.weight_sum, log_probs_K=sums.log_probs_K
    )
