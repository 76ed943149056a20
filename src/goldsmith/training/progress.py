"""What a person sees while a run goes on: a bar on a terminal, a line an evaluation elsewhere. Never on standard output."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from goldsmith.records import EvaluationRecord, StepRecord

__all__ = ["NoProgress", "ProgressReporter", "TerminalProgress", "progress_reporter"]


class ProgressReporter(Protocol):
    """What the trainer tells of its progress."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def start(self, *, done: int, total: int) -> None:
        """The number of steps is known."""

    def step(self, record: StepRecord) -> None:
        """An update was made."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """The held-out gold was evaluated."""

    def note(self, line: str) -> None:
        """Something that is no part of the plan was done."""


class NoProgress:
    """Says nothing but evaluations, one line each, and these only if asked to."""

    def __init__(self, *, lines: bool = False) -> None:
        self.lines = lines

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...
    def start(self, *, done: int, total: int) -> None: ...
    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, record: EvaluationRecord) -> None:
        if self.lines:
            print(_evaluation_line(record), file=sys.stderr, flush=True)

    def note(self, line: str) -> None:
        if self.lines:
            print(line, file=sys.stderr, flush=True)


class TerminalProgress:
    """A bar with the nll of the last step, tokens a second and the time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("nll {task.fields[nll]}  {task.fields[rate]} tokens/s  left"),
            TimeRemainingColumn(),
            console=console,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, *, done: int, total: int) -> None:
        self._task = self._progress.add_task("training", total=total, completed=done, nll="-", rate="-")

    def step(self, record: StepRecord) -> None:
        self._progress.update(
            self._task, completed=record.step, nll=f"{record.nll:.4f}", rate=f"{record.tokens_per_second:,.0f}"
        )

    def evaluation(self, record: EvaluationRecord) -> None:
        self._progress.console.print(_evaluation_line(record), highlight=False)

    def note(self, line: str) -> None:
        self._progress.console.print(line, highlight=False)


def _evaluation_line(record: EvaluationRecord) -> str:
    best = "  (best so far)" if record.is_best and record.step > 0 else ""
    return (
        f"step {record.step}: held-out nll {record.nll:.4f} nats a token over {record.gold_tokens:,} gold tokens{best}"
    )


def progress_reporter(*, quiet: bool) -> ProgressReporter:
    """A bar where standard error is a terminal; otherwise a line for each evaluation, or nothing when `quiet`."""
    console = Console(stderr=True)
    if console.is_terminal and not quiet:
        return TerminalProgress(console)
    return NoProgress(lines=not quiet)
