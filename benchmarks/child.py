"""What the measured programs share: the work they read and the figures they write.

A system is a program `system_NAME.py WORK_FOLDER SETTING_JSON RESULT_FILE`, run in a process and an environment of its
own. Nothing here imports goldsmith: the environments of peers do not have it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Stopwatch", "Work", "lora_config", "run_child"]

Setting = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every system is given.

    Attributes:
        facts: `work.json`, see `workloads.prepare`.
        model_folder: a Hugging Face folder, float32.
        rows: int32 [T] each.
        context_lengths: how many of a row's first tokens are context; the rest is gold.
        families: int64 [rows], not decreasing.
        order: the rows in the order of training; a step is the next `batch_size` of them.
    """

    facts: dict[str, Any]
    model_folder: Path
    rows: list[npt.NDArray[np.int32]]
    context_lengths: npt.NDArray[np.int64]
    families: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]

    @classmethod
    def read(cls, folder: Path) -> Work:
        with np.load(folder / "work.npz", allow_pickle=False) as arrays:
            rows = np.split(arrays["token_ids"], np.cumsum(arrays["lengths"])[:-1])
            return cls(
                facts=json.loads((folder / "work.json").read_text()),
                model_folder=folder / "model",
                rows=rows,
                context_lengths=arrays["context_lengths"],
                families=arrays["families"],
                order=arrays["order"],
            )

    @property
    def device(self) -> torch.device:
        return torch.device(self.facts["device"])

    def steps(self, at_most: int | None = None) -> list[npt.NDArray[np.int64]]:
        """The rows of each step."""
        size = self.facts["batch_size"]
        steps = [self.order[start : start + size] for start in range(0, len(self.order), size)]
        return steps[:at_most]

    def tokens_and_gold(self, at_most: int | None = None) -> tuple[int, int]:
        rows = np.concatenate(self.steps(at_most))
        tokens = sum(len(self.rows[row]) for row in rows)
        return tokens, tokens - int(self.context_lengths[rows].sum())


class Stopwatch:
    """Times of the steps, the loss of each, from the first forward pass to the end of the last update."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[float] = []
        self.losses: list[float] = []
        # What else a system has to tell about its run: name to value.
        self.notes: dict[str, Any] = {}

    def start(self) -> None:
        """Right before the first step, when model and data are loaded."""
        self._mark()

    def step_done(self, loss: float) -> None:
        """After an update. `loss` is the step's nll per gold token, before the update."""
        self.losses.append(float(loss))
        self._mark()

    def _mark(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._marks.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        return self._marks[-1] - self._marks[0]

    @property
    def step_seconds(self) -> list[float]:
        return np.diff(self._marks).tolist()


def lora_config(work: Work) -> Any:
    """The adapter of the workload for `peft`, which every system has; None where all of the model is trained."""
    rank = work.facts["lora_rank"]
    if not rank:
        return None
    from peft import LoraConfig

    torch.manual_seed(work.facts["seed"])  # of the random factor
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def run_child(train: Callable[[Work, Setting, Stopwatch], None], packages: Sequence[str]) -> None:
    """The main program of a system: read, train, write the result.

    Args:
        train: loads the model, calls `start`, trains `setting["steps"]` steps (all where it is None), calls
            `step_done` after each.
        packages: whose versions are reported.
    """
    work_folder, setting_json, result_file = sys.argv[1:]
    setting: Setting = json.loads(setting_json)
    _limit_memory(setting.pop("memory_limit_bytes", None))
    work = Work.read(Path(work_folder))
    stopwatch = Stopwatch(work.device)
    result: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "versions": {"python": sys.version.split()[0], **{name: metadata.version(name) for name in packages}},
    }
    try:
        train(work, setting, stopwatch)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        result["outcome"] = "out of memory"
    else:
        tokens, gold_tokens = work.tokens_and_gold(setting["steps"])
        result |= {
            "outcome": "done",
            "seconds": stopwatch.seconds,
            "step_seconds": stopwatch.step_seconds,
            "losses": stopwatch.losses,
            "tokens": tokens,
            "gold_tokens": gold_tokens,
            "notes": stopwatch.notes,
            "peak_bytes": _peak_resident_bytes(),
        }
        if work.device.type == "cuda":
            result["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(work.device)
    Path(result_file).write_text(json.dumps(result))


def _limit_memory(limit: int | None) -> None:
    """So that what does not fit fails here with a message, and kills nothing else on the machine."""
    with suppress(OSError):  # Linux only
        Path("/proc/self/oom_score_adj").write_text("1000")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _peak_resident_bytes() -> int:
    """VmHWM: the most that was resident at a time, since this program began."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Peers must not reach a hub or a tracker while they are measured.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
