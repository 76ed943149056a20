"""The folder of a run: one process at a time in it, whose it is, and that it still stands for the data it began with."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

import goldsmith
from goldsmith import distributed
from goldsmith.data.dataset import Dataset
from goldsmith.data.stream import ExampleStream
from goldsmith.data.tokenizer import load_tokenizer
from goldsmith.errors import MachineError
from goldsmith.models.precision import stored_dtype
from goldsmith.models.quantized import num_weights
from goldsmith.recipe import Recipe
from goldsmith.report.run_files import DATA, ENVIRONMENT, RECIPE
from goldsmith.storage import FolderLock, replace_folder, require_space, sha256_file, write_atomic
from goldsmith.training.checkpoint import checkpoint_bytes
from goldsmith.training.trainer import Trainer
from goldsmith.workflows.materials import RowList, tokenizer_of
from goldsmith.workflows.saying import Say, report_of

__all__ = [
    "MEMORY",
    "TOKENIZER",
    "UNCLAIMED",
    "claim",
    "data_report_of",
    "explained_disk_full",
    "open_folder",
    "require_run_space",
    "require_unchanged_files",
    "shared_tokenizer",
]

MEMORY, TOKENIZER = "memory.json", "tokenizer"
# What may lie in a folder that no run has claimed yet: left by a process that died before it could. A run claims a
# folder with recipe.yaml; data.json comes last, and without it the claim is made again.
UNCLAIMED = {".lock", f".{RECIPE}.tmp", f".{TOKENIZER}.tmp"}


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[None]:
    """Held by this run alone: the main process locks it, and leaves none behind where nothing was begun.

    Raises:
        MachineError: it is in use, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            existed = folder.exists()
            stack.enter_context(FolderLock(folder))
            # By who holds the lock, and before it is given up: what another process just begins looks unused, too.
            stack.callback(_remove_if_unused, folder, existed=existed)
        distributed.barrier()
        yield


def _remove_if_unused(folder: Path, *, existed: bool) -> None:
    """Leave no folder behind where nothing was begun: bad data or a refused model must not claim a name."""
    if folder.is_dir() and not (folder / RECIPE).exists():
        left = {entry.name for entry in folder.iterdir()}
        if left <= UNCLAIMED:
            if not existed:
                shutil.rmtree(folder)
            else:
                for name in left:
                    path = folder / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def explained_disk_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise MachineError(
            f"{folder}: the disk is full ({error.filename or error}); the newest checkpoint is whole",
            remedy="free disk space and give the same command again: it goes on from the newest checkpoint",
        ) from error
    except SafetensorError as error:
        if "No space left" not in str(error) and "File too large" not in str(error):
            raise
        raise MachineError(
            f"{folder}: the disk is full ({error}); the newest checkpoint is whole",
            remedy="free disk space and give the same command again: it goes on from the newest checkpoint",
        ) from error


def claim(
    folder: Path,
    resolved: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    data_report: dict[str, Any],
    *,
    stored: bool,
    say: Say,
) -> None:
    """Make the folder this run's, or check that its data is still what the run began with."""
    data_path, environment_path = folder / DATA, folder / ENVIRONMENT
    environment = _environment(torch.device(resolved.model.device))
    if stored and data_path.is_file():
        _require_same_data(json.loads(data_path.read_text()), data_report, folder)
        if environment_path.is_file():
            before = json.loads(environment_path.read_text())
            for key in before.keys() | environment.keys():
                if before.get(key) != environment.get(key):
                    say(
                        f"{key}: {before.get(key)} when the run began, {environment.get(key)} now; "
                        "the result will be equal to rounding, not to the bit"
                    )
        write_atomic(folder / RECIPE, resolved.to_yaml())
        return
    write_atomic(folder / RECIPE, resolved.to_yaml())
    temporary = folder / f".{TOKENIZER}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    replace_folder(temporary, folder / TOKENIZER)
    write_atomic(environment_path, json.dumps(environment, indent=1) + "\n")
    write_atomic(data_path, json.dumps(data_report, indent=1) + "\n")


def _require_same_data(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with other data.

    Raises:
        MachineError: a file, or the examples made of it, changed since the run began.
    """
    if before == now:
        return
    changed = []
    for split in sorted(before.keys() | now.keys()):
        old_files = {file["path"]: file for file in before.get(split, {}).get("files", ())}
        new_files = {file["path"]: file for file in now.get(split, {}).get("files", ())}
        differing = [path for path in old_files | new_files if old_files.get(path) != new_files.get(path)]
        if before.get(split, {}).get("fingerprint") != now.get(split, {}).get("fingerprint") or differing:
            changed.append(f"{split}: {', '.join(differing) or 'the examples made of its rows'}")
    raise MachineError(
        f"{folder}: the data is not what the run began with: {'; '.join(changed)}",
        remedy="restore the files, or train the new data into another output_dir",
    )


def require_unchanged_files(recipe: Recipe, folder: Path) -> None:
    """Refuse to tell the result of a finished run as that of files which are others by now.

    Files that are gone or cannot be read say nothing, and those that are streamed are not read for it.

    Raises:
        MachineError: a file's bytes are not those that the run read, or a glob matches one that it did not read.
    """
    path = folder / DATA
    splits = json.loads(path.read_text()) if path.is_file() else {}
    changed = []
    for split, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        files = splits.get(split, {}).get("files", ())
        changed += [f"{split}: {file['path']}" for file in files if _is_another(Path(file["path"]), file.get("sha256"))]
        known = {file["path"] for file in files}
        for source in sources:
            is_whole = source.limit is None and not source.streaming and not source.path.startswith("hf:")
            if known and is_whole and glob.has_magic(source.path):
                found = glob.glob(source.path, recursive=True)
                changed += [f"{split}: {name}, which came" for name in sorted(found) if name not in known]
    if changed:
        raise MachineError(
            f"{folder}: the run is finished, and the data is no longer what it read: {'; '.join(changed)}",
            remedy="train the new data into another output_dir, or restore the files; result.json tells of the old",
        )


def _is_another(file: Path, sha256: str | None) -> bool:
    try:
        return sha256 is not None and file.is_file() and sha256_file(file) != sha256
    except OSError:
        return False


def data_report_of(train_data: Dataset | ExampleStream, eval_data: Dataset | None) -> dict[str, Any]:
    splits = {"train": train_data, "eval": eval_data}
    return {
        split: {**report_of(data).to_json(), "fingerprint": data.fingerprint()}
        for split, data in splits.items()
        if data is not None
    }


def _environment(device: torch.device) -> dict[str, Any]:
    """What the resume law depends on."""
    return {
        "goldsmith": goldsmith.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "ranks": distributed.world_size(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def shared_tokenizer(recipe: Recipe, folder: Path, train_rows: RowList | None) -> PreTrainedTokenizerBase:
    """The run's own tokenizer where it has one already, and the same in every process: one learns it, the others read it.

    Training a unigram tokenizer is not deterministic, so each learning its own would not do.
    """
    if (folder / DATA).is_file():
        return load_tokenizer(str(folder / TOKENIZER))
    if distributed.world_size() == 1 or recipe.tokenizer.train is None:
        return tokenizer_of(recipe, train_rows)
    temporary = folder / f".{TOKENIZER}.tmp"
    if distributed.is_main():
        tokenizer = tokenizer_of(recipe, train_rows)
        shutil.rmtree(temporary, ignore_errors=True)
        tokenizer.save_pretrained(temporary)
    distributed.barrier()
    if not distributed.is_main():
        tokenizer = load_tokenizer(str(temporary))
    distributed.barrier()
    return tokenizer


def require_run_space(trainer: Trainer, folder: Path) -> None:
    """Checkpoints that will lie there at once (the kept, the best, the one being written) and the result."""
    model = trainer.model.causal_lm
    at_once = trainer.checkpoint_config.keep + 2 - len(trainer.store.steps())
    weights = sum(num_weights(p) for p in model.parameters()) * stored_dtype(model).itemsize
    needed = max(at_once, 1) * checkpoint_bytes(model) + 2 * weights
    require_space(folder, needed, f"{at_once} checkpoints and the result")
