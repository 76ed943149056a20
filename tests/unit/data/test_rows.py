"""Files to rows: every format, every line number, and hostile input that is rejected and never crashes."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from goldsmith.data import rows as rows_module
from goldsmith.data.config import DataConfig, SourceConfig, source_name
from goldsmith.data.rows import Rejection, Row, read_file, rows_in_memory, shorten, source_files
from goldsmith.errors import ConfigError, DataError


def read_rows(source: SourceConfig, *, base_folder: Path) -> Iterator[Row | Rejection]:
    """All rows of a source, file after file."""
    ordinal = 0
    for shown, path in source_files(source, base_folder=base_folder):
        for item in read_file(path, shown=shown, name=source_name(source), columns=source.columns, ordinal=ordinal):
            ordinal += 1
            yield item


def read(path: Path, **fields: Any) -> list[Row | Rejection]:
    return list(read_rows(SourceConfig(path=path.name, **fields), base_folder=path.parent))


def written(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    data = data.encode("utf-8") if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def values(items: list[Row | Rejection]) -> list[Mapping[str, object]]:
    assert all(isinstance(item, Row) for item in items), items
    return [item.values for item in items if isinstance(item, Row)]


def rejected(item: Row | Rejection) -> tuple[str, str]:
    assert isinstance(item, Rejection)
    return item.source, item.reason


ROWS: list[dict[str, object]] = [{"prompt": "a", "completion": "b"}, {"prompt": "c\td,é", "completion": 'x "y"\nz'}]


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet.gz"]
)
def test_the_same_rows_from_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    plain = suffix.removesuffix(".gz")
    raw = tmp_path / "raw"
    if plain in (".jsonl", ".ndjson"):
        raw.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif plain == ".json":
        raw.write_text(json.dumps(ROWS, indent=1))
    elif plain == ".csv":
        with raw.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), raw)
    path.write_bytes(gzip.compress(raw.read_bytes()) if suffix.endswith(".gz") else raw.read_bytes())
    items = read(path)
    assert values(items) == ROWS
    assert [(item.source_name, item.ordinal) for item in items if isinstance(item, Row)] == [("rows", 0), ("rows", 1)]


def test_jsonl_lines_are_counted_and_blank_ones_skipped(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "r.jsonl",
        '\ufeff{"a": 1}\r\n\r\n   \n[1]\n{"a": 2, "a": 3}\n{"a": \n{"b": {"c": 1, "c": 2}}\n{"a": 4}',
    )
    items = read(path)
    assert [item.source for item in items] == [f"r.jsonl:{line}" for line in (1, 4, 5, 6, 7, 8)]
    assert [item.reason if isinstance(item, Rejection) else item.values for item in items] == [
        {"a": 1},
        "not an object",
        "duplicate key",
        "invalid JSON",
        "duplicate key",
        {"a": 4},
    ]
    assert isinstance(items[-1], Row)
    assert items[-1].ordinal == 5  # rejected rows are counted, so an id does not depend on them


HOSTILE = {
    "deep nesting": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid JSON"),
    "unclosed nesting": (b'{"a": ' + b"[" * 100_000, "invalid JSON"),
    "huge integer": (b'{"a": ' + b"9" * 10_000 + b"}", "invalid JSON"),
    "not UTF-8": (b'{"a": "caf\xe9"}', "not UTF-8"),
    "surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
    "raw NUL": (b'{"a": "\x00"}', "invalid JSON"),
    "raw tab": (b'{"a": "\t"}', "invalid JSON"),
    "bare NUL": (b"\x00", "invalid JSON"),
    "two values": (b'{"a": 1} {"a": 2}', "invalid JSON"),
    "number": (b"12", "not an object"),
    "null": (b"null", "not an object"),
    "text": (b'"text"', "not an object"),
    "empty list": (b"[]", "not an object"),
}


# In a .json file unclosed nesting takes the file's own closing bracket with it: a damaged file, tested below.
HOSTILE_FILES = [(suffix, name) for suffix in (".jsonl", ".json") for name in HOSTILE]
HOSTILE_FILES.remove((".json", "unclosed nesting"))


@pytest.mark.parametrize(("suffix", "name"), HOSTILE_FILES)
def test_a_hostile_row_spoils_no_other(tmp_path: Path, name: str, suffix: str) -> None:
    data, reason = HOSTILE[name]
    good = b'{"a": "good"}'
    lines = b"\n".join([good, data, good])
    if suffix == ".json":
        lines = b"[\n" + b",\n".join([good, data, good]) + b"\n]"
    items = read(written(tmp_path, "r" + suffix, lines))
    first = 1 if suffix == ".jsonl" else 2
    assert len(items) == 3
    assert rejected(items[1]) == (f"r{suffix}:{first + 1}", reason)
    assert values([items[0], items[2]]) == [{"a": "good"}] * 2
    assert items[2].source == f"r{suffix}:{first + 2}"
    detail = items[1].detail if isinstance(items[1], Rejection) else ""
    assert len(detail) < 300
    detail.encode("utf-8")  # can be printed


def test_what_json_allows_is_kept(tmp_path: Path) -> None:
    row = read(
        written(
            tmp_path, "r.jsonl", rb'{"nul": "\u0000", "half": "\ud800", "nan": NaN, "big": 123456789012345678901234}'
        )
    )[0]
    assert isinstance(row, Row)
    assert row.values["nul"] == "\x00"
    assert row.values["half"] == "\ud800"  # found where it is used as text
    assert row.values["big"] == 123456789012345678901234


def test_json_object_of_rows_keeps_the_id_where_the_row_has_none(tmp_path: Path) -> None:
    data = '{\n "x": {"a": 1},\n\n "y": {"id": "own", "a": [1, {"b": "]},{"}]}, "z": 3,\n "w": {"id": null}, }'
    items = read(written(tmp_path, "r.json", data))
    assert values([items[0], items[1], items[3]]) == [
        {"a": 1, "id": "x"},
        {"id": "own", "a": [1, {"b": "]},{"}]},
        {"id": "w"},
    ]
    assert rejected(items[2]) == ("r.json:4", "not an object")
    assert [item.source for item in items] == ["r.json:2", "r.json:4", "r.json:4", "r.json:5"]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=4),
            st.recursive(st.text(max_size=8) | st.integers() | st.none(), lambda x: st.lists(x, max_size=3)),
            max_size=3,
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_json_pieces_are_the_same_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    content: list[dict[str, Any]],
    chunk: int,
    indent: int | None,
    ascii_only: bool,
) -> None:
    path = tmp_path_factory.mktemp("json") / "r.json"
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", errors="surrogatepass" if ascii_only else "replace"))
    before = rows_module._CHUNK_BYTES
    rows_module._CHUNK_BYTES = chunk
    try:
        items = read(path)
    finally:
        rows_module._CHUNK_BYTES = before
    assert len(items) == len(content)
    if ascii_only:
        assert values(items) == content
    if indent is not None and ascii_only:
        lines = text.split("\n")
        for item in items:
            assert lines[int(item.source.rpartition(":")[2]) - 1].lstrip().startswith("{")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "holds no row"),
        (" \n\n ", "holds no row"),
        ("[]", "holds no row"),
        ("{}", "holds no row"),
        ("12", "must be an array"),
        ('[{"a": 1}', "ends inside a row"),
        ('[{"a": "', "ends inside a row"),
        ('[\n{"a": 1},\n\n{"a": [', "r.json:4: the file ends"),
        ('[{"a": 1}] [', "more follows"),
        ('{"a": "x"}\n{"a": "y"}\n', "r.json:2: more follows.*\\.jsonl"),
    ],
)
def test_a_json_file_damaged_as_a_whole(tmp_path: Path, data: str, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        read(written(tmp_path, "r.json", data))


def test_stray_commas(tmp_path: Path) -> None:
    assert [item.source for item in read(written(tmp_path, "r.json", '[{"a":1},\n]'))] == ["r.json:1"]
    assert rejected(read(written(tmp_path, "r.json", '[{"a":1},,{"a":2}]'))[1]) == ("r.json:1", "invalid JSON")
    assert rejected(read(written(tmp_path, "r.json", '{"x":{"a":1},,"y":{"a":2}}'))[1]) == ("r.json:1", "invalid JSON")


def test_csv_records_span_lines_and_keep_their_first_line(tmp_path: Path) -> None:
    data = 'prompt,completion\r\n"a\r\nb","say ""hi"", now"\r\n\r\nc, d \r\n"e\n\n\nf",g\n'
    items = read(written(tmp_path, "r.csv", "\ufeff" + data))
    assert values(items) == [
        {"prompt": "a\r\nb", "completion": 'say "hi", now'},
        {"prompt": "c", "completion": " d "},
        {"prompt": "e\n\n\nf", "completion": "g"},
    ]
    assert [item.source for item in items] == ["r.csv:2", "r.csv:5", "r.csv:6"]


def test_csv_rows_that_are_wrong(tmp_path: Path) -> None:
    data = (
        b'prompt,completion\na,b,c\na\n"x"y,b\nok,1\ncaf\xe9,b\n"two\nlines \xff",b\na\rb,c\n'
        b'nul\x00,b\nok,2\n"never closed,b\nok,3\n'
    )
    items = read(written(tmp_path, "r.csv", data))
    found = [rejected(item) if isinstance(item, Rejection) else item.values["completion"] for item in items]
    assert found == [
        ("r.csv:2", "wrong number of columns"),
        ("r.csv:3", "wrong number of columns"),
        ("r.csv:4", "invalid CSV"),
        "1",
        ("r.csv:6", "not UTF-8"),
        ("r.csv:7", "not UTF-8"),
        ("r.csv:9", "invalid CSV"),
        "b",
        "2",
        ("r.csv:12", "invalid CSV"),
    ]
    assert "3 columns, but 2 in line 1" in items[0].detail  # type: ignore[union-attr]
    assert "never closed" in items[-1].detail  # type: ignore[union-attr]


def test_csv_field_beyond_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    csv.field_size_limit(131072)
    long = "x" * 300_000
    assert values(read(written(tmp_path, "r.csv", f"prompt,completion\n{long},b\n")))[0]["prompt"] == long


def test_csv_headers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"r\.csv:1: the header names 'a' twice"):
        read(written(tmp_path, "r.csv", "a,a\n1,2\n"))
    with pytest.raises(DataError, match="not UTF-8"):
        read(written(tmp_path, "r.csv", b"a,\xff\n1,2\n"))
    with pytest.raises(DataError, match="holds no row"):
        read(written(tmp_path, "r.csv", "a,b\n"))
    assert values(read(written(tmp_path, "r.csv", "a,b\n1,2\n"), columns={"prompt": 0, "completion": 1})) == [
        {"0": "a", "1": "b"},
        {"0": "1", "1": "2"},
    ]
    with pytest.raises(DataError, match="asks for position 2"):
        read(written(tmp_path, "r.csv", "a,b\n"), columns={"prompt": 0, "completion": 2})


def test_tsv_quotes_nothing(tmp_path: Path) -> None:
    items = read(written(tmp_path, "r.tsv", 'p\tc\r\n"a\tb"\r\n\r\nx\ty\tz\nq\t"\n'))
    assert values([items[0], items[2]]) == [{"p": '"a', "c": 'b"'}, {"p": "q", "c": '"'}]
    assert rejected(items[1]) == ("r.tsv:4", "wrong number of columns")
    items = read(written(tmp_path, "h.tsv", "a\tb\nc\td\n"), columns={"prompt": 1, "completion": 0})
    assert values(items) == [{"0": "a", "1": "b"}, {"0": "c", "1": "d"}]
    assert items[0].source == "h.tsv:1"


def test_parquet_rows(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}] * 3000
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "r.parquet")
    items = read(tmp_path / "r.parquet")
    assert values(items) == chats
    assert items[-1].source == "r.parquet:3000"


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = [pa.array(["p"]), pa.array(["gold"]), pa.array(["other"])]
    table = pa.Table.from_arrays(columns, names=["prompt", "completion", "completion"])
    pq.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"r\.parquet: two columns are named 'completion'"):
        read(tmp_path / "r.parquet")


def test_a_parquet_value_that_is_not_utf8_is_one_row(tmp_path: Path) -> None:
    column = pa.array([b"good", b"\xff", b"fine"], type=pa.binary()).view(pa.string())
    pq.write_table(pa.table({"completion": column}), tmp_path / "r.parquet")
    items = read(tmp_path / "r.parquet")
    assert rejected(items[1]) == ("r.parquet:2", "not UTF-8")
    assert values([items[0], items[2]]) == [{"completion": "good"}, {"completion": "fine"}]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("r.parquet", b"not parquet at all"),
        ("r.parquet", b"PAR1" + b"\x00" * 100 + b"PAR1"),
        ("r.jsonl.gz", None),
        ("r.csv.gz", None),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, data: bytes | None) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 5000)[:-200] if data is None else data)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read(path)
    if name.endswith(".gz"):
        path.write_bytes(b"no gzip")
        with pytest.raises(DataError, match="not a whole gzip file"):
            read(path)


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.tsv", "r.json", "r.jsonl.gz"])
def test_empty_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="holds no row"):
        read(written(tmp_path, name, ""))


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_utf16_is_recognised(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="UTF-16"):
        read(written(tmp_path, name, '{"a": 1}'.encode("utf-16")))


def test_missing_files(tmp_path: Path) -> None:
    for path, message in (
        ("no.jsonl", "no such data file: no.jsonl"),
        ("no*.jsonl", "no file matches"),
        ("r.txt", "unknown kind of file"),
        ("r", "unknown kind of file"),
        (".", "is a folder"),
    ):
        if path.startswith("r"):
            written(tmp_path, path, "x")
        with pytest.raises(DataError, match=message) as error:
            list(read_rows(SourceConfig(path=path), base_folder=tmp_path))
        assert error.value.remedy


def test_globs_are_sorted_and_share_a_name(tmp_path: Path) -> None:
    for number in (2, 1, 3):
        written(tmp_path, f"part-{number}.jsonl", json.dumps({"n": number}) + "\n")
    items = list(read_rows(SourceConfig(path="part-*.jsonl", name="parts"), base_folder=tmp_path))
    assert [(item.source, item.source_name, item.ordinal) for item in items if isinstance(item, Row)] == [
        ("part-1.jsonl:1", "parts", 0),
        ("part-2.jsonl:1", "parts", 1),
        ("part-3.jsonl:1", "parts", 2),
    ]
    written(tmp_path, "odd[1].jsonl", '{"n": 9}')
    assert values(list(read_rows(SourceConfig(path="odd[1].jsonl"), base_folder=tmp_path))) == [{"n": 9}]


def test_positions_are_for_files_without_a_header(tmp_path: Path) -> None:
    path = written(tmp_path, "r.jsonl", '{"a": 1}')
    with pytest.raises(ConfigError, match="gives positions"):
        read(path, columns={"prompt": 0, "completion": 1})


def test_reading_is_streaming(tmp_path: Path) -> None:
    """The first row comes before a broken end of the file is met."""
    whole = gzip.compress(b'{"a": 1}\n' * 200_000)
    (tmp_path / "r.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    items = read_rows(SourceConfig(path="r.jsonl.gz"), base_folder=tmp_path)
    assert values([next(items)]) == [{"a": 1}]
    with pytest.raises(DataError, match=r"after \d+ rows"):
        list(items)


def test_rows_in_memory() -> None:
    items = list(rows_in_memory([{"a": 1}, "x", None, {"a": 2}], name="mine"))  # type: ignore[list-item]
    assert [item.source for item in items] == ["mine:0", "mine:1", "mine:2", "mine:3"]
    assert [isinstance(item, Row) for item in items] == [True, False, False, True]


def test_a_datasets_dataset_is_rows_in_memory() -> None:
    datasets = pytest.importorskip("datasets")
    assert values(list(rows_in_memory(datasets.Dataset.from_list(ROWS)))) == ROWS


def test_configuration_forms() -> None:
    for train in ("a.jsonl", {"path": "a.jsonl"}, ["a.jsonl"], [{"path": "a.jsonl"}], SourceConfig(path="a.jsonl")):
        assert DataConfig.model_validate({"train": train}).train == [SourceConfig(path="a.jsonl")]
    assert SourceConfig(path="x", columns={"prompt": 0, "completion": 1}).columns == {"prompt": 0, "completion": 1}


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"path": ""},
        {"path": "x", "weight": 0},
        {"path": "x", "weight": float("inf")},
        {"path": "x", "repeat": -1},
        {"path": "x", "limit": 0},
        {"path": "x", "columns": {"promt": "a"}},
        {"path": "x", "columns": {"prompt": -1}},
        {"path": "x", "columns": {"prompt": True}},
        {"path": "x", "columns": {"prompt": 0, "completion": "b"}},
        {"path": "x", "colums": {}},
        {"path": "x", "format": "alpacca"},
        {"path": "x", "split": "train"},
        {"path": "x", "revision": "main"},
        {"path": "hf:openai/gsm8k"},
        {"path": "hf:", "split": "train"},
    ],
)
def test_configuration_mistakes(source: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SourceConfig.model_validate(source)


def test_source_names() -> None:
    assert source_name(SourceConfig(path="a/b.train.jsonl.gz")) == "b.train"
    assert source_name(SourceConfig(path="a/b.csv", name="n")) == "n"
    assert source_name(SourceConfig(path="hf:openai/gsm8k-v1.5", split="train")) == "gsm8k-v1.5"
    assert source_name(SourceConfig(path="hf:gsm8k", split="train")) == "gsm8k"


def test_shown_values_are_short_and_printable() -> None:
    assert len(shorten("x" * 10**6)) == 60
    assert shorten("\ud800\n") == r"'\ud800\n'"
    assert shorten(10**10_000) == "<int>"
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert len(shorten(nested)) <= 60
    while nested:  # take it apart: freeing it at once would recurse
        nested = nested[0]  # type: ignore[assignment]
