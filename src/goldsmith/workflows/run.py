"""A run: from a recipe to a trained model in a run folder, and back into the same run when the same command comes again."""

from __future__ import annotations

import contextlib
import errno
import json
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

import goldsmith
from goldsmith import distributed
from goldsmith.data.config import SourceConfig
from goldsmith.data.dataset import Dataset
from goldsmith.data.hub import hub_revision
from goldsmith.data.stream import ExampleStream
from goldsmith.data.tokenizer import load_tokenizer
from goldsmith.errors import ConfigError, MachineError, NumericalError
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.load import (
    load_causal_lm,
    resolve_device,
    silence_randomness,
    stored_dtype,
)
from goldsmith.models.proof import prove
from goldsmith.recipe import Recipe, load_recipe
from goldsmith.records import DataReport
from goldsmith.scoring.display import data_frame, html_table
from goldsmith.storage import FolderLock, replace_folder, require_space, write_atomic
from goldsmith.training.checkpoint import checkpoint_bytes
from goldsmith.training.memory import format_bytes
from goldsmith.training.progress import progress_reporter
from goldsmith.training.result import Parity, check_merged, check_parity, save_adapter, save_model
from goldsmith.training.trackers.config import require_installed
from goldsmith.training.trackers.following import Following
from goldsmith.training.trackers.protocol import RunFacts
from goldsmith.training.trainer import Trainer, TrainingResult, planned_steps
from goldsmith.workflows.materials import (
    RowList,
    Rows,
    causal_lm_of,
    choose_trained,
    compute_dtype_of,
    dataset_of,
    own_limit_of,
    renderer_of,
    stream_of,
    tokenizer_of,
)
from goldsmith.workflows.reporting import AFTER, BEFORE, REPORT, score_for_report, write_run_report

__all__ = ["RunResult", "train"]


RECIPE, DATA, ENVIRONMENT, MEMORY, RESULT, TOKENIZER = (
    "recipe.yaml",
    "data.json",
    "environment.json",
    "memory.json",
    "result.json",
    "tokenizer",
)
# What may lie in a folder that no run has claimed yet: left by a process that died before it could. A run claims a
# folder with recipe.yaml; data.json comes last, and without it the claim is made again.
UNCLAIMED = {".lock", f".{RECIPE}.tmp", f".{TOKENIZER}.tmp"}
# The optimizer's update, records, evaluations and checkpoints come on top of what the calibration measures, and a machine that
# was fast for a second may not be so for two minutes.
CALIBRATION_MARGIN = 1.2

# Resolved once, written to the run's recipe.yaml, and read from there afterwards.
AUTOMATIC_KEYS = (
    "model.device",
    "data.max_length",
    "training.max_steps",
    "training.activation_checkpointing",
    "rendering.date",
)
REVISION_KEY = re.compile(r"data\.(train|eval)\.\d+\.revision")
# What a resumed run may change: it is only shown, kept or cut.
CHANGEABLE_KEYS = (
    "training.tokens_per_microbatch",
    "training.shared_context",
    "training.activation_checkpointing",
    "training.compile",
    "training.memory_limit",
    "optimizer.step_in_backward",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "data.cache",
    "report.examples",
    "report.alternatives",
    "trackers",
    "output_dir",
)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run ended with.

    Attributes:
        output_dir: the run folder; `model/` inside it is the result.
        already_finished: the command found the run finished and did nothing.
        training: steps, nll before and after, the best.
        parity: how the saved model compares with the trained one; None on ranks that wrote nothing.
        rows: rows of the training data read, and used.
        report: the page that shows the run; None where it was not written.
    """

    output_dir: Path
    already_finished: bool
    training: TrainingResult
    parity: Parity | None
    rows: dict[str, int]
    report: Path | None = None

    @property
    def model_dir(self) -> Path:
        """The trained model as a Hugging Face folder."""
        return self.output_dir / "model"

    def to_json(self) -> dict[str, Any]:
        """One machine-readable object."""
        return {
            **asdict(self),
            "output_dir": str(self.output_dir),
            "model_dir": str(self.model_dir),
            "report": None if self.report is None else str(self.report),
        }

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` of `metrics.jsonl`: a row for each step and evaluation, `kind` says which.

        Raises:
            ConfigError: pandas is not installed.
        """
        lines = (self.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return data_frame([json.loads(line) for line in lines])

    def _repr_html_(self) -> str:
        """A small table, for a notebook."""
        training = self.training
        rows = [["run", str(self.output_dir)], ["model", str(self.model_dir)], ["steps", f"{training.steps:,}"]]
        rows.append(["rows", f"{self.rows['used']:,} of {self.rows['read']:,}"])
        if training.nll_before is not None and training.nll_after is not None:
            rows.append(
                ["held-out nll, nats a token", f"{training.nll_before:.4f} before, {training.nll_after:.4f} after"]
            )
        rows.append(["seconds", f"{training.seconds:,.0f}"])
        return html_table(rows)

    def __str__(self) -> str:
        training = self.training
        lines = [f"{self.output_dir}: finished before, nothing done"] if self.already_finished else []
        early = " (stopped early)" if training.stopped_early else ""
        lines.append(f"{training.steps:,} steps{early} on {self.rows['used']:,} rows in {training.seconds:,.0f} s")
        if training.nll_before is not None and training.nll_after is not None:
            lines.append(f"held-out nll {training.nll_before:.4f} -> {training.nll_after:.4f} nats a token")
        lines.append(f"model: {self.model_dir}")
        if self.parity is not None:
            lines.append(
                f"  loaded with transformers its log-probabilities are equal to {self.parity.largest_difference:.0e}; "
                f"rounding to its precision cost {self.parity.rounding_cost:+.1e} nats a token"
            )
            if self.parity.merge_difference is not None:
                lines.append(
                    f"adapter: {self.output_dir / 'adapter'}, in the form of peft; merged into the model above, which before "
                    f"rounding is equal to {self.parity.merge_difference:.0e}"
                )
        if self.report is not None:
            lines.append(f"report: {self.report}")
        return "\n".join(lines)


def train(
    recipe: Recipe,
    *,
    train_rows: Rows | None = None,
    eval_rows: Rows | None = None,
    quiet: bool = False,
) -> RunResult:
    """Train as the recipe says, or go on where the same recipe stopped; a finished run is only reported.

    Args:
        recipe: see `goldsmith.load_recipe`.
        train_rows, eval_rows: rows in memory (mappings, or a `datasets.Dataset`) in place of the recipe's files.
        quiet: no progress on standard error.

    >>> import tempfile
    >>> layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> recipe = Recipe.from_mapping({
    ...     "model": {"init": {"architecture": "llama", "max_position_embeddings": 32, **layer}, "device": "cpu"},
    ...     "tokenizer": {"train": {"kind": "character"}},
    ...     "data": {},
    ...     "training": {"max_steps": 2},
    ...     "output_dir": f"{tempfile.mkdtemp()}/run",
    ... })
    >>> gold = [{"prompt": "1 + 1 = ", "completion": "2"}]
    >>> result = train(recipe, train_rows=gold, quiet=True)
    >>> result.training.steps, result.model_dir.name
    (2, 'model')
    >>> train(recipe, train_rows=gold, quiet=True).already_finished
    True

    Raises:
        GoldsmithError: each kind with its own exit code; see `goldsmith.errors`.
    """
    device = resolve_device(recipe.model.device)
    compute_dtype_of(recipe, device)  # refused before anything is read
    # Rows in memory may be read twice: by a tokenizer that learns, and by the data set.
    rows = None if train_rows is None else list(train_rows)
    with contextlib.ExitStack() as stack:
        stack.enter_context(distributed.process_group(device))
        folder = Path(recipe.output_dir)
        if distributed.is_main():
            existed = folder.exists()
            stack.enter_context(FolderLock(folder))
            # By who holds the lock, and before it is given up: what another process just begins looks unused, too.
            stack.callback(_remove_if_unused, folder, existed=existed)
        distributed.barrier()
        stored = _stored_recipe(recipe, folder)
        distributed.barrier()  # every process has seen the folder as it was
        if stored is not None and (folder / RESULT).is_file():
            return _finished(folder)
        with _explained_disk_full(folder):
            return _run(recipe, stored, folder, device, rows, eval_rows, quiet=quiet)


def _run(
    recipe: Recipe,
    stored: Recipe | None,
    folder: Path,
    device: torch.device,
    train_rows: RowList | None,
    eval_rows: Rows | None,
    *,
    quiet: bool,
) -> RunResult:
    resolved = recipe if stored is None else _with_resolved(recipe, stored)
    say = _Say(quiet=quiet or not distributed.is_main())
    if stored is not None:
        _compare_machine(resolved, stored, device, say)

    if not resolved.data.train and train_rows is None:
        raise ConfigError("data.train: missing, and no rows were given", remedy="name the files to train on")
    if not resolved.data.eval and eval_rows is None:
        for key, value in resolved.evaluation:
            if value is not None:
                raise ConfigError(
                    f"evaluation.{key} is {value}, but there is no data.eval to evaluate on",
                    remedy="name held-out files in data.eval, or take the key out",
                )
    require_installed(resolved.trackers)
    resolved = _with_revisions(resolved, stored)
    # The model's folder first: a model that is not there should be named as such, and not by its tokenizer.
    own_limit = own_limit_of(resolved)
    tokenizer = _shared_tokenizer(resolved, folder, train_rows)
    max_length = resolved.data.max_length or own_limit
    renderer = renderer_of(resolved, tokenizer, max_length)
    if stored is None and resolved.rendering.date is None and renderer.reads_date:
        # Once, so that the run reads alike on another day; where no template writes the date it stays null.
        resolved = _with_values(resolved, {"rendering.date": _today(device)})
        renderer = renderer_of(resolved, tokenizer, max_length)
        say(f"the chat template writes the date: rendering.date is {resolved.rendering.date}")
    stream = stream_of(resolved, renderer) if resolved.data.is_streamed and train_rows is None else None
    if stream is None:
        train_data = dataset_of(resolved, renderer, "train", train_rows, note=say)
        say(f"training data: {train_data.report.used:,} of {train_data.report.rows_in:,} rows, "
            f"{train_data.report.gold_tokens:,} gold of {train_data.report.tokens:,} tokens")  # fmt: skip
    else:
        train_data = stream.first()
        say("training data: streamed, its rows are checked as they come")
    _say_formats(say, train_data if stream is None else stream)
    if stream is None:
        _say_losses(say, train_data.report, "training data")
    _say_unknown(say, train_data, "training data")
    eval_data = None
    if resolved.data.eval or eval_rows is not None:
        eval_data = dataset_of(resolved, renderer, "eval", eval_rows, note=say)
        say(f"held-out data: {eval_data.report.used:,} of {eval_data.report.rows_in:,} rows")
        _say_formats(say, eval_data)
        _say_losses(say, eval_data.report, "held-out data")
        _say_unknown(say, eval_data, "held-out data")

    causal_lm = causal_lm_of(resolved, tokenizer, device)
    silenced = silence_randomness(causal_lm)
    for name, value in silenced.items():
        say(f"{name}: {value} -> 0, so that the loss depends on the data alone")
    proof = prove(causal_lm.config, name=resolved.model.path or "model.init")
    adapter = choose_trained(resolved, causal_lm, tokenizer)
    if adapter is not None or resolved.training.trainable is not None:
        trained, frozen = (
            sum(p.numel() for p in causal_lm.parameters() if p.requires_grad is wanted) for wanted in (True, False)
        )
        say(f"trained: {trained:,} parameters; frozen: {frozen:,}")
    if adapter is not None and adapter.config.dropout:
        say(
            f"adapter.dropout: {adapter.config.dropout}: the loss is random, and cuts of a step are equal in distribution only"
        )
    longer = int((train_data.lengths > resolved.training.tokens_per_microbatch).sum())
    if longer:
        say(
            f"{longer:,} rows are longer than training.tokens_per_microbatch "
            f"({resolved.training.tokens_per_microbatch:,}): each is a micro-batch by itself"
        )
    model = LikelihoodModel(
        causal_lm,
        label_smoothing=resolved.objective.label_smoothing,
        compute_dtype=compute_dtype_of(resolved, device),
    )

    trainer = Trainer(
        model=model,
        train=train_data,
        evaluation=eval_data,
        config=resolved.training,
        objective=resolved.objective,
        optimizer=resolved.optimizer,
        evaluation_config=resolved.evaluation,
        checkpoint=resolved.checkpoint,
        total_steps=resolved.training.max_steps or planned_steps(train_data, resolved.training),
        output_dir=folder,
        stream=stream,
        order=resolved.data.order,
        can_share_contexts=proof.shares_contexts,
        progress=progress_reporter(quiet=quiet) if distributed.is_main() else None,
    )
    if stored is None:
        trainer.total_steps = _steps_within_time(trainer, resolved)
        automatic = {
            "model.device": str(device),
            "data.max_length": max_length,
            "training.max_steps": trainer.total_steps,
            "training.activation_checkpointing": trainer.memory.activation_checkpointing,
        }
        resolved = _with_values(resolved, automatic)
    _say_memory(trainer, say)
    data_report = _data_report(stream or train_data, eval_data)
    if distributed.is_main():
        if resolved.trackers:
            facts = RunFacts(name=folder.name, folder=folder, settings=resolved.settings())
            trainer.trackers = Following.of(resolved.trackers, facts)
        _require_space(trainer, folder)
        _claim(folder, resolved, tokenizer, data_report, stored=stored is not None, say=say)
        write_atomic(folder / MEMORY, json.dumps(trainer.memory.budget().to_json(), indent=1) + "\n")
    distributed.barrier()

    def score_shown(name: str) -> None:
        score_for_report(
            folder / name,
            model,
            tokenizer,
            eval_data or train_data,
            resolved.report,
            tokens_per_microbatch=trainer.memory.evaluation_tokens,
        )

    # Also in a run that goes on: until `trainer.train()` takes up its checkpoint, the weights are those that it began with.
    if distributed.agree(not (folder / BEFORE).is_file(), device):
        # The first evaluation meets the same number that is not finite, and says what it means for the run.
        with contextlib.suppress(NumericalError):
            score_shown(BEFORE)

    result = trainer.train()
    score_shown(AFTER)
    train_report = train_data.report
    if stream is not None:
        train_report = stream.report()
        _say_stream(say, train_report)
        _say_losses(say, train_report, "training data")

    outcome = RunResult(
        output_dir=folder,
        already_finished=False,
        training=result,
        parity=None,
        rows={"read": train_report.rows_in, "used": train_report.used},
    )
    if distributed.is_main():
        model_dir = folder / "model"
        # As the run keeps it: what is written of one that was just learnt differs from what a resumed run writes.
        kept_tokenizer = load_tokenizer(str(folder / TOKENIZER))
        merge_difference = None
        result_lm = causal_lm
        if adapter is not None:
            save_adapter(adapter, kept_tokenizer, folder / "adapter")
            # From the written folder, as a user would: weights of 4 bits are thereby merged into the unrounded ones.
            result_lm = load_causal_lm(folder / "adapter", dtype=resolved.model.dtype, device=device)
            merge_difference = check_merged(result_lm, model.eval(), eval_data or train_data)
        save_model(
            result_lm,
            kept_tokenizer,
            model_dir,
            dtype=stored_dtype(result_lm),
            end_token_ids=sorted(renderer.end_token_ids),
            silenced=silenced,
        )
        del result_lm
        parity = check_parity(model_dir, model, eval_data or train_data)
        outcome = replace(outcome, parity=replace(parity, merge_difference=merge_difference), report=folder / REPORT)
        write_atomic(folder / RESULT, json.dumps(outcome.to_json(), indent=1) + "\n")
        if stream is not None:  # only now are its rows counted
            data_report["train"] |= train_report.to_json()
            write_atomic(folder / DATA, json.dumps(data_report, indent=1) + "\n")
        write_run_report(folder)
    distributed.barrier()
    return outcome


# The run folder: whose it is, and what of it is used again


def _stored_recipe(recipe: Recipe, folder: Path) -> Recipe | None:
    """The resolved recipe of the run that the folder holds; None for a new folder.

    Raises:
        MachineError: the folder holds something else, or the run of another recipe.
    """
    path = folder / RECIPE
    if not path.is_file():
        foreign = (
            sorted(entry.name for entry in folder.iterdir() if entry.name not in UNCLAIMED) if folder.is_dir() else []
        )
        if foreign:
            raise MachineError(
                f"{folder}: not a run of goldsmith: it holds {', '.join(foreign[:5])} and no {RECIPE}",
                remedy="choose another output_dir",
            )
        return None
    try:
        stored = load_recipe(path, of_run=True)
    except ConfigError as error:
        raise MachineError(
            f"{folder}: not a run of this goldsmith: {error.message}", remedy="choose another output_dir"
        ) from error
    if stored.training.max_steps is None or stored.model.device == "auto":
        # A run's recipe has every automatic choice in it. The user's own must not be overwritten.
        raise MachineError(
            f"{folder}: not a run of goldsmith: its {RECIPE} is a recipe that no run has resolved",
            remedy="choose another output_dir, such as a folder inside it",
        )
    differing = {
        key: (ours, theirs)
        for key, (ours, theirs) in recipe.differences(stored).items()
        if not _is_changeable(key) and not _is_resolved_as(key, ours, theirs, recipe)
    }
    if differing:
        lines = "".join(f"\n  {key}: {ours!r} here, {theirs!r} there" for key, (ours, theirs) in differing.items())
        raise MachineError(
            f"{folder} belongs to another recipe:{lines}",
            remedy="choose another output_dir, or give the recipe that began it",
        )
    return stored


def _compare_machine(recipe: Recipe, stored: Recipe, device: torch.device, say: _Say) -> None:
    """Refuse another kind of machine, and say what makes the result equal to rounding only.

    Raises:
        MachineError: the run began on another device.
    """
    if str(device) != stored.model.device:
        raise MachineError(
            f"model.device: the run began on {stored.model.device}, but this is {device}",
            remedy="go on with it on such a machine, or begin anew in another output_dir",
        )
    for key in ("tokens_per_microbatch", "shared_context", "activation_checkpointing", "compile"):
        before, now = getattr(stored.training, key), getattr(recipe.training, key)
        if before != now:
            say(f"training.{key}: {before} before, {now} now; the result will be equal to rounding, not to the bit")


def _is_changeable(key: str) -> bool:
    """Whether a resumed run may have another value there, or within it (`trackers.0.project`)."""
    return any(key == changeable or key.startswith(f"{changeable}.") for changeable in CHANGEABLE_KEYS)


def _is_resolved_as(key: str, ours: Any, theirs: Any, recipe: Recipe) -> bool:
    """Whether a run may have made `theirs` out of `ours`."""
    if key == "training.max_steps" and recipe.training.max_seconds is not None and ours is not None:
        return bool(theirs < ours)  # time was short
    return (key in AUTOMATIC_KEYS or REVISION_KEY.fullmatch(key) is not None) and ours in (None, "auto")


def _with_resolved(recipe: Recipe, stored: Recipe) -> Recipe:
    """This recipe, with the automatic choices that were made when the run began."""
    choices = {}
    for key in AUTOMATIC_KEYS:
        section, name = key.split(".")
        if key in CHANGEABLE_KEYS and getattr(getattr(recipe, section), name) not in (None, "auto"):
            continue  # decided by the user, perhaps otherwise than before
        choices[key] = getattr(getattr(stored, section), name)
    return _with_values(recipe, choices)


def _with_revisions(recipe: Recipe, stored: Recipe | None) -> Recipe:
    """The same recipe, each hub data set held to one commit: the one of the run, or for a new one the newest."""
    splits = {}
    for split in ("train", "eval"):
        before = getattr(stored.data, split) if stored is not None else []
        sources: list[SourceConfig] = []
        for index, source in enumerate(getattr(recipe.data, split)):
            if source.is_hub:
                revision = before[index].revision if before else hub_revision(source)
                source = source.model_copy(update={"revision": revision})
            sources.append(source)
        splits[split] = sources
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=splits)})


def _today(device: torch.device) -> str:
    """The main process's day, on every rank: at midnight they might differ."""
    own = date.today().toordinal() if distributed.is_main() else 0
    day = distributed.sum_tensor(torch.tensor(own, device=device))
    return date.fromordinal(int(day)).isoformat()


def _with_values(recipe: Recipe, values: Mapping[str, object]) -> Recipe:
    for key, value in values.items():
        section, name = key.split(".")
        recipe = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={name: value})})
    return recipe


def _claim(
    folder: Path,
    resolved: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    data_report: dict[str, Any],
    *,
    stored: bool,
    say: _Say,
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


def _data_report(train_data: Dataset | ExampleStream, eval_data: Dataset | None) -> dict[str, Any]:
    splits = {"train": train_data, "eval": eval_data}
    return {
        split: {**_report_of(data).to_json(), "fingerprint": data.fingerprint()}
        for split, data in splits.items()
        if data is not None
    }


def _report_of(data: Dataset | ExampleStream) -> DataReport:
    return data.report() if isinstance(data, ExampleStream) else data.report


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


def _finished(folder: Path) -> RunResult:
    values = json.loads((folder / RESULT).read_text())
    return RunResult(
        output_dir=folder,
        already_finished=True,
        training=TrainingResult(**values["training"]),
        parity=Parity(**values["parity"]),
        rows=values["rows"],
        report=folder / REPORT if (folder / REPORT).is_file() else None,
    )


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
def _explained_disk_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MachineError(
            f"{folder}: the disk is full ({error.filename or error}); the newest checkpoint is whole",
            remedy="free disk space and give the same command again: it goes on from the newest checkpoint",
        ) from error
    except SafetensorError as error:
        if "No space left" not in str(error):
            raise
        raise MachineError(
            f"{folder}: the disk is full ({error}); the newest checkpoint is whole",
            remedy="free disk space and give the same command again: it goes on from the newest checkpoint",
        ) from error


def _shared_tokenizer(recipe: Recipe, folder: Path, train_rows: RowList | None) -> PreTrainedTokenizerBase:
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


def _steps_within_time(trainer: Trainer, recipe: Recipe) -> int:
    """The planned steps, or as many as a calibration says fit into `training.max_seconds`; the same on every rank."""
    seconds = recipe.training.max_seconds
    if seconds is None:
        return trainer.total_steps
    measured = torch.tensor(trainer.seconds_a_step(), dtype=torch.float64, device=trainer.device)
    slowest = float(distributed.sum_tensor(measured)) / distributed.world_size()
    return max(1, min(trainer.total_steps, int(seconds / (slowest * CALIBRATION_MARGIN))))


def _require_space(trainer: Trainer, folder: Path) -> None:
    """Checkpoints that will lie there at once (the kept, the best, the one being written) and the result."""
    model = trainer.model.causal_lm
    at_once = trainer.checkpoint_config.keep + 2 - len(trainer.store.steps())
    weights = sum(p.numel() for p in model.parameters()) * stored_dtype(model).itemsize
    needed = max(at_once, 1) * checkpoint_bytes(model) + 2 * weights
    require_space(folder, needed, f"{at_once} checkpoints and the result")


def _say_memory(trainer: Trainer, say: _Say) -> None:
    how = f"activation checkpointing: {trainer.memory.activation_checkpointing}"
    if trainer.config.activation_checkpointing == "auto" and trainer.memory.activation_checkpointing == "layers":
        how += f", because without it a step may take {format_bytes(trainer.memory.budget('none').total)}"
    say(f"memory of a step, at most {trainer.memory.budget()}; {how}")


def _say_stream(say: _Say, report: DataReport) -> None:
    """What became of the rows of a stream; a row of two passes counts twice."""
    for file in report.files:
        rejected = "".join(f", {count:,} rejected ({reason})" for reason, count in file.rejected.items())
        say(f"  {file.name}: {file.used:,} of {file.rows_in:,} rows that were read{rejected}")


def _say_losses(say: _Say, report: DataReport, name: str) -> None:
    for file in report.files:
        if file.too_long:
            say(
                f"{name}, {file.path}: {file.too_long:,} rows are longer than max_length: {file.dropped:,} left out, {file.cut:,} "
                f"cut, {file.split:,} split; lost are {file.tokens_lost:,} tokens, {file.gold_tokens_lost:,} of them gold"
            )


def _say_formats(say: _Say, data: Dataset | ExampleStream) -> None:
    """The format of each source, and how it is known."""
    said = set()
    for file in _report_of(data).files:
        if file.format and (file.name, file.format) not in said:
            said.add((file.name, file.format))
            how = f"found in the first rows of {file.path}" if file.format_detected else "as the recipe says"
            say(f"  {file.name}: format {file.format}, {how}")


def _say_unknown(say: _Say, data: Dataset, name: str) -> None:
    if data.num_unknown_tokens:
        say(
            f"{name}: {data.num_unknown_tokens:,} tokens are the unknown token: characters that the tokenizer cannot write"
        )


class _Say:
    """Lines on standard error for a person; nothing when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def __call__(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)
