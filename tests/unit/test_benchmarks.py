"""The benchmark harness on a tiny workload: the same work for every system, and figures that are taken rightly."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
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


def _child_result(
    harness: dict[str, ModuleType],
    name: str,
    work: Path,
    setting: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """The result file of a system's program, run in this process and so without a limit of memory."""
    child = harness["child"]
    monkeypatch.setattr(child, "_limit_memory", lambda _limit: None)
    result_file = tmp_path / f"{name}.json"
    arguments = [name, str(work), json.dumps({**setting, "steps": None}), str(result_file)]
    monkeypatch.setattr(sys, "argv", arguments)
    child.run_child(harness[name].train, ["torch"])
    result: dict[str, Any] = json.loads(result_file.read_text())
    return result


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
    expected = _child_result(harness, "system_plain", work, {"rows_per_microbatch": 4}, tmp_path, monkeypatch)
    result = _child_result(harness, system[0], work, system[1], tmp_path, monkeypatch)
    facts = json.loads((work / "work.json").read_text())
    assert result["outcome"] == "done"
    assert len(result["losses"]) == len(result["step_seconds"]) == facts["num_steps"] == 2
    # The random factors of an adapter are each system's own; they count from the second step on.
    np.testing.assert_allclose(result["losses"], expected["losses"], atol=2e-5 if kind == "work" else 1e-3)
    assert result["losses"][1] < result["losses"][0]
    assert result["seconds"] == pytest.approx(sum(result["step_seconds"]))
    assert (result["tokens"], result["gold_tokens"]) == (facts["num_tokens"], facts["num_gold_tokens"])
    assert result["peak_bytes"] > 50e6


# As the harness starts it, but the libraries are imported once: `python -c PROGRAM [WORK_FOLDER SETTING_JSON RESULT_FILE]...`
SEVERAL_RUNS = """
import runpy, sys
runs = sys.argv[1:]
for start in range(0, len(runs), 3):
    sys.argv = ["system_litgpt.py", *runs[start : start + 3]]
    runpy.run_path("system_litgpt.py", run_name="__main__")
"""


def test_litgpt_does_the_same_work(
    harness: dict[str, ModuleType], work: Path, lora_work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own environment, with micro-batches of a row, of which it takes the mean of means when left alone.

    Four steps at a rate at which they part by 0.004 nats or more where it does not clip, ties or weigh as the others do.
    """
    run = harness["run"]
    if (reason := run.unavailable("litgpt")) is not None:
        pytest.skip(f"waits for LitGPT: {reason}")
    fast = shutil.copytree(work, tmp_path / "fast")
    facts = json.loads((work / "work.json").read_text())
    (fast / "work.json").write_text(json.dumps({**facts, "learning_rate": 0.01, "batch_size": 2}))
    works = {"full": fast, "lora": lora_work}
    setting = json.dumps({"rows_per_microbatch": 1, "steps": None})
    arguments = [(str(folder), setting, str(tmp_path / f"litgpt-{kind}.json")) for kind, folder in works.items()]
    code, output, _ = run.run_python(
        run.interpreter("litgpt"), ["-c", SEVERAL_RUNS, *sum(arguments, ())], environment=dict(os.environ)
    )
    assert code == 0, output
    for kind, folder in works.items():
        expected = _child_result(harness, "system_plain", folder, {"rows_per_microbatch": 4}, tmp_path, monkeypatch)
        result = json.loads((tmp_path / f"litgpt-{kind}.json").read_text())
        assert result["outcome"] == "done"
        assert len(result["losses"]) == len(result["step_seconds"]) == (4 if kind == "full" else 2)
        np.testing.assert_allclose(result["losses"], expected["losses"], atol=1e-4 if kind == "full" else 1e-3)
        assert result["losses"][1] < result["losses"][0]
        assert result["notes"]["nats by which its own loss, a mean of means, was off"] > 1e-3
        assert (result["tokens"], result["gold_tokens"]) == (expected["tokens"], expected["gold_tokens"])
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


def test_steps_of_rows_of_like_length(harness: dict[str, ModuleType], tmp_path: Path) -> None:
    """Every system reads the same order, and goldsmith's trainer makes it by itself: a pad is rare, no row is twice."""
    workloads, child = harness["workloads"], harness["child"]
    padding = {}
    for name in ("short", "short-sorted"):
        folder = tmp_path / name
        folder.mkdir()
        workloads.prepare(name, folder, num_rows=700)
        padding[name] = json.loads((folder / "work.json").read_text())["padding"]
    work = child.Work.read(tmp_path / "short-sorted")
    steps = work.steps()
    assert [len(step) for step in steps] == [128] * 5
    assert sorted(np.concatenate(steps).tolist()) == list(range(640))
    lengths = [[len(work.rows[row]) for row in step] for step in steps]
    assert padding["short-sorted"] == pytest.approx(
        1 - sum(map(sum, lengths)) / sum(128 * max(step) for step in lengths)
    )
    assert padding["short-sorted"] < 0.1 < 0.25 < padding["short"]
    longest = [max(step) for step in lengths]
    assert longest != sorted(longest)  # the steps are shuffled
    assert len({tuple(row.tolist()) for row in work.rows}) > 600
    harness["system_goldsmith"].build_trainer(work, 4096, tmp_path / "run")  # refuses any other order


def test_short_is_the_shape_of_the_demo(harness: dict[str, ModuleType], tmp_path: Path) -> None:
    from goldsmith.workflows.demo import demo_recipe

    init = demo_recipe(tmp_path, tmp_path, max_seconds=1.0).model.init
    assert init is not None
    workloads = harness["workloads"].WORKLOADS
    assert replace(workloads["short"], is_sorted=True) == workloads["short-sorted"]
    shape = dict(workloads["short"].shape)
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
            "batch_size": 2, "useful_flops": 40.0, "padding": 0.25,
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
    page = harness["tables"].to_markdown(result)
    assert "void" not in page
    assert "| goldsmith | a 1 | 20.0 | 0.20 | 5 | 20% |" in page  # 4 rows in 20 s
    assert "25.0% is padding" in page


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
    assert "| plain | | | | | | | | | out of memory |" in page


def test_settings_that_ran_out_of_memory_are_listed(harness: dict[str, ModuleType]) -> None:
    """Also where the system has no other, and so no run in a round."""
    result = _result(harness, [{"goldsmith": _run(1.0, [3.0])}])
    failed = {"outcome": "out of memory", "memory_limit_bytes": 2e9, "steps": 2, "setting": {"rows_per_microbatch": 8}}
    result["trials"] = [
        {"system": "plain", **failed},
        {"system": "trl", **failed, "outcome": "failed with exit code 1"},
        {"system": "trl", **failed},
        {"system": "goldsmith", **failed},
    ]
    result["summary"] = harness["tables"].summarise(result)
    assert result["summary"]["goldsmith"]["outcome"] == "done"
    page = harness["tables"].to_markdown(result)
    assert "| plain | | | | | | | | | in every setting: out of memory |" in page
    assert "| trl | | | | | | | | | in every setting: failed with exit code 1, out of memory |" in page
    assert "| plain | rows_per_microbatch 8 | out of memory, of which it had 2.0 GB | |" in page
    assert "| trl | rows_per_microbatch 8 | failed with exit code 1 | |" in page


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
    trials = [("plain", rows, 2) for rows in run.WORKLOADS["gsm8k-135m"].rows_per_microbatch]
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
