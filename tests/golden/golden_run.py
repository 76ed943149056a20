"""The golden run: a tiny run from a recipe alone, and what it gave when it was last looked at.

    python tests/golden/golden_run.py            what this machine gets, beside what is committed
    python tests/golden/golden_run.py --write    commit to it: `golden.json` is written anew; docs/exactness.md says when

Everything that a run is made of takes part: rows, tokenizer, initial weights, order, packing, objective, optimizer,
schedule, evaluation, export.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["GOLDEN_FILE", "TOLERANCE", "golden_run", "largest_difference", "machine_kind", "renewed"]

GOLDEN_FILE = Path(__file__).with_name("golden.json")

# Relative. Over other cuts, one thread or two, and three instruction sets (AVX-512, AVX2, neither) losses differed by at most
# 1.1e-7 and gradient norms by 1e-6; a learning rate one percent higher moves them by 6e-4 and 2e-2. These are a hundred times the
# former, for the matrix products of processors that were not tried.
TOLERANCE = {"nll_before": 1e-5, "loss": 1e-5, "grad_norm": 1e-4, "nll_after": 1e-5}

STEPS = 12
WORDS = ["gold", "silver", "copper", "iron", "lead", "tin", "zinc", "nickel", "cobalt", "mercury"]


def rows() -> list[dict[str, Any]]:
    """A system prompt, words to be spelled backwards, some of which count twice."""
    prompt = "Spell the word backwards, letter by letter, and do not explain. "
    return [
        {
            "prompt": f"{prompt if number % 3 else ''}{word}: ",
            "completion": word[::-1],
            "weight": 1.0 + (number % 4 == 0),
        }
        for number, word in enumerate(WORDS * 2)
    ]


def recipe_of(folder: Path) -> dict[str, Any]:
    """Values of the recipe; what a default is today is written out, so that a new default is no drift."""
    for name, chosen in (("train", rows()), ("eval", rows()[3:9])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return {
        "model": {
            "init": {
                "architecture": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "initializer_range": 0.1,
                "tie_word_embeddings": True,
            },
            "device": "cpu",
            "dtype": "float32",
        },
        "tokenizer": {"train": {"kind": "character"}},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "objective": {"normalization": "token", "label_smoothing": 0.05},
        "training": {"max_steps": STEPS, "batch_size": 8, "tokens_per_microbatch": 256, "seed": 3},
        "optimizer": {
            "learning_rate": 0.01,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.1,
            "schedule": "cosine",
            "warmup_ratio": 0.1,
            "max_grad_norm": 1.0,
        },
        "output_dir": str(folder / "run"),
    }


def golden_run(*, tokens_per_microbatch: int | None = None, threads: int = 1) -> dict[str, Any]:
    """Run it here, on so many threads, and say what came out."""
    from safetensors.torch import load_file

    import goldsmith
    from goldsmith.recipe import Recipe

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            recipe = recipe_of(folder)
            if tokens_per_microbatch is not None:
                recipe["training"]["tokens_per_microbatch"] = tokens_per_microbatch
            goldsmith.train(Recipe.from_mapping(recipe), quiet=True)
            records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
            tensors = load_file(folder / "run" / "model" / "model.safetensors")
    finally:
        torch.set_num_threads(before)
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}\n".encode())
        digest.update(tensors[key].contiguous().numpy().tobytes())
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "loss" not in record]
    return {
        "nll_before": evaluations[0]["nll"],
        "tokens": [record["tokens"] for record in steps],
        "gold_tokens": [record["gold_tokens"] for record in steps],
        "loss": [record["loss"] for record in steps],
        "grad_norm": [record["grad_norm"] for record in steps],
        "nll_after": evaluations[-1]["nll"],
        "weights_sha256": digest.hexdigest(),
    }


def machine_kind() -> str:
    """What bits depend on: the CPU, what torch makes of it, the builds of torch and of its library, one thread."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in lines.items()}
        family = f"family {named.get('cpu family', '?')} model {named.get('model', '?')}"
        model = f"{named.get('model name', model)}, {family}"
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, 1 thread"


def largest_difference(key: str, got: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Relative, of one figure or of any step's."""
    pairs = zip(_as_list(got[key]), _as_list(wanted[key]), strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def agree(got: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether two runs are the same to rounding."""
    counts = all(got[key] == wanted[key] for key in ("tokens", "gold_tokens"))
    return counts and all(largest_difference(key, got, wanted) <= limit for key, limit in TOLERANCE.items())


def renewed(committed: dict[str, Any] | None, got: dict[str, Any], kind: str) -> dict[str, Any]:
    """What to commit: the hash of one more kind of machine beside a run that still holds, or a new run with this hash alone."""
    run = {key: value for key, value in got.items() if key != "weights_sha256"}
    hashes = {kind: got["weights_sha256"]}
    if committed is not None and agree(run, committed["run"]):
        known = committed["weights_sha256"]
        if known.get(kind, got["weights_sha256"]) == got["weights_sha256"]:
            return {"run": committed["run"], "weights_sha256": {**known, **hashes}}
    # Other bits on a known kind, or other losses: the hashes of other machines are of a run that is no more.
    return {"run": run, "weights_sha256": hashes}


def _as_list(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]


def main(arguments: list[str]) -> int:
    """Compare, or write."""
    got, kind = golden_run(), machine_kind()
    committed = json.loads(GOLDEN_FILE.read_text()) if GOLDEN_FILE.exists() else None
    if arguments == ["--write"]:
        GOLDEN_FILE.write_text(json.dumps(renewed(committed, got, kind), indent=2) + "\n")
        print(f"written to {GOLDEN_FILE}")
        return 0
    run = committed["run"] if committed else {}
    print(f"{kind}\n  committed hash {committed and committed['weights_sha256'].get(kind)}")
    print(f"  here           {got.pop('weights_sha256')}")
    for key, value in got.items():
        print(f"{key}\n  committed {run.get(key)}\n  here      {value}")
        if key in TOLERANCE and key in run:
            print(f"  largest difference {largest_difference(key, got, run):.1e}, allowed {TOLERANCE[key]:.0e}")
    return 0


if __name__ == "__main__":
    # As the tests have it: the package beside the tests, whether or not it is installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    raise SystemExit(main(sys.argv[1:]))
