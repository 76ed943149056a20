"""Score gold under a model: from a model's name and a file of rows to a score file and its figures."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import goldsmith
from goldsmith.data.config import Columns
from goldsmith.data.spool import ExampleSpool
from goldsmith.data.tokenizer import beginning_ids
from goldsmith.data.truncation import LengthPolicy, Losses
from goldsmith.errors import ConfigError
from goldsmith.models.precision import DtypeName
from goldsmith.models.step import autocast
from goldsmith.scoring.score import Asked, score_windows
from goldsmith.scoring.summary import ScoreSummary
from goldsmith.scoring.tally import ScoreTally, parts_of
from goldsmith.scoring.texts import TokenTexts
from goldsmith.scoring.writing import ScoreWriter
from goldsmith.storage import require_no_input, require_ordinary_file
from goldsmith.workflows.materials import Rows
from goldsmith.workflows.models import LENGTH_OPTIONS, OpenModel, files_of_model, open_model, require_sizes
from goldsmith.workflows.saying import RowCounter, Say

__all__ = ["default_budget", "score", "score_opened"]

# Seconds between two lines of progress where standard error is no terminal.
_SAY_EVERY = 30.0


def score(
    model: str,
    data: str | Path | Rows,
    *,
    columns: Columns | None = None,
    with_tokens: bool = False,
    alternatives: int = 0,
    without_context: bool = False,
    output: str | Path | None = None,
    limit: int | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    max_length: int | None = None,
    on_too_long: LengthPolicy | None = None,
    rendering: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
    revision: str | None = None,
    tokens_per_microbatch: int | None = None,
    quiet: bool = True,
) -> ScoreSummary:
    """log P(y | x) of every row under a model: written out row by row, and summed up.

    Args:
        model: a model folder, a run folder, a checkpoint of a run, or a hub id.
        data: a file of gold, a glob, or rows in memory.
        columns: field -> column where the file names them otherwise.
        with_tokens: write every gold token with its log-probability, rank, the best token's and the entropy.
        alternatives: also the likeliest tokens at each place, so many.
        without_context: also log P of the gold after the beginning token alone; from both the difficulty.
        output: the score file, JSON Lines or (by its suffix) Parquet; none is written by default. An interrupted run leaves
            `OUTPUT.partial`, and the same call goes on from there.
        limit: score the first rows only.
        max_length, on_too_long: what is too long, and what becomes of it: `reject`, `drop`, `left`, `right` or `split`, as in
            training. By default what the run did, where the model is one of a run that does not reject; else rows that the model
            cannot take are rejected.
        rendering: a run whose separator, template and columns are taken in place of the model's own; see `open_model`.
        tokens_per_microbatch: tokens that go through the model at a time; changes a number by rounding only.
        quiet: no progress on standard error; else it tells how many rows were read, and then scored.

    Raises:
        GoldsmithError: bad data (exit code 3), a refused model (4), a full disk (7).
    """
    require_sizes(tokens_per_microbatch, max_length)
    if alternatives < 0:
        raise ConfigError(f"alternatives: {alternatives} is negative", remedy="give how many tokens to list, such as 5")
    data = str(data) if isinstance(data, Path) else data
    if output is not None and (not Path(output).name or os.path.isdir(output)):
        raise ConfigError(f"output: {str(output)!r} is a folder", remedy="give the name of a file")
    if output is not None:
        require_ordinary_file(output)
        require_no_input(output, files_of_model(model), writes="the scores")
    opened = open_model(
        model,
        device=device,
        dtype=dtype,
        revision=revision,
        max_length=max_length,
        on_too_long=on_too_long,
        rendering=rendering,
        length_options=LENGTH_OPTIONS,
    )
    beside = None if output is None or not Path(output).absolute().parent.is_dir() else Path(output).absolute().parent
    read = RowCounter(Say(quiet=quiet), "read")
    with opened.spool(data, columns=columns, on_bad_row=on_bad_row, limit=limit, folder=beside, note_row=read) as spool:
        if output is not None and isinstance(data, str):
            require_no_input(output, [("the gold", file.path) for file in spool.report.files], writes="the scores")
        return score_opened(
            opened,
            spool,
            with_tokens=with_tokens,
            alternatives=alternatives,
            without_context=without_context,
            output=output,
            tokens_per_microbatch=tokens_per_microbatch,
            quiet=quiet,
        )


def score_opened(
    opened: OpenModel,
    spool: ExampleSpool,
    *,
    with_tokens: bool = False,
    alternatives: int = 0,
    without_context: bool = False,
    output: str | Path | None = None,
    tokens_per_microbatch: int | None = None,
    quiet: bool = True,
) -> ScoreSummary:
    """The same for a model that is open and rows that are read and lie on the disk; arguments as in `score`."""
    asked = Asked(
        tokens=with_tokens or alternatives > 0,
        alternatives=alternatives,
        without_context=without_context,
        beginning=_beginning(opened) if without_context else (),
    )
    budget = tokens_per_microbatch or default_budget(opened.model.device)
    say = Say(quiet=quiet)
    tally = ScoreTally(spool.num_rows)
    with ExitStack() as stack:
        writer = None
        if output is not None:
            run = {
                "model": _digest(opened.model),
                "data": spool.fingerprint(),
                "tokens": asked.tokens,
                "alternatives": asked.alternatives,
                "without_context": list(asked.beginning),
                "precision": str(opened.model.autocast_dtype or opened.model.causal_lm.dtype).removeprefix("torch."),
            }
            how = {
                "tokens_per_microbatch": budget,
                "device": str(opened.model.device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "goldsmith": goldsmith.__version__,
            }
            writer = stack.enter_context(ScoreWriter(output, run, how=how))
            # The rows are those of the former run: the fingerprint says so.
            for (scores, parts), (row, _) in zip(writer.done(), spool.numbered(), strict=False):
                tally.add(scores, parts, row=row)
            if writer.num_done:
                say(f"going on after {writer.num_done:,} of {len(spool):,} examples, from {writer.partial}")
            if writer.changed:
                say(f"{', '.join(writer.changed)} changed since: the rest will be equal to rounding, not to the bit")
        stack.enter_context(autocast(opened.model))
        show = stack.enter_context(_Progress(len(spool), quiet=quiet))
        done = 0 if writer is None else writer.num_done
        for window in score_windows(
            opened.model,
            TokenTexts(opened.tokenizer),
            spool,
            asked,
            tokens_per_microbatch=budget,
            shares_contexts=opened.shares_contexts,
            first=done,
        ):
            parts_of_window = [parts_of(one.scores, one.gold) for one in window]
            if writer is not None:
                writer.write_window([(one.scores, parts) for one, parts in zip(window, parts_of_window, strict=True)])
            for one, parts in zip(window, parts_of_window, strict=True):
                tally.add(one.scores, parts, row=one.row)
            done += len(window)
            show(done)
        if writer is not None:
            writer.finish()
    report = spool.report
    summary = replace(
        tally.summary(),
        losses=Losses.of_files(report.files),
        rejected=report.rejected,
        first_rejected=report.first_rejected,
    )
    return summary if output is None else replace(summary, output=str(output))


def default_budget(device: torch.device) -> int:
    """Tokens that go through the model at a time: on a CPU few, so that they stay in its caches."""
    return 2048 if device.type == "cpu" else 16384


def _beginning(opened: OpenModel) -> tuple[int, ...]:
    """What stands for an empty context: what the tokenizer begins a text with, else its beginning or end token."""
    tokenizer = opened.tokenizer
    found = beginning_ids(tokenizer)
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if not found and token is not None:
            found = [int(token)]
    if not found:
        raise ConfigError(
            f"{opened.name}: its tokenizer has neither a beginning nor an end token to stand for an empty context",
            remedy="score without --without-context, or set bos_token in the tokenizer's tokenizer_config.json",
        )
    return tuple(found)


def _digest(model: torch.nn.Module) -> str:
    """Of every weight and its name."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


class _Progress:
    """A bar on a terminal; elsewhere a line now and then; nothing where quiet."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total, self._say = total, Say(quiet=quiet)
        self._last = time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal and not quiet:
            columns = (TextColumn("scoring"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("scoring", total=total)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif time.monotonic() - self._last > _SAY_EVERY:
            self._last = time.monotonic()
            self._say(f"scored {done:,} of {self._total:,} examples")
