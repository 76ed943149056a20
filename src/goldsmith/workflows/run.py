"""A run: from a recipe to a trained model in a run folder, and back into the same run when the same command comes again."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from goldsmith import distributed
from goldsmith.data.dataset import Dataset
from goldsmith.data.loader import require_iterable
from goldsmith.data.rendering import Renderer
from goldsmith.data.stream import ExampleStream
from goldsmith.errors import ConfigError, NumericalError
from goldsmith.models.adapters import Adapter
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.precision import resolve_device
from goldsmith.models.proof import prove
from goldsmith.models.quantized import has_packed_weights, num_weights
from goldsmith.models.randomness import silence_randomness
from goldsmith.recipe import Recipe, require_recipe
from goldsmith.report.run_files import RESULT
from goldsmith.storage import write_atomic
from goldsmith.training.progress import progress_reporter
from goldsmith.training.trackers.config import require_installed
from goldsmith.training.trackers.following import Following
from goldsmith.training.trackers.protocol import RunFacts
from goldsmith.training.trainer import Trainer, planned_steps
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
)
from goldsmith.workflows.reporting import AFTER, BEFORE, score_for_report
from goldsmith.workflows.run_folder import (
    MEMORY,
    claim,
    data_report_of,
    explained_disk_full,
    open_folder,
    require_run_space,
    require_unchanged_files,
    shared_tokenizer,
)
from goldsmith.workflows.run_recipe import (
    compare_machine,
    stored_recipe,
    today,
    with_resolved,
    with_revisions,
    with_values,
)
from goldsmith.workflows.run_result import RunResult, finished_result, write_result
from goldsmith.workflows.saying import (
    Say,
    say_formats,
    say_losses,
    say_memory,
    say_spelt_controls,
    say_stream,
    say_unknown,
)

__all__ = ["train"]

# The optimizer's update, records, evaluations and checkpoints come on top of what the calibration measures, and a machine that
# was fast for a second may not be so for two minutes.
CALIBRATION_MARGIN = 1.4


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
        ConfigError: no recipe was given.
        GoldsmithError: each kind with its own exit code; see `goldsmith.errors`.
    """
    require_recipe(recipe)
    device = resolve_device(recipe.model.device)
    compute_dtype_of(recipe, device)  # refused before anything is read
    # Rows in memory may be read twice: by a tokenizer that learns, and by the data set.
    if train_rows is not None:
        require_iterable(train_rows)
    rows = None if train_rows is None else list(train_rows)
    folder = Path(recipe.output_dir)
    with distributed.process_group(device), open_folder(folder):
        stored = stored_recipe(recipe, folder)
        distributed.barrier()  # every process has seen the folder as it was
        if stored is not None and (folder / RESULT).is_file():
            require_unchanged_files(recipe, folder)
            return finished_result(folder)
        with explained_disk_full(folder):
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
    say = Say(quiet=quiet or not distributed.is_main())
    resolved = recipe if stored is None else with_resolved(recipe, stored)
    if stored is not None:
        compare_machine(resolved, stored, device, say)
    _require_rows(resolved, train_rows, eval_rows)
    require_installed(resolved.trackers)
    resolved = with_revisions(resolved, stored)

    gold = _gold(resolved, stored, folder, device, train_rows, eval_rows, say)
    resolved = gold.recipe
    model = _model(gold, device, say)
    trainer = Trainer(
        model=model.likelihood,
        train=gold.train,
        evaluation=gold.evaluation,
        config=resolved.training,
        objective=resolved.objective,
        optimizer=resolved.optimizer,
        evaluation_config=resolved.evaluation,
        checkpoint=resolved.checkpoint,
        total_steps=resolved.training.max_steps or planned_steps(gold.train, resolved.training),
        output_dir=folder,
        stream=gold.stream,
        order=resolved.data.order,
        can_share_contexts=model.shares_contexts,
        progress=progress_reporter(quiet=quiet) if distributed.is_main() else None,
    )
    if stored is None:
        trainer.total_steps = _steps_within_time(trainer, resolved)
        automatic = {
            "model.device": str(device),
            "data.max_length": gold.max_length,
            "training.max_steps": trainer.total_steps,
            "training.activation_checkpointing": trainer.memory.activation_checkpointing,
        }
        resolved = with_values(resolved, automatic)
    say_memory(trainer, say)
    data_report = data_report_of(gold.stream or gold.train, gold.evaluation)
    if distributed.is_main():
        if resolved.trackers:
            facts = RunFacts(name=folder.name, folder=folder, settings=resolved.settings())
            trainer.trackers = Following.of(resolved.trackers, facts)
        require_run_space(trainer, folder)
        claim(folder, resolved, gold.tokenizer, data_report, stored=stored is not None, say=say)
        write_atomic(folder / MEMORY, json.dumps(trainer.memory.budget().to_json(), indent=1) + "\n")
    distributed.barrier()

    # Also in a run that goes on: until `trainer.train()` takes up its checkpoint, the weights are those that it began with.
    if distributed.agree(not (folder / BEFORE).is_file(), device):
        # The first evaluation meets the same number that is not finite, and says what it means for the run.
        with contextlib.suppress(NumericalError):
            _score_shown(folder / BEFORE, trainer, gold, resolved)
    training = trainer.train()
    _score_shown(folder / AFTER, trainer, gold, resolved)

    report = gold.train.report
    if gold.stream is not None:  # only now are its rows counted
        report = gold.stream.report()
        say_stream(say, report)
        say_losses(say, report, "training data")
        data_report["train"] |= report.to_json()
    outcome = RunResult(
        output_dir=folder,
        already_finished=False,
        training=training,
        parity=None,
        rows={"read": report.rows_in, "used": report.used},
    )
    if distributed.is_main():
        outcome = write_result(
            outcome,
            model.likelihood,
            model.adapter,
            gold.shown,
            device,
            dtype=resolved.model.dtype,
            end_token_ids=sorted(gold.renderer.end_token_ids),
            silenced=model.silenced,
            data_report=None if gold.stream is None else data_report,
        )
    distributed.barrier()
    return outcome


def _require_rows(recipe: Recipe, train_rows: RowList | None, eval_rows: Rows | None) -> None:
    """Refuse a recipe that names no rows for what it asks for."""
    if not recipe.data.train and train_rows is None:
        raise ConfigError("data.train: missing, and no rows were given", remedy="name the files to train on")
    if not recipe.data.eval and eval_rows is None:
        for key, value in recipe.evaluation:
            if value is not None:
                raise ConfigError(
                    f"evaluation.{key} is {value}, but there is no data.eval to evaluate on",
                    remedy="name held-out files in data.eval, or take the key out",
                )


@dataclass(frozen=True, kw_only=True)
class _Gold:
    """What is trained on and evaluated with.

    Attributes:
        recipe: with the date, where the template writes one.
        max_length: of the recipe, else the model's own limit.
        train: of a stream the first examples.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    max_length: int | None
    train: Dataset
    stream: ExampleStream | None
    evaluation: Dataset | None

    @property
    def shown(self) -> Dataset:
        """What the report and the parity of the result look at."""
        return self.evaluation or self.train


def _gold(
    recipe: Recipe,
    stored: Recipe | None,
    folder: Path,
    device: torch.device,
    train_rows: RowList | None,
    eval_rows: Rows | None,
    say: Say,
) -> _Gold:
    """The rows of the recipe, read and rendered; what became of them is said."""
    # The model's folder first: a model that is not there should be named as such, and not by its tokenizer.
    own_limit = own_limit_of(recipe)
    tokenizer = shared_tokenizer(recipe, folder, train_rows)
    max_length = recipe.data.max_length or own_limit
    renderer = renderer_of(recipe, tokenizer, max_length)
    if stored is None and recipe.rendering.date is None and renderer.reads_date:
        # Once, so that the run reads alike on another day; where no template writes the date it stays null.
        recipe = with_values(recipe, {"rendering.date": today(device)})
        renderer = renderer_of(recipe, tokenizer, max_length)
        say(f"the chat template writes the date: rendering.date is {recipe.rendering.date}")
    stream = stream_of(recipe, renderer) if recipe.data.is_streamed and train_rows is None else None
    if stream is None:
        train_data = dataset_of(recipe, renderer, "train", train_rows, note=say)
        say(f"training data: {train_data.report.used:,} of {train_data.report.rows_in:,} rows, "
            f"{train_data.report.gold_tokens:,} gold of {train_data.report.tokens:,} tokens")  # fmt: skip
    else:
        train_data = stream.first()
        say("training data: streamed, its rows are checked as they come")
    say_formats(say, train_data if stream is None else stream)
    if stored is None and distributed.is_main():
        say_spelt_controls(say, recipe, tokenizer, train_rows)
    if stream is None:
        say_losses(say, train_data.report, "training data")
    say_unknown(say, train_data, "training data")
    evaluation = None
    if recipe.data.eval or eval_rows is not None:
        evaluation = dataset_of(recipe, renderer, "eval", eval_rows, note=say)
        say(f"held-out data: {evaluation.report.used:,} of {evaluation.report.rows_in:,} rows")
        say_formats(say, evaluation)
        say_losses(say, evaluation.report, "held-out data")
        say_unknown(say, evaluation, "held-out data")
    longer = int((train_data.lengths > recipe.training.tokens_per_microbatch).sum())
    if longer:
        say(
            f"{longer:,} rows are longer than training.tokens_per_microbatch "
            f"({recipe.training.tokens_per_microbatch:,}): each is a micro-batch by itself"
        )
    return _Gold(
        recipe=recipe,
        tokenizer=tokenizer,
        renderer=renderer,
        max_length=max_length,
        train=train_data,
        stream=stream,
        evaluation=evaluation,
    )


@dataclass(frozen=True, kw_only=True)
class _Model:
    """The proven model, with what is trained of it chosen.

    Attributes:
        silenced: the randomness that was turned off, by name.
    """

    likelihood: LikelihoodModel
    adapter: Adapter | None
    silenced: dict[str, float | bool]
    shares_contexts: bool


def _model(gold: _Gold, device: torch.device, say: Say) -> _Model:
    """The model of the recipe on its device, refused where packing does not compute it."""
    recipe = gold.recipe
    causal_lm = causal_lm_of(recipe, gold.tokenizer, device)
    silenced = silence_randomness(causal_lm)
    for name, value in silenced.items():
        say(f"{name}: {value} -> 0, so that the loss depends on the data alone")
    proof = prove(causal_lm.config, name=recipe.model.path or "model.init")
    adapter = choose_trained(recipe, causal_lm, gold.tokenizer)
    if adapter is not None or recipe.training.trainable is not None:
        trained, frozen = (
            sum(num_weights(p) for p in causal_lm.parameters() if p.requires_grad is wanted) for wanted in (True, False)
        )
        say(
            f"trained: {trained:,} parameters; frozen: {frozen:,}"
            + (", in 4 bits" if has_packed_weights(causal_lm) else "")
        )
    if adapter is not None and adapter.config.dropout:
        say(
            f"adapter.dropout: {adapter.config.dropout}: the loss is random, and cuts of a step are equal in distribution only"
        )
    likelihood = LikelihoodModel(
        causal_lm,
        label_smoothing=recipe.objective.label_smoothing,
        compute_dtype=compute_dtype_of(recipe, device),
    )
    return _Model(likelihood=likelihood, adapter=adapter, silenced=silenced, shares_contexts=proof.shares_contexts)


def _steps_within_time(trainer: Trainer, recipe: Recipe) -> int:
    """The planned steps, or as many as a calibration says fit into `training.max_seconds`; the same on every rank."""
    seconds = recipe.training.max_seconds
    if seconds is None:
        return trainer.total_steps
    measured = torch.tensor(trainer.seconds_a_step(), dtype=torch.float64, device=trainer.device)
    slowest = float(distributed.sum_tensor(measured)) / distributed.world_size()
    return max(1, min(trainer.total_steps, int(seconds / (slowest * CALIBRATION_MARGIN))))


def _score_shown(path: Path, trainer: Trainer, gold: _Gold, recipe: Recipe) -> None:
    """The examples that the report shows, under the weights as they are now."""
    score_for_report(
        path,
        trainer.model,
        gold.tokenizer,
        gold.shown,
        recipe.report,
        tokens_per_microbatch=trainer.memory.evaluation_tokens,
    )
