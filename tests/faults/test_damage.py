"""Damaged files: exit code 6 and the file's name; what the message advises works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import TrainingRun, assert_same_run, checkpoint_steps, copy_run

from goldsmith.errors import CheckpointError
from goldsmith.storage import verify_manifest

NewRun = Callable[..., TrainingRun]
Reference = Callable[..., TrainingRun]


@pytest.fixture(scope="module")
def half_way(tmp_path_factory: pytest.TempPathFactory, gold_folder: Path, small_model_folder: Path) -> TrainingRun:
    """A run that died with the checkpoints of steps 3 and 4."""
    run = TrainingRun(tmp_path_factory.mktemp("half") / "way", data=gold_folder, model=small_model_folder)
    run.train_dying_at("checkpoint.begin:4")
    assert checkpoint_steps(run) == [3, 4]  # step 3 was evaluated, and the best then
    return run


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(bytes(data))


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def missing(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncated, emptied, flipped, longer, missing])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
def test_every_file_and_damage_is_found(
    half_way: TrainingRun, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "step-00000004"
    shutil.copytree(half_way.checkpoint(4), folder)
    damage(folder / name)
    # A byte more or less in the manifest itself: either it is not JSON any more, or it says another thing of a file.
    with pytest.raises(CheckpointError, match=r"step-00000004/\w+\.") as error:
        verify_manifest(folder)
    assert error.value.remedy is not None
    if name != "MANIFEST.json":
        assert f"{folder / name}" in error.value.message


def test_a_flipped_bit_anywhere_in_a_manifest_is_never_a_crash(half_way: TrainingRun, tmp_path: Path) -> None:
    folder = tmp_path / "step"
    shutil.copytree(half_way.checkpoint(4), folder)
    manifest = folder / "MANIFEST.json"
    data = manifest.read_bytes()
    found = 0
    for position in range(len(data)):
        for bit in (0, 5, 7):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            manifest.write_bytes(bytes(changed))
            try:
                verify_manifest(folder)
            except CheckpointError:
                found += 1
            else:
                assert json.loads(changed) == json.loads(data), f"byte {position}, bit {bit}"
    assert found > len(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("checkpoints/step-00000004/model.safetensors", truncated),
        ("checkpoints/step-00000004/optimizer.safetensors", flipped),
        ("checkpoints/step-00000004/state.json", flipped),
        ("checkpoints/step-00000004/MANIFEST.json", missing),
        ("metrics.jsonl", truncated),
        ("metrics.jsonl", missing),
        ("examples.jsonl", truncated),
    ],
)
def test_the_command_names_the_file(
    half_way: TrainingRun, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    run = copy_run(half_way, tmp_path / "copy")
    damage(run.output / name)
    before = {path: path.read_bytes() for path in run.output.rglob("step-*/*")}
    outcome = run.train()
    assert outcome.exit_code == 6, outcome.stderr
    assert f"{run.output / name}: " in outcome.stderr
    assert "Remedy: " in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert {path: path.read_bytes() for path in run.output.rglob("step-*/*")} == before, "nothing else was changed"


def test_the_remedy_works(half_way: TrainingRun, reference: Reference, tmp_path: Path) -> None:
    """The damaged checkpoint removed, the command goes on from the one before, and from the start without any."""
    run = copy_run(half_way, tmp_path / "copy")
    for step in (4, 3):
        flipped(run.checkpoint(step) / "model.safetensors")
        outcome = run.train()
        assert outcome.exit_code == 6
        assert f"remove {run.checkpoint(step)}" in outcome.stderr
        shutil.rmtree(run.checkpoint(step))
    run.finish()
    assert_same_run(run, reference())
    again = copy_run(half_way, tmp_path / "again")
    shutil.rmtree(again.checkpoint(4))
    again.finish()
    assert_same_run(again, reference())


def test_files_beside_the_checkpoints_are_left_alone(
    half_way: TrainingRun, reference: Reference, tmp_path: Path
) -> None:
    run = copy_run(half_way, tmp_path / "copy")
    (run.output / "checkpoints" / ".DS_Store").write_bytes(b"of the file manager")
    (run.output / "checkpoints" / ".step-00000005.tmp").mkdir()
    (run.output / "checkpoints" / ".step-00000005.tmp" / "model.safetensors").write_bytes(b"half")
    run.finish()
    assert sorted(path.name for path in (run.output / "checkpoints").glob(".*")) == [".DS_Store"]


def test_a_model_folder_that_was_exchanged(new_run: NewRun, small_model_folder: Path, tmp_path: Path) -> None:
    """The recipe names the same path, but another model lies there now: its shapes differ, its names do not."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tmp_path / "model"
    shutil.copytree(small_model_folder, model)
    run = new_run({"model": {"path": str(model), "device": "cpu"}})
    run.train_dying_at("checkpoint.renamed")
    config = LlamaConfig.from_pretrained(model)
    config.intermediate_size += 1
    with torch.random.fork_rng():
        LlamaForCausalLM(config).save_pretrained(model)
    outcome = run.train()
    assert outcome.exit_code == 6, outcome.stderr
    assert "model.safetensors" in outcome.stderr
    assert "mlp" in outcome.stderr
    assert "Traceback" not in outcome.stderr
