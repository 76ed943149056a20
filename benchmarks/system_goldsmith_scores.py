"""log P of (context, continuation) pairs by `goldsmith score`'s own path, in float32 or float64. Run by `lm_eval.py`.

python system_goldsmith_scores.py WORK_FOLDER SETTING_JSON RESULT_FILE
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from goldsmith.data.config import DataConfig
from goldsmith.data.dataset import Dataset
from goldsmith.data.loader import load_dataset
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.tokenizer import load_tokenizer
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.load import load_causal_lm
from goldsmith.models.proof import prove
from goldsmith.models.randomness import silence_randomness
from goldsmith.scoring.score import Asked, score_windows
from goldsmith.scoring.texts import TokenTexts
from goldsmith.types import TokenizedExample
from goldsmith.workflows.scoring import default_budget

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")


def dataset_of(pairs: list[dict[str, Any]], tokenizer: Any, boundary: str) -> Dataset:
    """The pairs as gold without an end token."""
    if "context" in pairs[0]:
        rendering = RenderingConfig.model_validate({"boundary": boundary, "append_end_token": False})
        rows = [{"prompt": pair["context"], "completion": pair["continuation"]} for pair in pairs]
        return load_dataset(rows, config=DataConfig(), renderer=Renderer(tokenizer, rendering, None), split="rows")
    examples = []
    for number, pair in enumerate(pairs):
        weights = np.ones(len(pair["context_ids"]) + len(pair["continuation_ids"]), dtype=np.float32)
        weights[: len(pair["context_ids"])] = 0
        examples.append(
            TokenizedExample(
                token_ids=np.array([*pair["context_ids"], *pair["continuation_ids"]], dtype=np.int32),
                target_weights=weights,
                example_id=str(number),
                example_weight=1.0,
                source=f"pairs:{number}",
                num_bytes=0,
            )
        )
    return Dataset(examples)


def main() -> None:
    folder, setting, result_file = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()][: setting["pairs"]]
    causal_lm = load_causal_lm(str(folder / "model"), dtype=setting.get("dtype", "float32"), device="cpu")
    silence_randomness(causal_lm)
    proof = prove(causal_lm.config, name="the model")
    model = LikelihoodModel(causal_lm).eval()
    tokenizer = load_tokenizer(str(folder / "model"))
    budget = setting.get("tokens_per_microbatch") or default_budget(model.device)

    def scored(rows: list[dict[str, Any]]) -> tuple[Dataset, list[float], list[bool]]:
        data = dataset_of(rows, tokenizer, setting["boundary"])
        windows = score_windows(
            model,
            TokenTexts(tokenizer),
            data,
            Asked(),
            tokens_per_microbatch=budget,
            shares_contexts=proof.shares_contexts,
        )
        examples = [example for window in windows for example in window]
        return data, [one.scores.log_prob for one in examples], [bool(one.gold.is_best.all()) for one in examples]

    scored(pairs[:1])
    began = time.perf_counter()
    data, log_probs, greedy = scored(pairs)
    seconds = time.perf_counter() - began
    ids = []
    for example in data:
        first = int(np.flatnonzero(example.target_weights > 0)[0])
        ids.append([example.token_ids[:first].tolist(), example.token_ids[first:].tolist()])
    result = {
        "outcome": "done",
        "seconds": seconds,
        "log_probs": log_probs,
        "greedy": greedy,
        "ids": ids,
        "tokens": int(data.lengths.sum()),
        "gold_tokens": int(data.num_target_tokens.sum()),
        "threads": torch.get_num_threads(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: metadata.version(name) for name in ("goldsmith", "torch", "transformers")},
    }
    result_file.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
