from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from goldsmith.errors import CheckpointError
from goldsmith.records import TrainingState
from goldsmith.storage import verify_manifest
from goldsmith.training.checkpoint import CheckpointStore, checkpoint_bytes, load_weights
from goldsmith.training.optimizer import OptimizerConfig, build_optimizer


class Model(torch.nn.Module):
    """Two matrices that share their memory, a frozen one, and a buffer."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first = torch.nn.Linear(width, width)
            self.tied = torch.nn.Linear(width, width)
            self.frozen = torch.nn.Linear(width, 2)
        self.tied.weight = self.first.weight
        self.frozen.weight.requires_grad_(False)
        self.register_buffer("steps", torch.zeros(1))


def built(width: int = 3) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(width)
    return model, build_optimizer(model.named_parameters(), OptimizerConfig())


def one_update(model: Model, optimizer: torch.optim.Optimizer) -> None:
    out = model.tied(model.first(torch.ones(1, model.first.in_features)))
    (out.square().sum() + model.frozen(out).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.steps += 1


def state(step: int, *, best: int | None = None) -> TrainingState:
    return replace(TrainingState.initial(), step=step, best_step=best)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(folder=tmp_path / "checkpoints", keep=2)


def test_what_is_saved_comes_back_to_the_bit(store: CheckpointStore) -> None:
    model, optimizer = built()
    for _ in range(3):
        one_update(model, optimizer)
    torch.manual_seed(99)
    saved = replace(state(3, best=2), best_nll=1.25, metrics_offset=10, examples_offset=20, elapsed_seconds=1.5)
    folder = store.save(model, optimizer, saved)
    verify_manifest(folder)
    random = torch.rand(3)
    assert sorted(path.name for path in folder.iterdir()) == [
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    other, other_optimizer = built()
    torch.manual_seed(0)
    assert store.load(3, other, other_optimizer) == saved
    assert torch.equal(torch.rand(3), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert other.tied.weight is other.first.weight
    one_update(model, optimizer)
    one_update(other, other_optimizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_before_the_first_update_there_are_no_moments(store: CheckpointStore) -> None:
    model, optimizer = built()
    store.save(model, optimizer, state(0))
    other, other_optimizer = built()
    store.load(0, other, other_optimizer)
    one_update(model, optimizer)
    one_update(other, other_optimizer)
    assert torch.equal(model.first.weight, other.first.weight)


def test_pruning_keeps_the_newest_and_the_best(store: CheckpointStore) -> None:
    model, optimizer = built()
    for step in range(1, 7):
        store.save(model, optimizer, state(step, best=2 if step >= 2 else None))
    assert store.steps() == [2, 5, 6]
    store.save(model, optimizer, state(7, best=7))
    assert store.steps() == [6, 7]
    assert not list(store.folder.glob(".*"))


def test_unfinished_folders_are_no_checkpoints_and_are_removed(store: CheckpointStore) -> None:
    model, optimizer = built()
    store.save(model, optimizer, state(4))
    for name in (".step-00000005.tmp", ".step-00000001.pruned", ".step-00000004.old"):
        (store.folder / name).mkdir()
    (store.folder / ".DS_Store").write_text("")
    (store.folder / "notes").mkdir()
    assert store.steps() == [4]
    store.clean()
    assert sorted(path.name for path in store.folder.iterdir()) == [".DS_Store", "notes", "step-00000004"]


def test_no_folder_is_no_checkpoint(store: CheckpointStore) -> None:
    assert store.steps() == []
    store.clean()
    store.prune(best_step=None)


def test_a_failed_save_leaves_nothing_and_prunes_nothing(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = built()
    for step in (1, 2):
        store.save(model, optimizer, state(step))

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("goldsmith.training.checkpoint.write_manifest", fails)
    with pytest.raises(OSError, match="No space"):
        store.save(model, optimizer, state(3))
    assert store.steps() == [1, 2]
    assert not list(store.folder.glob(".*"))


def test_the_old_are_pruned_only_after_the_new_one_was_verified(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = built()
    for step in (1, 2):
        store.save(model, optimizer, state(step))

    def damaged(folder: Path) -> None:
        raise CheckpointError(f"{folder}: its sha256 differs")

    monkeypatch.setattr("goldsmith.training.checkpoint.verify_manifest", damaged)
    with pytest.raises(CheckpointError):
        store.save(model, optimizer, state(3))
    assert store.steps() == [1, 2, 3]


def test_another_model_is_refused(store: CheckpointStore) -> None:
    model, optimizer = built()
    one_update(model, optimizer)
    store.save(model, optimizer, state(1))
    with pytest.raises(CheckpointError, match=r"first\.weight has the shape \[3, 3\], the model's is \[4, 4\]"):
        store.load(1, *built(4))
    narrower = torch.nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="holds other tensors than the model"):
        load_weights(store.path(1), narrower)
    thawed, _ = built()
    thawed.frozen.weight.requires_grad_(True)
    with pytest.raises(CheckpointError, match="holds other tensors than the model"):
        store.load(1, thawed, build_optimizer(thawed.named_parameters(), OptimizerConfig()))
    optimizer.state.popitem()
    store.save(model, optimizer, state(2))
    with pytest.raises(CheckpointError, match="holds the state of other parameters"):
        store.load(2, *built())


def test_what_is_frozen_is_not_in_it_and_must_be_the_same(store: CheckpointStore) -> None:
    model, optimizer = built()
    one_update(model, optimizer)
    folder = store.save(model, optimizer, state(1))
    assert "frozen.weight" not in load_file(folder / "model.safetensors")
    fresh, fresh_optimizer = built()
    with torch.no_grad():
        fresh.frozen.weight[1, 2] += 1e-6
    with pytest.raises(CheckpointError, match="frozen weights of the model are not those that the run began with"):
        store.load(1, fresh, fresh_optimizer)
    fresh.frozen.load_state_dict(model.frozen.state_dict())
    store.load(1, fresh, fresh_optimizer)
    assert torch.equal(fresh.first.weight, model.first.weight)


def test_a_size_estimate_is_no_lower_than_the_files(store: CheckpointStore) -> None:
    model, optimizer = built(64)
    one_update(model, optimizer)
    folder = store.save(model, optimizer, state(1))
    size = sum((folder / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors"))
    assert size == pytest.approx(checkpoint_bytes(model), rel=0.5)


def test_a_state_of_another_version_names_itself(store: CheckpointStore) -> None:
    values = state(1).to_json()
    assert TrainingState.from_json(json.loads(json.dumps(values))) == state(1)
    with pytest.raises(TypeError):
        TrainingState.from_json({**values, "of_a_later_version": 1})
