"""From the runs of one workload to the figures, and to a Markdown table. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

__all__ = ["LOSS_TOLERANCE", "NUM_COMPARED_LOSSES", "loss_difference", "summarise", "to_markdown"]

LOSS_TOLERANCE = 1e-3
NUM_COMPARED_LOSSES = 3
# Cores that something else kept busy during a run, above which its figure is marked.
DISTURBED_CORES = 0.10

Json = dict[str, Any]


def loss_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference between the losses of the first steps, nats.

    >>> round(loss_difference([10.80, 10.75], [10.80, 10.74]), 4)
    0.01
    """
    pairs = list(zip(ours, theirs, strict=False))[:NUM_COMPARED_LOSSES]
    return max(abs(a - b) for a, b in pairs)


def summarise(result: Mapping[str, Any]) -> dict[str, Json]:
    """Per system: medians over the rounds, ratios to the reference, and whether the row is void.

    The reference is goldsmith, or the first system where goldsmith is not among them. A ratio is taken within each
    round, of runs that follow one another; the median of the rounds is what counts.

    A system of which no setting could be measured has its outcomes.

    Args:
        result: `workload` (`useful_flops`, `num_tokens`, ...), `trials` and `rounds`, each with `matmul` and `runs` by system.
    """
    rounds: Sequence[Mapping[str, Any]] = result["rounds"]
    systems = list(dict.fromkeys(name for entry in rounds for name in entry["runs"]))
    done = {
        name: [entry for entry in rounds if entry["runs"].get(name, {}).get("outcome") == "done"] for name in systems
    }
    reference = "goldsmith" if done.get("goldsmith") else next((name for name in systems if done[name]), None)
    summary: dict[str, Json] = {}
    for name in systems:
        outcomes = {entry["runs"][name]["outcome"] for entry in rounds if name in entry["runs"]}
        if not done[name] or reference is None:
            summary[name] = {"outcome": ", ".join(sorted(outcomes))}
            continue
        runs = [entry["runs"][name] for entry in done[name]]
        paired = [entry for entry in done[name] if entry in done[reference]]
        seconds = median(run["seconds"] for run in runs)
        differences = [
            loss_difference(entry["runs"][reference]["losses"], entry["runs"][name]["losses"]) for entry in paired
        ]
        difference = max(differences) if differences else None
        foreign = [run["foreign_cores"] for run in runs if run["foreign_cores"] is not None]
        summary[name] = {
            "outcome": "done",
            "setting": runs[0]["setting"],
            "notes": runs[0]["notes"],
            "rounds": len(runs),
            "seconds": seconds,
            "tokens_per_second": result["workload"]["num_tokens"] / seconds,
            "rows_per_second": result["workload"]["num_rows"] / seconds,
            "peak_bytes": median(run["peak_bytes"] for run in runs),
            "peak_gpu_bytes": median(run["peak_gpu_bytes"] for run in runs) if "peak_gpu_bytes" in runs[0] else None,
            "fraction_of_matmul_rate": median(
                result["workload"]["useful_flops"]
                / entry["runs"][name]["seconds"]
                / entry["matmul"]["flops_per_second"]
                for entry in done[name]
            ),
            "seconds_over_reference": _median_ratio(paired, name, reference, "seconds"),
            "reference_memory_over_own": _inverse(_median_ratio(paired, name, reference, "peak_bytes")),
            "largest_loss_difference": difference,
            "is_void": difference is None or difference > LOSS_TOLERANCE,
            "most_foreign_cores": max(foreign) if foreign else None,
            "is_disturbed": bool(foreign) and max(foreign) > DISTURBED_CORES,
        }
    for name in dict.fromkeys(trial["system"] for trial in result["trials"] if trial["system"] not in summary):
        outcomes = {trial["outcome"] for trial in result["trials"] if trial["system"] == name}
        summary[name] = {"outcome": f"in every setting: {', '.join(sorted(outcomes))}"}
    return summary


def _median_ratio(rounds: Sequence[Mapping[str, Any]], name: str, reference: str, key: str) -> float | None:
    return median(entry["runs"][name][key] / entry["runs"][reference][key] for entry in rounds) if rounds else None


def _inverse(ratio: float | None) -> float | None:
    return None if ratio is None else 1.0 / ratio


def to_markdown(result: Mapping[str, Any]) -> str:
    """The page of one workload."""
    work, summary = result["workload"], result["summary"]
    machine = result["machine"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else "unknown memory"
    matmul = [entry["matmul"]["flops_per_second"] / 1e9 for entry in result["rounds"]]
    reference = "goldsmith" if summary.get("goldsmith", {}).get("outcome") == "done" else "the first system"
    lines = [
        f"# {work['name']}, {result['date']}",
        "",
        f"- command: `{result['command']}`",
        f"- machine: {machine['processor']}, {machine['cores']} cores, {memory}, {machine['system']}; device {work['device']}",
        f"- goldsmith at {result['repository']}",
        f"- shape: {work['shape']['architecture']}, {work['parameters'] / 1e6:.1f} M parameters, random weights, "
        f"vocabulary {work['shape']['vocab_size']:,}",
        f"- rows: {work['num_rows']} ({work['origin']}), {work['num_tokens']:,} tokens, {work['num_gold_tokens']:,} of them "
        f"gold, the longest row {work['longest_row']:,}; {work['num_steps']} steps of {work['batch_size']} rows; "
        f"of what a loop computes that pads each step to its longest row, {work['padding']:.1%} is padding",
        f"- matrix products, measured before each round: {', '.join(f'{rate:.1f}' for rate in matmul)} GFLOP/s",
        f"- {len(result['rounds'])} rounds, systems in turn, each in a process of its own",
    ]
    if result["warning"]:
        lines.append(f"- **Not to be relied on:** {result['warning']}")
    if result.get("note"):
        lines.append(f"- {result['note']}")
    lines += [
        "",
        "| system | setting | seconds | rows/s | tokens/s | of the matmul rate | peak memory | times as slow | memory, "
        f"{reference} over it | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in summary.items():
        if row["outcome"] != "done":
            lines.append(f"| {name} | | | | | | | | | {row['outcome']} |")
            continue
        marks = []
        if row["is_void"]:
            marks.append("**void: other losses**")
        if row["is_disturbed"]:
            marks.append(f"disturbed: {row['most_foreign_cores']:.2f} cores busy elsewhere")
        marks += [f"{note}: {value:,}" for note, value in row["notes"].items() if value]
        lines.append(
            f"| {name} | {setting_text(row['setting'])} | {row['seconds']:.1f} | "
            f"{_rate(row['rows_per_second'])} | {row['tokens_per_second']:,.0f} | "
            f"{row['fraction_of_matmul_rate']:.0%} | {row['peak_bytes'] / 1e9:.2f} GB | "
            f"{_number(row['seconds_over_reference'])} | {_number(row['reference_memory_over_own'])} | {'; '.join(marks)} |"
        )
    lines += ["", "Losses of the first steps, nats a gold token:", ""]
    first = [
        (name, result["rounds"][0]["runs"][name]["losses"][:NUM_COMPARED_LOSSES])
        for name, row in summary.items()
        if row["outcome"] == "done" and "losses" in result["rounds"][0]["runs"].get(name, {})
    ]
    count = max((len(losses) for _, losses in first), default=0)
    lines.append(f"| system | {' | '.join(f'step {step}' for step in range(1, count + 1))} |")
    lines.append(f"|---|{'---:|' * count}")
    lines += [f"| {name} | {' | '.join(f'{loss:.6f}' for loss in losses)} |" for name, losses in first]
    if result["trials"]:
        steps = result["trials"][0]["steps"]
        lines += [
            "",
            f"Every setting tried, by its first {steps} steps; the fastest of a system is what the rounds measure:",
            "",
            "| system | setting | seconds | peak memory |",
            "|---|---|---:|---:|",
        ]
        for trial in result["trials"]:
            figures = (
                f"{trial['seconds']:.1f} | {trial['peak_bytes'] / 1e9:.2f} GB"
                if trial["outcome"] == "done"
                else f"{_failure(trial)} |"
            )
            lines.append(f"| {trial['system']} | {setting_text(trial['setting'])} | {figures} |")
    lines += ["", "Versions: " + "; ".join(_versions(result)) + ".", ""]
    return "\n".join(lines)


def setting_text(setting: Mapping[str, Any]) -> str:
    """`rows_per_microbatch 8, padding_free`."""
    parts = []
    for key, value in setting.items():
        if value is True:
            parts.append(key)
        elif value is not False:
            parts.append(f"{key} {value}")
    return ", ".join(parts)


def _rate(value: float) -> str:
    """
    >>> _rate(0.8312), _rate(31.4159), _rate(1551.2)
    ('0.83', '31.4', '1,551')
    """
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _failure(trial: Mapping[str, Any]) -> str:
    """
    >>> _failure({"outcome": "out of memory", "memory_limit_bytes": 22_600_000_000})
    'out of memory, of which it had 22.6 GB'
    """
    limit = trial.get("memory_limit_bytes")
    if trial["outcome"] != "out of memory" or limit is None:
        return str(trial["outcome"])
    return f"out of memory, of which it had {limit / 1e9:.1f} GB"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _versions(result: Mapping[str, Any]) -> list[str]:
    texts = []
    for name, run in result["rounds"][0]["runs"].items():
        if "versions" in run:
            versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
            texts.append(f"{name} ({run['threads']} threads): {versions}")
    return texts
