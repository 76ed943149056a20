"""What a run folder tells: its recipe, its data, its machine, its curves. Plain values, ready for the page.

The files are read as they are found, whatever wrote them: a run that is still training lacks its result, and its last
line of metrics may be half written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from goldsmith.errors import MachineError

__all__ = ["RUN_FILES", "RunView", "read_run"]

RECIPE, DATA, ENVIRONMENT, RESULT, METRICS = (
    "recipe.yaml",
    "data.json",
    "environment.json",
    "result.json",
    "metrics.jsonl",
)
# A page that shows a run must be made anew when one of these changes.
RUN_FILES = (RECIPE, DATA, ENVIRONMENT, RESULT, METRICS)

# A curve has no more points than this; longer runs are averaged over stretches of equally many steps.
MAX_POINTS = 1500


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run as the page shows it.

    Attributes:
        name: the folder's name.
        values: everything else, as JSON takes it: `folder`, `recipe` (the YAML text),
            `glance` (label -> text, out of the recipe), `data` (split -> files),
            `environment`, `result`, `steps` and `evaluations` (column -> values), `update_to_weight` (group -> points),
            `seconds`, `tokens_per_second`, `is_finished`.
    """

    name: str
    values: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """For the page."""
        return {"name": self.name, **self.values}


def read_run(folder: Path) -> RunView:
    """Read a run folder, finished or not.

    Raises:
        MachineError: the folder is not a run's, or a file of it is damaged.
    """
    recipe = folder / RECIPE
    if not recipe.is_file():
        raise MachineError(f"{folder}: not a run folder: it holds no {RECIPE}", remedy="name the folder of a run")
    recipe_text = recipe.read_text(encoding="utf-8", errors="replace")  # it is shown, and not used
    try:
        return _view(folder, recipe_text)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise MachineError(
            f"{folder}: a file of the run is damaged: {METRICS}, {DATA} or {RESULT} ({type(error).__name__}: {error})",
            remedy="restore it from a copy, or train anew",
        ) from error


def _view(folder: Path, recipe_text: str) -> RunView:
    records = list(_lines(folder / METRICS))
    steps = [record for record in records if record.get("kind") == "step"]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    tokens_at = _cumulative(steps, "tokens")
    gold_at = _cumulative(steps, "gold_tokens")
    seconds = sum(_number(step, "seconds") for step in steps)
    data = _document(folder / DATA)
    result = _document(folder / RESULT)
    return RunView(
        name=folder.resolve().name,
        values={
            "folder": str(folder),
            "recipe": recipe_text,
            "glance": _glance(recipe_text),
            "data": {split: _split(report) for split, report in data.items() if isinstance(report, Mapping)},
            "environment": _document(folder / ENVIRONMENT),
            "result": {**result.get("training", {}), "rows": result.get("rows")} if result else {},
            "parity": result.get("parity"),
            "is_finished": bool(result),
            "num_steps": len(steps),
            "steps": _step_columns(steps, tokens_at, gold_at),
            "evaluations": _evaluation_columns(evaluations, tokens_at, gold_at),
            "update_to_weight": _update_to_weight(steps, tokens_at, gold_at),
            "seconds": seconds,
            "tokens_per_second": tokens_at[-1][1] / seconds if seconds > 0 else None,
            "peak_memory_bytes": max((_number(step, "peak_memory_bytes") for step in steps), default=0) or None,
        },
    )


def _glance(recipe_text: str) -> dict[str, str]:
    """What one wants to know of a recipe first; keys that it lacks are left out."""
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError:
        return {}
    if not isinstance(recipe, dict):
        return {}
    model, training, optimizer = (
        section if isinstance(section := recipe.get(name), dict) else {} for name in ("model", "training", "optimizer")
    )
    init = model.get("init") if isinstance(model.get("init"), dict) else None
    adapter = recipe.get("adapter") if isinstance(recipe.get("adapter"), dict) else None
    from_nothing = f"{init.get('architecture')}, from nothing" if init else None
    rate = optimizer.get("learning_rate")
    facts = {
        "model": model.get("path") or from_nothing,
        "trained": f"adapter, {adapter.get('kind')}" if adapter else "all weights",
        "step": f"{training['batch_size']} examples" if "batch_size" in training else None,
        "optimizer": f"{optimizer.get('name')}, learning rate {rate:g}" if isinstance(rate, int | float) else None,
    }
    return {name: str(text) for name, text in facts.items() if text is not None}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON Lines file; a last line without its end is still being written."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise MachineError(f"{path}:{number}: not JSON ({error})", remedy="restore the file") from error
            if isinstance(record, dict):
                yield record


def _document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise MachineError(f"{path}: not JSON ({error})", remedy="restore the file") from error
    return document if isinstance(document, dict) else {}


def _number(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else 0.0


def _cumulative(steps: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, so many until its end), from (0, 0) on."""
    totals = [(0, 0.0)]
    for step in steps:
        totals.append((int(step["step"]), totals[-1][1] + _number(step, key)))
    return totals


def _split(report: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("path", "name", "rows_in", "used", "rejected", "over_limit", "examples", "tokens", "gold_tokens", "sha256")
    files = [{key: file.get(key) for key in kept} for file in report.get("files", ())]
    return {"files": files, "rejections": report.get("rejections", {})}


def _step_columns(
    steps: Sequence[Mapping[str, Any]], tokens_at: Sequence[tuple[int, float]], gold_at: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """The curves of the steps; nll is averaged over gold tokens, every other figure over steps."""
    stretch = -(-len(steps) // MAX_POINTS) or 1
    columns: dict[str, list[float | None]] = {key: [] for key in ("step", "tokens", "gold_tokens")}
    curves = ("nll", "loss", "learning_rate", "grad_norm", "tokens_per_second")
    columns |= {key: [] for key in curves}
    sources = sorted({name for step in steps for name in step.get("nll_by_source") or {}})
    by_source: dict[str, list[float | None]] = {name: [] for name in sources}
    for first in range(0, len(steps), stretch):
        part = steps[first : first + stretch]
        last = min(first + stretch, len(steps))
        columns["step"].append(part[-1]["step"])
        columns["tokens"].append(tokens_at[last][1])
        columns["gold_tokens"].append(gold_at[last][1])
        for key in curves:
            weighted = [(_number(step, "gold_tokens") if key == "nll" else 1.0, step.get(key)) for step in part]
            columns[key].append(_mean(weighted))
        for name in sources:
            by_source[name].append(_mean([(1.0, (step.get("nll_by_source") or {}).get(name)) for step in part]))
    return {**columns, "nll_by_source": by_source, "stretch": stretch}


def _evaluation_columns(
    evaluations: Sequence[Mapping[str, Any]],
    tokens_at: Sequence[tuple[int, float]],
    gold_at: Sequence[tuple[int, float]],
) -> dict[str, Any]:
    tokens, gold = dict(tokens_at), dict(gold_at)
    sources = sorted({name for record in evaluations for name in record.get("nll_by_source") or {}})
    return {
        "step": [record["step"] for record in evaluations],
        "tokens": [tokens.get(record["step"]) for record in evaluations],
        "gold_tokens": [gold.get(record["step"]) for record in evaluations],
        "nll": [record.get("nll") for record in evaluations],
        "examples": [record.get("examples") for record in evaluations],
        "nll_by_source": {
            name: [(record.get("nll_by_source") or {}).get(name) for record in evaluations] for name in sources
        },
    }


def _update_to_weight(
    steps: Sequence[Mapping[str, Any]], tokens_at: Sequence[tuple[int, float]], gold_at: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """The steps at which it was measured, and each group's ratio there."""
    measured = [(place, step) for place, step in enumerate(steps, start=1) if step.get("update_to_weight")]
    measured = measured[:: -(-len(measured) // MAX_POINTS) or 1]
    groups = dict.fromkeys(group for _, step in measured for group in step["update_to_weight"])
    return {
        "step": [step["step"] for _, step in measured],
        "tokens": [tokens_at[place][1] for place, _ in measured],
        "gold_tokens": [gold_at[place][1] for place, _ in measured],
        "groups": {group: [step["update_to_weight"].get(group) for _, step in measured] for group in groups},
    }


def _mean(weighted: Sequence[tuple[float, Any]]) -> float | None:
    known = [(weight, float(value)) for weight, value in weighted if isinstance(value, int | float)]
    total = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / total if total > 0 else None
