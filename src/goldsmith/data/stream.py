"""Sources without an end: rows are drawn from a seeded window that moves over them, and the position is kept exactly.

A source is read in its own order, pass after pass, and its usable rows enter a window of `window` rows. Draw d (counted from 0 over
the run) takes two numbers of a stream that depends on the seed and d alone. The first chooses the source, with probability
proportional to `repeat`; the second the place in that source's window: the row there is used, and the next usable row takes its
place. A step holds `batch_size` examples; the parts of a row stay together, and what a step has no room for begins the next.

The position is: draws done, and for each source how far it was read and which rows its window holds. A run that goes on reads these
rows again, from the oldest on, and then draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from goldsmith.data.config import DataConfig, SourceConfig, source_name
from goldsmith.data.dataset import Dataset
from goldsmith.data.fitting import RowFitter
from goldsmith.data.loader import render_rows
from goldsmith.data.rejections import remedy_of
from goldsmith.data.rendering import Renderer
from goldsmith.data.rows import Rejection
from goldsmith.data.sources import SourceReader
from goldsmith.data.truncation import TOO_LONG, Fitted, Losses
from goldsmith.errors import CheckpointError, DataError
from goldsmith.records import DataReport, FileReport
from goldsmith.types import Conversation, TokenizedExample

__all__ = ["DEFAULT_WINDOW", "ExampleStream"]

DEFAULT_WINDOW: Final = 10_000
# Rows rendered at once, ahead of need; the position counts only those that entered the window.
_ROWS_AT_ONCE: Final = 256
# Draws whose random numbers are made together.
_DRAWS_AT_ONCE: Final = 1024
# Sets the numbers of a stream apart from those of an epoch's order.
_STREAM: Final = 0x5712EA

# (pass, ordinal): a row of a source, in the order of reading.
_Key = tuple[int, int]


class ExampleStream:
    """The steps of a run over streamed sources.

    Attributes:
        source_names: of the sources, in the recipe's order.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        config: DataConfig,
        renderer: Renderer,
        seed: int,
        batch_size: int,
        base_folder: Path = Path(),
        parts_share_weight: bool = False,
    ) -> None:
        """
        Args:
            sources: all of them streamed.
            config: its `columns`, `format`, `on_bad_row` and `on_too_long`.
            renderer: also says the longest length.
            seed: of the run.
            batch_size: examples a step.
            base_folder: what the paths of sources are relative to.
            parts_share_weight: see `LengthLimit`.
        """
        self.source_names = [source_name(source) for source in sources]
        self._renderer = renderer
        self._seed = seed
        self._batch_size = batch_size
        fitter = RowFitter(renderer, config, parts_share_weight=parts_share_weight)
        self._windows = [
            _Window(source, config=config, renderer=renderer, fitter=fitter, base_folder=base_folder)
            for source in sources
        ]
        repeats = np.array([source.repeat for source in sources])
        self._shares = np.cumsum(repeats / repeats.sum())
        self._block: tuple[int, npt.NDArray[np.uint64]] = (-1, np.zeros(0, dtype=np.uint64))
        self._first: Dataset | None = None
        self._steps = self._draws = 0
        # Parts of the row drawn last that no step has held yet: (source, row, part, example).
        self._rest: list[tuple[int, _Key, int, TokenizedExample]] = []

    @property
    def longest(self) -> int:
        """Tokens that an example has at most."""
        limit = self._renderer.max_length
        return sys.maxsize if limit is None else limit

    def step(self, step: int) -> Dataset:
        """The examples of update `step`, which counts from 1; steps are asked for one after another.

        Raises:
            DataError: a row is rejected and `on_bad_row` is `stop`; a whole pass over a source has no row that can be used.
        """
        if step != self._steps + 1:
            raise ValueError(f"step {step} was asked for, but the stream stands after step {self._steps}")
        examples, self._rest = self._rest, []
        while len(examples) < self._batch_size:
            source, key, row = self._draw()
            examples.extend((source, key, part, example) for part, example in enumerate(row))
        self._rest = examples[self._batch_size :]
        examples = examples[: self._batch_size]
        self._steps = step
        return Dataset(
            [example for _, _, _, example in examples],
            source_names=[self.source_names[source] for source, _, _, _ in examples],
            known_sources=self.source_names,
        )

    def first(self) -> Dataset:
        """The examples of the first step; found at the first call, which leaves the position at the beginning."""
        if self._first is None:
            self.seek(None)
            self._first = self.step(1)
            self.seek(None)
        return self._first

    def fingerprint(self) -> str:
        """SHA-256, in hex, over the first step and what the sources are."""
        parts = [window.identity() for window in self._windows]
        return hashlib.sha256("\n".join([self.first().fingerprint(), *parts]).encode()).hexdigest()

    def report(self) -> DataReport:
        """What became of the rows that entered so far, one entry a source; a row of two passes counts twice."""
        return DataReport(files=[window.report() for window in self._windows])

    def state(self) -> dict[str, Any]:
        """The position, for `seek`; JSON can hold it."""
        rest = [[source, *key, part] for source, key, part, _ in self._rest]
        return {
            "steps": self._steps,
            "draws": self._draws,
            "rest": rest,
            "sources": [window.state() for window in self._windows],
        }

    def seek(self, state: Mapping[str, Any] | None) -> None:
        """Go to a position that `state` gave; None is the beginning.

        Raises:
            CheckpointError: the sources no longer hold the rows of the window.
        """
        if state is None:
            self._steps = self._draws = 0
            self._rest = []
            for window in self._windows:
                window.rewind()
            return
        self._steps, self._draws = state["steps"], state["draws"]
        kept: list[dict[_Key, list[TokenizedExample]]] = []
        for index, (window, saved) in enumerate(zip(self._windows, state["sources"], strict=True)):
            wanted = {(pass_number, ordinal) for source, pass_number, ordinal, _ in state["rest"] if source == index}
            kept.append(window.restore(saved, wanted))
        self._rest = [
            (source, (pass_number, ordinal), part, kept[source][pass_number, ordinal][part])
            for source, pass_number, ordinal, part in state["rest"]
        ]

    def _draw(self) -> tuple[int, _Key, list[TokenizedExample]]:
        block, place = divmod(self._draws, _DRAWS_AT_ONCE)
        if self._block[0] != block:
            bits = np.random.Philox(np.random.SeedSequence([self._seed, _STREAM, block]))
            self._block = (block, np.asarray(bits.random_raw(2 * _DRAWS_AT_ONCE), dtype=np.uint64))
        which, where = (int(number) for number in self._block[1][2 * place : 2 * place + 2])
        self._draws += 1
        share = (which >> 11) * 2.0**-53
        source = min(int(np.searchsorted(self._shares, share, side="right")), len(self._windows) - 1)
        return (source, *self._windows[source].take(where))


class _Window:
    """The window over one source, and how far it was read."""

    def __init__(
        self, source: SourceConfig, *, config: DataConfig, renderer: Renderer, fitter: RowFitter, base_folder: Path
    ) -> None:
        self._source = source
        self._config = config
        self._renderer = renderer
        self._fitter = fitter
        self._base_folder = base_folder
        self._size = source.window or DEFAULT_WINDOW
        self._reader = self._new_reader(source)
        self._is_detected = self._reader.is_detected
        self.rewind()

    def rewind(self) -> None:
        """Go to the beginning."""
        self._rows: list[tuple[_Key, list[TokenizedExample]]] = []
        self._next: _Key = (0, 0)  # what is read next: every row before it was counted
        self._rows_in = self._used = self._used_in_pass = self._examples = self._tokens = self._gold_tokens = 0
        self._rejected: dict[str, int] = {}
        self._losses = Losses()
        self._arrivals = self._read(self._next)

    def take(self, number: int) -> tuple[_Key, list[TokenizedExample]]:
        """The row at the place that a number below 2^64 means; the next usable row takes its place."""
        while len(self._rows) < self._size:
            self._rows.append(self._enter())
        place = (number * self._size) >> 64
        taken, self._rows[place] = self._rows[place], self._enter()
        return taken

    def state(self) -> dict[str, Any]:
        """The position, for `restore`. The rows of the window are one text, `pass:ordinal` each."""
        return {
            "next": list(self._next),
            "window": " ".join(f"{pass_number}:{ordinal}" for (pass_number, ordinal), _ in self._rows),
            "format": self._reader.format,
            "rows_in": self._rows_in,
            "used": self._used,
            "used_in_pass": self._used_in_pass,
            "examples": self._examples,
            "tokens": self._tokens,
            "gold_tokens": self._gold_tokens,
            "rejected": dict(self._rejected),
            "losses": asdict(self._losses),
        }

    def restore(self, state: Mapping[str, Any], also: Collection[_Key]) -> dict[_Key, list[TokenizedExample]]:
        """Go to a position, and read its rows again.

        Args:
            state: of `state`.
            also: rows that are wanted besides those of the window.

        Returns:
            The examples of every row that was read.
        """
        if state["format"] is not None:
            self._reader = self._new_reader(self._source.model_copy(update={"format": state["format"]}))
        self.rewind()
        keys: list[_Key] = [_key(text) for text in state["window"].split()]
        end: _Key = (state["next"][0], state["next"][1])
        wanted = {*keys, *also}
        self._arrivals = self._read(min([*wanted, end]), end=end, wanted=wanted)
        found: dict[_Key, list[TokenizedExample]] = {}
        while len(found) < len(wanted):
            key, result = next(self._arrivals)
            if key >= end:
                missing = min(wanted - found.keys())
                raise CheckpointError(
                    f"{self._source.path} no longer holds what the checkpoint stands at: row {missing[1] + 1} cannot be used",
                    remedy="restore the data that the run began with",
                )
            if result is not None and isinstance(result.examples, list):
                found[key] = result.examples
        self._rows = [(key, found[key]) for key in keys]
        self._next = end
        self._rows_in, self._used, self._used_in_pass = state["rows_in"], state["used"], state["used_in_pass"]
        self._examples, self._tokens, self._gold_tokens = state["examples"], state["tokens"], state["gold_tokens"]
        self._rejected = dict(state["rejected"])
        self._losses = Losses(**state["losses"])
        return found

    def report(self) -> FileReport:
        """What became of the rows so far."""
        return FileReport(
            path=self._source.path,
            name=source_name(self._source),
            sha256=None,
            rows_in=self._rows_in,
            used=self._used,
            rejected=dict(self._rejected),
            over_limit=0,
            examples=self._examples,
            tokens=self._tokens,
            gold_tokens=self._gold_tokens,
            straddles=0,
            format=self._reader.format or "",
            format_detected=self._is_detected,
            revision=self._source.revision,
            **self._losses.of_report(),
        )

    def identity(self) -> str:
        """What tells that the source is another one, without reading it: its files and their sizes, or its revision."""
        parts = self._reader.parts(self._base_folder)
        return " ".join(f"{part.path}:{part.file.stat().st_size if part.file else part.revision}" for part in parts)

    def _new_reader(self, source: SourceConfig) -> SourceReader:
        return SourceReader(source, config=self._config, vocab_size=len(self._renderer.tokenizer))

    def _enter(self) -> tuple[_Key, list[TokenizedExample]]:
        """The next usable row; those that are rejected before it are counted."""
        for key, fitted in self._arrivals:
            if key < self._next:  # the end of a pass that is behind us
                continue
            if fitted is None:
                if self._used_in_pass == 0:
                    reasons = dict(self._rejected)
                    if self._losses.rows_dropped:
                        reasons[TOO_LONG] = reasons.get(TOO_LONG, 0) + self._losses.rows_dropped
                    shown = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
                    raise DataError(
                        f"{self._source.path}: no row of the stream can be used: {shown}",
                        remedy=remedy_of(reasons, self._renderer.length_options),
                    )
                self._used_in_pass = 0
                self._next = (key[0] + 1, 0)
                continue
            self._next = (key[0], key[1] + 1)
            self._rows_in += 1
            result = fitted.examples
            self._losses += fitted.losses
            if isinstance(result, Rejection):
                if self._config.on_bad_row == "stop":
                    raise DataError(
                        f"a row of data.train cannot be used: {result.reason}\n  {result.source}: {result.detail}",
                        remedy="mend this row, or leave such rows out with `data.on_bad_row: skip`",
                    )
                self._rejected[result.reason] = self._rejected.get(result.reason, 0) + 1
                continue
            if not result:  # dropped for its length
                continue
            self._used += 1
            self._used_in_pass += 1
            self._examples += len(result)
            self._tokens += sum(example.num_tokens for example in result)
            self._gold_tokens += sum(example.num_target_tokens for example in result)
            return key, result
        raise AssertionError("a stream has no end")

    def _read(
        self, start: _Key, *, end: _Key = (0, 0), wanted: Collection[_Key] = ()
    ) -> Iterator[tuple[_Key, Fitted | None]]:
        """What becomes of each row from `start` on, pass after pass; behind the last row of a pass (pass, rows), None.

        Before `end` only the rows `wanted` are rendered; the others are passed over.
        """
        pass_number = start[0]
        while True:
            ordinal = 0
            pending: list[tuple[_Key, Conversation | TokenizedExample | Rejection]] = []
            for part in self._reader.parts(self._base_folder):
                for row in self._reader.read(part, ordinal):
                    key = (pass_number, ordinal)
                    ordinal += 1
                    if key < start or (key < end and key not in wanted):
                        continue
                    pending.append((key, row if isinstance(row, Rejection) else self._reader.convert(row)))
                    if len(pending) == _ROWS_AT_ONCE:
                        yield from self._rendered(pending)
                        pending = []
            yield from self._rendered(pending)
            yield (pass_number, ordinal), None
            pass_number += 1

    def _rendered(
        self, items: Sequence[tuple[_Key, Conversation | TokenizedExample | Rejection]]
    ) -> Iterator[tuple[_Key, Fitted]]:
        results = iter(render_rows(self._renderer, [item for _, item in items if not isinstance(item, Rejection)]))
        for key, item in items:
            if isinstance(item, Rejection):
                yield key, Fitted(examples=item, losses=Losses())
            else:
                yield key, self._fitter.fit(item, next(results))


def _key(text: str) -> _Key:
    pass_number, _, ordinal = text.partition(":")
    return int(pass_number), int(ordinal)
