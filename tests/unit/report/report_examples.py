"""Scores and a run folder, small and known, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from goldsmith.report.payload import Side
from goldsmith.scoring.files import score_to_json
from goldsmith.types import TokenScore, TokenScores

WORDS = [" two", " apples", " and", " three", " pears", " make", " five", " fruits", ".", "\n", " So", "</s>"]


def token(generator: np.random.Generator, token_id: int, sharpness: float) -> TokenScore:
    """A gold token under a made-up distribution over the words, sharper for a better model."""
    logits = generator.normal(0, 1.5, len(WORDS))
    logits[token_id] += sharpness
    log_probs = logits - np.log(np.exp(logits).sum())
    order = np.argsort(-log_probs, kind="stable")
    return TokenScore(
        token_id=token_id,
        text=WORDS[token_id],
        log_prob=float(log_probs[token_id]),
        rank=int(np.flatnonzero(order == token_id)[0]) + 1,
        best_log_prob=float(log_probs.max()),
        entropy=float(-(np.exp(log_probs) * log_probs).sum()),
        alternatives=tuple((int(one), WORDS[one], float(log_probs[one])) for one in order[:5]),
    )


def example(number: int, sharpness: float, *, seed: int, num_tokens: int = 12) -> TokenScores:
    generator = np.random.default_rng([seed, number])
    tokens = tuple(token(generator, place % len(WORDS), sharpness) for place in range(num_tokens))
    return TokenScores(
        example_id=f"row-{number}",
        source=f"/data/{'sums' if number % 3 else 'stories'}.jsonl:{number + 1}",
        source_name="sums" if number % 3 else "stories",
        log_prob=math.fsum(one.log_prob for one in tokens),
        num_target_tokens=num_tokens,
        num_bytes=sum(len(one.text) for one in tokens[:-1]),
        tokens=tokens,
        context=f"Question {number}: how many fruits are there?",
        context_tokens=9,
    )


def sides(num_examples: int = 45) -> list[Side]:
    return [
        Side(name=name, scores=[example(number, sharpness, seed=seed) for number in range(num_examples)])
        for seed, (name, sharpness) in enumerate((("before", 0.5), ("after", 2.5)))
    ]


def step(number: int, **values: Any) -> dict[str, Any]:
    ratios = {"embedding": 0.01, "layer 0": 0.02 / number, "output": 0.001} if number % 2 else {}
    record = {"kind": "step", "step": number, "epoch": 0, "examples": 4, "tokens": 100, "gold_tokens": 10 * number}
    record |= {"nll": 3.0 / number, "loss": 3.0 / number, "learning_rate": 1e-3, "grad_norm": 1.0, "seconds": 0.5}
    return record | {"update_to_weight": ratios, "tokens_per_second": 200.0, "peak_memory_bytes": 2**20} | values


def evaluation(number: int, **values: Any) -> dict[str, Any]:
    record = {
        "kind": "evaluation",
        "step": number,
        "epoch": 0,
        "examples": 4,
        "gold_tokens": 40,
        "nll": 3.5 / (number + 1),
    }
    return record | {"nll_per_example": 1.0, "is_best": True, "seconds": 1.0, "tokens_per_second": 100.0} | values


def write_run(folder: Path, records: list[dict[str, Any]], *, is_finished: bool = True) -> Path:
    """A run folder as training leaves it, without its weights."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        "model: {path: acme/model}\ntraining: {batch_size: 4}\noptimizer: {name: adamw, learning_rate: 2.0e-5}\n"
    )
    file = {"path": "/data/sums.jsonl", "name": "sums", "sha256": None, "rows_in": 12, "used": 10, "over_limit": 0}
    file |= {"rejected": {"empty gold": 2}, "examples": 10, "tokens": 1000, "gold_tokens": 400, "straddles": 0}
    data = {"train": {"files": [file], "rejections": {"empty gold": ["sums.jsonl:3"]}}, "eval": {"files": [file]}}
    (folder / "data.json").write_text(json.dumps(data))
    environment = {"goldsmith": "0.1.0", "torch": "2.13", "transformers": "5.23", "device": "EPYC 9V74", "threads": 2}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if is_finished:
        training = {"steps": 4, "nll_before": 3.5, "nll_after": 0.7, "stopped_early": False, "seconds": 7.0}
        (folder / "result.json").write_text(json.dumps({"training": training, "rows": {"read": 12, "used": 10}}))
    return folder


def write_side(path: Path, side: Side) -> None:
    """A score file."""
    path.write_text("".join(json.dumps(score_to_json(score)) + "\n" for score in side.scores))


RECORDS = [evaluation(0), *(step(number) for number in range(1, 5)), evaluation(4)]
