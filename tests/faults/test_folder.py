"""The run folder: whose it is, who may change it, and what may change between two runs of a command."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Outcome
from runs import TrainingRun, assert_same_run, checkpoint_steps, copy_run, read_metrics, without_measures

from goldsmith.errors import MachineError
from goldsmith.storage import FolderLock

NewRun = Callable[..., TrainingRun]
Reference = Callable[..., TrainingRun]


def refused(outcome: Outcome, exit_code: int, *words: str) -> None:
    assert outcome.exit_code == exit_code, outcome.stderr
    assert "Traceback" not in outcome.stderr
    for word in words:
        assert word in outcome.stderr
    assert json.loads(outcome.stdout)["error"]["exit_code"] == exit_code


# --- in use


def test_a_folder_in_use_is_refused_and_left_alone(new_run: NewRun) -> None:
    """Also in the first moments, when the run that holds it has written nothing yet."""
    run = new_run()
    with FolderLock(run.output):
        refused(run.train(), 7, str(run.output), "in use")
        assert [path.name for path in run.output.iterdir()] == [".lock"]
        # The lock still keeps others out: the refused process did not take it away.
        with pytest.raises(MachineError, match="in use"):
            FolderLock(run.output).__enter__()
    run.finish()


def test_a_run_that_goes_on_cannot_be_joined(new_run: NewRun, reference: Reference) -> None:
    run = new_run()
    running = run.start(env={"GOLDSMITH_FAIL_POINT": "export.begin"})
    while not run.metrics.exists():
        assert (run.folder).exists()
    with pytest.raises(MachineError, match=f"in use by process {running.pids[0]}"):
        FolderLock(run.output).__enter__()
    assert running.wait()[0].exit_code == -signal.SIGKILL
    run.finish()  # the lock went with the process
    assert_same_run(run, reference())


# --- another's


def test_another_recipe_is_refused_with_the_keys(new_run: NewRun) -> None:
    run = new_run()
    run.train_dying_at("checkpoint.renamed")
    before = run.metrics.read_bytes()
    outcome = run.train("optimizer.learning_rate=0.5", "training.batch_size=2", "objective.normalization=example")
    refused(
        outcome, 7, "optimizer.learning_rate: 0.5 here, 0.02 there", "training.batch_size", "objective.normalization"
    )
    refused(run.train("training.epochs=3"), 7, "training.epochs")
    refused(run.train("training.max_steps=3"), 7, "training.max_steps: 3 here, 8 there")
    assert run.metrics.read_bytes() == before


@pytest.mark.parametrize("name", ["thesis.tex", "tokenizer/notes.txt", ".env"])
def test_a_foreign_folder_is_refused_and_left_alone(new_run: NewRun, name: str) -> None:
    run = new_run()
    path = run.output / name
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    refused(run.train(), 7, name.partition("/")[0])
    refused(run.train("data.max_length=2"), 7, name.partition("/")[0])
    assert path.read_text() == "years of work"


@pytest.mark.parametrize("text", [None, "kind: of another tool\n"])
def test_a_recipe_of_the_users_own_is_not_taken_for_a_run(new_run: NewRun, text: str | None) -> None:
    """`output_dir` is the folder where the recipe lies: the run's resolved recipe would overwrite it."""
    run = new_run()
    recipe = run.folder / "recipe.yaml"
    if text is not None:
        (run.folder / "here").mkdir()
        recipe = run.folder / "here" / "recipe.yaml"
        recipe.write_text(text)
    before = recipe.read_text()
    refused(run.train(f"output_dir={recipe.parent}"), 7, "recipe.yaml")
    assert recipe.read_text() == before


def test_changed_data_is_refused_by_name(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run(data=tmp_path / "gold")
    run.train_dying_at("checkpoint.renamed")
    path = tmp_path / "gold" / "train.jsonl"
    text = path.read_text()
    path.write_text(text.replace("7 + 1 = ", "7 + 2 = "))
    refused(run.train(), 7, "train.jsonl")
    path.write_text(text + '{"prompt": "a", "completion": "b"}\n')
    refused(run.train(), 7, "train.jsonl")
    path.write_text(text)
    eval_path = tmp_path / "gold" / "eval.jsonl"
    eval_path.write_text(eval_path.read_text().replace("3 + 1", "2 + 1"))
    refused(run.train(), 7, "eval.jsonl")


# --- the same recipe, begun before


def test_a_run_that_is_finished_says_so_and_does_nothing(new_run: NewRun) -> None:
    run = new_run()
    first = json.loads(run.finish().stdout)
    times = {path: path.stat().st_mtime_ns for path in run.output.rglob("*") if path.name != ".lock"}
    outcome = run.finish()
    again = json.loads(outcome.stdout)
    assert (first.pop("already_finished"), again.pop("already_finished")) == (False, True)
    assert first == again
    assert {path: path.stat().st_mtime_ns for path in run.output.rglob("*") if path.name != ".lock"} == times


def test_a_run_may_be_copied_to_another_place_and_resumed_there(
    new_run: NewRun, reference: Reference, tmp_path: Path
) -> None:
    run = new_run()
    run.train_dying_at("checkpoint.renamed:2")
    copied = copy_run(run, tmp_path / "another place")
    copied.finish()
    assert_same_run(copied, reference())
    # And after its end it tells of itself where it lies now.
    moved = tmp_path / "moved"
    shutil.move(copied.folder, moved)
    copied.folder, copied.output = moved, moved / "run"
    result = json.loads(copied.finish().stdout)
    assert result["already_finished"] is True
    assert result["model_dir"] == str(moved / "run" / "model")


def test_what_may_change_on_resume(new_run: NewRun, reference: Reference) -> None:
    """Another checkpoint interval changes no number; another budget changes them by rounding only, and that is said."""
    run = new_run({"checkpoint.keep": 5, "checkpoint.every_steps": 1})
    run.train_dying_at("checkpoint.begin:5")
    assert checkpoint_steps(run) == [1, 2, 3, 4]
    run.train_dying_at("export.begin", "checkpoint.every_steps=3", "checkpoint.keep=1")
    assert checkpoint_steps(run) == [8]
    outcome = run.finish("checkpoint.every_steps=3", "checkpoint.keep=1")
    assert "tokens_per_microbatch" not in outcome.stderr
    expected = reference()
    assert without_measures(read_metrics(run.metrics)) == without_measures(read_metrics(expected.metrics))
    weights = "model/model.safetensors"
    assert (run.output / weights).read_bytes() == (expected.output / weights).read_bytes()

    other = new_run(name="b")
    other.train_dying_at("checkpoint.renamed:2")
    outcome = other.finish("training.tokens_per_microbatch=100000")
    assert "training.tokens_per_microbatch" in outcome.stderr
    assert "rounding" in outcome.stderr
    got, wanted = read_metrics(other.metrics), read_metrics(expected.metrics)
    assert [(record["kind"], record["step"]) for record in got] == [(r["kind"], r["step"]) for r in wanted]
    assert [record["microbatches"] for record in got if record["kind"] == "step"][-4:] == [1, 1, 1, 1]
    for record, wanted_record in zip(got, wanted, strict=True):
        assert record["nll"] == pytest.approx(wanted_record["nll"], rel=1e-4)
    assert "tokens_per_microbatch: 100000" in (other.output / "recipe.yaml").read_text()


def test_steps_cut_by_time_are_kept_on_resume(new_run: NewRun) -> None:
    """`max_seconds` shortens a plan of `max_steps`; the same command must find its own run again."""
    changes = {"training.max_steps": 5000, "training.max_seconds": 0.2}
    run = new_run(changes)
    assert run.train_dying_at("checkpoint.renamed").exit_code == -signal.SIGKILL
    planned = [line for line in (run.output / "recipe.yaml").read_text().splitlines() if "max_steps" in line]
    steps = int(planned[0].partition(":")[2])
    assert 1 <= steps < 5000
    result = json.loads(run.finish().stdout)
    assert result["training"]["steps"] == steps


def test_another_device_is_refused(new_run: NewRun) -> None:
    """A run that began on a GPU does not go on with a CPU's arithmetic in silence."""
    run = new_run({"model.device": "auto"})
    run.train_dying_at("checkpoint.renamed")
    recipe = run.output / "recipe.yaml"
    assert "device: cpu" in recipe.read_text()
    recipe.write_text(recipe.read_text().replace("device: cpu", "device: cuda"))
    refused(run.train("model.device=auto"), 7, "model.device", "cuda", "cpu")


def test_a_row_longer_than_the_budget_is_said(new_run: NewRun) -> None:
    run = new_run({"training.tokens_per_microbatch": 5, "training.max_steps": 1})
    outcome = run.finish()
    assert "tokens_per_microbatch" in outcome.stderr


def test_a_relative_recipe_means_the_same_from_another_folder(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run()
    run.finish()
    words = ["train", str(run.folder / "recipe.yaml"), "--json", "--set", f"output_dir={run.output}"]
    from forked import Command, forked

    outcome = forked().run(Command(arguments=words, cwd=tmp_path))
    assert outcome.exit_code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["already_finished"] is True
