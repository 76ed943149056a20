"""What a run tells a person on standard error about its data and its memory."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from goldsmith.data.dataset import Dataset
from goldsmith.data.spelt_controls import spelt_controls
from goldsmith.data.stream import ExampleStream
from goldsmith.recipe import Recipe
from goldsmith.records import DataReport
from goldsmith.storage import format_bytes
from goldsmith.training.trainer import Trainer
from goldsmith.workflows.materials import RowList

__all__ = [
    "RowCounter",
    "Say",
    "report_of",
    "say_formats",
    "say_losses",
    "say_memory",
    "say_spelt_controls",
    "say_stream",
    "say_unknown",
]

_SECONDS_BETWEEN_LINES = 5.0


class Say:
    """Lines on standard error for a person; nothing when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def __call__(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)


class RowCounter:
    """Counts rows while they are read, and says now and then how many they are; called for each."""

    def __init__(self, say: Say, what: str) -> None:
        """
        Args:
            what: the line's first word.
        """
        self._say, self._what = say, what
        self._rows = 0
        self._began = self._said = time.monotonic()

    def __call__(self) -> None:
        self._rows += 1
        now = time.monotonic()
        if now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            self._say(f"{self._what} {self._rows:,} rows, {self._rows / (now - self._began):,.0f} a second")


def say_formats(say: Say, data: Dataset | ExampleStream) -> None:
    """The format of each source, and how it is known."""
    said = set()
    for file in report_of(data).files:
        if file.format and (file.name, file.format) not in said:
            said.add((file.name, file.format))
            how = f"found in the first rows of {file.path}" if file.format_detected else "as the recipe says"
            say(f"  {file.name}: format {file.format}, {how}")


def say_spelt_controls(
    say: Say, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train_rows: RowList | None
) -> None:
    """A warning where the first rows look as if they had been rendered beforehand."""
    for found in spelt_controls(
        recipe.data.train if train_rows is None else train_rows,
        config=recipe.data,
        tokenizer=tokenizer,
        allowed=recipe.rendering.allow_control_tokens,
        base_folder=Path.cwd(),
    ):
        say(f"warning: {found}")


def say_losses(say: Say, report: DataReport, name: str) -> None:
    for file in report.files:
        if file.too_long:
            say(
                f"{name}, {file.path}: {file.too_long:,} rows are longer than max_length: {file.dropped:,} left out, {file.cut:,} "
                f"cut, {file.split:,} split; lost are {file.tokens_lost:,} tokens, {file.gold_tokens_lost:,} of them gold"
            )


def say_unknown(say: Say, data: Dataset, name: str) -> None:
    if data.num_unknown_tokens:
        say(
            f"{name}: {data.num_unknown_tokens:,} tokens are the unknown token: characters that the tokenizer cannot write"
        )


def say_stream(say: Say, report: DataReport) -> None:
    """What became of the rows of a stream; a row of two passes counts twice."""
    for file in report.files:
        rejected = "".join(f", {count:,} rejected ({reason})" for reason, count in file.rejected.items())
        say(f"  {file.name}: {file.used:,} of {file.rows_in:,} rows that were read{rejected}")


def say_memory(trainer: Trainer, say: Say) -> None:
    how = f"activation checkpointing: {trainer.memory.activation_checkpointing}"
    if trainer.config.activation_checkpointing == "auto" and trainer.memory.activation_checkpointing == "layers":
        how += f", because without it a step may take {format_bytes(trainer.memory.budget('none').total)}"
    say(f"memory of a step, at most {trainer.memory.budget()}; {how}")


def report_of(data: Dataset | ExampleStream) -> DataReport:
    return data.report() if isinstance(data, ExampleStream) else data.report
