from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from goldsmith.records import EvaluationRecord
from goldsmith.training.metrics import layer_group, peak_memory_bytes, read_evaluations, total_norm, update_to_weight


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "layer 0"),
        ("transformer.h.11.mlp.c_fc.bias", "layer 11"),
        ("gpt_neox.layers.3.attention.dense.weight", "layer 3"),
        ("model.decoder.layers.2.fc1.weight", "layer 2"),
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wpe.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("embed_out.weight", "output"),
        ("lm_head.bias", "output"),
        ("model.norm.weight", "other"),
    ],
)
def test_layer_group(name: str, group: str) -> None:
    assert layer_group(name) == group


def test_update_to_weight_is_a_ratio_of_norms_over_a_group() -> None:
    before = {
        "model.layers.0.a.weight": torch.tensor([3.0, 0.0]),
        "model.layers.0.b.weight": torch.tensor([[4.0]]),
        "lm_head.weight": torch.tensor([2.0]),
    }
    after = [
        ("model.layers.0.a.weight", torch.tensor([3.0, 0.3])),
        ("model.layers.0.b.weight", torch.tensor([[4.4]])),
        ("lm_head.weight", torch.tensor([2.0])),
    ]
    ratios = update_to_weight(before, after)
    assert ratios == {"layer 0": pytest.approx(0.1), "output": 0.0}


def test_a_ratio_that_is_no_number_is_left_out() -> None:
    """A record must stay JSON: no weight at all, or weights that are not finite."""
    before = {
        "model.norm.weight": torch.zeros(2),
        "lm_head.weight": torch.tensor([float("inf"), 1.0]),
        "model.embed_tokens.weight": torch.tensor([float("nan")]),
        "model.layers.1.weight": torch.ones(1),
    }
    after = [(name, tensor + 0.5) for name, tensor in before.items()]
    ratios = update_to_weight(before, after)
    assert ratios == {"layer 1": pytest.approx(0.5)}
    json.dumps(ratios, allow_nan=False)


def test_the_norm_of_many_is_exact() -> None:
    """PyTorch's own is off by more than a thousandth here, and so would be the clipping of gradients."""
    big = torch.full((20_000, 700), 0.1)
    exact = 0.1 * (20_000 * 700) ** 0.5
    assert float(total_norm([big, torch.tensor(3.0)])) == pytest.approx((exact**2 + 9.0) ** 0.5, rel=1e-6)
    assert abs(float(torch.nn.utils.get_total_norm([big])) / exact - 1.0) > 1e-3
    assert float(total_norm([])) == 0.0


def test_peak_memory_is_this_process() -> None:
    assert 50 * 2**20 < peak_memory_bytes(torch.device("cpu")) < 2**40


def test_read_evaluations(tmp_path: Path) -> None:
    record = EvaluationRecord(
        step=2,
        epoch=0,
        examples=3,
        gold_tokens=9,
        nll=1.5,
        nll_per_example=1.6,
        is_best=True,
        seconds=0.1,
        tokens_per_second=90.0,
    )
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"kind": "step", "step": 1}) + "\n" + json.dumps(record.to_json()) + "\n")
    assert read_evaluations(path) == [record]
