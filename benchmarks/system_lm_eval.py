"""log P of (context, continuation) pairs by lm-evaluation-harness' HFLM, in float32. Run by `lm_eval.py` beside this file.

    python -P system_lm_eval.py WORK_FOLDER SETTING_JSON RESULT_FILE

`-P` keeps this folder off the path, so that `import lm_eval` finds the package and not the benchmark of that name.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")


def main() -> None:
    from importlib import metadata

    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, setting, result_file = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    pairs: list[dict[str, Any]] = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    pairs = pairs[: setting["pairs"]]
    harness = HFLM(
        pretrained=str(folder / "model"),
        device="cpu",
        dtype="float32",
        batch_size=setting["batch_size"],
        softmax_dtype=setting.get("softmax_dtype"),
    )
    ids: list[list[list[int]]] = []
    if "context" in pairs[0]:
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=(p["context"], p["continuation"]), idx=0)
            for p in pairs
        ]
        harness.loglikelihood(requests[:1], disable_tqdm=True)
        began = time.perf_counter()
        answers = harness.loglikelihood(requests, disable_tqdm=True)
        seconds = time.perf_counter() - began
        ids = [[list(part) for part in harness._encode_pair(p["context"], p["continuation"])] for p in pairs]
    else:
        tokens = [((str(n), ""), p["context_ids"], p["continuation_ids"]) for n, p in enumerate(pairs)]
        harness._loglikelihood_tokens(tokens[:1], disable_tqdm=True)
        began = time.perf_counter()
        answers = harness._loglikelihood_tokens(tokens, disable_tqdm=True)
        seconds = time.perf_counter() - began
    result = {
        "outcome": "done",
        "seconds": seconds,
        "log_probs": [float(log_prob) for log_prob, _ in answers],
        "greedy": [bool(is_greedy) for _, is_greedy in answers],
        "ids": ids,
        "threads": torch.get_num_threads(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: metadata.version(name) for name in ("lm_eval", "torch", "transformers")},
    }
    result_file.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
