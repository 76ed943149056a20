"""Sources, whatever they are: the parts that they are read in, and their rows in the one format that they have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goldsmith.data.config import DataConfig, FormatName, SourceConfig, source_name
from goldsmith.data.formats import SAMPLE_ROWS, RowConverter, detect_format
from goldsmith.data.hub import hub_rows, shown_hub_source
from goldsmith.data.rows import Rejection, Row, read_file, rows_in_memory, source_files
from goldsmith.storage import sha256_file
from goldsmith.types import Conversation, TokenizedExample

__all__ = ["SourcePart", "SourceReader", "memory_part"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePart:
    """What a source is read in: a file, a data set of the hub, rows in memory.

    Attributes:
        path: as messages show it.
        read: the rows; the argument is the ordinal of the first.
        file: what lies on the disk, or None.
        revision: of a hub data set.
    """

    path: str
    read: Callable[[int], Iterator[Row | Rejection]]
    file: Path | None = None
    revision: str | None = None

    def sha256(self) -> str | None:
        """Of the file's bytes; None where there is no file."""
        return None if self.file is None else sha256_file(self.file)


def memory_part(rows: Iterable[Mapping[str, Any]], *, name: str) -> SourcePart:
    """Rows that a program holds."""
    return SourcePart(path=name, read=lambda _: rows_in_memory(rows, name=name))


class SourceReader:
    """The rows of one source, each to its conversation.

    Attributes:
        source: as given.
        format: of every row: the source's, the data's, or what was found in the first rows; None before any was read.
        is_detected: whether it was found.
    """

    def __init__(self, source: SourceConfig, *, config: DataConfig, vocab_size: int | None = None) -> None:
        """
        Args:
            source: `limit` and `repeat` are not applied here.
            config: its `columns` and `format` are used where the source has none.
            vocab_size: of the tokenizer, where one is there.
        """
        self.source = source
        self.is_detected = source.format is None and config.format is None
        self._columns = source.columns or config.columns
        self._vocab_size = vocab_size
        self._converter: RowConverter | None = None
        if form := source.format or config.format:
            self._converter = self._converter_of(form)

    @property
    def format(self) -> FormatName | None:
        return None if self._converter is None else self._converter.format

    def parts(self, base_folder: Path) -> Iterator[SourcePart]:
        """The files of the source, or the one data set that it is.

        Raises:
            DataError: see `rows.source_files`.
        """
        source, columns = self.source, self._columns
        if source.is_hub:
            yield SourcePart(
                path=shown_hub_source(source),
                read=lambda ordinal: hub_rows(source, columns=columns, ordinal=ordinal),
                revision=source.revision,
            )
            return
        name = source_name(source)
        for shown, path in source_files(source, base_folder=base_folder):
            yield SourcePart(
                path=shown,
                file=path,
                read=lambda ordinal, shown=shown, path=path: read_file(  # type: ignore[misc]
                    path, shown=shown, name=name, columns=columns, ordinal=ordinal
                ),
            )

    def read(self, part: SourcePart, ordinal: int = 0) -> Iterator[Row | Rejection]:
        """The rows of a part. Where the format is not known yet, it is found in the first ones before any is given out.

        Raises:
            DataError: what reading raises; no format fits the first rows, or several do.
        """
        rows = part.read(ordinal)
        if self._converter is not None:
            return rows
        head: list[Row | Rejection] = []
        sample: list[Row] = []
        for row in rows:
            head.append(row)
            if isinstance(row, Row):
                sample.append(row)
                if len(sample) == SAMPLE_ROWS:
                    break
        if sample:
            self._converter = self._converter_of(detect_format(sample, columns=self._columns, source=part.path))
        return itertools.chain(head, rows)

    def convert(self, row: Row) -> Conversation | TokenizedExample | Rejection:
        """What a row of `read` holds; see `RowConverter`."""
        assert self._converter is not None
        return self._converter(row)

    def _converter_of(self, form: FormatName) -> RowConverter:
        return RowConverter(
            form,
            columns=self._columns,
            source_weight=self.source.weight,
            ignored_message_keys=self.source.ignore_message_keys,
            vocab_size=self._vocab_size,
        )
