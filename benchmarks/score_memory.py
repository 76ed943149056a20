"""How much memory a row takes that `goldsmith score` or `goldsmith compare` reads.

    python benchmarks/score_memory.py                     bytes a row, from 20,000 rows to 200,000
    python benchmarks/score_memory.py --without-context   the same with the gold scored twice
    python benchmarks/score_memory.py --compare           two score files with tokens, from 2,000 rows to 20,000

Scoring is of a tiny random model and rows of a few characters; compared are rows of 20 gold tokens, with their texts and contexts.
Each runs in a process of its own and reads or writes JSON Lines (`--parquet`: Parquet). Memory is the difference of the two
processes' largest resident size, divided by the difference of their rows, so that what does not grow with the rows falls out; up to
20,000 rows the sums of the bootstrap do, so the smaller has as many at least.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Of each row that is compared.
TOKENS = 20


def write_rows(path: Path, count: int) -> None:
    """Distinct rows of some ten characters."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"prompt": f"{number % 1000}+1", "completion": f"{number * 7}"}) + "\n")


def write_model(folder: Path) -> None:
    """One layer of 16 channels with random weights, a token a character."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from goldsmith.data.tokenizer import TrainedTokenizerConfig, train_tokenizer

    tokenizer = train_tokenizer(TrainedTokenizerConfig(kind="character"), ["0123456789+"])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def score(folder: Path, count: int, *, without_context: bool, suffix: str) -> dict[str, float]:
    """One scoring in a process of its own: seconds, and its largest resident size in bytes."""
    rows, output = folder / f"rows-{count}.jsonl", folder / f"scores-{count}.{suffix}"
    write_rows(rows, count)
    program = (
        "import json, resource\n"
        "import goldsmith\n"
        f"summary = goldsmith.score({str(folder / 'model')!r}, {str(rows)!r}, output={str(output)!r}, device='cpu', "
        f"without_context={without_context})\n"
        f"assert summary.num_examples == {count}, summary.num_examples\n"
        "print(json.dumps({'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - started
    rows.unlink()
    output.unlink()
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def write_scores(path: Path, count: int, *, seed: int) -> None:
    """A score file with tokens, as `goldsmith score --tokens` writes it."""
    import random

    from goldsmith.scoring.parquet import write_parquet_rows

    generator = random.Random(seed)

    def rows() -> Iterator[dict[str, object]]:
        for number in range(count):
            log_probs = [-5 * generator.random() for _ in range(TOKENS)]
            tokens = [
                {"token_id": place, "text": f" word{place}", "log_prob": log_prob, "weight": 1.0, "rank": 3,
                 "best_log_prob": -0.1, "entropy": 1.5}
                for place, log_prob in enumerate(log_probs)
            ]  # fmt: skip
            yield {
                "example_id": f"test:{number}", "source": f"test.jsonl:{number + 1}", "source_name": "test",
                "log_prob": sum(log_probs), "num_target_tokens": TOKENS, "num_bytes": 6 * TOKENS,
                "weighted_log_prob": sum(log_probs), "weight_sum": float(TOKENS), "context_tokens": 9,
                "context": f"What is {number}?", "turns": [[0, 1, "assistant"]], "tokens": tokens,
            }  # fmt: skip

    if path.suffix == ".parquet":
        write_parquet_rows(path, rows())
        return
    with path.open("w", encoding="utf-8") as file:
        for row in rows():
            file.write(json.dumps(row) + "\n")


def compare(folder: Path, count: int, *, suffix: str) -> dict[str, float]:
    """One comparison of two files in a process of its own, as `score`."""
    files = [folder / f"{name}-{count}.{suffix}" for name in "ab"]
    for seed, file in enumerate(files):
        write_scores(file, count, seed=seed)
    program = (
        "import json, resource\n"
        "import goldsmith\n"
        f"comparison = goldsmith.compare({str(files[0])!r}, {str(files[1])!r})\n"
        f"assert comparison.num_shared == {count}, comparison.num_shared\n"
        "str(comparison)\n"
        "print(json.dumps({'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - started
    for file in files:
        file.unlink()
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="and a tenth as many; 200,000, and 20,000 with --compare")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--without-context", action="store_true")
    parser.add_argument("--parquet", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY / "src"))
    suffix = "parquet" if arguments.parquet else "jsonl"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = arguments.rows or (20_000 if arguments.compare else 200_000)
        if not arguments.compare:
            write_model(folder / "model")
        found = {}
        for count in (rows // 10, rows):
            if arguments.compare:
                found[count] = compare(folder, count, suffix=suffix)
            else:
                found[count] = score(folder, count, without_context=arguments.without_context, suffix=suffix)
            print(
                f"{count:,} rows: {found[count]['seconds']:.1f} s, "
                f"largest resident size {found[count]['peak'] / (1 << 20):,.1f} MiB",
                flush=True,
            )
        (fewer, base), (more, own) = found.items()
        print(f"{(own['peak'] - base['peak']) / (more - fewer):.1f} bytes a row")


if __name__ == "__main__":
    main()
