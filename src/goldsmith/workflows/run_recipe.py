"""The recipe that a run is held to: every automatic choice in it resolved once, and what a resumed run may still change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from goldsmith import distributed
from goldsmith.data.config import SourceConfig
from goldsmith.data.hub import hub_revision
from goldsmith.errors import ConfigError, MachineError
from goldsmith.recipe import Recipe, load_recipe
from goldsmith.report.run_files import RECIPE
from goldsmith.workflows.run_folder import UNCLAIMED
from goldsmith.workflows.saying import Say

__all__ = ["compare_machine", "stored_recipe", "today", "with_resolved", "with_revisions", "with_values"]

# Resolved once, written to the run's recipe.yaml, and read from there afterwards.
AUTOMATIC_KEYS = (
    "model.device",
    "data.max_length",
    "training.max_steps",
    "training.activation_checkpointing",
    "rendering.date",
)
REVISION_KEY = re.compile(r"data\.(train|eval)\.\d+\.revision")
# What a resumed run may change: it is only shown, kept or cut.
CHANGEABLE_KEYS = (
    "training.tokens_per_microbatch",
    "training.shared_context",
    "training.activation_checkpointing",
    "training.compile",
    "training.memory_limit",
    "optimizer.step_in_backward",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "data.cache",
    "report.examples",
    "report.alternatives",
    "trackers",
    "output_dir",
)


def stored_recipe(recipe: Recipe, folder: Path) -> Recipe | None:
    """The resolved recipe of the run that the folder holds; None for a new folder.

    Raises:
        MachineError: the folder holds something else, or the run of another recipe.
    """
    path = folder / RECIPE
    if not path.is_file():
        foreign = (
            sorted(entry.name for entry in folder.iterdir() if entry.name not in UNCLAIMED) if folder.is_dir() else []
        )
        if foreign:
            raise MachineError(
                f"{folder}: not a run of goldsmith: it holds {', '.join(foreign[:5])} and no {RECIPE}",
                remedy="choose another output_dir",
            )
        return None
    try:
        stored = load_recipe(path, of_run=True)
    except ConfigError as error:
        raise MachineError(
            f"{folder}: not a run of this goldsmith: {error.message}", remedy="choose another output_dir"
        ) from error
    if stored.training.max_steps is None or stored.model.device == "auto":
        # A run's recipe has every automatic choice in it. The user's own must not be overwritten.
        raise MachineError(
            f"{folder}: not a run of goldsmith: its {RECIPE} is a recipe that no run has resolved",
            remedy="choose another output_dir, such as a folder inside it",
        )
    differing = {
        key: (ours, theirs)
        for key, (ours, theirs) in recipe.differences(stored).items()
        if not _is_changeable(key) and not _is_resolved_as(key, ours, theirs, recipe)
    }
    if differing:
        lines = "".join(f"\n  {key}: {ours!r} here, {theirs!r} there" for key, (ours, theirs) in differing.items())
        raise MachineError(
            f"{folder} belongs to another recipe:{lines}",
            remedy="choose another output_dir, or give the recipe that began it",
        )
    return stored


def compare_machine(recipe: Recipe, stored: Recipe, device: torch.device, say: Say) -> None:
    """Refuse another kind of machine, and say what makes the result equal to rounding only.

    Raises:
        MachineError: the run began on another device.
    """
    if str(device) != stored.model.device:
        raise MachineError(
            f"model.device: the run began on {stored.model.device}, but this is {device}",
            remedy="go on with it on such a machine, or begin anew in another output_dir",
        )
    for key in ("tokens_per_microbatch", "shared_context", "activation_checkpointing", "compile"):
        before, now = getattr(stored.training, key), getattr(recipe.training, key)
        if before != now:
            say(f"training.{key}: {before} before, {now} now; the result will be equal to rounding, not to the bit")


def _is_changeable(key: str) -> bool:
    """Whether a resumed run may have another value there, or within it (`trackers.0.project`)."""
    return any(key == changeable or key.startswith(f"{changeable}.") for changeable in CHANGEABLE_KEYS)


def _is_resolved_as(key: str, ours: Any, theirs: Any, recipe: Recipe) -> bool:
    """Whether a run may have made `theirs` out of `ours`."""
    if key == "training.max_steps" and recipe.training.max_seconds is not None and ours is not None:
        return bool(theirs < ours)  # time was short
    return (key in AUTOMATIC_KEYS or REVISION_KEY.fullmatch(key) is not None) and ours in (None, "auto")


def with_resolved(recipe: Recipe, stored: Recipe) -> Recipe:
    """This recipe, with the automatic choices that were made when the run began."""
    choices = {}
    for key in AUTOMATIC_KEYS:
        section, name = key.split(".")
        if key in CHANGEABLE_KEYS and getattr(getattr(recipe, section), name) not in (None, "auto"):
            continue  # decided by the user, perhaps otherwise than before
        choices[key] = getattr(getattr(stored, section), name)
    return with_values(recipe, choices)


def with_revisions(recipe: Recipe, stored: Recipe | None) -> Recipe:
    """The same recipe, each hub data set held to one commit: the one of the run, or for a new one the newest."""
    splits = {}
    for split in ("train", "eval"):
        before = getattr(stored.data, split) if stored is not None else []
        sources: list[SourceConfig] = []
        for index, source in enumerate(getattr(recipe.data, split)):
            if source.is_hub:
                revision = before[index].revision if before else hub_revision(source)
                source = source.model_copy(update={"revision": revision})
            sources.append(source)
        splits[split] = sources
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=splits)})


def today(device: torch.device) -> str:
    """The main process's day, on every rank: at midnight they might differ."""
    own = date.today().toordinal() if distributed.is_main() else 0
    day = distributed.sum_tensor(torch.tensor(own, device=device))
    return date.fromordinal(int(day)).isoformat()


def with_values(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    for key, value in values.items():
        section, name = key.split(".")
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={name: value})})
    return recipe
