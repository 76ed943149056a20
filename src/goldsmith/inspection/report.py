"""What an inspection found, as text for a terminal and as one JSON object."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.text import Text

from goldsmith.errors import DataError
from goldsmith.inspection.findings import Finding, Place
from goldsmith.inspection.lengths import bars_text
from goldsmith.inspection.plan import Measured, Plan
from goldsmith.inspection.shown import ShownExample
from goldsmith.inspection.survey import SplitSurvey
from goldsmith.inspection.visible import near, visible
from goldsmith.records import DataReport
from goldsmith.storage import format_bytes

__all__ = ["InspectReport", "duration"]

# Rows of a finding that are named in text; JSON has more.
_SHOWN_PLACES = 20
_SHOWN_TOKENS = 400
# Characters of a file's name in a table; of a longer one the end is shown.
_NAME_LENGTH = 48
_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True, kw_only=True)
class InspectReport:
    """All of it.

    Attributes:
        output_dir: where the recipe's run will lie.
        splits: train, and eval where the recipe has one.
        plan: None where no row can be used.
        measured: None where it was not asked for, or `not_measured` says why not.
        examples: to be shown token by token.
        strict: whether a finding at error level makes the command fail.
    """

    output_dir: str
    splits: tuple[SplitSurvey, ...]
    plan: Plan | None
    measured: Measured | None
    not_measured: str | None
    examples: tuple[ShownExample, ...]
    strict: bool = False

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of all splits, the gravest first."""
        order = {"error": 0, "warning": 1, "info": 2}
        return tuple(sorted((f for split in self.splits for f in split.findings), key=lambda f: order[f.level]))

    @property
    def num_errors(self) -> int:
        """Findings at error level."""
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """Of the command: that of bad data where it is strict and there is an error."""
        return DataError.exit_code if self.strict and self.num_errors else 0

    def to_json(self) -> dict[str, Any]:
        """One machine-readable object."""
        return {
            "output_dir": self.output_dir,
            "splits": {split.split: _split_json(split) for split in self.splits},
            "findings": [asdict(finding) for finding in self.findings],
            "num_errors": self.num_errors,
            "plan": None if self.plan is None else {**asdict(self.plan), "tokens_per_step": self.plan.tokens_per_step},
            "measured": None if self.measured is None else asdict(self.measured),
            "not_measured": self.not_measured,
            "examples": [asdict(example) for example in self.examples],
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for split in self.splits:
            yield from _split_text(split)
        yield from _findings_text(self.findings)
        yield from _plan_text(self.plan, self.measured, self.not_measured)
        for example in self.examples:
            yield from _example_text(example)

    def __str__(self) -> str:
        console = Console(no_color=True, width=120, file=None, record=False)
        with console.capture() as captured:
            console.print(self, soft_wrap=True)
        return captured.get()


def duration(seconds: float) -> str:
    """As a person says it.

    >>> duration(0.5), duration(75), duration(7300)
    ('0.50 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return (
        f"{int(seconds // 60)} min {int(seconds % 60)} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    )


def rows_line(report: DataReport) -> str:
    """What became of the rows of a split."""
    parts = [f"{report.rows_in:,} rows in", f"{report.used:,} used"]
    rejected = sum(report.rejected.values())
    dropped = sum(file.dropped for file in report.files)
    over = sum(file.over_limit for file in report.files)
    parts += [f"{n:,} {what}" for n, what in ((rejected, "rejected"), (dropped, "dropped"), (over, "over limit")) if n]
    return ", ".join(parts)


def losses_line(report: DataReport) -> str | None:
    """What `max_length` cost a split; None for nothing."""
    files = [file for file in report.files if file.too_long]
    if not files:
        return None
    totals = {
        name: sum(getattr(file, name) for file in files)
        for name in ("too_long", "cut", "split", "dropped", "tokens_lost", "gold_tokens_lost")
    }
    return (
        f"longer than max_length: {totals['too_long']:,} rows ({totals['cut']:,} cut, {totals['split']:,} split, "
        f"{totals['dropped']:,} dropped); lost {totals['tokens_lost']:,} tokens, {totals['gold_tokens_lost']:,} of them gold"
    )


def _split_json(split: SplitSurvey) -> dict[str, Any]:
    return {
        "rows_in": split.report.rows_in,
        "rows_used": split.report.used,
        "rejected": split.report.rejected,
        "files": [file.to_json() for file in split.report.files],
        "lengths": {name: asdict(lengths) for name, lengths in split.lengths.items()},
        "roles": {name: asdict(share) for name, share in split.roles.items()},
        "bytes_a_row": split.bytes_a_row,
    }


def _split_text(split: SplitSurvey) -> Iterator[Text]:
    report = split.report
    yield Text(f"{split.split}: {rows_line(report)}", style="bold")
    for reason, count in sorted(report.rejected.items(), key=lambda item: -item[1]):
        yield Text(f"  rejected, {visible(reason)}: {count:,}")
    if losses := losses_line(report):
        yield Text(f"  {losses}")
    names = [_end_of(visible(near(file.path))) for file in report.files]
    width = max([6, *(cell_len(name) for name in names), *(cell_len(visible(role)) for role in split.roles)])
    yield Text(f"  {'file':<{width}} {'rows':>11} {'examples':>11} {'tokens':>13} {'gold':>13} {'gold share':>11}")
    for name, file in zip(names, report.files, strict=True):
        share = f"{file.gold_tokens / file.tokens:.1%}" if file.tokens else "-"
        yield Text(
            f"  {set_cell_size(name, width)} {file.used:>11,} {file.examples:>11,} {file.tokens:>13,} "
            f"{file.gold_tokens:>13,} {share:>11}"
        )
    if split.roles:
        yield Text(f"  {'role':<{width}} {'messages':>11} {'characters':>11} {'gold':>13}")
        for role, said in split.roles.items():
            yield Text(
                f"  {set_cell_size(visible(role), width)} {said.messages:>11,} {said.characters:>11,} {said.gold_characters:>13,}"
            )
    if split.lengths:
        first = next(iter(split.lengths.values()))
        percents = "".join(f"{f'{percent}%':>9}" for percent in first.percentiles)
        yield Text(f"\n  {'tokens of an example':<22}{'mean':>9}{'min':>9}{percents}{'max':>9}")
        for name, lengths in split.lengths.items():
            values = "".join(f"{value:>9,}" for value in lengths.percentiles.values())
            yield Text(f"  {name:<22}{lengths.mean:>9,.1f}{lengths.minimum:>9,}{values}{lengths.maximum:>9,}")
        for name in ("total", "gold"):
            yield Text(f"\n  examples by {name} tokens")
            for line in bars_text(split.lengths[name].bars):
                yield Text(f"  {line}")
    yield Text("")


def _findings_text(findings: tuple[Finding, ...]) -> Iterator[Text]:
    if not findings:
        yield Text("findings: none\n", style="bold")
        return
    yield Text("findings", style="bold")
    for finding in findings:
        rows = "row" if finding.count == 1 else "rows"
        yield Text.assemble(
            "  ",
            (f"{finding.level:<8}", _STYLES[finding.level]),
            (finding.kind, "bold"),
            f" ({finding.split}): {finding.count:,} {rows}: {finding.meaning}",
        )
        shown = finding.places[:_SHOWN_PLACES]
        if any(place.detail for place in shown):
            for place in shown:
                detail = f": {visible(near(place.detail))}" if place.detail else ""
                yield Text(f"            {visible(near(place.source))}{detail}")
        else:
            yield from (Text(f"            {line}") for line in _places(shown))
        if finding.count > len(shown):
            yield Text(f"            ... and {finding.count - len(shown):,} more")
        yield Text(f"            Remedy: {finding.remedy}", style="dim")
    yield Text("")


def _places(places: Sequence[Place]) -> Iterator[str]:
    """One line a file, with its rows: `train.jsonl:3, 14, 15`."""
    for file, rows in itertools.groupby((place.source.rpartition(":") for place in places), key=lambda parts: parts[0]):
        numbers = ", ".join(number for _, _, number in rows)
        yield visible(near(f"{file}:{numbers}" if file else numbers))


def _end_of(name: str) -> str:
    """As much of the end of a long name as a table has room for."""
    if cell_len(name) <= _NAME_LENGTH:
        return name
    while cell_len(name) >= _NAME_LENGTH:
        name = name[1:]
    return f"…{name}"


def _plan_text(plan: Plan | None, measured: Measured | None, not_measured: str | None) -> Iterator[Text]:
    if plan is None:
        yield Text("no row can be trained on", style="bold red")
        return
    yield Text("the run", style="bold")
    yield Text(
        f"  {plan.steps:,} steps of {plan.batch_size:,} examples = {plan.epochs:,.2f} epochs of {plan.steps_per_epoch:,} steps"
    )
    yield Text(
        f"  an epoch: {plan.examples:,.0f} examples, {plan.tokens:,.0f} tokens, {plan.gold_tokens:,.0f} of them gold"
    )
    yield Text(
        f"  a step: {plan.tokens_per_step:,.0f} tokens in {plan.microbatches_per_step:.2f} micro-batches, filled to "
        f"{plan.fill:.1%} of {plan.tokens_per_microbatch:,} tokens; "
        f"padded to its longest row it would be {plan.padding:.1%} padding"
    )
    if measured is not None:
        yield Text(
            f"  measured on {measured.device} ({measured.parameters:,} parameters): {measured.tokens_per_second:,.0f} tokens a "
            f"second; a step {duration(measured.seconds_per_step)}, the run {duration(measured.seconds_total)}, peak memory "
            f"{format_bytes(measured.peak_memory_bytes)}"
        )
    elif not_measured is not None:
        yield Text(f"  time and memory were not measured: {not_measured}")
    yield Text("")


def _example_text(example: ShownExample) -> Iterator[Text]:
    gold = sum(token.weight > 0 for token in example.tokens)
    yield Text(
        f"{visible(example.example_id)} ({visible(near(example.source))}): {len(example.tokens):,} tokens, {gold:,} gold, weight "
        f"{example.example_weight:g}",
        style="bold",
    )
    line = Text()
    for run in example.runs(max_tokens=_SHOWN_TOKENS):
        is_gold = run.weight > 0
        if is_gold:
            line.append("⟦" if run.weight == 1 else f"⟦{run.weight:g}: ", style="bold green")
        for index, token in enumerate(run.tokens):
            if index:
                line.append("|", style="dim")
            line.append(token.shown, style="green" if is_gold else "")
        if run.skipped:
            line.append(f" ... {run.skipped:,} tokens ... ", style="dim italic")
        line.append("⟧" if is_gold else "|", style="bold green" if is_gold else "dim")
    yield line
    yield Text("")
