"""Rows in: every one read, checked and rendered, kept in memory or on the disk, or only watched; and the report that adds up."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from goldsmith.data.config import DataConfig, SourceConfig, source_name
from goldsmith.data.dataset import Dataset, DatasetBuilder, gold_runs
from goldsmith.data.example_ids import ExampleIds, HashedIds
from goldsmith.data.fitting import RowFitter
from goldsmith.data.mixture import copies_in_epoch
from goldsmith.data.rejections import remedy_of
from goldsmith.data.rendering import Renderer
from goldsmith.data.rows import Rejection, Row, shorten
from goldsmith.data.sources import SourcePart, SourceReader, memory_part
from goldsmith.data.spool import ExampleSpool
from goldsmith.data.truncation import TOO_LONG, LengthOptions, Losses, rejected_whole
from goldsmith.errors import ConfigError, DataError
from goldsmith.records import DataReport, FileReport
from goldsmith.types import Conversation, Message, TokenizedExample

__all__ = ["RowWatcher", "load_dataset", "read_texts", "render_rows", "require_iterable", "spool_dataset", "watch_rows"]

# What a row is before it is rendered; a source of token ids needs no rendering.
_Readable = Conversation | TokenizedExample

# Rows rendered at once: enough to keep a tokenizer's threads busy, small enough to be no matter of memory.
_ROWS_AT_ONCE = 1024
# Rejections of each reason that are kept with their place.
_SHOWN_REJECTIONS = 3


class RowWatcher(Protocol):
    """Sees every row of a data set go by, and keeps of it what it likes; see `watch_rows`."""

    def used(
        self,
        row: Conversation | TokenizedExample,
        examples: list[TokenizedExample],
        *,
        repeat: float,
        losses: Losses,
        straddles: bool,
        spells_control: bool = False,
        mismatches: bool = False,
    ) -> None:
        """A row that is trained on.

        Args:
            losses: what `max_length` cost it.
            straddles, spells_control, mismatches: whether it is in `straddling`, `control_texts`, `mismatching` of the `Renderer`.
        """

    def dropped(self, row: Conversation | TokenizedExample) -> None:
        """A row that `on_too_long: drop` leaves out."""

    def rejected(self, rejection: Rejection) -> None:
        """A row that cannot be used."""


def load_dataset(
    sources: Sequence[SourceConfig] | Iterable[Mapping[str, Any]],
    *,
    config: DataConfig,
    renderer: Renderer,
    split: Literal["train", "eval", "rows"],
    base_folder: Path = Path(),
    parts_share_weight: bool = False,
) -> Dataset:
    """Read, check, render and keep all rows of a split. Every row is used, rejected, or over its source's limit.

    Args:
        sources: files (`config.train`, say), or rows in memory: mappings, or a `datasets.Dataset`.
        config: its `columns` and `on_bad_row`.
        renderer: also says the longest length.
        split: for messages (`rows`: not of a recipe); names the source of rows in memory.
        base_folder: what the paths of sources are relative to; default: the current directory.
        parts_share_weight: see `LengthLimit`; True where the objective normalises by example.

    Raises:
        DataError: a file is missing, empty or damaged; a row is rejected and `on_bad_row` is `stop` (everything is read
            first, and the message sums up by reason); no row can be used.
        ConfigError: two sources of one name, or what `Renderer.render` raises.
    """
    loading = _Loading(config, renderer, parts_share_weight=parts_share_weight)
    loading.read(sources, base_folder, split)
    return loading.finish(split)


def spool_dataset(
    sources: Sequence[SourceConfig] | Iterable[Mapping[str, Any]],
    *,
    config: DataConfig,
    renderer: Renderer,
    split: Literal["train", "eval", "rows"],
    base_folder: Path = Path(),
    parts_share_weight: bool = False,
    folder: Path | None = None,
    note_row: Callable[[], None] | None = None,
) -> ExampleSpool:
    """As `load_dataset`, but what is kept lies on the disk. Memory grows with the rows by eight bytes of each one's id.

    Rows are read once, so a generator serves too. `repeat` of a source is not kept.

    Args:
        folder: see `ExampleSpool`; to be closed by who called.
        note_row: called for each row that was read, whatever became of it.

    Raises:
        DataError, ConfigError: as `load_dataset`.
        MachineError: the disk is full.
    """
    spool = ExampleSpool(folder)
    try:
        ids = HashedIds(find=spool.place)
        watcher = _Spooling(spool, note_row)
        loading = _Loading(config, renderer, parts_share_weight=parts_share_weight, watcher=watcher, ids=ids)
        loading.read(sources, base_folder, split)
        spool.report = loading.accepted(split)
    except BaseException:
        spool.close()
        raise
    return spool


class _Spooling:
    """Writes the rows that it sees to a spool."""

    def __init__(self, spool: ExampleSpool, note_row: Callable[[], None] | None) -> None:
        self._spool = spool
        self._note_row = note_row or (lambda: None)

    def used(self, row: Conversation | TokenizedExample, examples: list[TokenizedExample], **_: object) -> None:
        self._spool.add(row.example_id, row.source, examples)
        self._note_row()

    def dropped(self, row: Conversation | TokenizedExample) -> None:
        self._spool.add(row.example_id, row.source, [])
        self._note_row()

    def rejected(self, rejection: Rejection) -> None:
        self._note_row()


@contextlib.contextmanager
def _collecting_little() -> Iterator[None]:
    """Let the garbage collector look at new objects only; else it goes through all of torch again: a fifth of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _require_end(source: SourceConfig) -> None:
    if source.streaming and source.limit is None:
        raise ConfigError(
            f"the source {source.path} is streamed, so it cannot be held as a whole, which is asked for here",
            remedy="set `limit` of the source: its first rows",
        )


def watch_rows(
    sources: Sequence[SourceConfig] | Iterable[Mapping[str, Any]],
    *,
    config: DataConfig,
    renderer: Renderer,
    split: Literal["train", "eval", "rows"],
    watcher: RowWatcher,
    base_folder: Path = Path(),
    parts_share_weight: bool = False,
) -> DataReport:
    """Read, check and render all rows of a split as `load_dataset` does, but show them to `watcher` and keep none.

    Bad rows stop nothing, whatever `on_bad_row` says. Memory does not grow with the rows, but for eight bytes of each one's id.

    Raises:
        DataError, ConfigError: as `load_dataset`, but for rows that are rejected.
    """
    loading = _Loading(config, renderer, parts_share_weight=parts_share_weight, watcher=watcher)
    loading.read(sources, base_folder, split)
    return loading.report


def read_texts(
    sources: Sequence[SourceConfig] | Iterable[Mapping[str, Any]], *, config: DataConfig, base_folder: Path = Path()
) -> tuple[list[str], list[str]]:
    """The texts to learn a tokenizer from: all that is not gold (prompts, other roles), and the gold. `limit` is kept to.

    Rows that cannot be used are passed over; `load_dataset` is where they are counted.

    Args:
        sources: files, or rows in memory.
    """
    contexts: list[str] = []
    golds: list[str] = []
    for reader, parts in _readers(sources, config, base_folder):
        ordinal = taken = 0
        for part in parts:
            for row in reader.read(part, ordinal):
                ordinal += 1
                if reader.source.limit is not None and taken >= reader.source.limit:
                    break
                conversation = row if isinstance(row, Rejection) else reader.convert(row)
                if isinstance(conversation, Conversation):
                    taken += 1
                    contexts.extend(json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
                    for message in conversation.messages:
                        (golds if message.role == "assistant" else contexts).extend(_texts(message))
    return contexts, golds


def _readers(
    sources: Sequence[SourceConfig] | Iterable[Mapping[str, Any]], config: DataConfig, base_folder: Path
) -> list[tuple[SourceReader, Iterable[SourcePart]]]:
    files = _files(sources)
    if files is None:
        part = memory_part(cast("Iterable[Mapping[str, Any]]", sources), name="rows")
        return [(SourceReader(SourceConfig(path="rows"), config=config), [part])]
    readers = [SourceReader(source, config=config) for source in files]
    return [(reader, reader.parts(base_folder)) for reader in readers]


def _texts(message: Message) -> list[str]:
    """What a template may write of a message."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls]
    return [text for text in (message.reasoning, message.content, *calls, message.name) if text is not None]


def _files(sources: Sequence[SourceConfig] | Iterable[Mapping[str, Any]]) -> list[SourceConfig] | None:
    """`sources` where they are files, None where they are rows in memory."""
    if isinstance(sources, (list, tuple)) and all(isinstance(source, SourceConfig) for source in sources):
        return list(sources)
    return None


def require_iterable(rows: object) -> None:
    """Refuse what is neither a file nor rows.

    Raises:
        DataError: a number, say.
    """
    try:
        iter(rows)  # type: ignore[call-overload]
    except TypeError as error:
        raise DataError(
            f"{shorten(rows)} is of type {type(rows).__name__}, and neither a file nor rows",
            remedy="give the name of a file, or mappings such as {'prompt': ..., 'completion': ...}",
        ) from error


def _check_names(sources: Sequence[SourceConfig], split: str) -> None:
    paths: dict[str, str] = {}
    for source in sources:
        name = source_name(source)
        if name in paths:
            raise ConfigError(
                f"two sources of data.{split} are named {name!r}: {paths[name]} and {source.path}; "
                "their rows would have the same example ids",
                remedy="give one of them another `name`",
            )
        paths[name] = source.path


def render_rows(renderer: Renderer, rows: Sequence[_Readable]) -> list[list[TokenizedExample] | Rejection]:
    """The examples of each row of one source, or why it has none; what came tokenised passes the renderer."""
    conversations = [row for row in rows if isinstance(row, Conversation)]
    if len(conversations) == len(rows):
        return renderer.render(conversations)
    # A source has one format: then all of them are tokenised.
    ends = frozenset(renderer.end_token_ids)
    return [_own_tokens(row, renderer, ends) for row in rows if isinstance(row, TokenizedExample)]


def _own_tokens(
    example: TokenizedExample, renderer: Renderer, ends: frozenset[int]
) -> list[TokenizedExample] | Rejection:
    """A row that came tokenised, its gold measured; a rejection where it is too long."""
    limit = renderer.max_length
    if not renderer.keeps_long_rows and limit is not None and example.num_tokens > limit:
        return rejected_whole(example.source, example.num_tokens, limit, renderer.length_options)
    num_bytes = 0
    for begin, end in gold_runs(example.target_weights):
        ids = example.token_ids[begin:end].tolist()
        text = renderer.tokenizer.decode(ids[:-1] if ids[-1] in ends else ids, skip_special_tokens=False)
        num_bytes += len(str(text).encode("utf-8"))
    return [replace(example, num_bytes=num_bytes)]


class _Loading:
    """The state of one `load_dataset`."""

    def __init__(
        self,
        config: DataConfig,
        renderer: Renderer,
        *,
        parts_share_weight: bool = False,
        watcher: RowWatcher | None = None,
        ids: ExampleIds | HashedIds | None = None,
    ) -> None:
        self._config = config
        self._renderer = renderer
        self._watcher = watcher
        self._fitter = RowFitter(renderer, config, parts_share_weight=parts_share_weight)
        self._builder = DatasetBuilder()
        self._files: list[FileReport] = []
        self._shown: dict[str, list[str]] = {}
        self._ids = ids if ids is not None else ExampleIds() if watcher is None else HashedIds()
        self._num_rows = 0
        self.losses = Losses()
        self.num_straddles = 0

    def read(
        self,
        sources: Sequence[SourceConfig] | Iterable[Mapping[str, Any]],
        base_folder: Path,
        split: Literal["train", "eval", "rows"],
    ) -> None:
        files = _files(sources)
        with _collecting_little():
            if files is not None:
                _check_names(files, split)
                for source in files:
                    _require_end(source)
                    self.read_source(source, base_folder)
            else:
                require_iterable(sources)
                self.read_memory(cast("Iterable[Mapping[str, Any]]", sources), name=split)

    def read_source(self, source: SourceConfig, base_folder: Path) -> None:
        reader = self._reader(source)
        self._read(reader, reader.parts(base_folder))

    def read_memory(self, rows: Iterable[Mapping[str, Any]], *, name: str) -> None:
        reader = self._reader(SourceConfig(path=name, name=name))
        self._read(reader, [memory_part(rows, name=name)])

    def _reader(self, source: SourceConfig) -> SourceReader:
        return SourceReader(source, config=self._config, vocab_size=len(self._renderer.tokenizer))

    def _read(self, reader: SourceReader, parts: Iterable[SourcePart]) -> None:
        used = ordinal = 0
        for part in parts:
            file = _FileInProgress(self, reader=reader, used_before=used)
            for row in reader.read(part, ordinal):
                if reader.source.streaming and file.is_full:
                    break
                file.take(row)
            report = file.report(part)
            self._files.append(report)
            used += report.used
            ordinal += report.rows_in

    def render(self, rows: Sequence[_Readable], source: SourceConfig) -> list[list[TokenizedExample] | Rejection]:
        """Render what is not tokenised yet, fit it to the limit, and keep what is good.

        Returns:
            One result a row, an empty list where it is dropped.
        """
        results = render_rows(self._renderer, rows)
        noted: list[set[str]] = [set(), set(), set()]
        if rows and isinstance(rows[0], Conversation):
            renderer = self._renderer
            noted = [set(names) for names in (renderer.straddling, renderer.control_texts, renderer.mismatching)]
        straddling = noted[0]
        self.num_straddles += len(straddling)
        name = source_name(source)
        for index, row in enumerate(rows):
            fitted = self._fitter.fit(row, results[index])
            examples = results[index] = fitted.examples
            if not isinstance(examples, Rejection):
                duplicate = self._register(row, examples)
                if duplicate is not None:
                    results[index] = duplicate
                    continue
            self.losses += fitted.losses
            if isinstance(examples, Rejection):
                continue
            if self._watcher is not None:
                notes = [row.source in names for names in noted]
                self._show_row(self._watcher, row, examples, source, fitted.losses, notes)
                continue
            for example in examples:
                self._builder.add(example, group=self._num_rows, repeat=source.repeat, source_name=name)
            self._num_rows += bool(examples)
        return results

    def _show_row(
        self,
        watcher: RowWatcher,
        row: _Readable,
        examples: list[TokenizedExample],
        source: SourceConfig,
        losses: Losses,
        notes: Sequence[bool],
    ) -> None:
        if examples:
            straddles, spells_control, mismatches = notes
            watcher.used(
                row,
                examples,
                repeat=source.repeat,
                losses=losses,
                straddles=straddles,
                spells_control=spells_control,
                mismatches=mismatches,
            )
        else:
            watcher.dropped(row)

    def _register(self, conversation: _Readable, examples: list[TokenizedExample]) -> Rejection | None:
        """Take the row's ids, its own and those of its parts; a rejection where one is taken already."""
        ids = [conversation.example_id]
        ids.extend(example.example_id for example in examples if example.example_id != conversation.example_id)
        for example_id in ids:
            place = self._ids.place(example_id)
            if place is not None:
                return Rejection(
                    source=conversation.source,
                    reason="duplicate id",
                    detail=f"the id {shorten(example_id)} is also that of {place}; make ids unique, or map "
                    "`columns: {id: ...}` to another column",
                )
        for example_id in ids:
            self._ids.add(example_id, conversation.source)
        return None

    def show(self, rejection: Rejection) -> None:
        if self._watcher is not None:
            self._watcher.rejected(rejection)
        shown = self._shown.setdefault(rejection.reason, [])
        if len(shown) < _SHOWN_REJECTIONS:
            shown.append(f"{rejection.source}: {rejection.detail}")

    @property
    def report(self) -> DataReport:
        return DataReport(files=self._files, rejections=self._shown)

    def accepted(self, split: Literal["train", "eval", "rows"]) -> DataReport:
        """The report, where the rows may be used.

        Raises:
            DataError: a row is rejected and `on_bad_row` is `stop`, or no row is left.
        """
        report = self.report
        if report.used == 0 or (report.rejected and self._config.on_bad_row == "stop"):
            raise _rejected_rows(report, split, self._renderer.length_options)
        return report

    def finish(self, split: Literal["train", "eval", "rows"]) -> Dataset:
        report = self.accepted(split)
        unknown = self._renderer.tokenizer.unk_token_id
        # Where the unknown token is also the end token (GPT-2), nothing is ever unknown.
        is_own = unknown is not None and unknown not in (
            self._renderer.tokenizer.eos_token_id,
            self._renderer.tokenizer.bos_token_id,
        )
        dataset = self._builder.finish(report, unknown_id=int(unknown) if is_own else None)
        rows = np.unique(dataset.groups, return_index=True)[1]
        if split == "train" and not copies_in_epoch(dataset.repeats[rows], np.zeros(len(rows), dtype=np.uint64)).any():
            raise DataError(
                f"an epoch would hold no row: {len(rows)} rows, of which `repeat` takes "
                f"{float(dataset.repeats[rows].sum()):.3g}",
                remedy="raise `repeat` of a source",
            )
        return dataset


class _FileInProgress:
    """Counts the rows of one file while they are read."""

    def __init__(self, loading: _Loading, *, reader: SourceReader, used_before: int) -> None:
        self._loading = loading
        self._reader = reader
        limit = reader.source.limit
        self._room = None if limit is None else limit - used_before
        self._pending: list[_Readable] = []
        self._straddles_before = loading.num_straddles
        self._losses_before = loading.losses
        self._rows_in = self._used = self._over_limit = 0
        self._examples = self._tokens = self._gold_tokens = 0
        self._rejected: dict[str, int] = {}

    @property
    def is_full(self) -> bool:
        """Whether the source's limit is reached."""
        if self._room is None or self._used + len(self._pending) < self._room:
            return False
        self._render()  # a pending row that is rejected makes room
        return self._used >= self._room

    def take(self, row: Row | Rejection) -> None:
        self._rows_in += 1
        if self.is_full:
            self._over_limit += 1
            return
        if isinstance(row, Rejection):
            self._reject(row)
            return
        conversation = self._reader.convert(row)
        if isinstance(conversation, Rejection):
            self._reject(conversation)
            return
        self._pending.append(conversation)
        if len(self._pending) >= _ROWS_AT_ONCE:
            self._render()

    def report(self, part: SourcePart) -> FileReport:
        self._render()
        losses = self._loading.losses - self._losses_before
        return FileReport(
            path=part.path,
            name=source_name(self._reader.source),
            sha256=part.sha256(),
            rows_in=self._rows_in,
            used=self._used,
            rejected=self._rejected,
            over_limit=self._over_limit,
            examples=self._examples,
            tokens=self._tokens,
            gold_tokens=self._gold_tokens,
            straddles=self._loading.num_straddles - self._straddles_before,
            format=self._reader.format or "",
            format_detected=self._reader.is_detected,
            revision=part.revision,
            **losses.of_report(),
        )

    def _render(self) -> None:
        kept: list[TokenizedExample] = []
        for result in self._loading.render(self._pending, self._reader.source):
            if isinstance(result, Rejection):
                self._reject(result)
            elif result:
                self._used += 1
                kept.extend(result)
        self._pending = []
        if kept:
            weights = np.concatenate([example.target_weights for example in kept])
            self._examples += len(kept)
            self._tokens += int(weights.shape[0])
            self._gold_tokens += int(np.count_nonzero(weights))

    def _reject(self, rejection: Rejection) -> None:
        self._rejected[rejection.reason] = self._rejected.get(rejection.reason, 0) + 1
        self._loading.show(rejection)


def _rejected_rows(report: DataReport, split: str, options: LengthOptions) -> DataError:
    """Counts by reason, each with its first places."""
    reasons = report.rejected
    dropped = sum(file.dropped for file in report.files)
    if report.used == 0 and dropped:  # as was asked for, but then nothing is left
        reasons[TOO_LONG] = reasons.get(TOO_LONG, 0) + dropped
    total = sum(reasons.values())
    place = "the data" if split == "rows" else f"data.{split}"
    lines = [f"{total} of {report.rows_in} rows of {place} cannot be used"]
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        lines.append(f"  {reason}: {count} row{'s' if count > 1 else ''}")
        shown = report.rejections.get(reason, [])
        lines.extend(f"    {place}" for place in shown)
        if shown and count > len(shown):
            lines.append(f"    ... and {count - len(shown)} more")
    if report.used == 0:
        if report.rows_in == 0:
            return DataError(f"{place} holds no row", remedy="give it rows")
        return DataError("\n".join(lines) + "\n  No row is left.", remedy=remedy_of(reasons, options))
    skipping = "`--skip-bad-rows`" if split == "rows" else "`data.on_bad_row: skip`"
    return DataError("\n".join(lines), remedy=f"mend these rows, or leave them out with {skipping}")
