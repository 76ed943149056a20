"""Drift between versions: the golden run of today against the one that is committed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from golden_run import GOLDEN_FILE, TOLERANCE, golden_run, largest_difference, machine_kind, renewed

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


def test_rows_and_tokens(run: dict[str, Any], committed: dict[str, Any]) -> None:
    """Exactly: data, tokenizer, rendering and order are integers."""
    for key in ("tokens", "gold_tokens"):
        assert run[key] == committed["run"][key], REMEDY


@pytest.mark.parametrize("key", TOLERANCE)
def test_every_figure(run: dict[str, Any], committed: dict[str, Any], key: str) -> None:
    """The nll before training by itself, so that other initial weights are not taken for another way of training."""
    assert largest_difference(key, run, committed["run"]) <= TOLERANCE[key], REMEDY
    assert run["loss"][-1] < 0.8 * run["loss"][0]  # it learns, so there is something to drift


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
    assert largest_difference("loss", cut, run) <= TOLERANCE["loss"] / 10
    step = torch.optim.AdamW.step

    def faster(self: torch.optim.AdamW, *arguments: Any) -> Any:
        for group in self.param_groups:
            group["lr"] *= 1.01
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", faster)
    assert largest_difference("loss", golden_run(), committed["run"]) > 10 * TOLERANCE["loss"]


def test_what_is_written(run: dict[str, Any]) -> None:
    """Another machine adds its hash; other bits on a known one, or other losses, make a new run."""
    first = renewed(None, run, "a")
    rounded = {**run, "nll_after": run["nll_after"] * (1 + 1e-7), "weights_sha256": "other"}
    second = renewed(first, rounded, "b")
    assert second["run"] == first["run"]
    assert second["weights_sha256"] == {"a": run["weights_sha256"], "b": "other"}
    assert renewed(second, run, "a") == second
    assert renewed(second, rounded, "a")["weights_sha256"] == {"a": "other"}
    drifted = {**run, "nll_after": run["nll_after"] * 1.01}
    assert list(renewed(second, drifted, "c")["weights_sha256"]) == ["c"]
