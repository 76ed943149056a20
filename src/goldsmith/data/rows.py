"""Files to rows. Reading is streaming; a row that cannot be read is a `Rejection` with its place, never a crash.

A file that is damaged as a whole (no such file, a cut gzip stream, a JSON array that never ends) is a `DataError`.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any, cast

from goldsmith.data.config import Columns, SourceConfig
from goldsmith.errors import ConfigError, DataError

__all__ = [
    "Rejection",
    "Row",
    "read_file",
    "rows_in_memory",
    "shorten",
    "source_files",
]

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_CHUNK_BYTES = 1 << 20
_PARQUET_BATCH = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as the file has it.

    Attributes:
        values: the row's fields. In a file without a header the keys are the positions, `"0"`, `"1"`, ...
        source: where it lies: `path:line` (Parquet has no lines: `path:row`, from 1; in memory `name:index`, from 0).
        source_name: the source's `name`.
        ordinal: counts the rows of the source from 0, rejected rows included.
    """

    values: Mapping[str, object]
    source: str
    source_name: str
    ordinal: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """One row that is not used.

    Attributes:
        source: where it lies, as in `Row`.
        reason: the short category that reports count by, such as `invalid JSON`.
        detail: the field and the value seen, shortened, and the remedy.
    """

    source: str
    reason: str
    detail: str


def shorten(value: object, length: int = 60) -> str:
    """A value as an error message shows it: on one line, printable (a lone surrogate is escaped), at most `length` characters.

    >>> shorten("a" * 100, 10)
    "'aaaaaa..."
    """
    # repr of a huge value is cut before it is made where that is possible, so that a message costs nothing.
    shown = value[: length + 1] if isinstance(value, (str, bytes, list, tuple)) else value
    try:
        text = repr(shown)
    except (RecursionError, ValueError):  # nested too deeply; an integer of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= length else text[: length - 3] + "..."


def source_files(source: SourceConfig, *, base_folder: Path) -> list[tuple[str, Path]]:
    """The files of a source, sorted by name: (the path as messages show it, the path to open).

    Raises:
        DataError: no such file, a folder, a glob that matches nothing, or an unknown suffix.
    """
    path = base_folder / source.path
    found = [source.path]
    if not path.exists():
        if not glob.has_magic(source.path):
            raise DataError(
                f"no such data file: {source.path} (looked in {base_folder.resolve()})",
                remedy="mend `path` of the source",
            )
        found = sorted(glob.glob(source.path, root_dir=base_folder, recursive=True))
        found = [name for name in found if (base_folder / name).is_file()]
        if not found:
            raise DataError(
                f"no file matches the glob {source.path} (looked in {base_folder.resolve()})",
                remedy="mend `path` of the source",
            )
    elif path.is_dir():
        raise DataError(f"{source.path} is a folder", remedy=f"name its files, for example `{source.path}/*.jsonl`")
    for name in found:
        _file_format(name)
    return [(name, base_folder / name) for name in found]


def read_file(
    path: Path, *, shown: str, name: str, columns: Columns | None = None, ordinal: int = 0
) -> Iterator[Row | Rejection]:
    """All rows of one file.

    Args:
        path: the file; its suffix (before an optional `.gz`) says the format: .jsonl .ndjson .json .csv .tsv .parquet.
        shown: the path in messages and in `Row.source`.
        name: `Row.source_name`.
        columns: field -> column; positions say that a CSV or TSV file has no header.
        ordinal: of the first row.

    Raises:
        DataError: nothing in it, an unknown suffix, or a file that is damaged as a whole.
        ConfigError: positions as columns of a format that has names.
    """
    form = _file_format(shown)
    by_position = columns is not None and any(isinstance(column, int) for column in columns.values())
    if by_position and form not in (".csv", ".tsv"):
        raise ConfigError(
            f"columns {columns} gives positions, but {shown} has names",
            remedy="positions are for CSV and TSV files without a header; give the names of the fields instead",
        )
    count = 0
    try:
        with _open(path) as handle:
            items: Iterator[tuple[int, Mapping[str, object] | Rejection]]
            if form == ".parquet":
                items = _read_parquet(handle, shown)
            elif form == ".json":
                items = _read_json(handle, shown)
            elif form in (".jsonl", ".ndjson"):
                items = _read_json_lines(handle, shown)
            else:
                records = _csv_records(handle, shown) if form == ".csv" else _tsv_records(handle, shown)
                width = max(int(c) for c in columns.values()) + 1 if by_position and columns else None
                items = _read_table(records, shown, needed_width=width)
            for line, item in items:
                if isinstance(item, Rejection):
                    yield item
                else:
                    yield Row(values=item, source=f"{shown}:{line}", source_name=name, ordinal=ordinal + count)
                count += 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{shown} is not a whole gzip file: {error} (after {count} rows)", remedy="copy or make the file again"
        ) from error
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error}", remedy="check the file and its permissions") from error
    if count == 0:
        raise DataError(f"{shown} holds no row", remedy="mend the file, or take it out of the sources")


def rows_in_memory(rows: Iterable[Mapping[str, Any]], name: str = "rows") -> Iterator[Row | Rejection]:
    """Rows that a program holds: a list of mappings, a generator, a `datasets.Dataset`. The source is `name:index`."""
    for index, values in enumerate(rows):
        source = f"{name}:{index}"
        if isinstance(values, Mapping):
            yield Row(values=cast("Mapping[str, object]", values), source=source, source_name=name, ordinal=index)
        else:
            yield _not_an_object(source, values)


def _file_format(name: str) -> str:
    suffix = PurePath(name.removesuffix(".gz")).suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(
            f"{name}: unknown kind of file, suffix {suffix!r}",
            remedy=f"known are {' '.join(_SUFFIXES)}, each also with .gz; rename or convert the file",
        )
    return suffix


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def _not_an_object(source: str, value: object) -> Rejection:
    return Rejection(
        source=source,
        reason="not an object",
        detail=f"a row must be an object (field -> value), but this is {_type_name(value)}: {shorten(value)}",
    )


def _type_name(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _not_utf8(source: str, error: UnicodeDecodeError) -> Rejection:
    seen = shorten(error.object[max(0, error.start - 10) : error.end + 10])
    return Rejection(
        source=source,
        reason="not UTF-8",
        detail=f"byte {error.object[error.start]:#04x} at {seen}; convert the file to UTF-8",
    )


def _lines(handle: IO[bytes], shown: str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line with its end), without a byte order mark; lines end with LF."""
    for number, line in enumerate(handle, start=1):
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(f"{shown} is UTF-16, not UTF-8", remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {shown}")
            line = line.removeprefix(codecs.BOM_UTF8)
        yield number, line


# ---------------------------------------------------------------------------------------------------------------- JSON


class _JsonParser:
    """JSON to Python values; what Python's parser lets pass but is wrong in a row comes back as a rejection."""

    def __init__(self) -> None:
        self._problem: tuple[str, str] | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._integer)

    def parse(self, data: bytes, source: str) -> object:
        """The value, or a `Rejection`: not UTF-8, invalid JSON, nested too deeply, duplicate key."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            return _not_utf8(source, error)
        self._problem = None
        try:
            value = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            seen = shorten(text[error.pos : error.pos + 40]) if error.pos < len(text) else "the end of the row"
            return Rejection(
                source=source, reason="invalid JSON", detail=f"{error.msg} at character {error.pos + 1}, at {seen}"
            )
        except RecursionError:
            return Rejection(
                source=source, reason="invalid JSON", detail=f"nested too deeply, from {shorten(text)}; flatten the row"
            )
        if self._problem is not None:
            reason, detail = self._problem
            return Rejection(source=source, reason=reason, detail=detail)
        return value

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self._problem = ("duplicate key", f"the key {shorten(key)} stands twice in one object; keep one")
                seen.add(key)
        return values

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # Python refuses to convert more than some thousand digits, as that takes quadratic time
            self._problem = (
                "invalid JSON",
                f"an integer of {len(digits)} digits, {digits[:20]}...; write it as a string",
            )
            return 0


def _read_json_lines(handle: IO[bytes], shown: str) -> Iterator[tuple[int, Mapping[str, object] | Rejection]]:
    parser = _JsonParser()
    for number, line in _lines(handle, shown):
        if not line.strip():
            continue
        source = f"{shown}:{number}"
        value = parser.parse(line.strip(b" \t\r\n"), source)
        yield number, _row_object(value, source)


def _row_object(value: object, source: str) -> Mapping[str, object] | Rejection:
    if isinstance(value, (dict, Rejection)):
        return value
    return _not_an_object(source, value)


_WHITESPACE = b" \t\r\n"
_STRUCTURE = re.compile(rb'[{}\[\]",]')
_END_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def _read_json(handle: IO[bytes], shown: str) -> Iterator[tuple[int, Mapping[str, object] | Rejection]]:
    """An array of rows, or an object of id -> row (the id is kept where the row has none)."""
    parser = _JsonParser()
    pieces = _json_pieces(handle, shown)
    opening = next(pieces)[1]
    for line, piece in pieces:
        source = f"{shown}:{line}"
        if opening == b"[":
            yield line, _row_object(parser.parse(piece, source), source)
            continue
        member = parser.parse(b"{" + piece + b"}", source)
        if isinstance(member, Rejection):
            yield line, member
            continue
        if not isinstance(member, dict) or len(member) != 1:
            yield line, Rejection(source=source, reason="invalid JSON", detail="nothing between two commas; remove one")
            continue
        [(key, value)] = member.items()
        if isinstance(value, dict):
            yield line, value if value.get("id") is not None else {**value, "id": key}
        else:
            yield (
                line,
                Rejection(
                    source=source,
                    reason="not an object",
                    detail=f"the file is an object, so each of its members must be a row, but {shorten(key)} is "
                    f"{_type_name(value)}: {shorten(value)}; write an array of rows, or one row a line and name it .jsonl",
                ),
            )


def _json_pieces(handle: IO[bytes], shown: str) -> Iterator[tuple[int, bytes]]:
    """Split the outermost array or object at its commas, reading a chunk at a time.

    The first item is (line, b"[" or b"{"); each further one is (line where it starts, its bytes). Only brackets, quotes and
    commas are looked at, so that a row with an error inside spoils no other.

    Raises:
        DataError: the outermost value is neither, never ends, or is followed by more.
    """
    buffer = handle.read(_CHUNK_BYTES)
    if buffer.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{shown} is UTF-16, not UTF-8", remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {shown}")
    buffer = buffer.removeprefix(codecs.BOM_UTF8)
    line = 1
    while buffer and not buffer.strip(_WHITESPACE):
        line += buffer.count(b"\n")
        buffer = handle.read(_CHUNK_BYTES)
    if not buffer:
        raise DataError(f"{shown} holds no row", remedy="mend the file, or take it out of the sources")
    start = len(buffer) - len(buffer.lstrip(_WHITESPACE))
    line += buffer.count(b"\n", 0, start)
    opening = buffer[start : start + 1]
    if opening not in (b"[", b"{"):
        raise DataError(
            f"{shown}:{line}: a .json file must be an array of rows, or an object of id -> row, but begins with "
            f"{shorten(buffer[start : start + 20])}",
            remedy="write an array of rows, or one row a line and name the file .jsonl",
        )
    yield line, opening

    start += 1  # of the piece
    position = start  # of the scan
    depth = 1
    while True:
        match = _STRUCTURE.search(buffer, position)
        if match is not None and match.group() == b'"':
            string = _END_OF_STRING.match(buffer, match.end())
            if string is not None:
                position = string.end()
                continue
            position, match = match.start(), None
        elif match is None:
            position = len(buffer)
        if match is None:
            # The piece goes on beyond the buffer: drop what is done, and read as much again as is held, so that a row of
            # many chunks takes linear time.
            more = handle.read(max(_CHUNK_BYTES, len(buffer) - start))
            if not more:
                line += _leading_lines(buffer, start)
                raise DataError(
                    f"{shown}:{line}: the file ends inside a row or before its closing bracket",
                    remedy="copy or make the file again",
                )
            buffer, position, start = buffer[start:] + more, position - start, 0
            continue
        position = match.end()
        mark = match.group()
        if mark in (b"{", b"["):
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
        if depth > 1 or (depth == 1 and mark != b","):
            continue
        piece = buffer[start : match.start()]
        blank = _leading_lines(piece, 0)
        # The last piece is empty where the array is; also after a stray last comma, which loses no row.
        if mark == b"," or piece.strip(_WHITESPACE):
            yield line + blank, piece.strip(_WHITESPACE)
        line += piece.count(b"\n")
        start = position
        if depth == 0:
            break
    rest = buffer[start:]
    while rest and not rest.strip(_WHITESPACE):
        line += rest.count(b"\n")
        rest = handle.read(_CHUNK_BYTES)
    if rest:
        raise DataError(
            f"{shown}:{line + _leading_lines(rest, 0)}: more follows after the outermost value: "
            f"{shorten(rest.strip(_WHITESPACE)[:40])}",
            remedy="where the file has one row a line, name it .jsonl",
        )


def _leading_lines(data: bytes, start: int) -> int:
    """Line ends in the white space that `data[start:]` begins with."""
    text = data[start:]
    return text[: len(text) - len(text.lstrip(_WHITESPACE))].count(b"\n")


# -------------------------------------------------------------------------------------------------------- CSV and TSV

_Record = tuple[int, list[str] | Rejection]


def _csv_records(handle: IO[bytes], shown: str) -> Iterator[_Record]:
    """(line where the record starts, its fields), by RFC 4180: a quoted field may hold commas, quotes and line ends."""
    # The module's limit of 131,072 characters a field is for one process and cannot be given to a reader; long text is fine.
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 become lone surrogates here and are found again in the fields, so only their row is rejected.
    lines = (line.decode("utf-8", errors="surrogateescape") for _, line in _lines(handle, shown))
    reader = csv.reader(lines, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            where = f"{shown}:{start}"
            if "unexpected end of data" in str(error):
                detail = (
                    "a quoted field is opened and never closed; close it, or double a quote that belongs to the text"
                )
            elif "new-line character" in str(error):
                detail = "a carriage return stands in a field that is not quoted; quote the field"
            else:
                detail = (
                    f"{error} (lines {start} to {reader.line_num}); quote the field, and double the quotes inside it"
                )
            yield start, Rejection(source=where, reason="invalid CSV", detail=detail)
            continue
        if fields:
            yield start, fields


def _tsv_records(handle: IO[bytes], shown: str) -> Iterator[_Record]:
    """(line, its fields): split at tabs, nothing is quoted or escaped."""
    for number, line in _lines(handle, shown):
        text = line.decode("utf-8", errors="surrogateescape").removesuffix("\n").removesuffix("\r")
        if text:
            yield number, text.split("\t")


def _read_table(
    records: Iterator[_Record], shown: str, *, needed_width: int | None
) -> Iterator[tuple[int, Mapping[str, object] | Rejection]]:
    """Records to rows. The first record is the header, unless columns are given by position (`needed_width` of them)."""
    header: list[str] | None = None
    header_line = 0
    for line, fields in records:
        if isinstance(fields, Rejection):
            if header is None and needed_width is None:
                raise DataError(
                    f"{fields.source}: the header cannot be read: {fields.detail}", remedy="mend the header"
                )
            yield line, fields
            continue
        if header is None:
            header_line = line
            if needed_width is None:
                header = _checked_header(fields, f"{shown}:{line}")
                continue
            if len(fields) < needed_width:
                raise DataError(
                    f"{shown}:{line}: columns asks for position {needed_width - 1}, but there are {len(fields)} columns: "
                    f"{shorten(fields)}",
                    remedy="positions count from 0; the delimiter is a comma in .csv and a tab in .tsv",
                )
            header = [str(position) for position in range(len(fields))]
        source = f"{shown}:{line}"
        joined = "".join(fields)
        if not joined.isascii() and _has_surrogate(joined):
            yield line, _first_not_utf8(fields, source)
        elif len(fields) != len(header):
            yield (
                line,
                Rejection(
                    source=source,
                    reason="wrong number of columns",
                    detail=f"{len(fields)} columns, but {len(header)} in line {header_line}: {shorten(fields)}",
                ),
            )
        else:
            yield line, dict(zip(header, fields, strict=True))


def _checked_header(fields: list[str], source: str) -> list[str]:
    if _has_surrogate("".join(fields)):
        raise DataError(f"{source}: the header is not UTF-8: {shorten(fields)}", remedy="convert the file to UTF-8")
    twice = sorted({field for field in fields if fields.count(field) > 1})
    if twice:
        raise DataError(
            f"{source}: the header names {shorten(twice[0])} twice: {shorten(fields)}",
            remedy="rename the columns; a file without a header needs `columns` by position, such as {prompt: 0, completion: 1}",
        )
    return fields


def _has_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _first_not_utf8(fields: list[str], source: str) -> Rejection:
    for field in fields:
        try:
            field.encode("utf-8", errors="surrogateescape").decode("utf-8")
        except UnicodeDecodeError as error:
            return _not_utf8(source, error)
    raise AssertionError("no field with a surrogate")


# ------------------------------------------------------------------------------------------------------------- Parquet


def _read_parquet(handle: IO[bytes], shown: str) -> Iterator[tuple[int, Mapping[str, object] | Rejection]]:
    import pyarrow as pa  # not needed by other formats, and slow to import
    import pyarrow.parquet as pq

    count = 0
    try:
        # Parquet is read from its end, which a gzip stream cannot give without unpacking it whole.
        file = pq.ParquetFile(io.BytesIO(handle.read()) if isinstance(handle, gzip.GzipFile) else handle)
        columns = list(file.schema_arrow.names)
        for name in columns:
            if columns.count(name) > 1:
                raise DataError(
                    f"{shown}: two columns are named {shorten(name)}, and a row has room for one",
                    remedy="rename one, or take it out",
                )
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            for values in _parquet_values(batch, shown, count):
                count += 1
                yield count, values
    except pa.ArrowException as error:
        raise DataError(
            f"{shown} is damaged or not Parquet: {shorten(str(error), 200)} (after {count} rows)",
            remedy="copy or make the file again",
        ) from error


def _parquet_values(batch: Any, shown: str, before: int) -> Iterator[Mapping[str, object] | Rejection]:
    """The rows of a record batch; where one of them cannot be converted, that one is rejected."""
    try:
        rows: list[dict[str, object]] | None = batch.to_pylist()
    except (ValueError, OverflowError):  # not UTF-8, or a date beyond Python's: found again row by row
        rows = None
    if rows is not None:
        yield from rows
        return
    for index in range(batch.num_rows):
        try:
            [values] = batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError as error:
            yield _not_utf8(f"{shown}:{before + index + 1}", error)
        except (ValueError, OverflowError) as error:
            yield Rejection(
                source=f"{shown}:{before + index + 1}", reason="unreadable value", detail=shorten(str(error), 200)
            )
        else:
            yield values
