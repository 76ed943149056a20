"""One case of the matrix: a step on the plain side, the same step on the fast side, and how far apart they are.

The plain side is `tests/numeric/plain.py`, in float64 the truth and in float32 the yardstick. The fast side is the real `Trainer`.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from families import (
    BY_HAND,
    FAMILIES,
    TRAINED,
    TRAINED_BY_HAND,
    TRAINED_BY_PEFT,
    VOCABULARY,
    build,
    is_soft_capped,
)
from plain import OWN_ATTENTION, PlainRow, PlainStep, plain_step
from small_trainer import build_trainer

from goldsmith.data.dataset import Dataset
from goldsmith.models import likelihood
from goldsmith.models.evaluate import sum_log_likelihood
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.training.trainer import Trainer, TrainingConfig
from goldsmith.types import TokenizedExample

__all__ = [
    "ALL_AT_ONCE",
    "CUT",
    "FACTORS",
    "GRADIENT_TOLERANCE",
    "LOSS_TOLERANCE",
    "MEANING",
    "Errors",
    "Outcome",
    "canonical",
    "examples_of",
    "fast_model",
    "plain_truth",
    "relative_errors",
    "run_case",
    "typical",
]

ALL_AT_ONCE = 10**6

# How a step may be cut: the law says that none of it changes a number.
CUT: dict[str, tuple[Any, ...]] = {
    # 1: a row each. All rows are 254 tokens, or 108 with contexts shared.
    "tokens_per_microbatch": (1, 50, 90, ALL_AT_ONCE),
    "order": ("as given", "reversed", "shuffled"),
    "chunk_size": (1, 5, None),
    "shared_context": ("auto", "off"),
    "layers": ("by hand", "their own"),
    "evaluation_tokens": (1, 50, ALL_AT_ONCE),
}
# Settings of the recipe that change memory only; each takes part as soon as the trainer has it.
for _name, _values in {"activation_checkpointing": ("none", "layers")}.items():
    if _name in TrainingConfig.model_fields:
        CUT[_name] = _values
# What is computed: the plain side has it too.
MEANING: dict[str, tuple[Any, ...]] = {
    "family": tuple(FAMILIES),
    # By peft too, as soon as a recipe can have adapters.
    "trained": TRAINED + (TRAINED_BY_PEFT if importlib.util.find_spec("goldsmith.models.adapters") else ()),
    "normalization": ("token", "example", "sum"),
    "example_weights": (False, True),
    "token_weights": (False, True),
    "label_smoothing": (0.0, 0.1),
}
FACTORS: dict[str, tuple[Any, ...]] = {**MEANING, **CUT}
Case = Mapping[str, Any]

LOSS_TOLERANCE = 1e-9
GRADIENT_TOLERANCE = 1e-6
EVALUATION_TOLERANCE = 1e-12  # between two batch sizes; to the plain side it is LOSS_TOLERANCE

# float32 may err twice as far as the plain loop, plus a floor in roundings of float32 (2^-24). The floor is there because the plain
# loop's own error is now and then zero by luck. A loss is rounded once a micro-batch, and so are its coefficients, which
# the plain loop multiplies in float64: 4. The gold of a row are up to fifteen log-probabilities of some five nats, whose logits
# round in another order: 32. A gradient is a sum of like terms in another order: 16. Over 169 cases the fast side was above twice
# the plain one by at most 1.1, 17 and 1.6. Every planted fault of `test_mutations.py` is above these limits too.
ROUNDING = 2.0**-24
FLOORS: dict[str, float] = {"loss": 4 * ROUNDING, "log_prob": 32 * ROUNDING, "gradient": 16 * ROUNDING}


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far a step is from the float64 plain one.

    Attributes:
        loss: relative.
        log_prob: nats, of the gold of any row.
        gradient: of any parameter, |a - b| / max(|b|, 1e-3 * global norm).
        parameter: where that is.
    """

    loss: float
    log_prob: float
    gradient: float
    parameter: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Errors by precision, and what of the law is broken, in words.

    Attributes:
        evaluation: relative error of nats a token or nats an example, in float64.
    """

    float64: Errors
    float32: Errors | None = None
    plain_float32: Errors | None = None
    evaluation: float = 0.0
    broken: list[str] = field(default_factory=list)


def typical(**changes: Any) -> dict[str, Any]:
    """A case to start from: several packs, a chunk that does not divide them, everything weighted."""
    case = {
        "family": "llama",
        "trained": "all",
        "normalization": "token",
        "example_weights": True,
        "token_weights": True,
        "label_smoothing": 0.0,
        "tokens_per_microbatch": 90,
        "order": "as given",
        "chunk_size": 5,
        "shared_context": "auto",
        "layers": "by hand",
        "evaluation_tokens": 50,
    }
    case |= {name: values[0] for name, values in FACTORS.items() if name not in case}
    return {**case, **changes}


def canonical(case: Case) -> dict[str, Any]:
    """The case without choices that its model does not have: two cases with the same canonical form run the same code."""
    plain = dict(case)
    if case["family"] not in BY_HAND or case["trained"] not in TRAINED_BY_HAND:
        plain["layers"] = "their own"
    if getattr(FAMILIES[case["family"]], "sliding_window", None) is not None or is_soft_capped(case["family"]):
        plain["shared_context"] = "off"
    return plain


# ------------------------------------------------------------------------------------------------------------------ rows


@functools.cache
def rows_of(example_weights: bool, token_weights: bool) -> tuple[PlainRow, ...]:
    """Eleven rows of 2 to 46 tokens: six with one beginning, four of which share more, and five of their own."""
    generator = np.random.default_rng(23)

    def tokens(number: int) -> list[int]:
        return generator.integers(0, VOCABULARY, size=number).tolist()

    outer, inner = tokens(16), tokens(22)
    beginnings = [outer + inner, [], outer, outer + inner, [], [], outer + inner, outer, [], outer + inner, []]
    own_lengths = [6, 2, 9, 1, 7, 15, 8, 3, 3, 5, 11]
    rows = []
    for number, (beginning, length) in enumerate(zip(beginnings, own_lengths, strict=True)):
        weights = generator.choice([0.0, 0.5, 1.0, 2.0] if token_weights else [0.0, 1.0, 1.0], size=length)
        weights[-1] = 2.0 if token_weights and number % 2 else 1.0
        if not beginning:
            weights[0] = 0.0
        rows.append(
            PlainRow(
                ids=beginning + tokens(length),
                weights=[0.0] * len(beginning) + weights.tolist(),
                example_weight=[1.0, 2.0, 0.5][number % 3] if example_weights else 1.0,
            )
        )
    return tuple(rows)


def examples_of(rows: tuple[PlainRow, ...]) -> list[TokenizedExample]:
    """The same rows as the fast side has them."""
    return [
        TokenizedExample(
            token_ids=np.array(row.ids, dtype=np.int32),
            target_weights=np.array(row.weights, dtype=np.float32),
            example_id=str(number),
            example_weight=row.example_weight,
            source=f"rows:{number}",
            num_bytes=0,
        )
        for number, row in enumerate(rows)
    ]


# ----------------------------------------------------------------------------------------------------------- the plain side


@functools.lru_cache(maxsize=256)
def plain_truth(
    dtype: torch.dtype,
    family: str,
    trained: str,
    normalization: str,
    example_weights: bool,
    token_weights: bool,
    label_smoothing: float,
) -> PlainStep:
    """The step on the plain side; nothing of goldsmith has touched the model."""
    model = build(family, trained=trained, dtype=dtype)
    model.set_attn_implementation(OWN_ATTENTION if is_soft_capped(family) else "sdpa")
    assert not any("forward" in vars(module) for module in model.modules())
    return plain_step(model, rows_of(example_weights, token_weights), normalization, label_smoothing)


# ------------------------------------------------------------------------------------------------------------ the fast side


def fast_model(case: Case, dtype: torch.dtype) -> LikelihoodModel:
    """The model of a case, with layers by hand or without."""
    causal_lm = build(case["family"], trained=case["trained"], dtype=dtype)
    if case["layers"] == "by hand":
        model = LikelihoodModel(causal_lm)
    else:
        with mock.patch.object(likelihood, "install_decoder_layers", return_value=0):
            model = LikelihoodModel(causal_lm)
    is_by_hand = case["layers"] == "by hand" and case["family"] in BY_HAND and case["trained"] in TRAINED_BY_HAND
    assert bool(model.num_layers_by_hand) == is_by_hand
    return model


def order_of(case: Case, number: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The rows of the step in the order of the case."""
    if case["order"] == "shuffled":
        return np.random.default_rng(5).permutation(number)
    return np.arange(number)[:: -1 if case["order"] == "reversed" else 1].copy()


def trainer_of(case: Case, model: LikelihoodModel, dataset: Dataset, folder: Path) -> Trainer:
    """The real trainer around the model."""
    model.chunk_size, model.label_smoothing = case["chunk_size"], case["label_smoothing"]
    return build_trainer(
        folder,
        dataset,
        model=model,
        normalization=case["normalization"],
        label_smoothing=case["label_smoothing"],
        **{name: case[name] for name in CUT if name in TrainingConfig.model_fields},
    )


def run_case(
    case: Case, *, in_float32: bool = True, evaluates: bool = True, model: LikelihoodModel | None = None
) -> Outcome:
    """Both sides of a case, in float64 and perhaps in float32.

    Args:
        evaluates: also compare an evaluation, which knows of neither the step nor its cut.
        model: of an earlier case with the same family, trained parameters and layers, in float64; its weights are as they were.
    """
    truth = plain_truth(torch.float64, *(case[name] for name in MEANING))
    model = model or fast_model(case, torch.float64)
    float64 = _fast_errors(case, truth, model)
    evaluation = 0.0
    if evaluates:
        by_token, by_example, true_by_token, true_by_example = evaluate(case, model)
        evaluation = max(abs(by_token / true_by_token - 1), abs(by_example / true_by_example - 1))
    broken = [
        f"float64 {name} {getattr(float64, name):.1e} > {limit:.0e}" + f" at {float64.parameter}" * (name == "gradient")
        for name, limit in (("loss", LOSS_TOLERANCE), ("log_prob", LOSS_TOLERANCE), ("gradient", GRADIENT_TOLERANCE))
        if not getattr(float64, name) <= limit  # so that a NaN is broken too
    ]
    if not evaluation <= LOSS_TOLERANCE:
        broken.append(f"float64 evaluation {evaluation:.1e} > {LOSS_TOLERANCE:.0e}")
    if not in_float32:
        return Outcome(float64=float64, evaluation=evaluation, broken=broken)
    plain_step_32 = plain_truth(torch.float32, *(case[name] for name in MEANING))
    plain_float32 = errors_between(case, plain_step_32, truth)
    float32 = _fast_errors(case, truth, fast_model(case, torch.float32))
    for name, floor in FLOORS.items():
        limit = 2 * getattr(plain_float32, name) + floor
        if not getattr(float32, name) <= limit:
            broken.append(f"float32 {name} {getattr(float32, name):.1e} > {limit:.1e}")
    return Outcome(float64=float64, float32=float32, plain_float32=plain_float32, evaluation=evaluation, broken=broken)


def _fast_errors(case: Case, truth: PlainStep, model: LikelihoodModel) -> Errors:
    dataset = Dataset(examples_of(rows_of(case["example_weights"], case["token_weights"])))
    order = order_of(case, len(dataset))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(case, model, dataset, Path(folder))
        if case["shared_context"] == "auto":
            assert trainer.shares_contexts == (canonical(case)["shared_context"] == "auto")
        trainer.optimizer.zero_grad(set_to_none=True)
        sums = trainer.forward_backward(order)
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.causal_lm.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad(set_to_none=True)
    log_probs = [torch.empty(0)] * len(dataset)
    for place, nll in zip(order.tolist(), sums.nll_E.tolist(), strict=True):
        log_probs[place] = torch.tensor([-nll], dtype=torch.float64)
    return errors_between(case, PlainStep(loss=sums.loss, gradients=gradients, log_probs=log_probs), truth)


def errors_between(case: Case, got: PlainStep, truth: PlainStep) -> Errors:
    """Errors of a step; log-probabilities are those of each row's gold together."""
    rows = rows_of(case["example_weights"], case["token_weights"])
    errors = relative_errors(got.gradients, truth.gradients)
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    log_prob = [
        abs(_of_gold(row, a) - _of_gold(row, b)) for row, a, b in zip(rows, got.log_probs, truth.log_probs, strict=True)
    ]
    return Errors(
        loss=abs(got.loss - truth.loss) / abs(truth.loss),
        log_prob=float(np.max(log_prob)),  # NaN where one is
        gradient=errors[worst],
        parameter=worst,
    )


def _of_gold(row: PlainRow, log_probs: torch.Tensor) -> float:
    """Sum over the gold: of all tokens but the first, or given as one number already."""
    if len(log_probs) == 1:
        return float(log_probs)
    return float(log_probs.double()[torch.tensor(row.weights[1:]) > 0].sum())


def relative_errors(got: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """|a - b| / max(|b|, 1e-3 * global norm), by name."""
    assert got.keys() == truth.keys()
    total = float(torch.stack([tensor.double().norm() for tensor in truth.values()]).norm())
    return {
        name: float((got[name].double() - tensor.double()).norm()) / max(float(tensor.double().norm()), 1e-3 * total)
        for name, tensor in truth.items()
    }


def evaluate(case: Case, model: LikelihoodModel) -> tuple[float, float, float, float]:
    """Nats a token and nats an example, by the fast side at the case's batch size; and by the plain side."""
    rows = rows_of(case["example_weights"], case["token_weights"])
    sums = sum_log_likelihood(model, Dataset(examples_of(rows)), tokens_per_microbatch=case["evaluation_tokens"])
    truth = plain_truth(torch.float64, *(case[name] for name in MEANING))
    nll = [
        -float((torch.tensor(row.weights[1:], dtype=torch.float64) * log_probs).sum())
        for row, log_probs in zip(rows, truth.log_probs, strict=True)
    ]
    weight_sums = [sum(row.weights) for row in rows]
    u = [row.example_weight for row in rows]
    per_token = float(np.dot(u, nll) / np.dot(u, weight_sums))
    per_example = float(np.dot(u, np.array(nll) / np.array(weight_sums)) / np.sum(u))
    return sums.nll, sums.nll_per_example, per_token, per_example
