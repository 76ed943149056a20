"""How fast `goldsmith inspect` reads, and how much memory a row takes: rows of GSM8K's lengths, or tiny ones.

    python benchmarks/inspect_speed.py --rows 100000               seconds, 100,000 rows of GSM8K's lengths
    python benchmarks/inspect_speed.py --rows 1000000 --tiny       bytes a row, from 100,000 rows to 1,000,000

Each inspection runs in a process of its own (`--no-measure`). Memory is the difference of the two processes' largest resident size,
divided by the difference of their rows, so that what does not grow with the rows falls out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
WORDS = [
    first + last for first in "bcdfghklmnprstvw" for last in ("an", "ell", "ine", "ook", "ust", "are", "ight", "ow")
]


def write_rows(path: Path, count: int, *, tiny: bool) -> None:
    """Distinct rows: GSM8K's own over and over, each with its number behind it, where they lie in `shared/`; else made-up ones."""
    draw = random.Random(0)
    own = GSM8K.read_text(encoding="utf-8").splitlines() if GSM8K.is_file() and not tiny else []
    parsed = [json.loads(line) for line in own]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            if tiny:
                row = {"prompt": f"{number}", "completion": f"{number * 7}"}
            elif parsed:
                taken = parsed[number % len(parsed)]
                row = {"prompt": f"{taken['question']} ({number})", "completion": taken["answer"]}
            else:
                question = " ".join(draw.choices(WORDS, k=max(8, round(draw.gauss(62, 22)))))
                answer = " ".join(draw.choices(WORDS, k=max(10, round(draw.gauss(95, 40)))))
                row = {"prompt": f"{question} {number}?", "completion": f"{answer} #### {number}"}
            file.write(json.dumps(row) + "\n")


def write_recipe(folder: Path, rows: Path) -> Path:
    """A recipe whose tokenizer is there already: learning one reads all texts, and is no part of inspecting."""
    from goldsmith.data.tokenizer import TrainedTokenizerConfig, train_tokenizer

    with rows.open(encoding="utf-8") as file:
        texts = list(itertools.islice(file, 5000))
    train_tokenizer(TrainedTokenizerConfig(kind="bpe", vocab_size=8192), texts).save_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    recipe = {
        "model": {"init": {"architecture": "llama", "max_position_embeddings": 2048, **sizes}},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"train": str(rows)},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def inspect(folder: Path, count: int, *, tiny: bool) -> dict[str, float]:
    """One inspection in a process of its own: seconds, its largest resident size in bytes, tokens."""
    rows = folder / f"rows-{count}.jsonl"
    write_rows(rows, count, tiny=tiny)
    recipe = write_recipe(folder, rows)
    program = (
        "import json, resource, sys\n"
        "from goldsmith import inspect, load_recipe\n"
        f"report = inspect(load_recipe({str(recipe)!r}), measure=False)\n"
        "values = report.to_json()\n"
        "assert values['splits']['train']['rows_used'] == "
        f"{count}, values['splits']['train']\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "print(json.dumps({'peak': peak, 'tokens': values['splits']['train']['lengths']['total']['total']}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - started
    rows.unlink()
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument(
        "--tiny", action="store_true", help="rows of a few characters; also a tenth as many, for bytes a row"
    )
    arguments = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY / "src"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = inspect(folder, arguments.rows, tiny=arguments.tiny)
        print(
            f"{arguments.rows:,} rows, {found['tokens']:,} tokens: {found['seconds']:.1f} s, "
            f"largest resident size {found['peak'] / (1 << 20):,.0f} MiB"
        )
        if arguments.tiny:
            fewer = arguments.rows // 10
            base = inspect(folder, fewer, tiny=True)
            print(
                f"{fewer:,} rows: {base['seconds']:.1f} s, {base['peak'] / (1 << 20):,.0f} MiB; "
                f"{(found['peak'] - base['peak']) / (arguments.rows - fewer):.1f} bytes a row"
            )


if __name__ == "__main__":
    main()
