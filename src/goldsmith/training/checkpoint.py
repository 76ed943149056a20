"""What a checkpoint holds, how it comes to the disk whole, and which ones are kept.

    checkpoints/step-00000100/   model.safetensors, optimizer.safetensors, state.json, MANIFEST.json

A checkpoint is written to a folder with another name, forced to the disk, and renamed. One that bears its final name is
therefore complete; what a killed process left lies under names that start with a dot, and is removed at the next start.

Where only a part of the model is trained (an adapter, chosen parameters), only that part is in it, with a fingerprint of the rest,
which is loaded again from where it came.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import save_file

from goldsmith.errors import CheckpointError
from goldsmith.models.quantized import packed_parts
from goldsmith.records import TrainingState
from goldsmith.storage import fail_point, replace_folder, verify_manifest, write_atomic, write_manifest

__all__ = ["CheckpointConfig", "CheckpointStore", "checkpoint_bytes"]

NAME = re.compile(r"step-(\d{8})")


class CheckpointConfig(BaseModel):
    """`checkpoint:` of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_steps: int | None = Field(
        500, gt=0, description="null: only at the end, and where an evaluation was the best"
    )
    keep: int = Field(2, gt=0, description="how many of the newest are kept; the best is kept besides")


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """Bytes of one checkpoint: what is trained, and two moments of it."""
    return sum(p.numel() * p.element_size() * 3 for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True, kw_only=True)
class CheckpointStore:
    """The `checkpoints/` folder of a run."""

    folder: Path
    keep: int

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after `step` updates."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def clean(self) -> None:
        """Remove what a killed process left unfinished."""
        if self.folder.is_dir():
            for path in self.folder.glob(".step-*"):
                shutil.rmtree(path)

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState) -> Path:
        """Write a checkpoint, verify it, then prune older ones."""
        fail_point("checkpoint.begin")
        final = self.path(state.step)
        temporary = self.folder / f".{final.name}.tmp"
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        try:
            weights = {name: tensor.contiguous() for name, tensor in _weights(model).items()}
            save_file(weights, temporary / "model.safetensors", metadata={"frozen": _frozen_fingerprint(model)})
            fail_point("checkpoint.model")
            save_file(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
            fail_point("checkpoint.optimizer")
            write_atomic(temporary / "state.json", json.dumps(state.to_json(), indent=1) + "\n")
            write_manifest(temporary)
            fail_point("checkpoint.manifest")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fail_point("checkpoint.rename")
        replace_folder(temporary, final)
        fail_point("checkpoint.renamed")
        verify_manifest(final)
        self.prune(best_step=state.best_step)
        return final

    def prune(self, *, best_step: int | None) -> None:
        """Remove all but the newest `keep` and the best."""
        fail_point("checkpoint.prune")
        for step in self.steps()[: -self.keep]:
            if step == best_step:
                continue
            doomed = self.folder / f".{self.path(step).name}.pruned"
            self.path(step).replace(doomed)
            fail_point("checkpoint.pruning")
            shutil.rmtree(doomed)
        fail_point("checkpoint.pruned")

    def load(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
        """Put weights and optimizer state back in place.

        Raises:
            CheckpointError: a file is damaged, or the tensors are not those of this model.
        """
        folder = self.path(step)
        verify_manifest(folder)
        load_weights(folder, model)
        _load_optimizer(folder / "optimizer.safetensors", model, optimizer)
        return TrainingState.from_json(json.loads((folder / "state.json").read_text()))


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Copy the weights of a checkpoint into `model`."""
    weights = _weights(model)
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file, torch.no_grad():
        if set(file.keys()) != set(weights):
            raise CheckpointError(f"{path}: holds other tensors than the model", remedy="use the recipe that made it")
        for name, tensor in weights.items():
            stored = file.get_tensor(name)
            if stored.shape != tensor.shape:
                raise CheckpointError(
                    f"{path}: {name} has the shape {list(stored.shape)}, the model's is {list(tensor.shape)}",
                    remedy="use the model that the run began with",
                )
            tensor.copy_(stored)
        if (file.metadata() or {}).get("frozen", "") != _frozen_fingerprint(model):
            raise CheckpointError(
                f"{path}: the frozen weights of the model are not those that the run began with",
                remedy="restore the folder that model.path names, or train anew in another output_dir",
            )


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters and persistent buffers by name, shared ones once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    changing = {id(p) for p in model.parameters() if p.requires_grad} | {id(buffer) for buffer in model.buffers()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in changing and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def _frozen_fingerprint(model: torch.nn.Module) -> str:
    """Of the parameters that are not trained; empty where there are none. The same for any number of threads.

    Their bytes are summed as integers, which is exact in any order, and takes one pass over them.
    """
    digest = hashlib.sha256()
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in frozen:
        # The codes of weights in 4 bits say nothing of their scale.
        parts = {name: parameter.detach(), **{f"{name}.{key}": part for key, part in packed_parts(parameter).items()}}
        for key, part in parts.items():
            total = part.contiguous().view(integers[part.element_size()]).sum(dtype=torch.int64)
            digest.update(f"{key} {tuple(part.shape)} {part.dtype} {int(total)}\n".encode())
    return digest.hexdigest() if frozen else ""


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {
        name: optimizer.state[p] for name, p in model.named_parameters() if p.requires_grad and p in optimizer.state
    }


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {"rng.cpu": torch.get_rng_state()}
    for name, state in _moments(model, optimizer).items():
        for kind, value in state.items():
            tensors |= {f"{part}.{name}": tensor.contiguous() for part, tensor in _plain_tensors(kind, value).items()}
    return tensors


def _plain_tensors(kind: str, value: Any) -> dict[str, torch.Tensor]:
    """`{kind: value}`, or the inner tensors of a quantised one as `kind:codes`, `kind:scale`, ...: these it is made of, exactly."""
    if not hasattr(value, "__tensor_flatten__"):
        return {kind: value}
    return {f"{kind}:{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}


def _load_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    states: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        torch.set_rng_state(file.get_tensor("rng.cpu"))
        for key in set(file.keys()) - {"rng.cpu"}:
            kind, _, name = key.partition(".")
            states.setdefault(name, {})[kind] = file.get_tensor(key)
    remedy = "use the recipe that made it"
    if states and set(states) != set(parameters):
        raise CheckpointError(f"{path}: holds the state of other parameters", remedy=remedy)
    for name, stored in states.items():
        parameter = parameters[name]
        # A fused step keeps its step counter on the device of its parameter.
        state = {kind: tensor.to(parameter.device) for kind, tensor in stored.items()}
        if hasattr(optimizer, "new_state"):
            state = _filled(optimizer.new_state(parameter), state, f"{path}: {name}", remedy)
        optimizer.state[parameter] = state


def _filled(
    new: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], place: str, remedy: str
) -> dict[str, torch.Tensor]:
    """A fresh state of a kind of optimizer that keeps it in its own precision, with the values of a checkpoint."""
    targets = {part: tensor for kind, value in new.items() for part, tensor in _plain_tensors(kind, value).items()}
    if set(targets) != set(stored):
        raise CheckpointError(f"{place}: its state was kept in another precision", remedy=remedy)
    for part, target in targets.items():
        if (target.shape, target.dtype) != (stored[part].shape, stored[part].dtype):
            raise CheckpointError(f"{place}: {part} is {stored[part].dtype} of another kind", remedy=remedy)
        target.copy_(stored[part])
    return new
