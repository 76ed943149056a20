"""The benchmark harness on a tiny workload: the same work for every system, and figures that are taken rightly."""

from __future__ import annotations

import doctest
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ["child", "machine", "tables", "workloads", "run", "system_goldsmith", "system_plain"]
MODULES += ["attention_groups", "measure_matmul", "profile_step", "lm_eval", "system_goldsmith_scores"]


@pytest.fixture(scope="module")
def harness() -> Iterator[dict[str, ModuleType]]:
    """The programs in benchmarks/, imported as they import each other."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def work(harness: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    harness["workloads"].prepare("tiny", folder)
    return folder


@pytest.fixture(scope="module")
def lora_work(harness: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora-work")
    harness["workloads"].prepare("tiny-lora", folder)
    return folder


def test_doctests(harness: dict[str, ModuleType]) -> None:
    results = [doctest.testmod(module) for module in harness.values()]
    assert sum(result.attempted for result in results) >= 4
    assert sum(result.failed for result in results) == 0


@pytest.mark.parametrize("kind", ["work", "lora_work"])
@pytest.mark.parametrize(
    "system", [("system_goldsmith", {"tokens_per_microbatch": 300}), ("system_plain", {"rows_per_microbatch": 1})]
)
def test_systems_do_the_same_work(
    harness: dict[str, ModuleType],
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: tuple[str, dict[str, int]],
) -> None:
    """Each child's result file is complete, and its losses are those of the plain loop with the whole step at once."""
    work: Path = request.getfixturevalue(kind)
    child = harness["child"]
    monkeypatch.setattr(child, "_limit_memory", lambda _limit: None)

    def losses(name: str, setting: dict[str, int]) -> dict[str, Any]:
        result_file = tmp_path / f"{name}.json"
        arguments = [name, str(work), json.dumps({**setting, "steps": None}), str(result_file)]
        monkeypatch.setattr(sys, "argv", arguments)
        child.run_child(harness[name].train, ["torch"])
        result: dict[str, Any] = json.loads(result_file.read_text())
        return result

    expected = losses("system_plain", {"rows_per_microbatch": 4})
    result = losses(*system)
    facts = json.loads((work / "work.json").read_text())
    assert result["outcome"] == "done"
    assert len(result["losses"]) == len(result["step_seconds"]) == facts["num_steps"] == 2
    # The random factors of an adapter are each system's own; they count from the second step on.
    np.testing.assert_allclose(result["losses"], expected["losses"], atol=2e-5 if kind == "work" else 1e-3)
    assert result["losses"][1] < result["losses"][0]
    assert result["seconds"] == pytest.approx(sum(result["step_seconds"]))
    assert (result["tokens"], result["gold_tokens"]) == (facts["num_tokens"], facts["num_gold_tokens"])
    assert result["peak_bytes"] > 50e6


def test_out_of_memory_is_an_outcome(
    harness: dict[str, ModuleType], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = harness["child"]
    monkeypatch.setattr(child, "_limit_memory", lambda _limit: None)
    monkeypatch.setattr(sys, "argv", ["name", str(work), '{"steps": null}', str(tmp_path / "result.json")])

    def train(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    child.run_child(train, ["torch"])
    assert json.loads((tmp_path / "result.json").read_text())["outcome"] == "out of memory"


def test_stand_in_rows_have_the_lengths_of_the_real_ones(
    harness: dict[str, ModuleType], shared_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workloads = harness["workloads"]
    for source in ("gsm8k", "legal"):
        monkeypatch.setattr(workloads, "SHARED_DATA", shared_folder / "data")
        real, _ = workloads.token_rows(source, 64, 49_152)
        monkeypatch.setattr(workloads, "SHARED_DATA", tmp_path)
        stand_in, origin = workloads.token_rows(source, 64, 49_152)
        assert "stand-in" in origin
        lengths = [[(len(row.context), len(row.gold)) for row in rows] for rows in (real, stand_in)]
        assert lengths[0] == lengths[1]


def test_rows_of_one_input_lie_together_and_begin_alike(harness: dict[str, ModuleType]) -> None:
    rows, _ = harness["workloads"].token_rows("answers", 16, 49_152)
    families = [row.family for row in rows]
    assert families == [0] * 8 + [1] * 8
    assert all(row.context == rows[0].context for row in rows[:8])
    assert rows[0].context != rows[8].context
    assert all(row.gold[-1] == harness["workloads"].END for row in rows)


def test_short_is_the_shape_of_the_demo(harness: dict[str, ModuleType], tmp_path: Path) -> None:
    from goldsmith.workflows.demo import demo_recipe

    init = demo_recipe(tmp_path, tmp_path, max_seconds=1.0).model.init
    assert init is not None
    shape = dict(harness["workloads"].WORKLOADS["short"].shape)
    del shape["vocab_size"]
    assert {key: init.get(key) for key in shape} == shape


def _run(seconds: float, losses: list[float], **others: Any) -> dict[str, Any]:
    run = {"outcome": "done", "setting": {"a": 1}, "seconds": seconds, "peak_bytes": seconds * 1e9, "losses": losses}
    return {**run, "foreign_cores": 0.0, "notes": {}, "versions": {"torch": "2"}, "threads": 2, **others}


def _result(harness: dict[str, ModuleType], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "date": "2026-01-01",
        "command": "python benchmarks/run.py",
        "repository": "commit abc",
        "machine": {"processor": "CPU", "cores": 2, "memory_bytes": 2**34, "system": "Linux"},
        "workload": {
            "name": "tiny", "device": "cpu", "shape": {"architecture": "llama", "vocab_size": 100}, "parameters": 1000,
            "num_rows": 4, "origin": "rows", "num_tokens": 100, "num_gold_tokens": 50, "longest_row": 30, "num_steps": 2,
            "batch_size": 2, "useful_flops": 40.0,
        },
        "note": None,
        "warning": None,
        "trials": [],
        "rounds": [{"matmul": {"flops_per_second": 10.0}, "runs": runs} for runs in rounds],
    }  # fmt: skip
    result["summary"] = harness["tables"].summarise(result)
    return result


def test_medians_of_ratios_within_rounds(harness: dict[str, ModuleType]) -> None:
    losses = [3.0, 2.0]
    pairs = [(10.0, 20.0), (20.0, 60.0), (30.0, 36.0)]
    rounds = [{"goldsmith": _run(ours, losses), "plain": _run(theirs, losses)} for ours, theirs in pairs]
    result = _result(harness, rounds)
    plain = result["summary"]["plain"]
    assert plain["seconds_over_reference"] == pytest.approx(2.0)  # of 2, 3, 1.2; the medians' own ratio would be 1.8
    assert plain["reference_memory_over_own"] == pytest.approx(0.5)
    assert result["summary"]["goldsmith"]["fraction_of_matmul_rate"] == pytest.approx(0.2)
    assert result["summary"]["goldsmith"]["tokens_per_second"] == pytest.approx(5.0)
    assert not plain["is_void"]
    assert "void" not in harness["tables"].to_markdown(result)


def test_other_losses_void_the_row(harness: dict[str, ModuleType]) -> None:
    result = _result(harness, [{"goldsmith": _run(1.0, [3.0, 2.0]), "plain": _run(2.0, [3.0, 2.0011])}])
    assert result["summary"]["plain"]["is_void"]
    assert not result["summary"]["goldsmith"]["is_void"]
    assert "**void: other losses**" in harness["tables"].to_markdown(result)


def test_a_disturbed_run_and_a_failed_one_are_marked(harness: dict[str, ModuleType]) -> None:
    runs = {"goldsmith": _run(1.0, [3.0], foreign_cores=0.5), "plain": {"outcome": "out of memory"}}
    result = _result(harness, [runs])
    page = harness["tables"].to_markdown(result)
    assert "disturbed: 0.50 cores busy elsewhere" in page
    assert "| plain | | | | | | | | out of memory |" in page


def test_a_run_of_the_harness(
    harness: dict[str, ModuleType], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the runs, the choice of settings, and what is written; the processes themselves are stand-ins."""
    run, order = harness["run"], []

    def measured(system: str, _folder: Path, setting: dict[str, int], *, steps: int | None, **_: Any) -> dict[str, Any]:
        order.append((system, setting.get("rows_per_microbatch"), steps))
        return _run(1.0 + setting.get("rows_per_microbatch", 0), [3.0, 2.0], setting=setting)

    def prepared(_python: Path, arguments: list[str], **_: Any) -> tuple[int, str, float]:
        (Path(arguments[2]) / "work.json").write_text((work / "work.json").read_text())
        return 0, "", 0.0

    monkeypatch.setattr(run, "run_system", measured)
    monkeypatch.setattr(run, "run_python", prepared)
    monkeypatch.setattr(run, "measure_matmul", lambda *_, **__: {"flops_per_second": 1e9})
    monkeypatch.setattr(run.machine, "idle_check", lambda: None)
    assert run.main(["--workload", "gsm8k-135m", "--rounds", "2", "--output", str(tmp_path)]) == 0
    trials = [("plain", rows, 2) for rows in (2, 8, 1)]
    assert order == [*trials, *[("goldsmith", None, None), ("plain", 1, None)] * 2]
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md"]
    page = next(tmp_path.glob("*.md")).read_text()
    assert "2 rounds" in page
    assert "| plain | rows_per_microbatch 8 |" in page


def test_a_busy_machine_is_refused(harness: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness["run"].machine, "idle_check", lambda: "other processes keep 1.00 cores busy")
    assert harness["run"].main(["--workload", "tiny"]) == 2


def test_what_a_failed_program_printed_is_kept(
    harness: dict[str, ModuleType], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = harness["run"]
    program = tmp_path / "system.py"
    program.write_text("print('what went wrong'); raise SystemExit(3)")
    monkeypatch.setitem(run.SYSTEMS, "goldsmith", str(program))
    result = run.run_system("goldsmith", work, {"a": 1}, steps=None, environment={})
    assert result["outcome"] == "failed with exit code 3"
    assert "what went wrong" in result["output"]


def test_packs_are_cut_in_every_way(harness: dict[str, ModuleType]) -> None:
    groups = harness["attention_groups"]
    lengths = [5, 5, 3, 7]
    for name, sizes in groups.cuts(lengths).items():
        one = groups.sample(lengths, sizes, (2, 1, 8), 1)
        assert one.groups == len(sizes), name
        assert one.tokens == 20
        assert one.seconds > 0
