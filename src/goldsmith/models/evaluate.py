"""log P of the gold of a data set, example by example: what training's evaluation and scoring both read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from goldsmith.data.dataset import Dataset
from goldsmith.data.packing import pack
from goldsmith.data.shared_context import pack_shared, plan_shared_microbatches, shareable_length, shared_segments
from goldsmith.errors import NumericalError
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.out_of_memory import OutOfMemoryError, is_out_of_memory, release_memory
from goldsmith.types import PackedBatch

__all__ = [
    "GoldStatistics",
    "LikelihoodSums",
    "iterate_log_probs",
    "statistics_of",
    "sum_log_likelihood",
]

# Examples are sorted by length within a window, so that a pack holds like lengths. A window ends at either limit: so
# many examples, or so many packs' worth of tokens, after which its first result is due.
_WINDOW_EXAMPLES = 4096
_WINDOW_PACKS = 32

# Cuts places into packs of at most so many tokens.
_Plan = Callable[[list[int], int], list[list[int]]]

# In float32 a log-softmax may round to a little above 0; what lies further above is an error and not rounding.
_ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class LikelihoodSums:
    """Sums over examples; sums of disjoint sets of examples add up, and each figure is one division of two of them.

    Attributes:
        weighted_nll: sum_i u_i nll(i), nats.
        weight_sum: sum_i u_i W(i).
        example_nll: sum_i u_i nll(i) / W(i), nats.
        example_weight_sum: sum_i u_i.
        log_prob: the unweighted log P of all gold tokens, nats.
        num_examples, num_target_tokens: counts.
        weighted_nll_by_source, weight_sum_by_source: the first two, apart for each of the data set's `source_names`.
    """

    weighted_nll: float = 0.0
    weight_sum: float = 0.0
    example_nll: float = 0.0
    example_weight_sum: float = 0.0
    log_prob: float = 0.0
    num_examples: int = 0
    num_target_tokens: int = 0
    weighted_nll_by_source: tuple[float, ...] = ()
    weight_sum_by_source: tuple[float, ...] = ()

    @property
    def nll(self) -> float:
        """Nats a token, weighted: the evaluation nll. NaN over no examples."""
        return self.weighted_nll / self.weight_sum if self.weight_sum else float("nan")

    @property
    def nll_per_example(self) -> float:
        """The weighted mean over examples of nll(i) / W(i), nats. NaN over no examples."""
        return self.example_nll / self.example_weight_sum if self.example_weight_sum else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldStatistics:
    """One example's gold tokens in order. Legend: K gold tokens, N alternatives; what was not asked for is None.

    Attributes:
        log_probs: float64 [K], nats.
        best_log_probs: float64 [K], of the likeliest token.
        is_best: bool [K], no token is likelier than the gold one.
        ranks: int64 [K]; 1 + the number of tokens that are strictly likelier.
        entropies: float64 [K], nats.
        top_ids, top_log_probs: [K, N], the likeliest tokens.
    """

    log_probs: npt.NDArray[np.float64]
    best_log_probs: npt.NDArray[np.float64]
    is_best: npt.NDArray[np.bool_]
    ranks: npt.NDArray[np.int64] | None = None
    entropies: npt.NDArray[np.float64] | None = None
    top_ids: npt.NDArray[np.int64] | None = None
    top_log_probs: npt.NDArray[np.float64] | None = None


def iterate_log_probs(
    model: LikelihoodModel,
    dataset: Dataset,
    *,
    tokens_per_microbatch: int,
    device: torch.device | str | None = None,
    indices: Sequence[int] | None = None,
    note_halved: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """The log-probability of each gold token, example by example, in data-set order.

    How the examples are packed changes a value by rounding only. The model computes without dropout and without
    gradients, in its own precision or that of a surrounding `torch.autocast`; its training mode is as before whenever
    this generator has handed over.

    Args:
        model: on its device.
        dataset: the gold.
        tokens_per_microbatch: at most so many tokens a pack; an example that is longer is a pack by itself.
        device: where packs are sent; the model's own by default.
        indices: these examples only, in this order (a rank's share); all by default.
        note_halved: told of the new `tokens_per_microbatch` where a pack did not fit into memory and the rest is cut finer.

    Yields:
        (index of the example in the data set, float64 [its gold tokens], nats, <= 0).

    Raises:
        NumericalError: a log-probability is not finite or is above 0; it names the example.
        OutOfMemoryError: an example by itself does not fit into memory.
    """
    if tokens_per_microbatch < 1:
        raise ValueError(f"tokens_per_microbatch must be at least 1, not {tokens_per_microbatch}")
    chosen = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    lengths = np.asarray(dataset.lengths, dtype=np.int64)[chosen]

    def compute(batch: PackedBatch) -> dict[str, torch.Tensor]:
        return {"log_probs": model(batch).log_probs_K}

    passes = _Passes(model, dataset, compute, tokens_per_microbatch, device=device, note_halved=note_halved)
    start = 0
    while start < len(chosen):
        end = _window_end(lengths, start, passes.tokens_per_microbatch)
        # `indices` may name an example twice: the window's places are what tells them apart.
        found = passes.run(chosen[start:end], _by_length(lengths[start:end]))
        for index, values in zip(chosen[start:end].tolist(), found, strict=True):
            yield index, values["log_probs"]
        start = end


def statistics_of(
    model: LikelihoodModel,
    dataset: Dataset,
    indices: Sequence[int] | npt.NDArray[np.int64],
    *,
    tokens_per_microbatch: int,
    top: int = 0,
    detailed: bool = False,
    shares_contexts: bool = False,
    device: torch.device | str | None = None,
    note_halved: Callable[[int], None] | None = None,
) -> list[GoldStatistics]:
    """What scoring reads of some examples, in the order of `indices`; all of it is held, so give a window of them.

    Args:
        model, dataset, tokens_per_microbatch, device, note_halved: as in `iterate_log_probs`.
        top: how many of the likeliest tokens are listed at each place.
        detailed: ranks and entropies too.
        shares_contexts: carry a context that several of the examples begin with once; changes a value by rounding only.

    Raises:
        NumericalError, OutOfMemoryError: as `iterate_log_probs`.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    plan = _by_length(np.asarray(dataset.lengths, dtype=np.int64)[chosen])
    packer = pack
    if shares_contexts:
        rows = [dataset[int(index)] for index in chosen]
        shareable = [shareable_length(row.target_weights) for row in rows]
        ids = [row.token_ids for row in rows]
        if any(segment.parent != -1 for segment in shared_segments(ids, shareable)):
            plan, packer = _by_context(ids, shareable), pack_shared

    def compute(batch: PackedBatch) -> dict[str, torch.Tensor]:
        found = model.statistics(batch, top=top, detailed=detailed)
        return {
            field.name.removesuffix("_K").removesuffix("_KN"): value
            for field in fields(found)
            if (value := getattr(found, field.name)) is not None
        }

    passes = _Passes(model, dataset, compute, tokens_per_microbatch, device=device, note_halved=note_halved)
    return [GoldStatistics(**values) for values in passes.run(chosen, plan, packer=packer)]


def sum_log_likelihood(
    model: LikelihoodModel,
    dataset: Dataset,
    *,
    tokens_per_microbatch: int,
    device: torch.device | str | None = None,
    indices: Sequence[int] | None = None,
    note_halved: Callable[[int], None] | None = None,
) -> LikelihoodSums:
    """The sums of an evaluation, in float64; arguments and errors as in `iterate_log_probs`."""
    weighted_nll = weight_sum = example_nll = example_weight_sum = log_prob = 0.0
    num_examples = num_target_tokens = 0
    nll_by_source = [0.0] * len(dataset.source_names)
    weight_by_source = [0.0] * len(dataset.source_names)
    for index, log_probs in iterate_log_probs(
        model,
        dataset,
        tokens_per_microbatch=tokens_per_microbatch,
        device=device,
        indices=indices,
        note_halved=note_halved,
    ):
        example = dataset[index]
        token_weights = example.target_weights[example.target_weights > 0].astype(np.float64)
        nll, own_weight_sum = -float(np.dot(token_weights, log_probs)), float(token_weights.sum())
        source = int(dataset.source_indices[index])
        nll_by_source[source] += example.example_weight * nll
        weight_by_source[source] += example.example_weight * own_weight_sum
        weighted_nll += example.example_weight * nll
        weight_sum += example.example_weight * own_weight_sum
        example_nll += example.example_weight * nll / own_weight_sum
        example_weight_sum += example.example_weight
        log_prob += float(log_probs.sum())
        num_examples += 1
        num_target_tokens += len(log_probs)
    return LikelihoodSums(
        weighted_nll=weighted_nll,
        weight_sum=weight_sum,
        example_nll=example_nll,
        example_weight_sum=example_weight_sum,
        log_prob=log_prob,
        num_examples=num_examples,
        num_target_tokens=num_target_tokens,
        weighted_nll_by_source=tuple(nll_by_source),
        weight_sum_by_source=tuple(weight_by_source),
    )


def _window_end(lengths: npt.NDArray[np.int64], start: int, tokens_per_microbatch: int) -> int:
    """Where the window that begins at `start` ends: after at least one example."""
    within = np.cumsum(lengths[start : start + _WINDOW_EXAMPLES])
    return start + max(1, int(np.searchsorted(within, _WINDOW_PACKS * tokens_per_microbatch, side="right")))


def _packs(lengths: npt.NDArray[np.int64], start: int, end: int, max_tokens: int) -> Iterator[list[int]]:
    """The places of a window, longest first, cut where the next would exceed the budget."""
    places: list[int] = []
    num_tokens = 0
    for place in (start + np.argsort(-lengths[start:end], kind="stable")).tolist():
        length = int(lengths[place])
        if places and num_tokens + length > max_tokens:
            yield places
            places, num_tokens = [], 0
        places.append(place)
        num_tokens += length
    if places:
        yield places


def _by_length(lengths: npt.NDArray[np.int64]) -> _Plan:
    def plan(places: list[int], max_tokens: int) -> list[list[int]]:
        own = lengths[places]
        return [[places[place] for place in group] for group in _packs(own, 0, len(own), max_tokens)]

    return plan


def _by_context(ids: list[npt.NDArray[np.int32]], shareable: list[int]) -> _Plan:
    def plan(places: list[int], max_tokens: int) -> list[list[int]]:
        groups = plan_shared_microbatches(
            [ids[place] for place in places], [shareable[place] for place in places], max_tokens
        )
        return [[places[place] for place in group] for group in groups]

    return plan


class _Passes:
    """Packs through the model, smaller ones where memory does not suffice; what comes out is dealt out to the examples.

    Args:
        compute: name -> [K, ...] of a pack on the device; `log_probs` is one of them.
        device, note_halved: as in `iterate_log_probs`.

    Attributes:
        tokens_per_microbatch: as given, until a pack did not fit.
    """

    def __init__(
        self,
        model: LikelihoodModel,
        dataset: Dataset,
        compute: Callable[[PackedBatch], dict[str, torch.Tensor]],
        tokens_per_microbatch: int,
        *,
        device: torch.device | str | None,
        note_halved: Callable[[int], None] | None,
    ) -> None:
        self.tokens_per_microbatch = tokens_per_microbatch
        self._model, self._dataset, self._compute = model, dataset, compute
        self._device = model.device if device is None else device
        self._note_halved = note_halved

    def run(
        self, chosen: npt.NDArray[np.int64], plan: _Plan, *, packer: Callable[..., PackedBatch] = pack
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """What is computed of the gold tokens of each of the examples `chosen`; all of it is held.

        Args:
            plan: cuts places within `chosen` into packs of at most so many tokens.

        Raises:
            OutOfMemoryError: an example by itself does not fit.
        """
        found: list[dict[str, npt.NDArray[Any]]] = [{} for _ in range(len(chosen))]
        packs = plan(list(range(len(chosen))), self.tokens_per_microbatch)[::-1]
        while packs:
            places = packs.pop()
            batch = packer(self._dataset, chosen[places])
            values = self._values(batch)
            if values is None:
                release_memory(self._model.device)
                if len(places) == 1:
                    raise OutOfMemoryError(self._dataset, chosen[places], self._model.device)
                self.tokens_per_microbatch = max(1, batch.num_tokens // 2)
                left = [place for group in (places, *packs[::-1]) for place in group]
                packs = plan(left, self.tokens_per_microbatch)[::-1]
                if self._note_halved is not None:
                    self._note_halved(self.tokens_per_microbatch)
                continue
            ends = np.cumsum(np.bincount(batch.target_example.cpu().numpy(), minlength=len(places)))[:-1]
            for name, array in values.items():
                for place, own in zip(places, np.split(array, ends), strict=True):
                    found[place][name] = own
            for place in places:
                found[place]["log_probs"] = _checked(found[place]["log_probs"], self._dataset, int(chosen[place]))
        return found

    def _values(self, batch: PackedBatch) -> dict[str, npt.NDArray[Any]] | None:
        """Of the gold of a pack; None where memory did not suffice."""
        try:
            with _evaluating(self._model):
                return {
                    name: (tensor.double() if tensor.is_floating_point() else tensor).cpu().numpy()
                    for name, tensor in self._compute(batch.to(self._device)).items()
                }
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None


@contextmanager
def _evaluating(model: LikelihoodModel) -> Iterator[None]:
    """Dropout off and no gradients; each module returns to the mode it had."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def _checked(values: npt.NDArray[np.float64], dataset: Dataset, index: int) -> npt.NDArray[np.float64]:
    wrong = np.flatnonzero(~np.isfinite(values) | (values > _ROUNDING))
    if len(wrong):
        example = dataset[index]
        token_id = int(example.token_ids[example.target_weights > 0][wrong[0]])
        raise NumericalError(
            f"example {example.example_id!r} ({example.source}): log P of gold token {int(wrong[0]) + 1} of "
            f"{len(values)} (id {token_id}) is {values[wrong[0]]}",
            remedy="compute in float32, and look at the model's weights and at this example",
        )
    return np.minimum(values, 0.0)
