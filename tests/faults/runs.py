"""A small run to be broken: its recipe and gold, the command that trains it, and what of two runs must be the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from forked import Command, Outcome, Running, forked

from goldsmith.records import MEASURED_FIELDS
from goldsmith.storage import verify_manifest

__all__ = [
    "STEPS",
    "TrainingRun",
    "assert_same_run",
    "checkpoint_steps",
    "copy_run",
    "read_metrics",
    "valid_checkpoints",
    "without_measures",
]

# 13 examples, 4 a step: the last step of an epoch holds one example. 2 epochs are 8 steps.
TRAIN = [
    {"id": f"t{number}", "prompt": f"{number * 7} + {number} = ", "completion": " ".join(str(number * 8))}
    for number in range(13)
]
EVAL = [
    {"id": f"e{number}", "prompt": f"{number * 3} + 1 = ", "completion": str(number * 3 + 1)} for number in range(5)
]

RECIPE: dict[str, Any] = {
    "training": {
        "epochs": 2,
        "batch_size": 4,
        "tokens_per_microbatch": 40,
        "seed": 3,
        "log_update_ratio_every": 1,
    },
    "optimizer": {"learning_rate": 0.02, "weight_decay": 0.1, "warmup_ratio": 0.2},
    "evaluation": {"every_steps": 3},
    "checkpoint": {"every_steps": 2, "keep": 2},
    "output_dir": "run",
}
STEPS = 8


class TrainingRun:
    """A folder with `recipe.yaml`, gold and (as `run/`) what `goldsmith train` makes of it.

    Args:
        folder: made here; runs of the same `data` have the same absolute paths in their recipes.
        data: where the gold and the model lie.
        model: a model folder.
        changes: dotted key -> value, over `RECIPE`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        data: Path,
        model: Path,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.output = folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        data.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train.jsonl", TRAIN), ("eval.jsonl", EVAL)):
            if not (data / name).exists():
                (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe: dict[str, Any] = json.loads(json.dumps(RECIPE))
        recipe["model"] = {"path": str(model), "device": "cpu"}
        recipe["data"] = {"train": str(data / "train.jsonl"), "eval": str(data / "eval.jsonl")}
        for key, value in (changes or {}).items():
            *sections, name = key.split(".")
            section = recipe
            for part in sections:
                section = section.setdefault(part, {})
            if value is None and name in section and not sections:
                del section[name]
            else:
                section[name] = value
        self.recipe = recipe
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

    def command(self, *overrides: str, **keywords: Any) -> Command:
        """`goldsmith train recipe.yaml --set ...`."""
        words = [word for text in overrides for word in ("--set", text)]
        return Command(arguments=["train", "recipe.yaml", "--json", *words], cwd=self.folder, **keywords)

    def train(self, *overrides: str, timeout: float = 60.0, **keywords: Any) -> Outcome:
        """The command, to its end."""
        return forked().run(self.command(*overrides, **keywords), timeout)

    def start(self, *overrides: str, **keywords: Any) -> Running:
        """The command, begun."""
        return forked().start(self.command(*overrides, **keywords))

    def train_dying_at(self, fail_point: str, *overrides: str) -> Outcome:
        """The command with `GOLDSMITH_FAIL_POINT`."""
        return self.train(*overrides, env={"GOLDSMITH_FAIL_POINT": fail_point})

    def finish(self, *overrides: str) -> Outcome:
        """The command, which must succeed."""
        outcome = self.train(*overrides)
        assert outcome.exit_code == 0, outcome.stderr
        return outcome

    @property
    def metrics(self) -> Path:
        return self.output / "metrics.jsonl"

    def checkpoint(self, step: int) -> Path:
        return self.output / "checkpoints" / f"step-{step:08d}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_measures(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every field that the resume law speaks of."""
    return [{key: value for key, value in record.items() if key not in MEASURED_FIELDS} for record in records]


def checkpoint_steps(run: TrainingRun) -> list[int]:
    """Steps of the checkpoints that bear their final name."""
    folder = run.output / "checkpoints"
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*")) if folder.is_dir() else []


def valid_checkpoints(run: TrainingRun) -> list[int]:
    """The same, each checked against its manifest: one that is damaged fails the test."""
    steps = checkpoint_steps(run)
    for step in steps:
        verify_manifest(run.checkpoint(step))
    return steps


def _content(run: TrainingRun) -> dict[str, Any]:
    """Everything in a run folder that is not a time, by name."""
    content: dict[str, Any] = {}
    for path in sorted(run.output.rglob("*")):
        name = path.relative_to(run.output).as_posix()
        if path.is_dir():
            content[name] = "a folder"
        elif name == "metrics.jsonl":
            content[name] = without_measures(read_metrics(path))
        elif name == "recipe.yaml":
            content[name] = [line for line in path.read_text().splitlines() if not line.startswith("output_dir:")]
        elif name == "result.json":
            result = json.loads(path.read_text())
            del result["training"]["seconds"], result["output_dir"], result["model_dir"], result["report"]
            content[name] = result
        elif path.name == "state.json":
            # The times in metrics.jsonl are longer or shorter, so the offset into it is not comparable.
            state = json.loads(path.read_text())
            content[name] = {k: v for k, v in state.items() if k not in ("elapsed_seconds", "metrics_offset")}
        elif name == "report.html":
            # It shows how long steps took; what it shows of the gold is in scores-before.jsonl and scores-after.jsonl.
            content[name] = "a page"
        elif path.name not in ("MANIFEST.json", ".lock"):
            content[name] = path.read_bytes()
    return content


def assert_same_run(run: TrainingRun, reference: TrainingRun, *, newest_checkpoint_only: bool = False) -> None:
    """Weights, optimizer state, order, metrics, result and every other file are the same to the bit.

    Args:
        newest_checkpoint_only: for a run that was stopped by a signal: it has saved where it was stopped, so that the
            checkpoint before the last may be another.
    """
    got, expected = _content(run), _content(reference)
    if newest_checkpoint_only:
        newest = f"checkpoints/{reference.checkpoint(checkpoint_steps(reference)[-1]).name}"
        for content in (got, expected):
            for name in [name for name in content if name.startswith("checkpoints/step-")]:
                if not name.startswith(newest):
                    del content[name]
    assert sorted(got) == sorted(expected)
    for name, value in expected.items():
        assert got[name] == value, f"{name} differs"
    valid_checkpoints(run)


def copy_run(run: TrainingRun, folder: Path) -> TrainingRun:
    """The same run in another place."""
    shutil.copytree(run.folder, folder)
    copied = object.__new__(TrainingRun)
    copied.folder, copied.output, copied.recipe = folder, folder / "run", run.recipe
    return copied
