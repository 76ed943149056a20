"""goldsmith's log P beside lm-evaluation-harness' loglikelihood: the same numbers, and how fast. `make bench-lm-eval`.

    .venv/bin/python benchmarks/lm_eval.py --install          an environment for lm-eval, once
    .venv/bin/python benchmarks/lm_eval.py                    the three workloads

Both score the same (context, continuation) pairs with the same weights in float32 on the CPU, the end token left out, each
in a process and an environment of its own, in turn. The harness' batch sizes are tried on some pairs, and its fastest counts.

| workload | model | pairs |
|---|---|---|
| stories | `../shared/models/stories260k` | GSM8K as text: questions, and answers after a boundary of three kinds |
| gsm8k-135m | SmolLM2-135M's shape, random weights | GSM8K's lengths, as ids |
| shared-prompt | the same | the same behind one prompt of 300 tokens, as ids |

Where the two cut the text into other tokens at the boundary, they score other things. Such pairs are counted apart and shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import machine
from run import commit, say

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"
ENVIRONMENT = HERE / ".venv-lm-eval"
# Name -> pairs, enough for seconds.
WORKLOADS = {"stories": 480, "gsm8k-135m": 48, "shared-prompt": 32}
TOLERANCE_NATS = 1e-4
# Of pairs that are cut into other tokens, so many are kept beside the page.
SHOWN_PAIRS = 12
# Kinds of boundary: what ends the context, and what begins the continuation.
BOUNDARIES = {
    "space in the continuation": ("\nAnswer:", " "),
    "space at the end of the context": ("\nAnswer: ", ""),
    "line break at the end of the context": ("\n", ""),
}

Json = dict[str, Any]


def install() -> None:
    """An environment of its own for lm-eval, with the torch and transformers of goldsmith's."""
    pip = ENVIRONMENT / "bin" / "pip"
    if not pip.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    same = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in ("torch", "transformers")]
    subprocess.run([str(pip), "install", "--upgrade", "lm-eval[hf]", *same], check=True)


def prepare(name: str, folder: Path, num_pairs: int) -> str:
    """Write the model and `pairs.jsonl`; where the pairs come from."""
    if name == "stories":
        shutil.copytree(SHARED / "models" / "stories260k", folder / "model")
        pairs = _pairs_of_text(folder / "model", num_pairs)
        origin = "GSM8K test, as text"
    else:
        command = [sys.executable, "workloads.py", name, str(folder), "--rows", str(num_pairs)]
        subprocess.run(command, check=True, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        origin = json.loads((folder / "work.json").read_text())["origin"]
        pairs = _pairs_of_work(folder)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return origin


def _pairs_of_text(model: Path, num_pairs: int) -> list[Json]:
    """GSM8K's rows in turn behind each kind of boundary. The harness cuts what the model cannot take; such rows are left out."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    limit = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    pairs: list[Json] = []
    kinds = list(BOUNDARIES.items())
    for line in (SHARED / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind, (end, begin) = kinds[len(pairs) % len(kinds)]
        context, continuation = f"Question: {row['question']}{end}", begin + row["answer"]
        if len(tokenizer.encode(context).ids) + len(tokenizer.encode(continuation).ids) < limit - 4:
            pairs.append({"context": context, "continuation": continuation, "kind": kind})
        if len(pairs) == num_pairs:
            break
    return pairs


def _pairs_of_work(folder: Path) -> list[Json]:
    import numpy as np

    with np.load(folder / "work.npz", allow_pickle=False) as arrays:
        rows = np.split(arrays["token_ids"], np.cumsum(arrays["lengths"])[:-1])
        return [
            {"context_ids": row[:context].tolist(), "continuation_ids": row[context:].tolist()}
            for row, context in zip(rows, arrays["context_lengths"].tolist(), strict=True)
        ]


def run_system(system: str, folder: Path, setting: Json, *, timeout: float, threads: int | None) -> Json:
    """One scoring of the pairs in a process of its own."""
    environment = dict(os.environ)
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as results:
        result_file = Path(results) / "result.json"
        if system == "goldsmith":
            program = [sys.executable, "system_goldsmith_scores.py"]
        else:
            program = [str(ENVIRONMENT / "bin" / "python"), "-P", "system_lm_eval.py"]
        command = [*program, str(folder), json.dumps(setting), str(result_file)]
        try:
            done = subprocess.run(
                command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            result: Json = {"outcome": f"not done in {timeout:.0f} s"}
        else:
            if done.returncode == 0 and result_file.is_file():
                result = json.loads(result_file.read_text())
            else:
                result = {"outcome": f"failed with exit code {done.returncode}", "output": done.stderr[-2000:]}
                say(done.stderr[-2000:])
    result["setting"] = setting
    shown = f"{result['seconds']:.2f} s" if result["outcome"] == "done" else result["outcome"]
    say(f"  {system} {setting}: {shown}")
    return result


def agreement(ours: Json, theirs: Json, pairs: Sequence[Json]) -> Json:
    """How far the two agree, on pairs of the same ids, and the pairs of other ids.

    >>> ours = {"log_probs": [-1.0, -5.0], "greedy": [True, False], "ids": [[[1], [2]], [[1, 9], [3]]]}
    >>> theirs = {"log_probs": [-1.00001, -4.0], "greedy": [True, False], "ids": [[[1], [2]], [[1], [9, 3]]]}
    >>> found = agreement(ours, theirs, [{}, {"kind": "space"}])
    >>> found["num_same_ids"], round(found["largest_difference"], 6), [pair["kind"] for pair in found["other_ids"]]
    (1, 1e-05, ['space'])
    """
    same, other = [], []
    for number, pair in enumerate(pairs):
        known = theirs["ids"][number] if theirs["ids"] else ours["ids"][number]
        mine = ours["ids"][number]
        entry = {
            "pair": number,
            "kind": pair.get("kind", ""),
            "log_probs": [ours["log_probs"][number], theirs["log_probs"][number]],
            "greedy": [ours["greedy"][number], theirs["greedy"][number]],
        }
        if mine == known:
            same.append(entry)
        else:
            around = max(0, len(mine[0]) - 4)
            entry["contexts_end"] = [mine[0][around:], known[0][around:]]
            entry["continuations_begin"] = [mine[1][:4], known[1][:4]]
            entry["num_tokens"] = [sum(map(len, mine)), sum(map(len, known))]
            other.append(entry)
    differences = [abs(entry["log_probs"][0] - entry["log_probs"][1]) for entry in same]
    return {
        "num_pairs": len(pairs),
        "num_same_ids": len(same),
        "largest_difference": max(differences, default=None),
        "greedy_agrees": sum(entry["greedy"][0] == entry["greedy"][1] for entry in same),
        "other_ids": other,
    }


def rounding_errors(truth: Json, systems: dict[str, Json], pairs: Sequence[Json]) -> Json:
    """The largest distance of each system from the float64 run, on pairs of the same ids; nats.

    >>> truth = {"outcome": "done", "log_probs": [-1.0, -5.0], "ids": [[[1], [2]], [[1], [3]]]}
    >>> other = {"log_probs": [-1.5, -9.0], "ids": [[[1], [2]], [[1, 3], []]]}
    >>> rounding_errors(truth, {"a": {**truth, "log_probs": [-1.25, -7.0]}, "b": other}, [{}, {}])
    {'a': 0.25, 'b': 0.5}
    """
    if truth["outcome"] != "done":
        raise SystemExit(f"goldsmith in float64 failed: {truth['outcome']}")
    known = [run["ids"] for run in systems.values() if run["ids"]]
    same = [number for number in range(len(pairs)) if all(ids[number] == truth["ids"][number] for ids in known)]
    return {
        name: max((abs(run["log_probs"][number] - truth["log_probs"][number]) for number in same), default=None)
        for name, run in systems.items()
    }


def run_workload(name: str, options: argparse.Namespace) -> Json:
    """Try the harness' batch sizes, measure in turn, compare."""
    with tempfile.TemporaryDirectory(prefix="goldsmith-lm-eval-") as work:
        folder = Path(work)
        origin = prepare(name, folder, options.pairs or WORKLOADS[name])
        pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        say(f"{name}: {len(pairs)} pairs; {origin}")
        trial = {"pairs": min(len(pairs), options.trial_pairs or max(12, len(pairs) // 4))}
        keywords: Json = {"timeout": options.timeout, "threads": options.threads}
        trials = [
            run_system("lm-eval", folder, {**trial, "batch_size": size}, **keywords) for size in options.batch_sizes
        ]
        done = [result for result in trials if result["outcome"] == "done"]
        if not done:
            raise SystemExit(f"{name}: no batch size of the harness works")
        best = min(done, key=lambda result: result["seconds"])["setting"]["batch_size"]
        rounds = []
        setting: Json = {"pairs": None, "boundary": "separate"}
        for _ in range(options.rounds):
            ours = run_system("goldsmith", folder, setting, **keywords)
            theirs = run_system("lm-eval", folder, {"pairs": None, "batch_size": best}, **keywords)
            if "done" not in (ours["outcome"], theirs["outcome"]) or ours["outcome"] != theirs["outcome"]:
                raise SystemExit(f"{name}: a system failed: {ours['outcome']}; {theirs['outcome']}")
            rounds.append({"goldsmith": ours, "lm-eval": theirs})
        # The harness sums a continuation in float32, whose steps are 1.2e-4 above 1,024 nats; this run, which is not timed, has its
        # log-softmax and sums in float64.
        exact_setting = {"pairs": None, "batch_size": best, "softmax_dtype": "float64"}
        exact = run_system("lm-eval", folder, exact_setting, **keywords)
        if exact["outcome"] != "done":
            raise SystemExit(f"{name}: the harness failed with a float64 softmax: {exact['outcome']}")
        # What both would find without rounding, but for the angles of rotary embeddings, which both have in float32.
        truth = run_system("goldsmith", folder, {**setting, "dtype": "float64"}, **keywords)
        rounding = rounding_errors(truth, {"goldsmith": ours, "lm-eval": exact, "lm-eval, its own sums": theirs}, pairs)
        joint = joint_rounding = None
        if "context" in pairs[0]:
            setting = {**setting, "boundary": "joint"}
            ours_joint = run_system("goldsmith", folder, setting, **keywords)
            truth = run_system("goldsmith", folder, {**setting, "dtype": "float64"}, **keywords)
            joint = agreement(ours_joint, exact, pairs)
            joint_rounding = rounding_errors(
                truth, {"goldsmith": ours_joint, "lm-eval": exact, "lm-eval, its own sums": theirs}, pairs
            )
    found = {
        "workload": name,
        "origin": origin,
        "tokens": ours["tokens"],
        "gold_tokens": ours["gold_tokens"],
        "batch_size": best,
        "trials": [{"setting": t["setting"], "outcome": t["outcome"], "seconds": t.get("seconds")} for t in trials],
        "rounds": [
            {system: {key: run[key] for key in ("seconds", "peak_bytes")} for system, run in one.items()}
            for one in rounds
        ],
        "ratio": statistics.median(one["lm-eval"]["seconds"] / one["goldsmith"]["seconds"] for one in rounds),
        "agreement": agreement(ours, exact, pairs),
        "agreement_float32_sums": agreement(ours, theirs, pairs)["largest_difference"],
        "joint": joint,
        "rounding": rounding,
        "joint_rounding": joint_rounding,
        "threads": {"goldsmith": ours["threads"], "lm-eval": theirs["threads"]},
        "versions": {"goldsmith": ours["versions"], "lm-eval": theirs["versions"]},
    }
    largest = [one["largest_difference"] for one in (found["agreement"], found["joint"] or {}) if one]
    found["agrees"] = all(value is None or value <= TOLERANCE_NATS for value in largest)
    return found


def to_markdown(results: Sequence[Json], facts: Json) -> str:
    """The page."""
    lines = [
        "# log P beside lm-evaluation-harness",
        "",
        f"{facts['date']}, {facts['machine']['processor']}, {facts['machine']['cores']} cores, {facts['repository']}, "
        f"`{facts['command']}`" + (f"; something else ran: {facts['warning']}" if facts["warning"] else ""),
        "",
        "Seconds from the text (or ids) to the last log P, model loaded and warm, float32, medians of rounds in turn; the",
        "harness with the fastest of the batch sizes tried. Differences, in nats, are of pairs that both cut into the same",
        "tokens: with the harness' log-softmax and sums in float64, and as it is, where it sums a continuation in float32",
        "(whose steps are 1.2e-4 above 1,024 nats).",
        "",
        "| workload | pairs | tokens | gold | goldsmith s | lm-eval s | batch size | speed "
        "| same ids | largest difference | as it is |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        own, theirs = (
            statistics.median(one[system]["seconds"] for one in result["rounds"]) for system in ("goldsmith", "lm-eval")
        )
        found = result["agreement"]
        largest, as_it_is = (
            "-" if value is None else f"{value:.1e}"
            for value in (found["largest_difference"], result["agreement_float32_sums"])
        )
        lines.append(
            f"| {result['workload']} | {found['num_pairs']} | {result['tokens']:,} | {result['gold_tokens']:,} | {own:.2f} | "
            f"{theirs:.2f} | {result['batch_size']} | {result['ratio']:.2f}x | {found['num_same_ids']} | {largest} | "
            f"{as_it_is} |"
        )
    lines += ["", "Batch sizes tried:", ""]
    for result in results:
        shown = ", ".join(
            f"{trial['setting']['batch_size']}: "
            + (f"{trial['seconds']:.2f} s" if trial["outcome"] == "done" else trial["outcome"])
            for trial in result["trials"]
        )
        lines.append(f"- {result['workload']} ({result['trials'][0]['setting']['pairs']} pairs): {shown}")
    lines += ["", *_rounding(results)]
    for result in results:
        if result["joint"] is not None:
            lines += ["", *_boundaries(result)]
    return "\n".join(lines) + "\n"


def _rounding(results: Sequence[Json]) -> list[str]:
    found = [(result["workload"], result["rounding"]) for result in results]
    found += [(f"{result['workload']}, joint", result["joint_rounding"]) for result in results if result["joint"]]
    found = [(name, errors) for name, errors in found if errors["lm-eval"] is not None]
    if not found:
        return []
    lines = [
        "## How far each is from float64",
        "",
        "The largest distance from goldsmith's run in float64, nats, on the pairs that both cut into the same tokens: what float32",
        "leaves open. Two programs that round otherwise differ by as much.",
        "",
        "| workload | goldsmith, float32 | lm-eval, float32, sums in float64 | lm-eval as it is |",
        "|---|---|---|---|",
    ]
    return lines + [
        f"| {name} | {errors['goldsmith']:.1e} | {errors['lm-eval']:.1e} | {errors['lm-eval, its own sums']:.1e} |"
        for name, errors in found
    ]


def _boundaries(result: Json) -> list[str]:
    other = result["agreement"]["other_ids"]
    joint = result["joint"]
    largest = "none" if joint["largest_difference"] is None else f"{joint['largest_difference']:.1e} nats"
    lines = [
        "## Pairs that are cut into other tokens",
        "",
        f"{len(other)} of {result['agreement']['num_pairs']} pairs of {result['workload']}. The harness moves spaces (and line",
        "breaks) at the end of the context into the continuation, encodes both as one text, and takes what lies behind as many",
        "tokens as the context alone has. goldsmith encodes the two apart (`boundary: separate`), as a server does that has the",
        "prompt only. With `boundary: joint` goldsmith encodes one text too, and a token that straddles the boundary is gold;",
        f"then {joint['num_same_ids']} pairs have the harness' ids (largest difference {largest}). What still differs is that",
        "the harness counts the moved white space as gold. This tokenizer puts a space before every text that it encodes, so",
        "that a continuation encoded apart has one more than the same text behind a context.",
        "",
        "| boundary | pairs | same ids, separate | same ids, joint | mean difference of log P where they differ, separate |",
        "|---|---|---|---|---|",
    ]
    total = result["agreement"]["num_pairs"]
    for place, kind in enumerate(BOUNDARIES):
        differing = [pair for pair in other if pair["kind"] == kind]
        joint_differing = [pair for pair in joint["other_ids"] if pair["kind"] == kind]
        count = len(range(place, total, len(BOUNDARIES)))
        mean = "-"
        if differing:
            mean = f"{statistics.mean(pair['log_probs'][0] - pair['log_probs'][1] for pair in differing):+.3f} nats"
        lines.append(f"| {kind} | {count} | {count - len(differing)} | {count - len(joint_differing)} | {mean} |")
    lines += ["", "The first of each kind; ids around the boundary, goldsmith's (separate) and the harness':", ""]
    for kind in BOUNDARIES:
        for pair in [pair for pair in other if pair["kind"] == kind][:1]:
            (own_end, their_end), (own_begin, their_begin) = pair["contexts_end"], pair["continuations_begin"]
            lines.append(
                f"- {kind}: {own_end} | {own_begin} and {their_end} | {their_begin}; "
                f"log P {pair['log_probs'][0]:.4f} and {pair['log_probs'][1]:.4f}"
            )
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default=",".join(WORKLOADS), help="some of them, with commas between")
    parser.add_argument("--pairs", type=int, help="in place of each workload's own number")
    parser.add_argument(
        "--trial-pairs", type=int, help="by which the harness' batch sizes are compared; default: a quarter"
    )
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="OpenMP threads of both")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of one process")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--force", action="store_true", help="measure although something else runs; the result says so")
    parser.add_argument("--install", action="store_true", help="make the environment of lm-eval, and end")
    options = parser.parse_args(arguments)
    options.workload = options.workload.split(",")
    for name in options.workload:
        if name not in WORKLOADS:
            parser.error(f"{name!r} is none of {', '.join(WORKLOADS)}")
    options.batch_sizes = [int(size) if size.isdecimal() else size for size in options.batch_sizes.split(",")]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.install:
        install()
        return 0
    if not (ENVIRONMENT / "bin" / "python").is_file():
        say("lm-eval is not installed; `python benchmarks/lm_eval.py --install` does it")
        return 2
    warning = machine.idle_check()
    if warning is not None:
        say(f"something else runs on this machine: {warning}")
        if not options.force:
            say("measure when it is idle, or give --force: the figures will be marked")
            return 2
    results = []
    for name in options.workload:
        if name == "stories" and not (SHARED / "models" / "stories260k").is_dir():
            say(f"stories: waits for the model in {SHARED}")
            continue
        results.append(run_workload(name, options))
    facts = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/lm_eval.py", *sys.argv[1:]]),
        "machine": machine.describe(),
        "repository": commit(),
        "warning": warning,
    }
    page = to_markdown(results, facts)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"lm-eval-{facts['date']}"
    for found in (found for result in results for found in (result["agreement"], result["joint"]) if found):
        found["num_other_ids"] = len(found["other_ids"])
        found["other_ids"] = found["other_ids"][:SHOWN_PAIRS]
    stem.with_suffix(".json").write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(page)
    print(page)
    disagreeing = [result["workload"] for result in results if not result["agrees"]]
    if disagreeing:
        say(f"differ by more than {TOLERANCE_NATS:g} nats on the same ids: {', '.join(disagreeing)}")
    return 1 if disagreeing else 0


if __name__ == "__main__":
    raise SystemExit(main())
