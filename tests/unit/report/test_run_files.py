"""A run folder as the page reads it: finished, still training, long, and none at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_examples import RECORDS, evaluation, step, write_run

from goldsmith.errors import MachineError
from goldsmith.report.run_files import MAX_POINTS, read_run


def test_a_finished_run(tmp_path: Path) -> None:
    view = read_run(write_run(tmp_path / "legal", RECORDS)).to_json()
    assert view["name"] == "legal"
    assert view["is_finished"]
    assert view["glance"]["model"] == "acme/model"
    assert view["steps"]["step"] == [1, 2, 3, 4]
    assert view["steps"]["tokens"] == [100, 200, 300, 400]
    assert view["steps"]["gold_tokens"] == [10, 30, 60, 100]
    assert view["evaluations"]["tokens"] == [0, 400]
    assert view["update_to_weight"]["step"] == [1, 3]
    assert view["update_to_weight"]["groups"]["layer 0"] == [0.02, pytest.approx(0.02 / 3)]
    assert view["tokens_per_second"] == pytest.approx(400 / 2.0)
    assert view["data"]["train"]["files"][0]["rejected"] == {"empty gold": 2}


def test_a_run_in_progress_ends_at_its_last_whole_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", RECORDS[:3], is_finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "ste')
    view = read_run(folder).to_json()
    assert not view["is_finished"]
    assert view["steps"]["step"] == [1, 2]


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("model: {init: {architecture: llama}}\n")
    view = read_run(folder).to_json()
    assert view["steps"]["step"] == []
    assert view["glance"]["model"] == "llama, from nothing"
    assert view["tokens_per_second"] is None


def test_nll_by_source_is_read_where_it_is_recorded(tmp_path: Path) -> None:
    records = [
        evaluation(0, nll_by_source={"sums": 2.0, "stories": 3.0}),
        step(1, nll_by_source={"sums": 1.5}),
        step(2, nll_by_source={"stories": 2.5}),
    ]
    view = read_run(write_run(tmp_path / "run", records)).to_json()
    assert view["steps"]["nll_by_source"] == {"stories": [None, 2.5], "sums": [1.5, None]}
    assert view["evaluations"]["nll_by_source"] == {"stories": [3.0], "sums": [2.0]}


def test_a_long_run_is_averaged_over_its_gold_tokens(tmp_path: Path) -> None:
    count = 2 * MAX_POINTS - 1
    records = [step(number, gold_tokens=1 + 2 * (number % 2), nll=float(number % 2)) for number in range(1, count + 1)]
    steps = read_run(write_run(tmp_path / "run", records)).to_json()["steps"]
    assert steps["stretch"] == 2
    assert len(steps["step"]) == MAX_POINTS
    assert steps["nll"][0] == pytest.approx(3 / 4), "of 3 gold tokens at 1 nat and one at 0"
    assert steps["step"][-1] == count
    assert steps["tokens"][-1] == 100 * count


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"not a run folder: it holds no recipe\.yaml"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "run", RECORDS)
    (folder / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(MachineError, match=r"metrics\.jsonl:1: not JSON"):
        read_run(folder)
