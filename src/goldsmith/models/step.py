"""The gradient of one step: micro-batches that contribute sums, over all ranks. Training and verifying both run this."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from goldsmith import distributed
from goldsmith.data.loader import Dataset
from goldsmith.data.packing import pack, plan_microbatches
from goldsmith.data.shared_context import pack_shared, plan_shared_microbatches, shareable_length
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.objective.normalization import Normalization, step_denominator, token_coefficients
from goldsmith.types import PackedBatch

__all__ = ["StepSums", "autocast", "forward_backward", "microbatches"]

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
    """

    loss: float
    weighted_nll: float
    nll_E: npt.NDArray[np.float64]
    weighted_nll_E: npt.NDArray[np.float64]
    microbatches: int
    computed_tokens: int


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 products on CUDA; float32 (or the model's own precision) on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def microbatches(
    data: Dataset, indices: Indices, *, tokens_per_microbatch: int, shares_contexts: bool
) -> Iterator[tuple[PackedBatch, Indices]]:
    """This rank's share of a step, packed; with each pack the places of its examples within `indices`."""
    lengths = data.lengths[indices]
    ranks = distributed.world_size()
    # Enough micro-batches for every rank, where the examples can be divided.
    share = max(math.ceil(int(lengths.sum()) / ranks), int(lengths.max()))
    budget = min(tokens_per_microbatch, share)
    if shares_contexts:
        examples = [data[int(index)] for index in indices]
        shareable = [shareable_length(example.target_weights) for example in examples]
        plan = plan_shared_microbatches([example.token_ids for example in examples], shareable, budget)
    else:
        plan = plan_microbatches(lengths, budget)
    for members in plan[distributed.rank() :: ranks]:
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
) -> StepSums:
    """Add the gradient of a step's loss to the parameters' `grad` and return its sums, over all ranks.

    The denominator is that of the whole step, counted before the first forward pass; nothing is divided afterwards.

    Args:
        indices: the examples of the step, all ranks the same.
        tokens_per_microbatch: tokens in memory at a time; changes no number.
        shares_contexts: carry a context that several rows of a micro-batch begin with once; changes no number.
    """
    denominator = step_denominator(data.example_weights[indices], data.weight_sums[indices], normalization)
    num_microbatches = computed_tokens = 0
    losses: list[torch.Tensor] = []
    log_prob_sums: list[torch.Tensor] = []
    weighted_sums: list[torch.Tensor] = []
    weighted: list[torch.Tensor] = []
    places: list[Indices] = []
    packs = microbatches(data, indices, tokens_per_microbatch=tokens_per_microbatch, shares_contexts=shares_contexts)
    for packed, members in packs:
        batch = packed.to(model.device)
        with autocast(model.device):
            sums = model(batch, token_coefficients(batch, normalization, denominator=denominator))
        sums.weighted_nll.backward()
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
    totals = torch.zeros(2 * size + 4, dtype=torch.float64)
    if num_microbatches:
        members = np.concatenate(places)
        totals[members] = torch.cat(log_prob_sums).cpu()
        totals[size + members] = torch.cat(weighted_sums).cpu()
        totals[-4] = torch.stack(losses).sum().cpu()
        totals[-3] = torch.stack(weighted).sum().cpu()
    totals[-2], totals[-1] = num_microbatches, computed_tokens
    totals = distributed.sum_tensor(totals.to(model.device)).cpu()
    distributed.sum_gradients(p for p in model.parameters() if p.requires_grad)
    return StepSums(
        loss=float(totals[-4]),
        weighted_nll=-float(totals[-3]),
        nll_E=-totals[:size].numpy(),
        weighted_nll_E=-totals[size:-4].numpy(),
        microbatches=int(totals[-2]),
        computed_tokens=int(totals[-1]),
    )
