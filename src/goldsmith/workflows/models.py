"""What is done with a model, trained here or not: open it, let it answer. Scoring has `scoring.py` beside this file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from goldsmith.data.config import HUB_PREFIX, Columns, DataConfig, SourceConfig
from goldsmith.data.dataset import Dataset
from goldsmith.data.loader import load_dataset, spool_dataset
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.spool import ExampleSpool
from goldsmith.data.tokenizer import load_tokenizer
from goldsmith.data.truncation import LengthOptions, LengthPolicy
from goldsmith.errors import CheckpointError, ConfigError, MachineError, ModelError
from goldsmith.generation.generate import Generation, GenerationConfig, decode_text
from goldsmith.generation.generate import generate as decode
from goldsmith.generation.metrics import GenerationMetrics, measure, measure_example
from goldsmith.models.embeddings import require_positions
from goldsmith.models.folder import load_config, model_files, resolve_model_folder, tokenizer_folder
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.load import load_causal_lm
from goldsmith.models.precision import DtypeName, parameter_dtype, resolve_device, resolve_dtype
from goldsmith.models.proof import prove
from goldsmith.models.quantized import has_packed_weights, take_products_in
from goldsmith.models.randomness import silence_randomness
from goldsmith.recipe import Recipe, load_recipe
from goldsmith.records import DataReport
from goldsmith.report.run_files import RECIPE
from goldsmith.scoring.summary import skipped_lines
from goldsmith.storage import require_no_input, require_ordinary_file, verify_manifest, write_asked_file
from goldsmith.training.checkpoint import load_weights
from goldsmith.types import Conversation, Message
from goldsmith.workflows.materials import Rows, causal_lm_of, choose_trained, own_limit_of
from goldsmith.workflows.run_folder import TOKENIZER

__all__ = [
    "LENGTH_OPTIONS",
    "Answer",
    "Answers",
    "OpenModel",
    "RowLimit",
    "files_of_model",
    "generate",
    "open_model",
    "row_limit_of",
    "vocabulary_of",
]

# What the commands that take them call the limit of a row and the policy.
LENGTH_OPTIONS = LengthOptions(max_length="--max-length", on_too_long="--on-too-long")
_NO_OPTIONS = LengthOptions(max_length=None, on_too_long=None)


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model that was loaded and proven, with what renders rows for it.

    Attributes:
        model: in float32 (or float64), packed attention; half precision where it was asked for by name.
        columns: of the run's recipe, where the model is a run's.
        end_token_after_cut, on_too_long, parts_share_weight: what becomes of a row that is longer than the renderer's limit; see
            `LengthLimit`.
        shares_contexts: the proof found that packs may carry a shared context once.
    """

    name: str
    model: LikelihoodModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    columns: Columns | None
    shares_contexts: bool = False
    on_too_long: LengthPolicy = "reject"
    end_token_after_cut: bool = False
    parts_share_weight: bool = False

    def dataset(
        self,
        data: str | Path | Rows,
        *,
        columns: Columns | None,
        on_bad_row: Literal["stop", "skip"],
        limit: int | None = None,
    ) -> Dataset:
        """The gold of a file, a glob, or of rows in memory."""
        return load_dataset(**self._source(data, columns=columns, on_bad_row=on_bad_row, limit=limit))

    def spool(
        self,
        data: str | Path | Rows,
        *,
        columns: Columns | None,
        on_bad_row: Literal["stop", "skip"],
        limit: int | None = None,
        folder: Path | None = None,
        note_row: Callable[[], None] | None = None,
    ) -> ExampleSpool:
        """The same on the disk, in `folder`; to be closed. `note_row` is called for each row that was read."""
        found = self._source(data, columns=columns, on_bad_row=on_bad_row, limit=limit)
        return spool_dataset(**found, folder=folder, note_row=note_row)

    def _source(
        self,
        data: str | Path | Rows,
        *,
        columns: Columns | None,
        on_bad_row: Literal["stop", "skip"],
        limit: int | None,
    ) -> dict[str, Any]:
        """What `load_dataset` is given.

        Raises:
            ConfigError: a data set of the hub, or columns that are none.
        """
        if isinstance(data, str) and data.startswith(HUB_PREFIX):
            raise ConfigError(
                f"{data}: a data set of the hub is read by a recipe only, which names its split",
                remedy="save its rows to a file, for example with `datasets`: Dataset.to_json",
            )
        data = str(data) if isinstance(data, Path) else data
        try:
            source = SourceConfig(path=data if isinstance(data, str) else "rows", limit=limit)
            config = DataConfig(
                train=[source],
                columns=columns or self.columns,
                on_bad_row=on_bad_row,
                on_too_long=self.on_too_long,
                end_token_after_cut=self.end_token_after_cut,
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = {"columns": "--columns", "path": "DATA"}.get(str(first["loc"][0]), str(first["loc"][0]))
            raise ConfigError(
                f"{where}: {first['msg'].removeprefix('Value error, ')}, but {first['input']!r} was given",
                remedy="name a file of gold and, with --columns, which of its columns is which field"
                if where in ("--columns", "DATA")
                else None,
            ) from error
        return {
            "sources": config.train if isinstance(data, str) else data,
            "config": config,
            "renderer": self.renderer,
            "base_folder": Path.cwd(),
            "split": "rows",
            "parts_share_weight": self.parts_share_weight,
        }


def open_model(
    path: str,
    *,
    device: str = "auto",
    dtype: DtypeName = "auto",
    revision: str | None = None,
    max_length: int | None = None,
    on_too_long: LengthPolicy | None = "reject",
    end_token_after_cut: bool | None = None,
    length_options: LengthOptions = _NO_OPTIONS,
    rendering: str | None = None,
) -> OpenModel:
    """Load a model or adapter folder, a hub id, a run's result or a checkpoint; refuse what packed attention does not compute.

    Rows are rendered as the run's recipe says where it is a run or a checkpoint of one, plainly otherwise.

    Args:
        max_length: tokens of an example at most. None: where rows are not rejected for their length, that of the run's recipe; else
            the model's own limit, so that `reject` refuses nothing that the model can take.
        on_too_long: what becomes of a longer row; None: as the run's recipe says, `reject` where there is no run.
        end_token_after_cut: see `LengthLimit`; None: as the run's recipe says, else no.
        length_options: what messages call the limit and the policy, where the caller has them.
        rendering: a run, or a checkpoint of one, whose separator, template and columns are taken instead, so that a base model is
            given what the tuned one was.

    Raises:
        ModelError: not found, damaged, or refused by the proof.
        MachineError: a run folder without a result yet.
    """
    folder, config, columns = path, RenderingConfig(), None
    length = DataConfig()
    parts_share_weight = False
    run, is_checkpoint = _run_of(path)
    recipe = load_recipe(run / RECIPE, of_run=True) if (run / RECIPE).is_file() else None
    if recipe is not None:
        config, columns = recipe.rendering, _columns_of(recipe)
        length = recipe.data
        parts_share_weight = recipe.objective.normalization == "example"
        folder = str(run / "model")
    if is_checkpoint:
        if recipe is None:
            raise CheckpointError(f"{path}: its run has no {RECIPE}", remedy=f"give a checkpoint within its run: {run}")
        tokenizer = load_tokenizer(str(run / TOKENIZER))
        # As the run had it, adapter and all: its checkpoints hold what was trained, and name what was frozen by its bytes.
        causal_lm: Any = causal_lm_of(recipe, tokenizer, resolve_device(device))
        silence_randomness(causal_lm)
        choose_trained(recipe, causal_lm, tokenizer)
        verify_manifest(
            Path(path), only="model.safetensors", remedy="name another checkpoint of the run, or its result"
        )
        load_weights(Path(path), causal_lm)
        wanted = parameter_dtype(resolve_dtype(recipe.model.dtype if dtype == "auto" else dtype, torch.device("cpu")))
        if wanted != parameter_dtype(resolve_dtype(recipe.model.dtype, torch.device("cpu"))):
            if has_packed_weights(causal_lm):
                raise ModelError(f"{path}: its weights in 4 bits know no {dtype}", remedy="score it in float32")
            causal_lm.to(dtype=wanted)
        take_products_in(causal_lm, _scoring_dtype(dtype))
    else:
        if folder != path and not Path(folder).is_dir():
            raise MachineError(
                f"{path}: the run has no result yet", remedy=f"finish it: goldsmith train {run / 'recipe.yaml'}"
            )
        causal_lm = load_causal_lm(folder, revision=revision, dtype=dtype, device=device)
        tokenizer_path, tokenizer_revision = tokenizer_folder(folder, revision=revision)
        tokenizer = load_tokenizer(tokenizer_path, revision=tokenizer_revision)
    if config.chat_template is not None and tokenizer.chat_template is not None:
        # The run gave its tokenizer the template that it trained with; the file may be gone, or another by now.
        config = config.model_copy(update={"chat_template": None, "control_tokens": ()})
    if rendering is not None:
        config, columns = _rendered_as(rendering, tokenizer)
    silence_randomness(causal_lm)
    proof = prove(causal_lm.config, name=path)
    policy = on_too_long or length.on_too_long
    limit = max_length or (length.max_length if policy != "reject" else None)
    if limit is not None:
        require_positions(causal_lm, limit, name=path, option=length_options.max_length if max_length else None)
    limit = limit or getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    return OpenModel(
        name=path,
        model=LikelihoodModel(causal_lm, compute_dtype=_scoring_dtype(dtype)).eval(),
        tokenizer=tokenizer,
        renderer=Renderer(tokenizer, config, limit, keeps_long_rows=policy != "reject", length_options=length_options),
        columns=columns,
        shares_contexts=proof.shares_contexts,
        on_too_long=policy,
        end_token_after_cut=length.end_token_after_cut if end_token_after_cut is None else end_token_after_cut,
        parts_share_weight=parts_share_weight,
    )


@dataclass(frozen=True, kw_only=True)
class RowLimit:
    """What is known of the rows that a model takes before its weights are loaded.

    Attributes:
        longest: positions that its configuration names.
        of_run: the data settings of the run's recipe, where it is a run or a checkpoint of one.
    """

    longest: int | None
    of_run: DataConfig | None

    def tokens(self, policy: LengthPolicy) -> int | None:
        """The limit where none is given: that of `open_model`."""
        own = None if self.of_run is None or policy == "reject" else self.of_run.max_length
        return own or self.longest


def row_limit_of(path: str) -> RowLimit:
    """Of a model as `open_model` takes it; errors likewise."""
    run, is_checkpoint = _run_of(path)
    recipe = load_recipe(run / RECIPE, of_run=True) if (run / RECIPE).is_file() else None
    if recipe is not None and (is_checkpoint or not (run / "model").is_dir()):
        return RowLimit(longest=own_limit_of(recipe), of_run=recipe.data)
    config = load_config(resolve_model_folder(path if recipe is None else str(run / "model")), name=path)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return RowLimit(longest=longest, of_run=None if recipe is None else recipe.data)


def vocabulary_of(path: str) -> dict[str, int]:
    """Of the tokenizer of a model, as `open_model` takes it; errors likewise."""
    run, is_checkpoint = _run_of(path)
    if is_checkpoint:
        return dict(load_tokenizer(str(run / TOKENIZER)).get_vocab())
    folder, revision = tokenizer_folder(str(run / "model") if (run / RECIPE).is_file() else path)
    return dict(load_tokenizer(folder, revision=revision).get_vocab())


def _run_of(path: str) -> tuple[Path, bool]:
    """The run folder that it may be, or be a checkpoint of; and whether it is a checkpoint."""
    is_checkpoint = (Path(path) / "state.json").is_file()
    return (Path(path).resolve().parent.parent if is_checkpoint else Path(path)), is_checkpoint


def _columns_of(recipe: Recipe) -> Columns | None:
    return recipe.data.columns or (recipe.data.train[0].columns if recipe.data.train else None)


def _rendered_as(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[RenderingConfig, Columns | None]:
    """The rendering and the columns of a run; the tokenizer is given its template, and loses its own where the run had none."""
    run, _ = _run_of(path)
    if not (run / RECIPE).is_file():
        raise ConfigError(f"rendering: {path} is no run: it has no {RECIPE}", remedy="name a run folder")
    recipe = load_recipe(run / RECIPE, of_run=True)
    # The run gave its tokenizer the template that it trained with.
    tokenizer.chat_template = load_tokenizer(str(run / TOKENIZER)).chat_template
    return recipe.rendering.model_copy(update={"chat_template": None}), _columns_of(recipe)


def files_of_model(path: str) -> list[tuple[str, Path]]:
    """What `open_model` may read, for `require_no_input`: the files of the model's folder, or of the run's."""
    run = Path(path).expanduser()
    folders = (run, run / "model", run / TOKENIZER)
    files = [run / RECIPE, *(file for folder in folders for file in model_files(folder))]
    return [("a file of the model", file) for file in files]


def require_sizes(tokens_per_microbatch: int | None, max_length: int | None) -> None:
    """Refuse what holds no token, or no context and gold.

    Raises:
        ConfigError: a size is too small; None is never.
    """
    for option, value, least in (("tokens_per_microbatch", tokens_per_microbatch, 1), ("max_length", max_length, 2)):
        if value is not None and value < least:
            raise ConfigError(f"{option}: {value} is below {least}", remedy="leave it out for what suits the model")


def _scoring_dtype(dtype: DtypeName) -> torch.dtype:
    """Products are float32 unless half precision is asked for by name: numbers that are compared are worth the time."""
    return torch.float32 if dtype in ("auto", "float64") else resolve_dtype(dtype, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said to one prompt; `gold` where the row has some."""

    example_id: str
    prompt: str
    text: str
    stop_reason: str
    gold: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A row of the output file."""
        own = {"example_id": self.example_id, "prompt": self.prompt, "text": self.text, "stop_reason": self.stop_reason}
        return own if self.gold is None else {**own, "gold": self.gold, "is_exact": self.text == self.gold}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All answers, and how they compare with the gold where every row has some.

    Attributes:
        rejected: rows that could not be used and were skipped, by reason: they have no answer and are in no figure.
        first_rejected: the first of each reason: where it lies, and what was seen there.
    """

    answers: tuple[Answer, ...]
    metrics: GenerationMetrics | None
    rejected: Mapping[str, int] = field(default_factory=dict)
    first_rejected: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One machine-readable object."""
        return {
            "answers": [answer.to_json() for answer in self.answers],
            "metrics": None if self.metrics is None else self.metrics.to_json(),
            "rejected": dict(self.rejected),
            "first_rejected": dict(self.first_rejected),
        }

    def __str__(self) -> str:
        shown = self.answers[:SHOWN_ANSWERS]
        lines = []
        for answer in shown:
            lines.append(f"{answer.example_id}: {answer.prompt!r}")
            lines.append(f"  answer: {answer.text!r}" + ("" if answer.stop_reason == "end" else "  (cut off)"))
            if answer.gold is not None:
                lines.append(f"  gold:   {answer.gold!r}")
        if len(self.answers) > len(shown):
            lines.append(f"... and {len(self.answers) - len(shown):,} more")
        if self.metrics is not None:
            lines.append(str(self.metrics))
        for number, line in enumerate(skipped_lines(self.rejected, self.first_rejected)):
            lines.append(f"{'' if number else 'rows skipped':<20} {line}")
        return "\n".join(lines)


SHOWN_ANSWERS = 10


def generate(
    model: str,
    data: str | Path | Rows | None = None,
    *,
    prompts: Sequence[str] = (),
    columns: Columns | None = None,
    output: str | Path | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    limit: int | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    device: str = "auto",
    dtype: DtypeName = "auto",
    revision: str | None = None,
    quiet: bool = True,
) -> Answers:
    """Let a model answer the rows of a file, and say how near it comes to their gold; or let it answer `prompts`.

    Args:
        data: a file of rows with gold, as for training; the gold is not shown to the model. Without gold give `prompts`.
        prompts: in place of `data`; with a chat model each is one user message.

    Raises:
        ConfigError: both or neither of `data` and `prompts`; a setting out of its range; `output` is one of the files that
            are read.
    """
    data = str(data) if isinstance(data, Path) else data
    prompts = (prompts,) if isinstance(prompts, str) else prompts
    if (data is None) == (not prompts):
        raise ConfigError("generate wants data or prompts, and not both", remedy="give one of them")
    try:
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, batch_size=batch_size
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            f"{first['loc'][0]}: {first['msg']}, but {first['input']!r} was given",
            remedy="see goldsmith generate --help",
        ) from error
    if output is not None:
        require_ordinary_file(output)
        require_no_input(output, files_of_model(model), writes="the answers")
    opened = open_model(model, device=device, dtype=dtype, revision=revision)
    report = DataReport()
    if data is None:
        rows = list(_prompts(opened, prompts))
    else:
        dataset = opened.dataset(data, columns=columns, on_bad_row=on_bad_row, limit=limit)
        report = dataset.report
        if output is not None and isinstance(data, str):
            read = [("the data", file.path) for file in report.files]
            require_no_input(output, read, writes="the answers")
        rows = list(_contexts(opened, dataset))
    generations = decode(
        opened.model.causal_lm,
        opened.tokenizer,
        [row.context for row in rows],
        config,
        end_ids=opened.renderer.end_token_ids,
    )
    answers = tuple(_answer(row, generation) for row, generation in zip(rows, generations, strict=True))
    metrics = None
    if data is not None:
        metrics = measure([measure_example(a.text, a.gold or "", tokenize=_tokenize(opened)) for a in answers])
    if output is not None:
        write_asked_file(output, "".join(json.dumps(a.to_json(), ensure_ascii=False) + "\n" for a in answers))
    return Answers(answers=answers, metrics=metrics, rejected=report.rejected, first_rejected=report.first_rejected)


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    example_id: str
    prompt: str
    context: list[int]
    gold: str | None


def _prompts(opened: OpenModel, prompts: Sequence[str]) -> Iterator[_Prompt]:
    is_chat = opened.renderer.chat_template is not None or opened.tokenizer.chat_template is not None
    for number, prompt in enumerate(prompts):
        conversation = Conversation(
            messages=(Message(role="user", content=prompt), Message(role="assistant", content="")),
            example_id=f"prompt:{number}",
            source=f"--prompt {number + 1}",
            is_chat=is_chat,
        )
        context = [int(token_id) for token_id in opened.renderer.render_context(conversation)]
        yield _Prompt(example_id=conversation.example_id, prompt=prompt, context=context, gold=None)


def _contexts(opened: OpenModel, dataset: Dataset) -> Iterator[_Prompt]:
    ends = opened.renderer.end_token_ids
    for index in range(len(dataset)):
        example = dataset[index]
        context, gold = dataset.last_turn(index)
        yield _Prompt(
            example_id=example.example_id,
            prompt=dataset.context_text(index, opened.tokenizer),
            context=context.tolist(),
            gold=decode_text(opened.tokenizer, gold, ends),
        )


def _answer(row: _Prompt, generation: Generation) -> Answer:
    return Answer(
        example_id=row.example_id,
        prompt=row.prompt,
        text=generation.text,
        stop_reason=generation.stop_reason,
        gold=row.gold,
    )


def _tokenize(opened: OpenModel) -> Any:
    def tokenize(text: str) -> list[int]:
        ids = opened.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [int(token_id) for token_id in ids]

    return tokenize
