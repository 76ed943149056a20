"""Examples on the disk are those of the data set in memory, whatever the blocks; what is refused leaves nothing."""

from __future__ import annotations

import errno
import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from goldsmith.data import example_ids, spool
from goldsmith.data.config import DataConfig
from goldsmith.data.dataset import Dataset
from goldsmith.data.loader import load_dataset, spool_dataset
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.spool import ExampleSpool
from goldsmith.errors import DataError, MachineError
from goldsmith.types import GoldTurn


def characters() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


TOKENIZER = characters()
# Short rows, one of three parts where it is split, one too long to be kept by `drop`.
ROWS: list[dict[str, Any]] = [
    {"prompt": f"{n}", "completion": "x" * (1 + n % 5), "weight": 1 + n % 2} for n in range(20)
]
ROWS[7] = {"id": "long", "prompt": "long", "completion": "y" * 25}


def read(
    rows: Any, *, on_disk: bool, folder: Path | None = None, train_on: tuple[str, ...] = ("assistant",), **settings: Any
) -> Any:
    config = DataConfig.model_validate(settings)
    renderer = Renderer(TOKENIZER, RenderingConfig(train_on=train_on), 14, keeps_long_rows=True)
    if on_disk:
        return spool_dataset(rows, config=config, renderer=renderer, split="rows", folder=folder)
    return load_dataset(rows, config=config, renderer=renderer, split="rows")


@pytest.fixture(params=[(1, 1 << 18), (3, 1 << 18), (1024, 20)], ids=["a row", "three rows", "twenty tokens"])
def _small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_ROWS_A_BLOCK", request.param[0])
    monkeypatch.setattr(spool, "_TOKENS_A_BLOCK", request.param[1])


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("train_on", [("assistant",), ("user", "assistant")])
@pytest.mark.parametrize("policy", ["split", "drop", "right"])
def test_what_lies_on_the_disk_is_the_data_set(policy: str, train_on: tuple[str, ...]) -> None:
    held: Dataset = read(ROWS, on_disk=False, on_too_long=policy, train_on=train_on)
    assert {turn.role for example in held for turn in example.turns} == set(train_on)
    with read((row for row in ROWS), on_disk=True, on_too_long=policy, train_on=train_on) as found:
        assert isinstance(found, ExampleSpool)
        assert found.report.to_json() == held.report.to_json()
        assert (len(found), found.longest, found.num_rows) == (len(held), held.longest, len(set(held.groups.tolist())))
        for first in range(len(held) + 1):
            pairs = list(zip(found.numbered(first), held.numbered(first), strict=True))
            assert len(pairs) == len(held) - first
            for (row, example), (expected_row, expected) in pairs:
                assert row == expected_row
                for name in ("example_id", "source", "example_weight", "num_bytes", "turns"):
                    assert getattr(example, name) == getattr(expected, name)
                np.testing.assert_array_equal(example.token_ids, expected.token_ids)
                np.testing.assert_array_equal(example.target_weights, expected.target_weights)


def test_the_fingerprint_is_of_the_rows_and_not_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(rows: list[dict[str, Any]]) -> str:
        with read(rows, on_disk=True, on_too_long="split") as found:
            return str(found.fingerprint())

    whole = fingerprint(ROWS)
    monkeypatch.setattr(spool, "_ROWS_A_BLOCK", 3)
    assert fingerprint(ROWS) == whole
    for change in ({"completion": "z"}, {"weight": 3.0}, {"id": "another"}):
        assert fingerprint([*ROWS[:-1], {**ROWS[-1], **change}]) != whole
    # Whose words they are is in the sums, too.
    own = []
    for role in ("user", "tool"):
        with ExampleSpool() as found:
            turns = (GoldTurn(begin=1, number=1, role=role),)
            found.add("r", "rows:0", [replace(read(ROWS[:1], on_disk=False)[0], turns=turns)])
            own.append(found.fingerprint())
    assert own[0] != own[1]


@pytest.mark.usefixtures("_small_blocks")
def test_an_id_that_is_taken_is_told_with_its_place() -> None:
    """Of a row, of a part, and of a row that was dropped; of as many as the message shows."""
    own = [{**row, "id": f"r{n}"} for n, row in enumerate(ROWS)]
    own[3]["completion"] = "z" * 30
    for policy, taken in (("split", "r3"), ("split", "r3#2"), ("drop", "r3"), ("drop", "r5")):
        rows = [*own, *({"id": taken, "prompt": "p", "completion": f"{n}"} for n in range(5))]
        with pytest.raises(DataError) as expected:
            read(rows, on_disk=False, on_too_long=policy)
        with pytest.raises(DataError) as raised:
            read(rows, on_disk=True, on_too_long=policy)
        assert str(raised.value) == str(expected.value)
        assert f"is also that of rows:{taken[1]}" in str(raised.value)


def test_a_bad_row_at_the_end_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 21 rows of the data cannot be used"):
        read([*ROWS, {"prompt": "no gold"}], on_disk=True, folder=tmp_path, on_too_long="split")
    with read(
        [*ROWS, {"prompt": "none"}], on_disk=True, folder=tmp_path, on_too_long="split", on_bad_row="skip"
    ) as found:
        assert sum(found.report.rejected.values()) == 1
        assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("r+b"))  # noqa: SIM115
    with read(ROWS, on_disk=True, folder=tmp_path, on_too_long="split") as found, pytest.raises(MachineError) as raised:
        list(found.numbered())
    assert f"{tmp_path}: the tokenised rows cannot be kept there" in str(raised.value)
    monkeypatch.undo()
    with pytest.raises(MachineError, match="No such file"):
        ExampleSpool(tmp_path / "none")

    # No folder for temporary files is left, not even the current one.
    def found_none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(spool.tempfile, "gettempdir", found_none)
    with pytest.raises(MachineError, match=r"^the tokenised rows cannot be kept while they are scored: No usable"):
        ExampleSpool()


def test_memory_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bytes of its id while it is read, and next to nothing while it is read back."""
    # The newest ids are a set until they fill a block: both measurements are taken just after one was filled.
    monkeypatch.setattr(example_ids, "_IDS_A_BLOCK", 1024)
    monkeypatch.setattr(spool, "_ROWS_A_BLOCK", 128)
    first, num_rows = 2 * 1024 + 10, 6 * 1024 + 10
    held: dict[int, int] = {}
    add = ExampleSpool.add

    def watched(self: ExampleSpool, row_id: str, place: str, examples: Any) -> None:
        add(self, row_id, place, examples)
        if len(self) in (first, num_rows):
            held[len(self)] = tracemalloc.get_traced_memory()[0]

    monkeypatch.setattr(ExampleSpool, "add", watched)

    def rows() -> Iterator[dict[str, str]]:
        for number in range(num_rows):
            yield {"prompt": f"{number}", "completion": f"{number}"}

    tracemalloc.start()
    try:
        with read(rows(), on_disk=True, folder=tmp_path) as found:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            count = sum(1 for _ in found.numbered())
            of_reading = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert count == num_rows
    assert (held[num_rows] - held[first]) / (num_rows - first) < 40
    assert of_reading < 400_000


def test_the_rows_of_a_file_lie_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = DataConfig.model_validate({"train": "gold.jsonl"})
    with read(config.train, on_disk=True, on_too_long="split") as found:
        assert [example.source for _, example in found.numbered()][:2] == ["gold.jsonl:1", "gold.jsonl:2"]
        assert found.report.files[0].sha256 is not None
