"""The fast path against the plain path on a user's own model and rows: loss, gradient and log-probabilities."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from goldsmith.data.dataset import Dataset
from goldsmith.data.packing import plan_microbatches
from goldsmith.errors import DataError, ModelError, NumericalError
from goldsmith.inspection.plain import PlainStep, plain_step
from goldsmith.models.checkpointing import checkpoint_layers, decoder_layers, keep_activations
from goldsmith.models.evaluate import iterate_log_probs
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.step import forward_backward
from goldsmith.objective.cross_entropy import ObjectiveConfig

__all__ = ["TOLERANCES", "Cut", "Tolerance", "VerifyReport", "verify"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What two right computations may differ by.

    Attributes:
        loss: relative.
        log_prob: nats, any gold token.
        gradient: of any parameter, |a - b| / max(|b|, 1e-3 of the norm of all gradients).
    """

    loss: float
    log_prob: float
    gradient: float


# float64: norms and rotary embeddings of `transformers` round to float32 inside, which is what is left of the difference.
# A segment that sees its neighbour, or a mean of means, differs by more than a hundred times as much.
TOLERANCES = {
    torch.float64: Tolerance(loss=1e-6, log_prob=1e-4, gradient=1e-4),
    torch.float32: Tolerance(loss=1e-4, log_prob=1e-2, gradient=1e-2),
}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One way to run the step, and how far it is from the plain one.

    Attributes:
        name: how the step was cut.
        microbatches: forward passes.
        computed_tokens: tokens that went through the model.
        loss: of the step.
        loss_difference, log_prob_difference, gradient_difference: as `Tolerance` defines them.
        worst_parameter: where the gradient differs most.
        holds: every difference is within its tolerance.
    """

    name: str
    microbatches: int
    computed_tokens: int
    loss: float
    loss_difference: float
    log_prob_difference: float
    gradient_difference: float
    worst_parameter: str
    holds: bool


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Whether the fast path gives what the plain one gives.

    Attributes:
        rows, tokens, gold_tokens: of the step that both ran.
        layers_by_hand: how many decoder layers run as one autograd node each.
        plain_loss: of the plain path.
    """

    model: str
    dtype: str
    rows: int
    tokens: int
    gold_tokens: int
    layers_by_hand: int
    plain_loss: float
    tolerance: Tolerance
    cuts: tuple[Cut, ...]

    @property
    def holds(self) -> bool:
        """Every cut holds."""
        return all(cut.holds for cut in self.cuts)

    @property
    def exit_code(self) -> int:
        """Of the command: 0, or that of a refused model."""
        return 0 if self.holds else ModelError.exit_code

    def to_json(self) -> dict[str, Any]:
        """One machine-readable object."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        lines = [
            f"{self.model} in {self.dtype}: {self.rows} rows, {self.tokens:,} tokens, {self.gold_tokens:,} gold",
            f"plain: padded batch, own attention, full logits: loss {self.plain_loss:.10f}",
            "",
            f"{'fast path':<34}{'tokens':>8}{'loss':>16}{'d loss':>10}{'d log p':>10}{'d gradient':>12}",
        ]
        for cut in self.cuts:
            lines.append(
                f"{cut.name:<34}{cut.computed_tokens:>8,}{cut.loss:>16.10f}{cut.loss_difference:>10.1e}"
                f"{cut.log_prob_difference:>10.1e}{cut.gradient_difference:>12.1e}" + ("" if cut.holds else "  FAILS")
            )
            if not cut.holds:
                lines.append(f"  the gradient differs most at {cut.worst_parameter}")
        limits = self.tolerance
        lines.append(f"{'allowed':<58}{limits.loss:>10.0e}{limits.log_prob:>10.0e}{limits.gradient:>12.0e}")
        lines.append("")
        lines.append(
            "The fast path gives what the plain path gives."
            if self.holds
            else "The fast path does NOT give what the plain path gives: do not train with it, and please report this."
        )
        return "\n".join(lines)


def verify(
    model: LikelihoodModel,
    data: Dataset,
    *,
    name: str,
    objective: ObjectiveConfig,
    num_rows: int = 8,
    can_share_contexts: bool = True,
) -> VerifyReport:
    """Run the first rows through the plain path and through several cuts of the fast path; nothing is updated.

    The cuts: two micro-batches of several rows each (which shows a mean of means), one pack of all rows, and, where the
    model may, one pack that carries shared contexts once and one whose layers are computed again in the backward pass.

    Args:
        model: float64 or float32, on its device.
        data: at least two rows; the first `num_rows` are used.
        name: how the report calls the model.

    Raises:
        DataError: fewer than two rows, which cannot show that packed rows leave each other alone.
        NumericalError: the plain path itself is not finite, so that there is nothing to compare with.
    """
    indices = np.arange(min(num_rows, len(data)))
    if len(indices) < 2:
        raise DataError(f"verify packs at least two rows, but the data has {len(data)}", remedy="give it more rows")
    model.train()
    examples = [data[int(index)] for index in indices]
    plain = plain_step(
        model.causal_lm,
        examples,
        normalization=objective.normalization,
        label_smoothing=objective.label_smoothing,
    )
    if not math.isfinite(plain.loss):
        raise NumericalError(
            f"the plain path gives a loss of {plain.loss}: there is nothing to compare the fast path with",
            remedy="look at the model's weights and at the first rows of the data",
        )
    dtype = next(model.parameters()).dtype
    tolerance = TOLERANCES[dtype]
    lengths = data.lengths[indices]
    total = int(lengths.sum())
    half = -(-total // 2)
    while len(plan_microbatches(lengths, half)) > 2:
        half += -(-half // 20)
    shares = can_share_contexts and model.shares_contexts(int(lengths.max()))
    cuts = [_cut(model, data, indices, objective, plain, tolerance, "two micro-batches", half)]
    cuts.append(_cut(model, data, indices, objective, plain, tolerance, "one pack", total))
    if shares:
        name_of_cut = "one pack, shared contexts once"
        cuts.append(_cut(model, data, indices, objective, plain, tolerance, name_of_cut, total, shares_contexts=True))
    if decoder_layers(model.causal_lm):
        name_of_cut = "one pack, layers computed again"
        checkpoint_layers(model.causal_lm)
        try:
            # With all that the model may do at once, as training with a small memory would run it.
            cut = _cut(model, data, indices, objective, plain, tolerance, name_of_cut, total, shares_contexts=shares)
        finally:
            keep_activations(model.causal_lm)
        cuts.append(cut)
    return VerifyReport(
        model=name,
        dtype=str(dtype).removeprefix("torch."),
        rows=len(indices),
        tokens=total,
        gold_tokens=int(data.num_target_tokens[indices].sum()),
        layers_by_hand=model.num_layers_by_hand,
        plain_loss=plain.loss,
        tolerance=tolerance,
        cuts=tuple(cuts),
    )


def _cut(
    model: LikelihoodModel,
    data: Dataset,
    indices: np.ndarray[Any, np.dtype[np.int64]],
    objective: ObjectiveConfig,
    plain: PlainStep,
    tolerance: Tolerance,
    name: str,
    budget: int,
    *,
    shares_contexts: bool = False,
) -> Cut:
    sums = forward_backward(
        model,
        data,
        indices,
        normalization=objective.normalization,
        tokens_per_microbatch=budget,
        shares_contexts=shares_contexts,
    )
    gradients = {key: p.grad for key, p in model.causal_lm.named_parameters() if p.grad is not None}
    for parameter in model.causal_lm.parameters():
        parameter.grad = None
    gradient_difference, worst = _gradient_difference(gradients, plain.gradients)
    log_prob_difference = _log_prob_difference(model, data, indices, plain, budget)
    loss_difference = abs(sums.loss - plain.loss) / max(abs(plain.loss), 1e-300)
    return Cut(
        name=name,
        microbatches=sums.microbatches,
        computed_tokens=sums.computed_tokens,
        loss=sums.loss,
        loss_difference=loss_difference,
        log_prob_difference=log_prob_difference,
        gradient_difference=gradient_difference,
        worst_parameter=worst,
        # Written so that a NaN does not hold.
        holds=loss_difference <= tolerance.loss
        and log_prob_difference <= tolerance.log_prob
        and gradient_difference <= tolerance.gradient,
    )


def _log_prob_difference(
    model: LikelihoodModel,
    data: Dataset,
    indices: np.ndarray[Any, np.dtype[np.int64]],
    plain: PlainStep,
    budget: int,
) -> float:
    """Of any gold token, by the path of evaluation and scoring; NaN where that path refuses what it got."""
    try:
        values = [
            log_probs
            for _, log_probs in iterate_log_probs(model, data, tokens_per_microbatch=budget, indices=indices.tolist())
        ]
    except NumericalError:
        return math.nan
    return float((torch.from_numpy(np.concatenate(values)) - plain.log_probs.double()).abs().max())


def _gradient_difference(fast: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative difference and its parameter; infinite where only one side has a gradient, NaN where there is one."""
    total = float(torch.nn.utils.get_total_norm(list(plain.values())))
    worst, where = 0.0, ""
    for key in plain.keys() | fast.keys():
        if key not in fast or key not in plain:
            return float("inf"), key
        difference = float((fast[key] - plain[key]).norm()) / max(float(plain[key].norm()), 1e-3 * total, 1e-300)
        if math.isnan(difference):
            return difference, key  # every comparison with it is false: a later one would hide it
        if difference > worst:
            worst, where = difference, key
    return worst, where
