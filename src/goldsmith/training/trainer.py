"""The training loop: steps of maximum likelihood, exactly resumable.

A step is a set of examples. Its denominator is counted over the whole step, and over all ranks, before the first
forward pass; micro-batches contribute sums. The position is the number of updates done and nothing else: order, learning rate and
evaluation points are functions of it.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from goldsmith import distributed
from goldsmith.data.dataset import Dataset
from goldsmith.data.families import family_levels
from goldsmith.data.order import StepOrder
from goldsmith.data.stream import ExampleStream
from goldsmith.errors import NumericalError, StoppedBySignal
from goldsmith.models.compiling import compile_layers, require_compilable
from goldsmith.models.evaluate import sum_log_likelihood
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.step import StepSums, autocast, forward_backward
from goldsmith.objective.cross_entropy import ObjectiveConfig
from goldsmith.objective.normalization import step_denominator
from goldsmith.records import EvaluationRecord, ExampleRecord, StepRecord, TrainingState
from goldsmith.storage import JsonLinesWriter, fail_point
from goldsmith.training.checkpoint import CheckpointConfig, CheckpointStore
from goldsmith.training.memory import parse_bytes
from goldsmith.training.metrics import peak_memory_bytes, read_evaluations, total_norm, update_to_weight
from goldsmith.training.optimizer import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate
from goldsmith.training.progress import NoProgress, ProgressReporter
from goldsmith.training.step_memory import StepMemory
from goldsmith.training.trackers.following import Following
from goldsmith.training.update_in_backward import UpdateInBackward, require_one_microbatch

__all__ = ["EvaluationConfig", "Trainer", "TrainingConfig", "TrainingResult", "nll_by_source", "planned_steps"]


class TrainingConfig(BaseModel):
    """`training:` of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(3, gt=0, description="passes over the data; not used where max_steps is given")
    max_steps: int | None = Field(None, gt=0, description="updates in all, over as many epochs as that takes")
    max_seconds: float | None = Field(
        None, gt=0.0, description="fewer steps where a short calibration says that they would take longer than this"
    )
    batch_size: int = Field(64, gt=0, description="examples an update: a statistical choice")
    tokens_per_microbatch: int = Field(8192, gt=0, description="tokens in memory at a time: changes no number")
    seed: int = Field(0, ge=0, description="of the data order and of new weights")
    shared_context: Literal["auto", "off"] = Field(
        "auto", description="carry a context that several rows of a micro-batch begin with once: changes no number"
    )
    activation_checkpointing: Literal["none", "layers", "auto"] = Field(
        "auto",
        description="layers: compute each layer again in the backward pass, for memory; auto: where memory is too small",
    )
    memory_limit: int | str | None = Field(
        None, description="what `auto` may plan with: bytes, or such as 8GB; null: what the machine has free"
    )
    compile: Literal["off", "layers"] = Field(
        "off",
        description="layers: compile decoder layers that goldsmith does not compute by hand; on a CPU that wants a C++ compiler",
    )
    trainable: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="globs over parameter names, in order, `!` takes away (`[model.layers.2?.*, '!*.bias']`); the rest is frozen; "
        "null: all",
    )
    log_update_ratio_every: int = Field(10, gt=0, description="steps between two measurements of update_to_weight")

    @field_validator("memory_limit")
    @classmethod
    def _is_a_size(cls, value: int | str | None) -> int | str | None:
        if value is not None:
            parse_bytes(value)
        return value


class EvaluationConfig(BaseModel):
    """`evaluation:` of a recipe. The held-out gold is always evaluated before the first step and after the last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_steps: int | None = Field(None, gt=0, description="also every so many steps")
    early_stopping: int | None = Field(None, gt=0, description="stop after so many evaluations without a better one")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished run has to tell.

    Attributes:
        steps: updates done; fewer than planned where early stopping ended it.
        nll_before, nll_after: held-out nll a token, nats; None without held-out data.
        best_step, best_nll: of the best evaluation.
        seconds: training and evaluation, over all runs.
    """

    steps: int
    nll_before: float | None
    nll_after: float | None
    best_step: int | None
    best_nll: float | None
    stopped_early: bool
    seconds: float


class Trainer:
    """Trains a `LikelihoodModel` on a data set, in a run folder that this process holds the lock of.

    Args:
        model: in training precision, on its device, already proven.
        train: the gold.
        evaluation: held-out gold, or None.
        total_steps: updates in all, resolved; see `planned_steps`.
        output_dir: the run folder.
        stream: where the training data has no end: what the steps are drawn from; `train` is then its first step, which stands
            for those that are not read yet.
        order: `data.order` of the recipe: whether rows that begin with the same context meet in a step.
        can_share_contexts: whether the proof found that this model may carry a shared context once.
        progress: told of each step and evaluation; the main process only.
        trackers: told of each record after it was written; the main process only.
    """

    def __init__(
        self,
        *,
        model: LikelihoodModel,
        train: Dataset,
        evaluation: Dataset | None,
        config: TrainingConfig,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        evaluation_config: EvaluationConfig,
        checkpoint: CheckpointConfig,
        total_steps: int,
        output_dir: Path,
        stream: ExampleStream | None = None,
        order: Literal["shuffled", "grouped"] = "shuffled",
        can_share_contexts: bool = True,
        progress: ProgressReporter | None = None,
        trackers: Following | None = None,
    ) -> None:
        self.model = model
        self.device = model.device
        # Of a stream it is replaced by the examples of each step.
        self.train_data = train
        self.stream = stream
        self.evaluation_data = evaluation
        self.config = config
        self.objective = objective
        self.optimizer_config = optimizer
        self.evaluation_config = evaluation_config
        self.checkpoint_config = checkpoint
        self.total_steps = total_steps
        self.output_dir = output_dir
        self.progress = progress or NoProgress()
        self.trackers = trackers
        self.parameters = [p for p in model.causal_lm.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model.causal_lm.named_parameters(), optimizer)
        if optimizer.step_in_backward:
            require_one_microbatch(
                train, batch_size=config.batch_size, tokens_per_microbatch=config.tokens_per_microbatch
            )
        if config.compile == "layers":
            require_compilable(model.causal_lm)
            compile_layers(model.causal_lm)
        self.memory = StepMemory(
            model,
            train,
            batch_size=config.batch_size,
            tokens_per_microbatch=config.tokens_per_microbatch,
            activation_checkpointing=config.activation_checkpointing,
            memory_limit=config.memory_limit,
            state_dtype=optimizer.state_dtype,
            step_in_backward=optimizer.step_in_backward,
            note=self.progress.note,
        )
        self.store = CheckpointStore(folder=output_dir / "checkpoints", keep=checkpoint.keep)
        self.state = TrainingState.initial()
        self.shares_contexts = (
            can_share_contexts
            and config.shared_context == "auto"
            and model.shares_contexts(int(train.lengths.max()) if stream is None else stream.longest)
        )
        self.order = step_order(train, config, order)

    # One step

    def examples_of(self, step: int) -> tuple[int, npt.NDArray[np.int64]]:
        """Epoch of a step, and its examples within `train_data`. A stream has no epochs, and its steps are drawn in order."""
        if self.stream is None:
            return self.order.step(step)
        self.train_data = self.stream.step(step)
        return 0, np.arange(len(self.train_data))

    def forward_backward(self, indices: npt.NDArray[np.int64]) -> StepSums:
        """Add the gradient of the step's loss to the parameters and return its sums over all ranks."""
        return forward_backward(
            self.model,
            self.train_data,
            indices,
            normalization=self.objective.normalization,
            tokens_per_microbatch=self.memory.tokens_per_microbatch,
            shares_contexts=self.shares_contexts,
            updates_in_backward=self.optimizer_config.step_in_backward,
        )

    def train_step(self, step: int) -> tuple[StepRecord, list[ExampleRecord]]:
        """One update.

        Raises:
            NumericalError: the loss or the gradient is not finite; nothing was updated.
        """
        started = time.perf_counter()
        epoch, indices = self.examples_of(step)
        drawn_seconds = time.perf_counter() - started
        rate = learning_rate(self.optimizer_config, step, self.total_steps)
        set_learning_rate(self.optimizer, rate)
        measures = step == 1 or step % self.config.log_update_ratio_every == 0
        if self.optimizer_config.step_in_backward:
            sums, grad_norm, ratios = self._update_in_backward(step, indices, measures=measures)
        else:
            sums = self.memory.fitting(self.forward_backward, indices)
            grad_norm = float(total_norm(p.grad for p in self.parameters if p.grad is not None))
            if not (math.isfinite(sums.loss) and math.isfinite(grad_norm)):
                raise self._numerical_error(step, indices, sums, grad_norm)
            ratios = self._update(grad_norm, measures=measures)

        data = self.train_data
        tokens = int(data.lengths[indices].sum())
        gold_tokens = data.num_target_tokens[indices]
        seconds = time.perf_counter() - started
        record = StepRecord(
            step=step,
            epoch=epoch,
            examples=len(indices),
            tokens=tokens,
            gold_tokens=int(gold_tokens.sum()),
            microbatches=sums.microbatches,
            shared_tokens=tokens - sums.computed_tokens,
            nll=sums.weighted_nll / step_denominator(data.example_weights[indices], data.weight_sums[indices], "token"),
            nll_by_source=nll_by_source(data, indices, sums.weighted_nll_E),
            loss=sums.loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            update_to_weight=ratios,
            seconds=seconds,
            data_seconds=drawn_seconds + sums.data_seconds,
            tokens_per_second=tokens / seconds,
            peak_memory_bytes=peak_memory_bytes(self.device),
            tokens_per_microbatch=self.memory.tokens_per_microbatch,
        )
        examples = [
            ExampleRecord(
                step=step,
                epoch=epoch,
                example_id=data.example_ids[index],
                source=data.sources[index],
                source_name=data.source_names[data.source_indices[index]],
                nll=float(nll),
                gold_tokens=int(count),
            )
            for index, nll, count in zip(indices.tolist(), sums.nll_E, gold_tokens, strict=True)
        ]
        return record, examples

    def _update(self, grad_norm: float, *, measures: bool) -> dict[str, float]:
        """Clip, update, free the gradients; update over weight by layer group where that is measured."""
        max_norm = self.optimizer_config.max_grad_norm
        if max_norm is not None and grad_norm > max_norm:
            torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], max_norm / grad_norm)
        named = self._named_parameters()
        before = {name: p.detach().clone() for name, p in named} if measures else {}
        self.optimizer.step()
        ratios = update_to_weight(before, named) if measures else {}
        self.optimizer.zero_grad(set_to_none=True)
        return ratios

    def _update_in_backward(
        self, step: int, indices: npt.NDArray[np.int64], *, measures: bool
    ) -> tuple[StepSums, float, dict[str, float]]:
        """Gradient and update in one; the step's sums, the norm of its gradient, and update over weight."""
        with UpdateInBackward(self.optimizer, self._named_parameters(), measures_update=measures) as update:
            sums = self.memory.fitting(self.forward_backward, indices)
            if not math.isfinite(sums.loss):
                raise self._numerical_error(step, indices, sums, math.nan)
            grad_norm, ratios = update.finish()
        if not math.isfinite(grad_norm):
            raise self._numerical_error(step, indices, sums, grad_norm, updated=True)
        return sums, grad_norm, ratios

    def _named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.model.causal_lm.named_parameters() if p.requires_grad]

    def _numerical_error(
        self,
        step: int,
        indices: npt.NDArray[np.int64],
        sums: StepSums,
        grad_norm: float,
        *,
        updated: bool = False,
    ) -> NumericalError:
        blamed = indices[~np.isfinite(sums.nll_E)]
        what = "these examples" if len(blamed) else "the gradient, and no single example, in a step of"
        named = (blamed if len(blamed) else indices).tolist()
        ids = ", ".join(f"{self.train_data.example_ids[i]} ({self.train_data.sources[i]})" for i in named[:8])
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        state = (
            "With optimizer.step_in_backward the weights were updated with it; the newest checkpoint is whole"
            if updated
            else f"The weights are as they were after step {step - 1}"
        )
        return NumericalError(
            f"step {step}: loss {sums.loss}, gradient norm {grad_norm}; not finite because of {what}: {ids}{more}. {state}",
            remedy="look at these rows, lower optimizer.learning_rate, or train in float32",
        )

    # Evaluation

    def evaluate(self, step: int) -> EvaluationRecord:
        """Exact nll of the held-out gold: one sum over the whole set, one division."""
        data = self.evaluation_data
        assert data is not None
        started = time.perf_counter()
        share = range(distributed.rank(), len(data), distributed.world_size())
        try:
            with autocast(self.model):
                own = sum_log_likelihood(
                    self.model,
                    data,
                    tokens_per_microbatch=self.memory.evaluation_tokens,
                    indices=share,
                    note_halved=self.memory.evaluate_smaller,
                )
        except NumericalError as error:
            raise NumericalError(f"evaluation after step {step}: {error.message}", remedy=error.remedy) from error
        whole = (own.weighted_nll, own.weight_sum, own.example_nll, own.example_weight_sum)
        sums = torch.tensor([*whole, *own.weighted_nll_by_source, *own.weight_sum_by_source], dtype=torch.float64)
        weighted_nll, weight_sum, example_nll, example_weight_sum, *by_source = distributed.sum_tensor(
            sums.to(self.device)
        ).tolist()
        names = data.source_names if len(data.source_names) > 1 else []
        source_sums = zip(names, by_source, by_source[len(data.source_names) :], strict=False)
        nll = weighted_nll / weight_sum
        seconds = time.perf_counter() - started
        return EvaluationRecord(
            step=step,
            epoch=0 if step == 0 or self.stream is not None else self.order.step(step)[0],
            examples=len(data),
            gold_tokens=int(data.num_target_tokens.sum()),
            nll=nll,
            nll_per_example=example_nll / example_weight_sum,
            nll_by_source={name: own_nll / own_weight for name, own_nll, own_weight in source_sums},
            is_best=self.state.best_nll is None or nll < self.state.best_nll,
            seconds=seconds,
            tokens_per_second=int(data.lengths.sum()) / seconds,
        )

    def _note_evaluation(self, record: EvaluationRecord) -> None:
        if record.is_best:
            self.state = replace(
                self.state, best_step=record.step, best_nll=record.nll, evaluations_without_improvement=0
            )
        else:
            waited = self.state.evaluations_without_improvement + 1
            patience = self.evaluation_config.early_stopping
            self.state = replace(
                self.state,
                evaluations_without_improvement=waited,
                stopped_early=patience is not None and waited >= patience,
            )

    # The loop

    def resume(self) -> bool:
        """Go back to the newest checkpoint, if there is one; True if so."""
        if distributed.is_main():
            self.store.clean()
        distributed.barrier()
        steps = self.store.steps()
        if not steps:
            return False
        self.state = self.store.load(steps[-1], self.model.causal_lm, self.optimizer)
        self.memory.restore(self.state)
        if distributed.is_main():
            # A process that died right after a save had no time to do it.
            self.store.prune(best_step=self.state.best_step)
        distributed.barrier()
        return True

    def train(self) -> TrainingResult:
        """Train to the end, from the newest checkpoint where there is one.

        Raises:
            NumericalError: a non-finite loss or gradient.
            StoppedBySignal: after SIGINT or SIGTERM, when a checkpoint was written.
            CheckpointError: the newest checkpoint is damaged.
        """
        with contextlib.ExitStack() as stack:
            # Whatever draws a random number draws the same in every run of a recipe; the caller's own state stays.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(self.config.seed)
            self.model.train()
            self.resume()
            if self.stream is not None:
                self.stream.seek(self.state.stream)
            run_started = time.monotonic() - self.state.elapsed_seconds
            metrics, examples_file = self._writers(stack)

            def log(record: StepRecord | EvaluationRecord, examples: list[ExampleRecord] | None = None) -> None:
                if metrics is not None and examples_file is not None:
                    metrics.append(record.to_json())
                    examples_file.append(*(example.to_json() for example in examples or ()))
                    metrics.flush()
                    fail_point("metrics.append")
                    if self.trackers is not None:
                        self.trackers.log(record)

            def save() -> None:
                if metrics is not None and examples_file is not None:
                    self.state = replace(
                        self.memory.remembered(self.state),
                        metrics_offset=metrics.sync(),
                        examples_offset=examples_file.sync(),
                        elapsed_seconds=time.monotonic() - run_started,
                        stream=None if self.stream is None else self.stream.state(),
                    )
                    self.store.save(self.model.causal_lm, self.optimizer, self.state)
                distributed.barrier()

            stop_requested = stack.enter_context(stop_on_signals())
            stack.enter_context(self.progress)
            self.progress.start(done=self.state.step, total=self.total_steps)
            if self.trackers is not None:
                self.trackers.start(resumed_from=self.state.step, note=self.progress.note)
                stack.callback(self.trackers.finish, None)  # of a run that is cut off; a second call says nothing

            if self.state.step == 0 and self.evaluation_data is not None:
                record = self.evaluate(0)
                log(record)
                self._note_evaluation(record)
                self.progress.evaluation(record)

            while self.state.step < self.total_steps and not self.state.stopped_early:
                step = self.state.step + 1
                step_record, examples = self.train_step(step)
                log(step_record, examples)
                self.state = replace(self.state, step=step)
                self.progress.step(step_record)

                best = False
                if self.evaluation_data is not None and self._evaluates_after(step):
                    record = self.evaluate(step)
                    log(record)
                    self._note_evaluation(record)
                    self.progress.evaluation(record)
                    best = record.is_best
                stopping = distributed.agree(stop_requested(), self.device)
                if best or stopping or self._saves_after(step):
                    save()
                if stopping and step < self.total_steps and not self.state.stopped_early:
                    raise StoppedBySignal(
                        f"stopped by a signal after step {step} of {self.total_steps}; the checkpoint is written",
                        remedy="the same command goes on from there",
                    )
            result = self.result()
            if self.trackers is not None:
                self.trackers.finish(result)
        return result

    def _writers(self, stack: contextlib.ExitStack) -> tuple[JsonLinesWriter, JsonLinesWriter] | tuple[None, None]:
        """metrics.jsonl and examples.jsonl, cut back to the checkpoint; closed with `stack`. Only the main process has them."""
        if not distributed.is_main():
            return None, None
        metrics = JsonLinesWriter(self.output_dir / "metrics.jsonl", offset=self.state.metrics_offset)
        stack.callback(metrics.close)
        examples = JsonLinesWriter(self.output_dir / "examples.jsonl", offset=self.state.examples_offset)
        stack.callback(examples.close)
        return metrics, examples

    def _evaluates_after(self, step: int) -> bool:
        every = self.evaluation_config.every_steps
        return step == self.total_steps or (every is not None and step % every == 0)

    def _saves_after(self, step: int) -> bool:
        every = self.checkpoint_config.every_steps
        return step == self.total_steps or self.state.stopped_early or (every is not None and step % every == 0)

    def result(self) -> TrainingResult:
        """The summary of a finished run, read back from its metrics."""
        evaluations = read_evaluations(self.output_dir / "metrics.jsonl")
        return TrainingResult(
            steps=self.state.step,
            nll_before=evaluations[0].nll if evaluations else None,
            nll_after=evaluations[-1].nll if evaluations else None,
            best_step=self.state.best_step,
            best_nll=self.state.best_nll,
            stopped_early=self.state.stopped_early,
            seconds=self.state.elapsed_seconds,
        )

    def seconds_a_step(self, steps: int = 3) -> float:
        """Seconds of forward and backward passes over the first steps, the slowest of them; updates nothing."""
        self.model.train()
        times = []
        for step in range(1, steps + 2):
            started = time.perf_counter()
            self.memory.fitting(self.forward_backward, self.examples_of(step)[1])
            times.append(time.perf_counter() - started)
            self.optimizer.zero_grad(set_to_none=True)
        if self.stream is not None:
            self.stream.seek(None)
        return max(times[1:])  # the first one warms up


def nll_by_source(
    data: Dataset, indices: npt.NDArray[np.int64], weighted_nll_E: npt.NDArray[np.float64]
) -> dict[str, float]:
    """Nats a token of each source's gold among the examples `indices`; empty where the data has one source.

    Args:
        weighted_nll_E: nll(i) of each of `indices`, without the example weights.
    """
    if len(data.source_names) < 2:
        return {}
    sources, weights = data.source_indices[indices], data.example_weights[indices]
    nlls, weight_sums = weights * weighted_nll_E, weights * data.weight_sums[indices]
    return {
        data.source_names[source]: float(nlls[sources == source].sum() / weight_sums[sources == source].sum())
        for source in np.unique(sources).tolist()
    }


def step_order(data: Dataset, config: TrainingConfig, order: Literal["shuffled", "grouped"] = "shuffled") -> StepOrder:
    """The steps of a run over `data`."""
    levels = None
    if order == "grouped":
        levels = family_levels(data, np.flatnonzero(np.diff(data.groups, prepend=-1)))
    return StepOrder(data.groups, data.repeats, seed=config.seed, batch_size=config.batch_size, levels=levels)


def planned_steps(data: Dataset, config: TrainingConfig) -> int:
    """Updates that `epochs` or `max_steps` ask for, before `max_seconds` is looked at. They are as many in any order."""
    return config.max_steps or step_order(data, config).steps_before(config.epochs)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a question that the loop asks after each step; a second one acts at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for either, handler in previous.items():
            signal.signal(either, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            # What is ignored stays so: a Ctrl-C in a terminal is not meant for what a script put in the background.
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: the caller handles signals
        previous.clear()
    try:
        yield lambda: bool(received)
    finally:
        for stopped, handler in previous.items():
            signal.signal(stopped, handler)
