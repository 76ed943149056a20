"""What goldsmith trains on in each hard case, as JSON: run_goldsmith.py OUTPUT."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import (
    CASES,
    Case,
    Same,
    difference,
    make_model,
    make_tokenizer,
    plain_gradient,
    plain_log_probs,
    plain_loss,
    plain_rows,
)

from goldsmith.data.config import DataConfig
from goldsmith.data.dataset import Dataset
from goldsmith.data.loader import load_dataset
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.errors import GoldsmithError
from goldsmith.models.evaluate import iterate_log_probs, sum_log_likelihood
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.step import forward_backward

ALL_AT_ONCE = 1 << 20


def observe(case: Case) -> dict[str, Any]:
    """What is trained on: `examples`, each its ids and weights; or `refused`, a message. Of a `Same`: `number` and `shown`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case.write(folder)
        sections = {section: dict(settings) for section, settings in case.goldsmith.items()}
        config = DataConfig.model_validate(
            {"train": "rows.jsonl", "max_length": case.max_length, **sections.get("data", {})}
        )
        rendering = RenderingConfig.model_validate(sections.get("rendering", {}))
        renderer = Renderer(make_tokenizer(case), rendering, case.max_length, keeps_long_rows=True)
        try:
            data = load_dataset(config.train, config=config, renderer=renderer, split="train", base_folder=folder)
        except GoldsmithError as error:
            return {"refused": str(error)}
    if isinstance(case.right, Same):
        number, shown = MEASURES[case.measure](case, data)
        return {"number": number, "shown": shown}
    examples = [
        {"ids": example.token_ids.tolist(), "weights": (example.target_weights * example.example_weight).tolist()}
        for example in data
    ]
    return {"examples": examples}


def _packing(case: Case, data: Dataset) -> tuple[float, str]:
    found = iterate_log_probs(LikelihoodModel(make_model()), data, tokens_per_microbatch=ALL_AT_ONCE)
    plain = make_model()
    with torch.no_grad():
        worst = max(
            difference(torch.from_numpy(values).float(), plain_log_probs(plain, *row))
            for (_, values), row in zip(found, plain_rows(case), strict=True)
        )
    return worst, f"{worst:.1e}"


def _accumulation(case: Case, data: Dataset) -> tuple[float, str]:
    model = LikelihoodModel(make_model())
    indices = torch.arange(len(data)).numpy()
    sums = forward_backward(model, data, indices, normalization="token", tokens_per_microbatch=1)
    assert sums.microbatches == len(data)
    gradients = [p.grad for p in model.causal_lm.parameters() if p.grad is not None]
    worst = difference(torch.cat([gradient.flatten() for gradient in gradients]), plain_gradient(make_model(), case))
    return worst, f"{worst:.1e}"


def _evaluation(case: Case, data: Dataset) -> tuple[float, str]:
    model = LikelihoodModel(make_model())
    lengths = sorted(map(int, data.lengths))
    budgets = (1, lengths[0] + lengths[1], sum(lengths))
    nlls = [sum_log_likelihood(model, data, tokens_per_microbatch=budget).nll for budget in budgets]
    truth = float(plain_loss(make_model(), case).detach())
    worst = max(abs(nll / truth - 1) for nll in nlls)
    return worst, f"{', '.join(f'{nll:.5f}' for nll in nlls)}; plain {truth:.5f}"


MEASURES: dict[str, Callable[[Case, Dataset], tuple[float, str]]] = {
    "packing": _packing,
    "accumulation": _accumulation,
    "evaluation": _evaluation,
}

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({case.name: observe(case) for case in CASES}), encoding="utf-8")
