"""Tokenised rows kept from one run to the next, found again by the content of all that they were made of.

An entry is one split: the flat arrays of its `Dataset`, its ids and places, and its report. Its name is a hash over the bytes of
the source files, the tokenizer, the chat template, every option that changes a row, and the code and libraries that make
rows of them. So nothing has to be declared out of date: what differs has another name, and old entries are removed when there is no
room. There is no pickle in an entry, and one whose checksum is wrong is made again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from goldsmith.data.config import DataConfig, SourceConfig
from goldsmith.data.dataset import Dataset
from goldsmith.data.loader import load_dataset
from goldsmith.data.rendering import Renderer
from goldsmith.data.rows import source_files
from goldsmith.errors import DataError
from goldsmith.records import DataReport, FileReport
from goldsmith.storage import free_bytes, sha256_file

__all__ = ["MIN_SOURCE_BYTES", "RowCache", "default_cache_folder", "load_cached_dataset"]

# Of the layout of an entry.
_SCHEMA: Final = 2
# Files smaller than this, together, are read as fast as an entry is found; the user's own folder is asked for, and takes them all.
MIN_SOURCE_BYTES: Final = 1 << 20
_MAX_BYTES: Final = 20 << 30
# An entry is written only where so many of its size are free: checkpoints matter more.
_FREE_SIZES: Final = 4
# What a process that died left behind.
_STALE_SECONDS: Final = 24 * 3600
_LIBRARIES: Final = ("tokenizers", "transformers", "jinja2", "numpy", "pyarrow", "datasets")
# What a template may write differently each time.
_CHANGING: Final = re.compile(r"\|\s*random\b|\blipsum\b")
# A bound of time may have been met; another day it is not.
_PASSING_REASONS: Final = frozenset({"refused by the chat template"})
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_ARRAYS: Final = (
    "token_ids",
    "target_weights",
    "lengths",
    "example_weights",
    "groups",
    "repeats",
    "num_bytes",
    "source_indices",
    "turn_counts",
    "turn_begins",
    "turn_numbers",
    "turn_roles",
)


def default_cache_folder() -> Path:
    """Within `XDG_CACHE_HOME`, else `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()) / "goldsmith" / "rows"


@dataclass(frozen=True, kw_only=True)
class RowCache:
    """A folder of entries, which several processes may use at once.

    Attributes:
        folder: made when the first entry is written, for its owner alone.
        min_source_bytes: what the files of a split have together, to be kept.
        max_bytes: of all entries; those that were not used for the longest time go first.
        note: told what was found, and what could not be kept.
    """

    folder: Path
    min_source_bytes: int = 0
    max_bytes: int = _MAX_BYTES
    note: Callable[[str], None] = lambda line: None

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def load(self, key: str, renderer: Renderer) -> Dataset | None:
        """The data set of an entry; None where there is none, or where it is damaged (then it is removed)."""
        path = self.path(key)
        try:
            dataset, end_ids = _read(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            self.note(f"the kept rows {path} are damaged ({type(error).__name__}: {error}); made again from the files")
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        renderer.seen_end_ids.update(end_ids)
        with contextlib.suppress(OSError):
            os.utime(path)  # when it was last used
        return dataset

    def store(self, key: str, dataset: Dataset, renderer: Renderer) -> None:
        """Write an entry, and remove old ones where there are too many bytes. A disk that refuses stops nothing."""
        path = self.path(key)
        arrays = _arrays_of(dataset, renderer)
        size = sum(array.nbytes for array in arrays.values())
        if path.exists() or size > self.max_bytes:
            return
        temporary: str | None = None
        try:
            if free_bytes(self.folder) < _FREE_SIZES * size:
                self.note(f"rows are not kept: {self.folder} has too little room")
                return
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A name of its own for each writer; the last rename wins, and all write the same.
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{key[:16]}-", suffix=".tmp")
            os.close(handle)
            save_file(arrays, temporary, metadata={"sha256": _digest(arrays)})
            os.replace(temporary, path)  # not forced to the disk: what a crash leaves torn, the checksum finds
        except (OSError, SafetensorError) as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            self.note(f"rows are not kept: {self.folder}: {error}")
            return
        self._trim(keep=path)

    def _trim(self, *, keep: Path) -> None:
        """Remove the entries that were not used for the longest time, and what dead processes left."""
        entries = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process trims as well
                facts = path.stat()
                if path.suffix == ".safetensors":
                    entries.append((facts.st_mtime, facts.st_size, path))
                elif path.suffix == ".tmp" and time.time() - facts.st_mtime > _STALE_SECONDS:
                    path.unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.max_bytes:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def load_cached_dataset(
    sources: Sequence[SourceConfig],
    *,
    config: DataConfig,
    renderer: Renderer,
    split: Literal["train", "eval", "rows"],
    base_folder: Path = Path(),
    parts_share_weight: bool = False,
    cache: RowCache,
) -> Dataset:
    """As `load_dataset`, from the cache where it has the split; what is read is kept there.

    Raises:
        DataError, ConfigError: as `load_dataset`.
    """
    key = _key(
        sources,
        config=config,
        renderer=renderer,
        split=split,
        base_folder=base_folder,
        parts_share_weight=parts_share_weight,
        min_source_bytes=cache.min_source_bytes,
    )
    if key is not None and (kept := cache.load(key.name, renderer)) is not None:
        cache.note(f"{'held-out' if split == 'eval' else 'training'} data: from the cache, {cache.path(key.name)}")
        return kept
    dataset = load_dataset(
        sources,
        config=config,
        renderer=renderer,
        split=split,
        base_folder=base_folder,
        parts_share_weight=parts_share_weight,
    )
    # A file may have changed between the two readings: then the key is not that of these rows.
    if (
        key is not None
        and _PASSING_REASONS.isdisjoint(dataset.report.rejected)
        and [file.sha256 for file in dataset.report.files if file.sha256 is not None] == key.hashes
    ):
        cache.store(key.name, dataset, renderer)
    return dataset


@dataclass(frozen=True, kw_only=True)
class _Key:
    """The name of an entry, and the SHA-256 of each file that is in it."""

    name: str
    hashes: list[str]


def _key(
    sources: Sequence[SourceConfig],
    *,
    config: DataConfig,
    renderer: Renderer,
    split: str,
    base_folder: Path,
    parts_share_weight: bool,
    min_source_bytes: int,
) -> _Key | None:
    """None where the rows are not a function of what can be hashed, or are too few."""
    tokenizer = tokenizer_fingerprint(renderer.tokenizer)
    # The text that renders chats; a tokenizer may have several.
    template = json.dumps(renderer.chat_template or renderer.tokenizer.chat_template)
    if tokenizer is None or _CHANGING.search(template) or (renderer.reads_date and renderer.config.date is None):
        return None
    files: list[list[str]] = []
    num_bytes = 0
    for source in sources:
        if source.streaming:
            return None
        if source.is_hub:
            if source.revision is None or not _COMMIT.fullmatch(source.revision):
                return None
            num_bytes += min_source_bytes  # it lies elsewhere; a download is worth keeping
            continue
        try:
            found = source_files(source, base_folder=base_folder)
            num_bytes += sum(path.stat().st_size for _, path in found)
            files += [[shown, sha256_file(path)] for shown, path in found]
        except (DataError, OSError):
            return None  # reading says what is wrong
    if num_bytes < min_source_bytes:
        return None
    parts = {
        "schema": _SCHEMA,
        "goldsmith": metadata.version("goldsmith"),
        "code": _code_fingerprint(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "split": split,
        "sources": [source.model_dump(mode="json") for source in sources],
        "files": files,
        "data": config.model_dump(mode="json", exclude={"train", "eval", "cache", "order", "max_length"}),
        # As it is resolved: a run that goes on has the number where the recipe that began it has null.
        "max_length": renderer.max_length,
        "keeps_long_rows": renderer.keeps_long_rows,
        "parts_share_weight": parts_share_weight,
        "rendering": renderer.config.model_dump(mode="json", exclude={"chat_template"}),
        "template": template,
        "tokenizer": tokenizer,
        # What earlier rows taught the renderer counts for rows that come tokenised.
        "seen_end_ids": sorted(renderer.seen_end_ids),
    }
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return _Key(name=name, hashes=[digest for _, digest in files])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 over all that decides about a text's ids; None for a tokenizer that cannot be written down."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    try:
        backend = tokenizer.backend_tokenizer.to_str()
    except Exception:  # parts written in Python
        return None
    specials = {name: str(value) for name, value in sorted(tokenizer.special_tokens_map.items())}
    added = {index: repr(token) for index, token in sorted(tokenizer.added_tokens_decoder.items())}
    settings = [
        type(tokenizer).__name__,
        tokenizer.split_special_tokens,
        tokenizer.clean_up_tokenization_spaces,
        len(tokenizer),
    ]
    digest = hashlib.sha256(json.dumps([specials, added, settings]).encode())
    digest.update(backend.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@functools.cache
def _code_fingerprint() -> str:
    """Of the code that makes rows, so that no version has to be remembered to be counted up while it is worked on."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _arrays_of(dataset: Dataset, renderer: Renderer) -> dict[str, npt.NDArray[Any]]:
    facts = {
        "source_names": dataset.source_names,
        "role_names": dataset.role_names,
        "num_unknown_tokens": dataset.num_unknown_tokens,
        "report": dataset.report.to_json(),
        "seen_end_ids": sorted(renderer.seen_end_ids),
    }
    texts = {"example_ids": dataset.example_ids, "sources": dataset.sources, "facts": facts}
    arrays: dict[str, npt.NDArray[Any]] = {name: np.ascontiguousarray(getattr(dataset, name)) for name in _ARRAYS}
    arrays |= {name: np.frombuffer(json.dumps(value).encode("ascii"), dtype=np.uint8) for name, value in texts.items()}
    return arrays


def _digest(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[Dataset, list[int]]:
    """The data set of a file, and the end tokens that its rows showed.

    Raises:
        OSError, SafetensorError, ValueError, KeyError, TypeError: no such file, or not what was written.
    """
    expected = _header(path)["sha256"]
    arrays = load_file(path)
    if _digest(arrays) != expected:
        raise ValueError("its checksum differs")
    example_ids, sources, facts = (json.loads(arrays[name].tobytes()) for name in ("example_ids", "sources", "facts"))
    report = DataReport(
        files=[FileReport.from_json(file) for file in facts["report"]["files"]],
        rejections=facts["report"]["rejections"],
    )
    dataset = Dataset.of_arrays(
        {name: arrays[name] for name in _ARRAYS},
        example_ids=example_ids,
        sources=sources,
        source_names=facts["source_names"],
        role_names=facts["role_names"],
        num_unknown_tokens=facts["num_unknown_tokens"],
        report=report,
    )
    return dataset, facts["seen_end_ids"]


def _header(path: Path) -> dict[str, str]:
    """What was written beside the arrays."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("its header is cut")
        found: dict[str, str] = json.loads(file.read(size))["__metadata__"]
    return found
