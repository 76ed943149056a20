"""Twenty optimizer steps in float64: the weights go the same way under every cut, and the way of a loop that is written out.

What is compared is the *change* of each parameter, so that a large weight hides nothing. A parameter whose true gradient
is zero moves by rounding alone, magnified by Adam; those are listed by name and left out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, is_soft_capped
from matrix import ALL_AT_ONCE, CUT, examples_of, fast_model, relative_errors, rows_of, typical
from plain import OWN_ATTENTION, plain_step
from small_trainer import build_trainer, weights

from goldsmith.records import StepRecord
from goldsmith.training.progress import NoProgress

STEPS, BATCH_SIZE = 20, 4
TOLERANCE = 1e-6
CHANGES = {"learning_rate": 0.01, "weight_decay": 0.1, "warmup_ratio": 0.2, "max_grad_norm": 1.0}

# Parameters (and the elements of them) whose true gradient is zero: a constant added to all scores of a query leaves its
# softmax as it is, so a key's bias does nothing, unless a rotary embedding turns it by the key's own position.
ZERO_GRADIENT: dict[str, dict[str, list[int]]] = {
    "opt": {f"model.decoder.layers.{layer}.self_attn.k_proj.bias": list(range(16)) for layer in range(2)},
    # Query, key and value lie side by side.
    "gpt2": {f"transformer.h.{layer}.attn.c_attn.bias": list(range(16, 32)) for layer in range(2)},
    # Each of four heads has its query, key and value, four wide; only the first half of a head is turned.
    "gpt_neox": {
        f"gpt_neox.layers.{layer}.attention.query_key_value.bias": [
            12 * head + 4 + place for head in range(4) for place in (2, 3)
        ]
        for layer in range(2)
    },
}


def changes(family: str, after: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of each parameter, flat, without what has no gradient."""
    found = {}
    for name, parameter in build(family).named_parameters():
        change = (after[name] - parameter.detach()).flatten()
        left_out = ZERO_GRADIENT.get(family, {}).get(name, [])
        keep = torch.ones(len(change), dtype=torch.bool)
        keep[left_out] = False
        if keep.any():
            found[name] = change[keep]
    return found


def largest_difference(family: str, got: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| of any parameter's change."""
    got, truth = changes(family, got), changes(family, truth)
    return max(float((got[name] - change).norm() / change.norm()) for name, change in truth.items())


def plain_trajectory(family: str, steps: list[list[int]]) -> dict[str, torch.Tensor]:
    """AdamW (Loshchilov and Hutter 2019), clipping, and a cosine after a linear warm-up, from their formulas."""
    rows = rows_of(True, True)
    model = build(family)
    model.set_attn_implementation(OWN_ATTENTION if is_soft_capped(family) else "sdpa")
    named = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in named.items()}
    second = {name: torch.zeros_like(p) for name, p in named.items()}
    warmup = math.ceil(CHANGES["warmup_ratio"] * len(steps))
    for t, members in enumerate(steps, start=1):
        gradients = plain_step(model, [rows[member] for member in members], "token").gradients
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        clip = min(1.0, CHANGES["max_grad_norm"] / norm)
        progress = (t - 1 - warmup) / (len(steps) - warmup)
        rate = CHANGES["learning_rate"] * (t / warmup if t <= warmup else 0.5 * (1 + math.cos(math.pi * progress)))
        with torch.no_grad():
            for name, p in named.items():
                g = clip * gradients[name]
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                if p.ndim >= 2:
                    p *= 1 - rate * CHANGES["weight_decay"]
                p -= rate * (first[name] / (1 - 0.9**t)) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
    return {name: p.detach() for name, p in named.items()}


class KilledError(Exception):
    """The process is gone."""


class KilledAfter(NoProgress):
    """Dies in the middle of a run, between two checkpoints."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.last = step

    def step(self, record: StepRecord) -> None:
        if record.step == self.last:
            raise KilledError


def trainer_for(family: str, folder: Path, layers: str, **settings: Any) -> Any:
    model = fast_model(typical(family=family, layers=layers), torch.float64)
    model.chunk_size = settings.pop("chunk_size", None)
    return build_trainer(
        folder,
        examples_of(rows_of(True, True)),
        model=model,
        max_steps=STEPS,
        batch_size=BATCH_SIZE,
        **CHANGES,
        **settings,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_way_under_every_cut(tmp_path: Path, family: str, record_property: Any) -> None:
    whole = trainer_for(
        family, tmp_path / "whole", "their own", tokens_per_microbatch=ALL_AT_ONCE, shared_context="off"
    )
    steps = [whole.order.step(step)[1].tolist() for step in range(1, STEPS + 1)]
    assert [len(members) for members in steps[:4]] == [4, 4, 3, 4]  # the last step of an epoch is smaller
    truth = plain_trajectory(family, steps)
    whole.train()
    worst = {"one pack": largest_difference(family, weights(whole), truth)}

    cut = trainer_for(family, tmp_path / "cut", "by hand", tokens_per_microbatch=1, chunk_size=1)
    cut.train()
    worst["a row each"] = largest_difference(family, weights(cut), truth)

    # Killed after step 11, resumed from step 8, with another cut before and after.
    again = {"activation_checkpointing": "layers"} if "activation_checkpointing" in CUT else {}
    before = trainer_for(
        family, tmp_path / "resumed", "by hand", tokens_per_microbatch=90, chunk_size=5, save_every=8, **again
    )
    before.progress = KilledAfter(11)
    with pytest.raises(KilledError):
        before.train()
    after = trainer_for(family, tmp_path / "resumed", "their own", tokens_per_microbatch=50, chunk_size=3, save_every=8)
    after.train()
    worst["resumed"] = largest_difference(family, weights(after), truth)

    print(family, {name: f"{value:.1e}" for name, value in worst.items()})
    for name, value in worst.items():
        record_property(name, value)
        assert value <= TOLERANCE, (name, value)
    records = [json.loads(line) for line in (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_has_no_gradient(family: str) -> None:
    """And nothing else has none: the list is neither too long nor too short."""
    model = build(family)
    model.set_attn_implementation(OWN_ATTENTION if is_soft_capped(family) else "sdpa")
    gradients = plain_step(model, list(rows_of(True, True)), "token").gradients
    total = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    listed = ZERO_GRADIENT.get(family, {})
    for name, gradient in gradients.items():
        left_out = torch.zeros(gradient.numel(), dtype=torch.bool)
        left_out[listed.get(name, [])] = True
        assert float(gradient.flatten()[left_out].norm()) <= 1e-13 * total, name
        others = gradient.flatten()[~left_out].abs()
        # Exactly zero is no rounding: a unit that never fires, a token that does not occur.
        assert not ((others > 0) & (others < 1e-12 * total)).any(), name
    assert set(listed) <= set(gradients)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Another epsilon in Adam's root, a millionth in place of a hundredth of that, is another way."""
    family = "llama"
    trainer = trainer_for(family, tmp_path / "a", "by hand")
    steps = [trainer.order.step(step)[1].tolist() for step in range(1, STEPS + 1)]
    truth = plain_trajectory(family, steps)
    start = {name: parameter.detach() for name, parameter in build(family).named_parameters()}
    for group in trainer.optimizer.param_groups:
        group["eps"] = 1e-6
    trainer.train()
    assert largest_difference(family, weights(trainer), truth) > 10 * TOLERANCE
    assert min(relative_errors(truth, start).values()) > 1e-3  # it is a way
