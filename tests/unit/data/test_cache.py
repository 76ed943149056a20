"""The cache of tokenised rows: found again only where nothing changed, and then the same to the bit."""

from __future__ import annotations

import copy
import gzip
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import CHATML, learnt
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from goldsmith.data import cache as cache_module
from goldsmith.data.cache import RowCache, default_cache_folder, load_cached_dataset, tokenizer_fingerprint
from goldsmith.data.config import DataConfig
from goldsmith.data.dataset import Dataset
from goldsmith.data.loader import load_dataset
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.errors import DataError
from goldsmith.storage import sha256_file

ROWS: list[dict[str, object]] = [
    {"id": f"r{n}", "prompt": f"What is {n}?", "completion": f"It is {n}, I think."} for n in range(12)
]
CHATS: list[dict[str, object]] = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(4)
]
ARRAYS = (
    *("token_ids", "target_weights", "offsets", "lengths", "num_target_tokens", "weight_sums", "example_weights"),
    *("groups", "repeats", "num_bytes", "source_indices"),
    *("turn_counts", "turn_begins", "turn_numbers", "turn_roles"),
)


class Case:
    """Everything that a load depends on, to be changed one by one."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, object]] = ROWS) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.file = folder / "rows.jsonl"
        self.write(rows)
        self.data: dict[str, Any] = {"train": [{"path": "rows.jsonl"}], "on_bad_row": "skip"}
        self.rendering: dict[str, Any] = {}
        self.max_length: int | None = None
        self.split: Any = "train"
        self.parts_share_weight = False
        self.notes: list[str] = []
        self.cache = RowCache(folder=folder / "cache", note=self.notes.append)
        self.renderer = Renderer(tokenizer, RenderingConfig(), None)

    def write(self, rows: list[dict[str, object]]) -> None:
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(self, *, cached: bool = True) -> Dataset:
        config = DataConfig.model_validate(self.data)
        self.renderer = Renderer(
            self.tokenizer, RenderingConfig.model_validate(self.rendering), self.max_length, keeps_long_rows=True
        )
        given: dict[str, Any] = {
            "config": config,
            "renderer": self.renderer,
            "split": self.split,
            "base_folder": self.folder,
            "parts_share_weight": self.parts_share_weight,
        }
        self.notes.clear()
        if cached:
            return load_cached_dataset(config.train, cache=self.cache, **given)
        return load_dataset(config.train, **given)

    @property
    def entries(self) -> set[str]:
        return {path.name for path in self.cache.folder.glob("*")} if self.cache.folder.exists() else set()

    @property
    def was_hit(self) -> bool:
        return any("from the cache" in note for note in self.notes)


@pytest.fixture
def case(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> Case:
    return Case(tmp_path, bpe)


def assert_same(one: Dataset, other: Dataset) -> None:
    for name in ARRAYS:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype, name
        assert a.tobytes() == b.tobytes(), name
    assert one.example_ids == other.example_ids
    assert one.sources == other.sources
    assert one.source_names == other.source_names
    assert one.role_names == other.role_names
    assert one.num_unknown_tokens == other.num_unknown_tokens
    assert json.dumps(one.report.to_json()) == json.dumps(other.report.to_json())  # the order of reasons, too
    assert one.report == other.report
    assert one.fingerprint() == other.fingerprint()
    assert [example.example_id for example in one[:3]] == [example.example_id for example in other[:3]]


def test_a_hit_is_the_same_to_the_bit(case: Case) -> None:
    lines = [json.dumps(row) for row in ROWS]
    lines[1:1] = ["{broken", '{"prompt": "p"}', json.dumps({"prompt": "p", "completion": "long " * 90})]
    case.file.write_text("\n".join(lines))
    case.data |= {"on_too_long": "split", "train": [{"path": "rows.jsonl", "weight": 2.5, "repeat": 1.5, "limit": 11}]}
    case.max_length = 60
    plain, first = case.load(cached=False), case.load()
    assert not case.was_hit
    again = case.load()
    assert case.was_hit
    assert len(case.entries) == 1
    assert plain.report.rejected
    assert plain.report.files[0].split == 1
    assert plain.report.files[0].over_limit > 0
    assert_same(plain, first)
    assert_same(plain, again)


CHANGES: dict[str, Callable[[Case], object]] = {
    "a byte of the file": lambda case: case.write([*ROWS[:-1], {**ROWS[-1], "completion": "It is 12."}]),
    "a row more": lambda case: case.write([*ROWS, {"prompt": "a", "completion": "b"}]),
    "weight": lambda case: case.data.update(train=[{"path": "rows.jsonl", "weight": 2.0}]),
    "repeat": lambda case: case.data.update(train=[{"path": "rows.jsonl", "repeat": 2.0}]),
    "limit": lambda case: case.data.update(train=[{"path": "rows.jsonl", "limit": 3}]),
    "name": lambda case: case.data.update(train=[{"path": "rows.jsonl", "name": "other"}]),
    "columns": lambda case: case.data.update(columns={"prompt": "completion", "completion": "prompt"}),
    "format": lambda case: case.data.update(format="prompt_completion"),
    "on_bad_row": lambda case: case.data.update(on_bad_row="stop"),
    "on_too_long": lambda case: case.data.update(on_too_long="drop"),
    "end_token_after_cut": lambda case: case.data.update(end_token_after_cut=True),
    "max_length": lambda case: setattr(case, "max_length", 24),
    "split": lambda case: setattr(case, "split", "eval"),
    "parts_share_weight": lambda case: setattr(case, "parts_share_weight", True),
    "boundary": lambda case: case.rendering.update(boundary="joint"),
    "separator": lambda case: case.rendering.update(separator="\n"),
    "append_end_token": lambda case: case.rendering.update(append_end_token=False),
    "train_on": lambda case: case.rendering.update(train_on="all"),
    "first_tokens": lambda case: case.rendering.update(first_tokens=2, first_tokens_weight=0.5),
    "chat_template": lambda case: case.rendering.update(chat_template="chatml"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_a_row_makes_another_entry(case: Case, name: str) -> None:
    case.load()
    CHANGES[name](case)
    changed = case.load()
    assert not case.was_hit
    assert len(case.entries) == 2
    assert_same(changed, case.load(cached=False))
    assert_same(changed, case.load())
    assert case.was_hit


def test_a_key_holds_every_option_of_rendering() -> None:
    """One that is added later is in the key by itself: the whole config is, but for what is read from elsewhere."""
    dumped = RenderingConfig().model_dump(mode="json", exclude={"chat_template"})
    assert set(RenderingConfig.model_fields) - set(dumped) == {"chat_template"}


def test_the_tokenizer_is_part_of_the_key(case: Case) -> None:
    case.load()
    fingerprints = {tokenizer_fingerprint(case.tokenizer)}
    for change in (
        lambda tokenizer: tokenizer.add_tokens([AddedToken(" is", normalized=False)]),
        lambda tokenizer: setattr(tokenizer, "eos_token", "<|im_end|>"),
        lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
    ):
        case.tokenizer = copy.deepcopy(learnt("bpe"))
        change(case.tokenizer)
        fingerprints.add(tokenizer_fingerprint(case.tokenizer))
        changed = case.load()
        assert not case.was_hit
        assert_same(changed, case.load(cached=False))
    assert len(fingerprints) == 4
    assert len(case.entries) == 4


def test_code_and_versions_are_part_of_the_key(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.load()
    for number, (name, value) in enumerate(
        {"_SCHEMA": 99, "_code_fingerprint": lambda: "other", "_version": lambda library: "0"}.items()
    ):
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, name, value)
            case.load()
            assert not case.was_hit
            assert len(case.entries) == 2 + number
    with monkeypatch.context() as patch:
        real = cache_module.metadata.version
        patch.setattr(cache_module.metadata, "version", lambda name: "99.0" if name == "goldsmith" else real(name))
        case.load()
        assert not case.was_hit
    case.load()
    assert case.was_hit


def test_chats_by_the_text_of_their_template(
    tmp_path: Path, bpe: PreTrainedTokenizerFast, template_file: Callable[[str], str]
) -> None:
    case = Case(tmp_path, bpe, CHATS)
    case.rendering["chat_template"] = template_file(CHATML)
    plain = case.load(cached=False)
    ends = case.renderer.end_token_ids
    case.load()
    assert_same(plain, case.load())
    assert case.was_hit
    # What a server has to stop at was learnt from the rows, and is not forgotten where none was rendered.
    assert case.renderer.end_token_ids == ends
    assert case.renderer.seen_end_ids
    template_file("A chat.\n" + CHATML)
    assert_same(case.load(), case.load(cached=False))
    assert not case.was_hit
    assert len(case.entries) == 2
    # A template that is told the time writes another text tomorrow.
    template_file("{{ strftime_now('%Y') }}" + CHATML)
    case.load()
    assert len(case.entries) == 2
    case.rendering["date"] = "2026-01-01"
    case.load()
    assert len(case.entries) == 3
    case.rendering["date"] = "2027-01-01"
    assert_same(case.load(), case.load(cached=False))
    assert not case.was_hit
    assert len(case.entries) == 4
    template_file("{{ ['one to draw from'] | random }}" + CHATML)
    case.load()
    assert len(case.entries) == 4


def test_rows_that_were_refused_by_the_template_are_not_kept(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    case = Case(tmp_path, bpe, [*CHATS, {"messages": [{"role": "user", "content": "no"}, *CHATS[0]["messages"]]}])  # type: ignore[misc]
    path = tmp_path / "strict.jinja"
    path.write_text("{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + CHATML)
    case.rendering["chat_template"] = str(path)
    assert case.load().report.rejected == {"refused by the chat template": 1}
    assert case.entries == set()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "header"])
def test_a_damaged_entry_is_said_and_made_again(case: Case, damage: str) -> None:
    plain = case.load()
    [path] = case.cache.folder.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-40] ^= 1
    elif damage == "header":
        data[:8] = b"\xff" * 8
    path.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(damage, len(data))])
    assert_same(plain, case.load())
    assert not case.was_hit
    assert any("damaged" in note for note in case.notes)
    assert_same(plain, case.load())
    assert case.was_hit


def test_old_entries_make_room(case: Case) -> None:
    case.load()
    [oldest] = case.cache.folder.iterdir()
    size = oldest.stat().st_size
    case.cache = replace(case.cache, max_bytes=int(2.5 * size))
    left = case.cache.folder / ".dead-writer.tmp"
    left.touch()
    os.utime(left, (0, 0))
    case.rendering["separator"] = "\n"
    case.load()
    [second] = [path for path in case.cache.folder.glob("*.safetensors") if path != oldest]
    os.utime(second, (time.time() - 50, time.time() - 50))
    case.rendering["separator"] = ""
    case.load()  # used again, so that the second is the older one
    case.rendering["separator"] = "\t"
    case.load()
    assert oldest.exists()
    assert not second.exists()
    assert not left.exists()
    assert len(case.entries) == 2


def test_a_disk_that_refuses_stops_nothing(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("no folder")
    case.cache = replace(case.cache, folder=tmp_path / "occupied" / "rows")
    assert len(case.load()) == len(ROWS)
    assert any("not kept" in note for note in case.notes)
    case.cache = replace(case.cache, folder=tmp_path / "full")
    monkeypatch.setattr(cache_module, "free_bytes", lambda folder: 1000)
    assert len(case.load()) == len(ROWS)
    assert any("too little room" in note for note in case.notes)
    assert not (tmp_path / "full").exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed_then_changed(path: Path) -> str:
        digest = sha256_file(path)
        case.write(ROWS[:5])
        return digest

    monkeypatch.setattr(cache_module, "sha256_file", hashed_then_changed)
    assert len(case.load()) == 5
    assert case.entries == set()


def test_writers_of_the_same_entry_do_not_meet(case: Case) -> None:
    dataset = case.load()
    [path] = case.cache.folder.iterdir()
    failures: list[BaseException] = []

    def write_and_read() -> None:
        try:
            for _ in range(8):
                path.unlink(missing_ok=True)
                case.cache.store(path.stem, dataset, case.renderer)
                found = case.cache.load(path.stem, case.renderer)
                assert found is None or found.fingerprint() == dataset.fingerprint()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write_and_read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not any("damaged" in note or "not kept" in note for note in case.notes)
    assert not [name for name in case.entries if name.endswith(".tmp")]


def test_what_is_not_kept(case: Case, slow_tokenizer: Any) -> None:
    case.cache = replace(case.cache, min_source_bytes=1 << 20)
    case.load()  # small
    case.cache = replace(case.cache, min_source_bytes=0)
    case.data["train"] = [{"path": "rows.jsonl", "streaming": True, "limit": 3}]
    case.load()
    case.data["train"] = [{"path": "absent.jsonl"}]
    with pytest.raises(DataError, match="no such data file"):
        case.load()
    case.data["train"] = [{"path": "rows.jsonl"}]
    case.write([{"prompt": "p"}, *ROWS])
    case.data["on_bad_row"] = "stop"
    with pytest.raises(DataError, match="1 of 13 rows"):
        case.load()
    assert tokenizer_fingerprint(slow_tokenizer) is None
    assert case.entries == set()


def test_gzipped_files_and_several_sources(case: Case, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "More?", "completion": "No."}) + "\n")
    case.data["train"] = [{"path": "rows.jsonl"}, {"path": "*.gz", "name": "more"}]
    plain = case.load(cached=False)
    case.load()
    assert_same(plain, case.load())
    assert case.was_hit
    assert np.unique(plain.source_indices).tolist() == [0, 1]


def test_the_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: Case) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "goldsmith" / "rows"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_folder() == Path("/home/someone/.cache/goldsmith/rows")
    case.load()
    assert case.cache.folder.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def slow_tokenizer() -> Any:
    class Slow:
        special_tokens_map: dict[str, str] = {}  # noqa: RUF012

    return Slow()
