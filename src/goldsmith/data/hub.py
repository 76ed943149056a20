"""Data sets of the Hugging Face hub, through the `datasets` library: `path: hf:NAME` of a source. Needs the extra `hub`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from goldsmith.data.config import HUB_PREFIX, Columns, SourceConfig, source_name
from goldsmith.data.rows import Rejection, Row, shorten
from goldsmith.errors import ConfigError, DataError

__all__ = ["hub_revision", "hub_rows", "shown_hub_source"]


def shown_hub_source(source: SourceConfig) -> str:
    """The source as messages show it: `hf:openai/gsm8k/main/train`."""
    return "/".join(part for part in (source.path, source.subset, source.split) if part)


def hub_revision(source: SourceConfig) -> str | None:
    """The source's own `revision`; where it names none, the commit that is the newest now.

    None for a folder on this machine, and where the hub cannot be reached: then only what was fetched before can be read.

    Raises:
        ConfigError: the extra is not installed.
        DataError: the hub knows no such data set.
    """
    name = source.path.removeprefix(HUB_PREFIX)
    if source.revision is not None or Path(name).is_dir():
        return source.revision
    _import_datasets(source)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().dataset_info(name).sha
    except (HfHubHTTPError, HFValidationError) as error:
        raise _unreadable(source, error) from error
    except Exception:  # no network; whose error that is differs between versions of huggingface_hub
        return None


def hub_rows(source: SourceConfig, *, columns: Columns | None = None, ordinal: int = 0) -> Iterator[Row | Rejection]:
    """All rows of a hub data set, one after another; the place of a row is `hf:NAME/SPLIT:row`, counted from 1.

    Raises:
        ConfigError: the extra is not installed, or columns are given by position.
        DataError: there is no such data set, it cannot be fetched, or it holds no row.
    """
    shown = shown_hub_source(source)
    if any(isinstance(column, int) for column in (columns or {}).values()):
        raise ConfigError(
            f"columns {columns} gives positions, but {shown} has names",
            remedy="positions are for CSV and TSV files without a header; give the names of the fields instead",
        )
    count = 0
    try:
        for values in _open(source):
            count += 1
            yield Row(values=values, source=f"{shown}:{count}", source_name=source_name(source), ordinal=ordinal)
            ordinal += 1
    except (ConfigError, DataError):
        raise
    except Exception as error:  # `datasets` raises many kinds, those of Arrow and of the network among them
        raise _unreadable(source, error) from error
    if count == 0:
        raise DataError(f"{shown} holds no row", remedy="take it out of the sources")


def _open(source: SourceConfig) -> Iterator[Mapping[str, object]]:
    datasets = _import_datasets(source)
    opened = datasets.load_dataset(
        source.path.removeprefix(HUB_PREFIX),
        name=source.subset,
        split=source.split,
        revision=source.revision,
        streaming=source.streaming,
    )
    return cast("Iterator[Mapping[str, object]]", iter(opened))


def _import_datasets(source: SourceConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"the source {source.path} is a data set of the hub, but the library `datasets` is not installed",
            remedy="install the extra: pip install 'goldsmith[hub]'",
        ) from error
    return datasets


def _unreadable(source: SourceConfig, error: Exception) -> DataError:
    return DataError(
        f"{shown_hub_source(source)} cannot be read: {type(error).__name__}: {shorten(str(error).strip(), 300)}",
        remedy="check `path`, `subset`, `split` and `revision` of the source, and that the hub can be reached",
    )
