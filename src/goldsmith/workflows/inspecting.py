"""Inspecting: all rows of a recipe as they will be trained on, what is wrong with them, and what the run will cost."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from goldsmith.data.dataset import Dataset
from goldsmith.data.loader import watch_rows
from goldsmith.data.rendering import Renderer
from goldsmith.data.rows import Rejection, source_files
from goldsmith.data.truncation import Losses
from goldsmith.errors import ConfigError, GoldsmithError
from goldsmith.inspection.page import html_page
from goldsmith.inspection.plan import Measured, Plan, plan_run
from goldsmith.inspection.report import InspectReport
from goldsmith.inspection.shown import show_example
from goldsmith.inspection.survey import Sample, SplitSurvey, Survey, compare_with_eval
from goldsmith.models.folder import load_config, resolve_model_folder
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.precision import resolve_device
from goldsmith.models.randomness import silence_randomness
from goldsmith.recipe import Recipe
from goldsmith.records import DataReport
from goldsmith.storage import require_no_input, write_asked_file
from goldsmith.training.trainer import Trainer
from goldsmith.types import Conversation, TokenizedExample
from goldsmith.workflows.materials import (
    causal_lm_of,
    choose_trained,
    compute_dtype_of,
    own_limit_of,
    renderer_of,
    tokenizer_of,
)
from goldsmith.workflows.models import files_of_model
from goldsmith.workflows.saying import RowCounter, Say

__all__ = ["inspect"]

_MEASURED_STEPS = 3
# Measuring is over after so long, with the steps that were done by then.
_MEASURED_SECONDS = 60.0
# A weight, its gradient and two moments, four bytes each.
_BYTES_A_PARAMETER = 16


def inspect(
    recipe: Recipe,
    *,
    num_examples: int = 3,
    html: str | Path | None = None,
    measure: bool = True,
    strict: bool = False,
    quiet: bool = True,
    recipe_file: str | Path | None = None,
) -> InspectReport:
    """Look at the whole data of a recipe as it will be trained on. Nothing is trained, and only `html` is written.

    Args:
        num_examples: the first examples of the training data, shown token by token.
        html: write a page here, too.
        measure: build the recipe's model and time a few steps of it on sampled rows.
        strict: let the report's exit code be that of bad data where a finding is at error level.
        quiet: no progress on standard error.
        recipe_file: where the recipe was read from, which `html` is not to replace.

    Raises:
        DataError: a file is missing, empty or damaged. (Bad rows are findings.)
        ConfigError, ModelError: the recipe, its tokenizer or its template; `html` is one of the files that are read.
    """
    if not recipe.data.train:
        raise ConfigError("data.train: missing", remedy="name the files to be looked at")
    if html is not None:
        require_no_input(html, _read_files(recipe, recipe_file), option="html", writes="the page")
    own_limit = own_limit_of(recipe)
    tokenizer = tokenizer_of(recipe, None)
    renderer = renderer_of(recipe, tokenizer, recipe.data.max_length or own_limit)
    train, train_report = _watch(recipe, renderer, "train", num_examples=num_examples, quiet=quiet)
    splits: list[SplitSurvey] = []
    if recipe.data.eval:
        evaluation, report = _watch(recipe, renderer, "eval", num_examples=0, quiet=quiet)
        compare_with_eval(train, evaluation)
        splits.append(evaluation.finish(report, bad_rows_stop=recipe.data.on_bad_row == "stop"))
    found = train.finish(train_report, bad_rows_stop=recipe.data.on_bad_row == "stop")
    splits.insert(0, found)
    training = recipe.training
    plan = plan_run(
        found.sample,
        batch_size=training.batch_size,
        tokens_per_microbatch=training.tokens_per_microbatch,
        epochs=training.epochs,
        max_steps=training.max_steps,
    )
    measured, not_measured = None, None
    if measure and plan is not None:
        Say(quiet=quiet)("measuring a few steps")
        try:
            measured, not_measured = _measure(recipe, tokenizer, found.sample, plan)
        except GoldsmithError as error:
            not_measured = error.message
    result = InspectReport(
        output_dir=recipe.output_dir,
        splits=tuple(splits),
        plan=plan,
        measured=measured,
        not_measured=not_measured,
        examples=tuple(show_example(tokenizer, example) for example in found.first_examples),
        strict=strict,
    )
    if html is not None:
        write_asked_file(html, html_page(result), option="html")
    return result


def _read_files(recipe: Recipe, recipe_file: str | Path | None) -> Iterator[tuple[str, str | Path]]:
    if recipe_file is not None:
        yield "the recipe", recipe_file
    for source in [*recipe.data.train, *recipe.data.eval]:
        if not source.is_hub:
            yield from (("the data", file) for _, file in source_files(source, base_folder=Path.cwd()))
    if recipe.rendering.chat_template is not None:
        yield "the chat template", recipe.rendering.chat_template
    for folder in (recipe.model.path, recipe.tokenizer.path):
        if folder is not None:
            yield from files_of_model(folder)


def _watch(
    recipe: Recipe, renderer: Renderer, split: Literal["train", "eval"], *, num_examples: int, quiet: bool
) -> tuple[Survey, DataReport]:
    survey = Survey(
        renderer,
        split=split,
        tokens_per_microbatch=recipe.training.tokens_per_microbatch,
        num_examples=num_examples,
    )
    report = watch_rows(
        recipe.data.train if split == "train" else recipe.data.eval,
        config=recipe.data,
        renderer=renderer,
        split=split,
        watcher=survey if quiet else _Counted(survey),
        base_folder=Path.cwd(),
        parts_share_weight=recipe.objective.normalization == "example",
    )
    return survey, report


class _Counted:
    """A survey that says on standard error how far it is."""

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._count = RowCounter(Say(quiet=False), f"{survey.split}:")

    def used(
        self,
        row: Conversation | TokenizedExample,
        examples: list[TokenizedExample],
        *,
        repeat: float,
        losses: Losses,
        straddles: bool,
        spells_control: bool = False,
        mismatches: bool = False,
    ) -> None:
        self._count()
        self._survey.used(
            row,
            examples,
            repeat=repeat,
            losses=losses,
            straddles=straddles,
            spells_control=spells_control,
            mismatches=mismatches,
        )

    def dropped(self, row: Conversation | TokenizedExample) -> None:
        self._count()
        self._survey.dropped(row)

    def rejected(self, rejection: Rejection) -> None:
        self._count()
        self._survey.rejected(rejection)


def _measure(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, sample: Sample, plan: Plan
) -> tuple[Measured | None, str | None]:
    """Time steps of the recipe's model on the sample: forward, backward and update, as training does them."""
    device = resolve_device(recipe.model.device)
    needed, available = _needed_bytes(recipe), _memory_bytes(device)
    if needed is not None and needed > available:
        return None, f"the model would want {needed / 1e9:,.0f} GB to train, and {device} has {available / 1e9:,.0f} GB"
    causal_lm: Any = causal_lm_of(recipe, tokenizer, device)
    silence_randomness(causal_lm)
    choose_trained(recipe, causal_lm, tokenizer)
    model = LikelihoodModel(
        causal_lm, label_smoothing=recipe.objective.label_smoothing, compute_dtype=compute_dtype_of(recipe, device)
    )
    data = Dataset(sample.examples)
    # A step's own size, or two micro-batches of it where it has more: a token costs the same in them all.
    room = max(2 * recipe.training.tokens_per_microbatch, int(data.lengths[0]))
    within = int(np.searchsorted(np.cumsum(data.lengths), room, side="right"))
    size = max(1, min(recipe.training.batch_size, within))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            train=data,
            evaluation=None,
            config=recipe.training.model_copy(update={"batch_size": size}),
            objective=recipe.objective,
            optimizer=recipe.optimizer,
            evaluation_config=recipe.evaluation,
            checkpoint=recipe.checkpoint,
            total_steps=_MEASURED_STEPS + 1,
            output_dir=Path(folder),
        )
        model.train()
        records = []
        began = time.perf_counter()
        for step in range(1, _MEASURED_STEPS + 2):
            records.append(trainer.train_step(step)[0])
            if time.perf_counter() - began > _MEASURED_SECONDS:
                break
    timed = records[1:] or records  # the first one warms up
    rate = sum(record.tokens for record in timed) / sum(record.seconds for record in timed)
    a_step = plan.tokens_per_step / rate
    return (
        Measured(
            device=str(device),
            parameters=causal_lm.num_parameters(),
            tokens=sum(record.tokens for record in timed),
            seconds=tuple(record.seconds for record in timed),
            tokens_per_second=rate,
            seconds_per_step=a_step,
            seconds_total=a_step * plan.steps,
            peak_memory_bytes=max(record.peak_memory_bytes for record in records),
        ),
        None,
    )


def _needed_bytes(recipe: Recipe) -> int | None:
    """Of weights, gradients and moments, before anything of them is allocated; None for a model from nothing.

    Where only an adapter or some parameters are trained, the weights alone.
    """
    if recipe.model.path is None:
        return None
    config = load_config(resolve_model_folder(recipe.model.path, revision=recipe.model.revision))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    trains_all = recipe.adapter is None and recipe.training.trainable is None
    return (_BYTES_A_PARAMETER if trains_all else 4) * int(model.num_parameters())


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
