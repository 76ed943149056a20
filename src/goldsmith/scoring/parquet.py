"""Score files in Parquet: the columns are the fields of the JSON rows, `tokens` a list of structs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from goldsmith.errors import DataError

__all__ = ["read_parquet_rows", "write_parquet_rows"]

_ROWS_PER_GROUP = 1024
# Lists without names in JSON are structs here.
_NAMES = {"alternatives": ("token_id", "text", "log_prob"), "turns": ("begin", "number", "role")}


def _schema() -> Any:
    import pyarrow as pa

    alternative = pa.struct([("token_id", pa.int64()), ("text", pa.string()), ("log_prob", pa.float64())])
    turn = pa.struct([("begin", pa.int64()), ("number", pa.int64()), ("role", pa.string())])
    token = pa.struct(
        [
            ("token_id", pa.int64()),
            ("text", pa.string()),
            ("log_prob", pa.float64()),
            ("weight", pa.float64()),
            ("rank", pa.int64()),
            ("best_log_prob", pa.float64()),
            ("entropy", pa.float64()),
            ("alternatives", pa.list_(alternative)),
        ]
    )
    return pa.schema(
        [
            ("example_id", pa.string()),
            ("source", pa.string()),
            ("source_name", pa.string()),
            ("log_prob", pa.float64()),
            ("num_target_tokens", pa.int64()),
            ("num_bytes", pa.int64()),
            ("weighted_log_prob", pa.float64()),
            ("weight_sum", pa.float64()),
            ("context_tokens", pa.int64()),
            ("context", pa.string()),
            ("log_prob_without_context", pa.float64()),
            ("turns", pa.list_(turn)),
            ("tokens", pa.list_(token)),
        ]
    )


def write_parquet_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the JSON rows of a score file, a row group of 1,024 at a time. The same rows give the same bytes.

    Half a surrogate pair, which Parquet's text cannot hold, becomes the replacement character.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        stream = iter(rows)
        while group := [_storable(dict(row)) for row in islice(stream, _ROWS_PER_GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def read_parquet_rows(path: str | Path) -> Iterator[tuple[int, object]]:
    """The rows from 1, as their JSON would be: what is null is left out.

    Raises:
        DataError: the file cannot be read, or is not Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: the score file cannot be read: {reason}") from error


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {
            key: [dict(zip(_NAMES[key], _storable(item), strict=True)) for item in inner]
            if key in _NAMES
            else _storable(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
