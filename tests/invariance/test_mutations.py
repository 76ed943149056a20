"""The matrix can fail: a fault planted for each law makes its comparison fail, in float64 and in float32.

Each fault is one that a trainer somewhere has had. Only the fast side is touched; the plain side imports none of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import ALL_AT_ONCE, run_case, typical

from goldsmith.models import attention_cpu, decoder_layers, likelihood, step
from goldsmith.models.layout import PackLayout
from goldsmith.objective import normalization

# The function that hands a step its packs.
PACKS = "_packs" if hasattr(step, "_packs") else "microbatches"
Plant = Callable[[pytest.MonkeyPatch], None]


def mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each micro-batch is divided by its own weight, and the sum by their number."""
    packs, count = getattr(step, PACKS), [0]

    def counted(*arguments: Any, **others: Any) -> Any:
        found = list(packs(*arguments, **others))
        count[0] = len(found)
        return iter(found)

    def faulty(batch: Any, name: Any, *, denominator: float = 1.0) -> torch.Tensor:
        own = normalization.token_coefficients(batch, name)
        return own if denominator == 1.0 else own / own.sum() / count[0]

    monkeypatch.setattr(step, PACKS, counted)
    monkeypatch.setattr(step, "token_coefficients", faulty)


def denominator_of_a_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each micro-batch is divided by its own weight; the gradient grows with their number."""

    def faulty(batch: Any, name: Any, *, denominator: float = 1.0) -> torch.Tensor:
        own = normalization.token_coefficients(batch, name)
        return own if denominator == 1.0 else own / own.sum()

    monkeypatch.setattr(step, "token_coefficients", faulty)


def sees_its_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second segment of a pack attends to the first."""
    plan = PackLayout.plan

    def faulty(lengths: Any, *arguments: Any, segment_parents: Any = None, **others: Any) -> PackLayout:
        merged = [lengths[0] + lengths[1], *lengths[2:]] if len(lengths) > 1 else lengths
        return plan(merged, *arguments, **others)

    monkeypatch.setattr(PackLayout, "plan", faulty)


def shifted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is predicted by its own hidden state."""
    _on_pack(monkeypatch, lambda batch: {"target_positions": batch.target_positions + 1})


def positions_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions do not begin again with each row; rotary ones are relative and do not care, learnt ones do."""
    _on_pack(monkeypatch, lambda batch: {"position_ids": torch.arange(batch.num_tokens)})


def token_weights_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gold is gold, whatever it weighs."""
    _on_pack(monkeypatch, lambda batch: {"target_weights": torch.ones_like(batch.target_weights)})


def example_weights_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the numerator; the denominator has them."""
    _on_pack(monkeypatch, lambda batch: {"example_weights": torch.ones_like(batch.example_weights)})


def nll_of_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient are right; what is written of each example is another's."""
    packs = getattr(step, PACKS)

    def faulty(*arguments: Any, **others: Any) -> Any:
        return ((batch, members[::-1]) for batch, members in packs(*arguments, **others))

    monkeypatch.setattr(step, PACKS, faulty)


def shared_gradient_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows read a shared context and send nothing back to it: the loss is right, the gradient is not."""
    backward = attention_cpu._flash_backward

    def faulty(*arguments: Any, **others: Any) -> tuple[torch.Tensor, ...]:
        query, key, value = backward(*arguments, **others)
        is_causal = arguments[7]
        if not is_causal and others.get("attn_mask") is None:
            return query, torch.zeros_like(key), torch.zeros_like(value)
        return query, key, value

    monkeypatch.setattr(attention_cpu, "_flash_backward", faulty)


def wider_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token sees one token more."""
    window = decoder_layers._window
    monkeypatch.setattr(decoder_layers, "_window", lambda module: window(module) + 1)


def smoothing_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe asks for it, the loss has none."""
    objective = likelihood.linear_cross_entropy
    monkeypatch.setattr(
        likelihood,
        "linear_cross_entropy",
        lambda *arguments, label_smoothing, **others: objective(*arguments, **others),
    )


def layer_detached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing flows back below the last layer: the loss is right, and so is half of the gradient."""
    forward = likelihood.LikelihoodModel.gold_states

    def faulty(self: Any, batch: Any) -> torch.Tensor:
        last = next(m for m in self.causal_lm.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))[-1]
        handle = last.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), *inputs[1:]))
        try:
            return forward(self, batch)
        finally:
            handle.remove()

    monkeypatch.setattr(likelihood.LikelihoodModel, "gold_states", faulty)


def _on_pack(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], dict[str, Any]]) -> None:
    for name in ("pack", "pack_shared"):
        sound = getattr(step, name)

        def faulty(*arguments: Any, sound: Any = sound) -> Any:
            batch = sound(*arguments)
            return dataclasses.replace(batch, **change(batch))

        monkeypatch.setattr(step, name, faulty)


APART = {"shared_context": "off"}
FAULTS: list[tuple[Plant, dict[str, Any], str]] = [
    (mean_of_means, {}, "loss"),
    (mean_of_means, {"normalization": "example"}, "loss"),
    (denominator_of_a_microbatch, {}, "loss"),
    (sees_its_neighbour, APART, "loss"),
    (sees_its_neighbour, {**APART, "family": "gemma2"}, "loss"),
    (sees_its_neighbour, {**APART, "trained": "low rank", "family": "gpt2"}, "loss"),
    (shifted_twice, APART, "loss"),
    (positions_go_on, {**APART, "family": "gpt2", "tokens_per_microbatch": 50}, "loss"),
    (token_weights_ignored, {"normalization": "sum"}, "loss"),
    (example_weights_ignored, {}, "loss"),
    (nll_of_another_row, {}, "log_prob"),
    (shared_gradient_dropped, {"tokens_per_microbatch": ALL_AT_ONCE}, "gradient"),
    (wider_window, {"family": "mistral"}, "loss"),
    (smoothing_forgotten, {"label_smoothing": 0.1}, "loss"),
    (layer_detached, {}, "gradient"),
]


@pytest.mark.parametrize(
    ("plant", "changes", "seen_in"), FAULTS, ids=lambda value: getattr(value, "__name__", None) or str(value)
)
def test_a_planted_fault_breaks_the_law(
    monkeypatch: pytest.MonkeyPatch, plant: Plant, changes: dict[str, Any], seen_in: str
) -> None:
    case = typical(**changes)
    assert not run_case(case).broken  # sound before, on the very case
    plant(monkeypatch)
    broken = run_case(case).broken
    for precision in ("float64", "float32"):
        assert any(line.startswith(f"{precision} {seen_in}") for line in broken), broken
    if seen_in != "loss":
        assert not any(" loss " in line for line in broken), "it was meant to be seen where the loss is right"
