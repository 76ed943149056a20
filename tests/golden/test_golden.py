"""Drift between versions: the golden run of today against the one that is committed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from golden_run import GOLDEN_FILE, TOLERANCE, golden_run, machine_kind

REMEDY = (
    "the golden run has drifted. If a change of what is computed was meant (or torch or transformers is another version), look at "
    "`python tests/golden/golden_run.py` and commit `--write` with the reason; docs/exactness.md says when"
)


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(GOLDEN_FILE.read_text())


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return golden_run()


def largest(got: Sequence[float], wanted: Sequence[float]) -> float:
    assert len(got) == len(wanted)
    return max(abs(a - b) / abs(b) for a, b in zip(got, wanted, strict=True))


def test_rows_and_tokens(run: dict[str, Any], committed: dict[str, Any]) -> None:
    """Exactly: data, tokenizer, rendering and order are integers."""
    for key in ("tokens", "gold_tokens"):
        assert run[key] == committed["run"][key], REMEDY


def test_the_model_before_training(run: dict[str, Any], committed: dict[str, Any]) -> None:
    """By itself, so that other initial weights are not taken for another way of training."""
    assert largest([run["nll_before"]], [committed["run"]["nll_before"]]) <= TOLERANCE["nll"], REMEDY


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
def test_every_step(run: dict[str, Any], committed: dict[str, Any], key: str) -> None:
    assert largest(run[key], committed["run"][key]) <= TOLERANCE[key], REMEDY
    assert run["loss"][-1] < 0.8 * run["loss"][0]  # it learns, so there is something to drift


def test_the_model_after_training(run: dict[str, Any], committed: dict[str, Any]) -> None:
    assert largest([run["nll_after"]], [committed["run"]["nll_after"]]) <= TOLERANCE["nll"], REMEDY


def test_every_bit_of_the_weights(run: dict[str, Any], committed: dict[str, Any]) -> None:
    """On the kind of machine and the build of torch that a hash is committed for."""
    kind = machine_kind()
    if kind not in committed["weights_sha256"]:
        known = "; ".join(committed["weights_sha256"])
        pytest.skip(f"waits for a machine of a kind with a committed hash ({known}); this one is: {kind}")
    assert run["weights_sha256"] == committed["weights_sha256"][kind], REMEDY


def test_another_cut_is_within_the_tolerance_and_a_fault_is_not(
    run: dict[str, Any], committed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tolerance lets rounding through; a learning rate one percent higher it does not."""
    cut = golden_run(tokens_per_microbatch=60)
    assert cut["weights_sha256"] != run["weights_sha256"]  # bits are for the same cut only
    assert largest(cut["loss"], run["loss"]) <= TOLERANCE["loss"] / 10
    step = torch.optim.AdamW.step

    def faster(self: torch.optim.AdamW, *arguments: Any) -> Any:
        for group in self.param_groups:
            group["lr"] *= 1.01
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", faster)
    assert largest(golden_run()["loss"], committed["run"]["loss"]) > 10 * TOLERANCE["loss"]
