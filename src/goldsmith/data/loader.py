"""The data set: every row read, checked, rendered, and kept in a few flat arrays; and the report that adds up."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, overload

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from goldsmith.data.fitting import RowFitter
from goldsmith.data.mixture import copies_in_epoch
from goldsmith.data.rejections import remedy_of
from goldsmith.data.rendering import Renderer
from goldsmith.data.rows import DataConfig, Rejection, Row, SourceConfig, shorten, source_name
from goldsmith.data.sources import SourcePart, SourceReader, memory_part
from goldsmith.data.truncation import Losses
from goldsmith.errors import ConfigError, DataError
from goldsmith.records import DataReport, FileReport
from goldsmith.types import Conversation, GoldTurn, Message, TokenizedExample

__all__ = ["Dataset", "RowWatcher", "gold_runs", "load_dataset", "read_texts", "render_rows", "watch_rows"]

# What a row is before it is rendered; a source of token ids needs no rendering.
_Readable = Conversation | TokenizedExample

# Rows rendered at once: enough to keep a tokenizer's threads busy, small enough to be no matter of memory.
_ROWS_AT_ONCE = 1024
# Rejections of each reason that are kept with their place.
_SHOWN_REJECTIONS = 3
# Ids of a watched data set are kept as 64-bit hashes, in sorted blocks; two of one size become one, up to a size.
_IDS_A_BLOCK = 1 << 13
_MAX_IDS_A_BLOCK = 1 << 18


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


class Dataset(Sequence[TokenizedExample]):
    """Examples in flat arrays. Legend: E examples, N tokens and G gold turns of all together. Nothing here changes after loading.

    Attributes:
        token_ids: int32 [N], the examples end to end.
        target_weights: float32 [N].
        offsets: int64 [E + 1]; example i is `token_ids[offsets[i]:offsets[i + 1]]`.
        lengths: int64 [E], tokens.
        num_target_tokens: int64 [E], tokens of weight > 0.
        weight_sums: float64 [E], W(i).
        example_weights: float64 [E], u_i (the source's weight is in it).
        groups: int64 [E], counts rows from 0; the parts of a row share it and lie together.
        repeats: float64 [E], how often an epoch holds the example's row.
        num_bytes: int64 [E], see `TokenizedExample`.
        example_ids, sources: one an example; ids are unique.
        source_names: of the sources, in the order in which they were read.
        source_indices: int32 [E], index into `source_names`.
        turn_counts: int32 [E], how many gold turns an example has; 0 where they are not known.
        turn_begins, turn_numbers: int32 [G], see `GoldTurn`.
        turn_roles: int32 [G], index into `role_names`.
        role_names: of the messages that have gold.
        num_unknown_tokens: tokens that are the tokenizer's unknown token: text that it could not write.
        report: what became of every row.
    """

    def __init__(
        self,
        examples: Iterable[TokenizedExample],
        *,
        groups: Sequence[int] | None = None,
        repeats: Sequence[float] | None = None,
        source_names: Sequence[str] | None = None,
        known_sources: Sequence[str] = (),
        report: DataReport | None = None,
        unknown_id: int | None = None,
    ) -> None:
        """
        Args:
            examples: in order; copied.
            groups: default: every example is a row of its own.
            repeats: default: 1 each.
            source_names: the name of each example's source; default: one source without a name.
            known_sources: names that come first in the data set's `source_names`, whether an example has them or not.
            report: default: an empty one.
            unknown_id: the tokenizer's `unk_token_id`, to count.
        """
        builder = _Builder()
        builder.source_names = {name: index for index, name in enumerate(known_sources)}
        for index, example in enumerate(examples):
            builder.add(
                example,
                group=index if groups is None else groups[index],
                repeat=1.0 if repeats is None else repeats[index],
                source_name="" if source_names is None else source_names[index],
            )
        self._fill(builder, report or DataReport(), unknown_id)

    def _fill(self, builder: _Builder, report: DataReport, unknown_id: int | None) -> None:
        builder.flush()
        self.token_ids: npt.NDArray[np.int32] = _joined(builder.token_ids, np.int32)
        self.target_weights: npt.NDArray[np.float32] = _joined(builder.target_weights, np.float32)
        self.lengths: npt.NDArray[np.int64] = np.array(builder.lengths, dtype=np.int64)
        self.offsets: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.example_weights: npt.NDArray[np.float64] = np.array(builder.example_weights, dtype=np.float64)
        self.groups: npt.NDArray[np.int64] = np.array(builder.groups, dtype=np.int64)
        self.repeats: npt.NDArray[np.float64] = np.array(builder.repeats, dtype=np.float64)
        self.num_bytes: npt.NDArray[np.int64] = np.array(builder.num_bytes, dtype=np.int64)
        self.example_ids: list[str] = builder.example_ids
        self.sources: list[str] = builder.sources
        self.source_names: list[str] = list(builder.source_names)
        self.source_indices: npt.NDArray[np.int32] = np.array(builder.source_indices, dtype=np.int32)
        self.turn_counts: npt.NDArray[np.int32] = np.array(builder.turn_counts, dtype=np.int32)
        self.turn_begins: npt.NDArray[np.int32] = np.array(builder.turn_begins, dtype=np.int32)
        self.turn_numbers: npt.NDArray[np.int32] = np.array(builder.turn_numbers, dtype=np.int32)
        self.turn_roles: npt.NDArray[np.int32] = np.array(builder.turn_roles, dtype=np.int32)
        self.role_names: list[str] = list(builder.role_names)
        self._sum_up()
        self.num_unknown_tokens = 0 if unknown_id is None else int(np.count_nonzero(self.token_ids == unknown_id))
        self.report = report

    def _sum_up(self) -> None:
        self._turn_offsets = np.concatenate([[0], np.cumsum(self.turn_counts)]).astype(np.int64)
        starts = self.offsets[:-1]
        empty = len(self.example_ids) == 0
        self.weight_sums: npt.NDArray[np.float64] = (
            np.zeros(0) if empty else np.add.reduceat(self.target_weights, starts, dtype=np.float64)
        )
        self.num_target_tokens: npt.NDArray[np.int64] = (
            np.zeros(0, dtype=np.int64) if empty else np.add.reduceat(self.target_weights > 0, starts, dtype=np.int64)
        )

    @classmethod
    def of_arrays(
        cls,
        arrays: Mapping[str, npt.NDArray[Any]],
        *,
        example_ids: list[str],
        sources: list[str],
        source_names: list[str],
        role_names: list[str],
        num_unknown_tokens: int,
        report: DataReport,
    ) -> Dataset:
        """A data set that was taken apart into what it holds; `arrays` by the names of the attributes, but for what follows from
        others.
        """
        dataset = cls.__new__(cls)
        for name, array in arrays.items():
            setattr(dataset, name, array)
        dataset.offsets = np.concatenate([[0], np.cumsum(dataset.lengths)]).astype(np.int64)
        dataset.example_ids, dataset.sources, dataset.source_names = example_ids, sources, source_names
        dataset.role_names = role_names
        dataset._sum_up()
        dataset.num_unknown_tokens = num_unknown_tokens
        dataset.report = report
        return dataset

    def __len__(self) -> int:
        return len(self.example_ids)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...

    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        """One example, its arrays views of the data set's; or a list for a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        span = slice(int(self.offsets[position]), int(self.offsets[position + 1]))
        return TokenizedExample(
            token_ids=self.token_ids[span],
            target_weights=self.target_weights[span],
            example_id=self.example_ids[position],
            example_weight=float(self.example_weights[position]),
            source=self.sources[position],
            num_bytes=int(self.num_bytes[position]),
            turns=self._turns(position),
        )

    def _turns(self, position: int) -> tuple[GoldTurn, ...]:
        return tuple(
            GoldTurn(
                begin=int(self.turn_begins[index]),
                number=int(self.turn_numbers[index]),
                role=self.role_names[self.turn_roles[index]],
            )
            for index in range(int(self._turn_offsets[position]), int(self._turn_offsets[position + 1]))
        )

    def last_turn(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The ids before the last run of a turn's gold, and the run itself (its end token included).

        The first is what a server is given for that turn, unless a token straddles the boundary (`boundary: joint`).
        """
        example = self[index]
        first, end = gold_runs(example.target_weights)[-1]
        if example.turns:  # what comes right before may be gold too, of another's
            first = max(first, example.turns[-1].begin)
        return example.token_ids[:first], example.token_ids[first:end]

    def context_text(self, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """What stands before the last run of gold, for display: decoded, control tokens included."""
        return str(tokenizer.decode(self.last_turn(index)[0].tolist(), skip_special_tokens=False))

    def gold_text(self, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """The last run of gold, for display and for exact match: decoded, without special tokens."""
        return str(tokenizer.decode(self.last_turn(index)[1].tolist(), skip_special_tokens=True))

    def fingerprint(self) -> str:
        """SHA-256, in hex, over all that training depends on: ids, weights, rows, repeats and example ids, in order."""
        digest = hashlib.sha256()
        for array, kind in (
            (self.token_ids, "<i4"),
            (self.target_weights, "<f4"),
            (self.lengths, "<i8"),
            (self.example_weights, "<f8"),
            (self.groups, "<i8"),
            (self.repeats, "<f8"),
        ):
            digest.update(f"{kind}[{array.shape[0]}]".encode())
            digest.update(np.ascontiguousarray(array, dtype=np.dtype(kind)).data)
        digest.update(json.dumps(self.example_ids).encode("utf-8"))
        return digest.hexdigest()


class _Builder:
    """Collects examples; small arrays are joined as they come, so that memory holds few objects."""

    def __init__(self) -> None:
        self.token_ids: list[npt.NDArray[np.int32]] = []
        self.target_weights: list[npt.NDArray[np.float32]] = []
        self.lengths: list[int] = []
        self.example_weights: list[float] = []
        self.groups: list[int] = []
        self.repeats: list[float] = []
        self.num_bytes: list[int] = []
        self.example_ids: list[str] = []
        self.sources: list[str] = []
        self.source_names: dict[str, int] = {}
        self.source_indices: list[int] = []
        self.turn_counts: list[int] = []
        self.turn_begins: list[int] = []
        self.turn_numbers: list[int] = []
        self.turn_roles: list[int] = []
        self.role_names: dict[str, int] = {}
        self._pending: list[TokenizedExample] = []

    def add(self, example: TokenizedExample, *, group: int, repeat: float, source_name: str) -> None:
        self._pending.append(example)
        self.lengths.append(example.num_tokens)
        self.example_weights.append(example.example_weight)
        self.groups.append(group)
        self.repeats.append(repeat)
        self.num_bytes.append(example.num_bytes)
        self.example_ids.append(example.example_id)
        self.sources.append(example.source)
        self.source_indices.append(self.source_names.setdefault(source_name, len(self.source_names)))
        self.turn_counts.append(len(example.turns))
        for turn in example.turns:
            self.turn_begins.append(turn.begin)
            self.turn_numbers.append(turn.number)
            self.turn_roles.append(self.role_names.setdefault(turn.role, len(self.role_names)))
        if len(self._pending) >= _ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self.token_ids.append(np.concatenate([example.token_ids for example in self._pending]))
            self.target_weights.append(np.concatenate([example.target_weights for example in self._pending]))
            self._pending = []


def gold_runs(target_weights: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
    """(begin, end) of each stretch of gold, one after another.

    >>> gold_runs(np.array([0, 0, 1, 2, 0, 1], dtype=np.float32))
    [(2, 4), (5, 6)]
    """
    edges = np.flatnonzero(np.diff(target_weights > 0, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _joined(arrays: list[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)


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
        return Rejection(
            source=example.source,
            reason="longer than max_length",
            detail=f"{example.num_tokens} tokens, but max_length is {limit}; shorten or remove the row, or raise "
            "data.max_length where the model can take more (a row is never cut)",
        )
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
    ) -> None:
        self._config = config
        self._renderer = renderer
        self._watcher = watcher
        self._fitter = RowFitter(renderer, config, parts_share_weight=parts_share_weight)
        self._builder = _Builder()
        self._files: list[FileReport] = []
        self._shown: dict[str, list[str]] = {}
        self._ids: _Ids | _HashedIds = _Ids() if watcher is None else _HashedIds()
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

    def finish(self, split: Literal["train", "eval", "rows"]) -> Dataset:
        report = self.report
        if report.used == 0 or (report.rejected and self._config.on_bad_row == "stop"):
            raise _rejected_rows(report, split)
        dataset = Dataset.__new__(Dataset)
        unknown = self._renderer.tokenizer.unk_token_id
        # Where the unknown token is also the end token (GPT-2), nothing is ever unknown.
        is_own = unknown is not None and unknown not in (
            self._renderer.tokenizer.eos_token_id,
            self._renderer.tokenizer.bos_token_id,
        )
        dataset._fill(self._builder, report, int(unknown) if is_own else None)
        rows = np.unique(dataset.groups, return_index=True)[1]
        if split == "train" and not copies_in_epoch(dataset.repeats[rows], np.zeros(len(rows), dtype=np.uint64)).any():
            raise DataError(
                f"an epoch would hold no row: {len(rows)} rows, of which `repeat` takes "
                f"{float(dataset.repeats[rows].sum()):.3g}",
                remedy="raise `repeat` of a source",
            )
        return dataset


class _Ids:
    """Every example id with the place where it was first seen."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def place(self, example_id: str) -> str | None:
        return self._places.get(example_id)

    def add(self, example_id: str, place: str) -> None:
        self._places[example_id] = place


class _HashedIds:
    """The same in eight bytes an id, without the places. Two different ids among a million agree once in 37 million times."""

    def __init__(self) -> None:
        self._blocks: list[npt.NDArray[np.uint64]] = []
        self._newest: set[int] = set()

    def place(self, example_id: str) -> str | None:
        key = _hash(example_id)
        found = key in self._newest or any(_holds(block, key) for block in self._blocks)
        return "an earlier row" if found else None

    def add(self, example_id: str, place: str) -> None:
        self._newest.add(_hash(example_id))
        if len(self._newest) >= _IDS_A_BLOCK:
            block = np.fromiter(self._newest, dtype=np.uint64, count=len(self._newest))
            block.sort()
            self._newest.clear()
            while self._blocks and self._blocks[-1].shape == block.shape and block.shape[0] < _MAX_IDS_A_BLOCK:
                block = np.concatenate([self._blocks.pop(), block])
                block.sort()
            self._blocks.append(block)


def _hash(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _holds(block: npt.NDArray[np.uint64], key: int) -> bool:
    place = int(np.searchsorted(block, np.uint64(key)))
    return place < block.shape[0] and int(block[place]) == key


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


def _rejected_rows(report: DataReport, split: str) -> DataError:
    """Counts by reason, each with its first places."""
    total = sum(report.rejected.values())
    place = "the data" if split == "rows" else f"data.{split}"
    lines = [f"{total} of {report.rows_in} rows of {place} cannot be used"]
    for reason, count in sorted(report.rejected.items(), key=lambda item: -item[1]):
        lines.append(f"  {reason}: {count} row{'s' if count > 1 else ''}")
        lines.extend(f"    {place}" for place in report.rejections.get(reason, []))
        if count > _SHOWN_REJECTIONS:
            lines.append(f"    ... and {count - _SHOWN_REJECTIONS} more")
    if report.used == 0:
        if report.rows_in == 0:
            return DataError(f"{place} holds no row", remedy="give it rows")
        return DataError("\n".join(lines) + "\n  No row is left.", remedy=remedy_of(report.rejected))
    skipping = "`--skip-bad-rows`" if split == "rows" else "`data.on_bad_row: skip`"
    return DataError("\n".join(lines), remedy=f"mend these rows, or leave them out with {skipping}")
