"""The command line: one function a command. Each parses, calls `goldsmith.workflows`, prints and exits; no more.

Standard output carries the result and nothing else: with `--json` one JSON object, else text. Progress, warnings and
errors go to standard error. Exit codes are the design's one table, in `EXIT_CODES`.

The heavy imports (torch, transformers) happen inside the commands, so that `goldsmith --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn, Protocol

import typer

import goldsmith
from goldsmith.errors import ConfigError, GoldsmithError, MachineError, StoppedBySignal

__all__ = ["EXIT_CODES", "app", "main"]

EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "a bug in goldsmith: a traceback is printed",
    2: "usage or recipe",
    3: "data rejected",
    4: "model refused",
    5: "numerical stop: a loss or gradient that is not finite",
    6: "checkpoint damaged",
    7: "environment: disk full, memory, a folder that is in use or another recipe's",
    75: "stopped by a signal; the same command resumes",
}

_TABLE = "\n".join(f"{code:>4}  {meaning}" for code, meaning in EXIT_CODES.items())
_EPILOG = f"\b\nExit codes of every command:\n{_TABLE}"

app = typer.Typer(
    name="goldsmith",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # the traceback of a bug is Python's own
    rich_markup_mode=None,  # plain help: the same in a terminal, a pipe and a log
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


class Result(Protocol):
    """What every workflow returns: a mapping for `--json`; else text by `str()`, or colour as a `rich` renderable."""

    def to_json(self) -> Mapping[str, Any]: ...


# As in goldsmith.models.precision, which would import torch.
DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]
# As in goldsmith.data.truncation, likewise.
LengthPolicy = Literal["reject", "drop", "left", "right", "split"]

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output; all else goes to standard error.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[DtypeName, typer.Option(help="What is computed in; auto: float32 on a CPU, bfloat16 on a GPU.")]
RenderingOption = Annotated[
    str | None,
    typer.Option(
        "--rendering",
        metavar="RUN",
        help="Render rows as this run did (its separator, chat template and columns), so that a base model is given what the "
        "tuned one was.",
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit, where MODEL is a hub id.")]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="ROLE=NAME",
        help="Names (or, in files without a header, positions from 0) of the data's columns; may be repeated: "
        "--columns prompt=question --columns completion=answer.",
    ),
]
SkipOption = Annotated[bool, typer.Option("--skip-bad-rows", help="Count rows that cannot be used, and go on.")]
BudgetOption = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens that go through the model at a time; default: what suits the device."),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"goldsmith {goldsmith.__version__}")
        raise typer.Exit


@app.callback()
def _goldsmith(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train a causal language model to maximise log P(y | x) of your gold, and see that likelihood token by token.

    \b
    goldsmith demo                  the whole way on a small example
    goldsmith train recipe.yaml     train as a recipe says
    """


def _command(summary: str) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Register a function as a command: its result is printed, its errors become exit codes.

    `summary` is the line in the list of commands; the function's docstring is the page of `--help`.
    """

    def register(function: Callable[..., Result]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*args: Any, **kwargs: Any) -> None:
            as_json = bool(kwargs.get("as_json"))
            try:
                # A library that prints must not break the one JSON object: during the work, all print goes to stderr.
                with contextlib.redirect_stdout(sys.stderr):
                    result = function(*args, **kwargs)
                _print_result(result, as_json=as_json)
                # A result can be a refusal: `verify` prints what it saw either way.
                if exit_code := getattr(result, "exit_code", 0):
                    raise typer.Exit(exit_code)
            except typer.Exit:
                raise
            except BaseException as error:
                raise typer.Exit(_report(error, as_json=as_json)) from error

        app.command(name=function.__name__.strip("_"), short_help=summary, epilog=_EPILOG)(command)
        return command

    return register


def _print_result(result: Result, *, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0" or sys.stdout is None:
        return  # under torchrun the first process speaks for all; and `>&-` leaves nothing to speak to
    if as_json:
        print(json.dumps(_finite(result.to_json()), ensure_ascii=True, allow_nan=False))
    elif hasattr(result, "__rich__") or hasattr(result, "__rich_console__"):
        from rich.console import Console

        # In a pipe or a log: no colour and no line broken.
        Console(highlight=False).print(result, soft_wrap=not sys.stdout.isatty())
    else:
        print(result)
    # A closed pipe shows up here, and not after the exit code is settled.
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _report(error: BaseException, *, as_json: bool) -> int:
    """Say what went wrong on standard error, with `as_json` on standard output too; return the exit code."""
    if isinstance(error, BrokenPipeError):
        # Whoever read standard output has gone (`| head`). Nothing can be said there, not even by the interpreter's
        # last flush.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return MachineError.exit_code
    known = _as_goldsmith_error(error)
    if known is None:
        traceback.print_exception(error)
        print("goldsmith: this is a bug in goldsmith; please report it with the traceback above", file=sys.stderr)
        kind, message, remedy, exit_code = type(error).__name__, str(error), None, 1
    else:
        print(f"goldsmith: {known}", file=sys.stderr)
        kind, message, remedy, exit_code = type(known).__name__, known.message, known.remedy, known.exit_code
    if as_json:
        problem = {"kind": kind, "message": message, "remedy": remedy, "exit_code": exit_code}
        with contextlib.suppress(OSError):
            print(json.dumps({"error": problem}), flush=True)
    return exit_code


def _as_goldsmith_error(error: BaseException) -> GoldsmithError | None:
    """The error as the table of exit codes knows it; None for a bug."""
    if isinstance(error, GoldsmithError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return StoppedBySignal(
            "stopped by a signal", remedy="the same command goes on from the last checkpoint, if any"
        )
    if isinstance(error, OSError) and error.errno in {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
    }:
        return MachineError(f"{error.strerror}: {error.filename or 'a file that was being written'}")
    torch = sys.modules.get("torch")
    out_of_memory = isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    if out_of_memory or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return MachineError(
            f"out of memory: {' '.join(str(error).split()) or 'an allocation failed'}",
            remedy="set a smaller training.tokens_per_microbatch (or --tokens-per-microbatch); it changes no result",
        )
    return None


def _columns(texts: Sequence[str] | None) -> dict[str, str | int] | None:
    """`["prompt=question", "completion=1"]` -> `{"prompt": "question", "completion": 1}`."""
    if not texts:
        return None
    columns: dict[str, str | int] = {}
    for text in texts:
        role, equals, name = text.partition("=")
        if not (role and equals and name):
            raise ConfigError(
                f"--columns {text}: not of the form ROLE=NAME", remedy="for example: --columns prompt=question"
            )
        if role in columns:
            raise ConfigError(
                f"--columns {text}: {role} was given already, as {columns[role]!r}", remedy="give each once"
            )
        columns[role] = int(name) if name.isdecimal() else name
    return columns


@_command("Train as a recipe says; the same command resumes.")
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The YAML file of settings.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the recipe; may be repeated."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Result:
    """Train as RECIPE says, with an evaluation before the first step.

    The same command resumes a run that was stopped, and says so when the run is finished. Paths in the recipe are
    relative to its folder; output_dir, and paths given with --set, to the current directory.

    \b
    Example:
      goldsmith train recipe.yaml --set training.epochs=1 --set optimizer.learning_rate=1e-4
    """
    from goldsmith import workflows
    from goldsmith.recipe import load_recipe

    return workflows.train(load_recipe(recipe, overrides or ()), quiet=quiet)


@_command("log P(y | x) of gold under a model.")
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, a run folder, or a hub id.")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A file of gold, or a quoted pattern such as 'test-*.jsonl'.")
    ],
    columns: ColumnsOption = None,
    with_tokens: Annotated[
        bool,
        typer.Option(
            "--tokens", help="Write every gold token: its log-probability, rank, the best one's, the entropy."
        ),
    ] = False,
    alternatives: Annotated[
        int, typer.Option(min=0, metavar="N", help="Write the N likeliest tokens at each place too.")
    ] = 0,
    without_context: Annotated[
        bool, typer.Option("--without-context", help="Also score the gold without its context: how much does it help?")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write score rows here; .parquet for Parquet."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of DATA.")] = None,
    skip_bad_rows: SkipOption = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Longer rows are too long; default: the model's limit, or the run's where it cut rows."
        ),
    ] = None,
    on_too_long: Annotated[
        LengthPolicy | None,
        typer.Option(
            metavar="POLICY",
            help="What becomes of rows that are too long: reject, drop, left, right or split, as in training; "
            "default: what the run did where MODEL is one, else reject.",
        ),
    ] = None,
    rendering: RenderingOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    tokens_per_microbatch: BudgetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Result:
    """Score gold: log P(y | x) of every row of DATA under MODEL, in nats, and its figures with intervals.

    An interrupted run that writes --output goes on when the same command comes again.

    \b
    Example:
      goldsmith score runs/legal/model test.jsonl --tokens --output scores.jsonl
      goldsmith score runs/legal test.jsonl --alternatives 5 --output scores.parquet
      goldsmith score base-model test.jsonl --rendering runs/legal --output base.jsonl
      goldsmith score HuggingFaceTB/SmolLM2-135M gsm8k.jsonl --columns prompt=question --columns completion=answer
    """
    from goldsmith import workflows

    return workflows.score(
        model,
        data,
        columns=_columns(columns),
        with_tokens=with_tokens,
        alternatives=alternatives,
        without_context=without_context,
        output=output,
        limit=limit,
        on_bad_row="skip" if skip_bad_rows else "stop",
        max_length=max_length,
        on_too_long=on_too_long,
        rendering=rendering,
        device=device,
        dtype=dtype,
        revision=revision,
        tokens_per_microbatch=tokens_per_microbatch,
        quiet=quiet,
    )


@_command("Which of several models gives the same gold the higher likelihood.")
def compare(
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C...] [DATA]",
            help="Score files, as `goldsmith score --output` writes them; or models, and then a file of gold.",
        ),
    ],
    columns: ColumnsOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of DATA.")] = None,
    skip_bad_rows: SkipOption = False,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Longer rows are too long, for all models; default: the shortest of their limits."),
    ] = None,
    on_too_long: Annotated[
        LengthPolicy | None,
        typer.Option(
            metavar="POLICY",
            help="What becomes of rows that are too long, for all models: reject (default), drop, left, right or split, "
            "as in training.",
        ),
    ] = None,
    rendering: RenderingOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    tokens_per_microbatch: BudgetOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Result:
    """Compare models on the same gold, example by example: the difference of log P, its mean with an interval, who is higher.

    Two are compared, more are ranked. Other tokenizers do no harm: log P is of the whole gold.

    \b
    Example:
      goldsmith compare runs/small runs/large test.jsonl
      goldsmith score model-a test.jsonl --tokens --output a.jsonl
      goldsmith score model-b test.jsonl --tokens --output b.jsonl
      goldsmith compare a.jsonl b.jsonl
    """
    from goldsmith import workflows

    if len(subjects) < 2:
        raise ConfigError(
            f"compare wants two models or score files at least, not {len(subjects)}",
            remedy="for example: goldsmith compare a.jsonl b.jsonl, or goldsmith compare MODEL-A MODEL-B test.jsonl",
        )
    return workflows.compare(
        *subjects,
        columns=_columns(columns),
        limit=limit,
        on_bad_row="skip" if skip_bad_rows else "stop",
        max_length=max_length,
        on_too_long=on_too_long,
        rendering=rendering,
        device=device,
        dtype=dtype,
        tokens_per_microbatch=tokens_per_microbatch,
        quiet=quiet,
    )


@_command("The fast path against a plain one, on your own model and rows.")
def verify(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The YAML file of settings.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the recipe; may be repeated."),
    ] = None,
    num_rows: Annotated[int, typer.Option("--rows", min=2, help="Rows of the step that both run.")] = 8,
    dtype: Annotated[
        Literal["auto", "float32", "float64"],
        typer.Option(help="What both compute in; auto: float64 where the model fits into memory twice over."),
    ] = "auto",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Result:
    """Prove on your own model and rows that packing, chunking and sharing change nothing.

    The first rows of the training data go through a plain path (one padded batch, the model's own attention, full logits) and
    through the fast path, cut in several ways. Loss, log-probabilities and the gradient of every parameter are compared;
    exit code 4 where they differ by more than rounding. Nothing is trained or written.

    \b
    Example:
      goldsmith verify recipe.yaml --rows 4
    """
    from goldsmith import workflows
    from goldsmith.recipe import load_recipe

    return workflows.verify(load_recipe(recipe, overrides or ()), num_rows=num_rows, dtype=dtype, quiet=quiet)


@_command("What will be trained on, token by token, and what is wrong with it.")
def inspect(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The YAML file of settings.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one setting of the recipe; may be repeated."),
    ] = None,
    num_examples: Annotated[int, typer.Option("--examples", min=0, help="Examples shown token by token.")] = 3,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page that needs no other file.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 3 where a finding is at error level.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time a few steps of the model on this machine.")
    ] = True,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Result:
    """Look at the whole data of RECIPE before a second is spent on training.

    All rows are read and rendered as training does it: how many are used, cut or rejected, how long they are, what is wrong
    with which of them, how they fill the micro-batches, and how long the run will take here. Nothing is trained.

    \b
    Example:
      goldsmith inspect recipe.yaml --examples 5 --html inspect.html
    """
    from goldsmith import workflows
    from goldsmith.recipe import load_recipe

    return workflows.inspect(
        load_recipe(recipe, overrides or ()),
        num_examples=num_examples,
        html=html,
        measure=measure,
        strict=strict,
        quiet=quiet,
        recipe_file=recipe,
    )


@_command("Let a model answer, and check it against the gold.")
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, a run folder, or a hub id.")],
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="A file of rows with gold, which the model is not shown.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="A prompt in place of DATA; may be repeated."),
    ] = None,
    columns: ColumnsOption = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write the answers here.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop an answer here if it has not ended.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the most probable token each time.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(max=1.0, help="Above 0: sample from the likeliest tokens that hold this much.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers made at a time.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of DATA.")] = None,
    skip_bad_rows: SkipOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Result:
    """Decode answers of MODEL to the rows of DATA, with exact match and edit rates against their gold; or to --prompt.

    \b
    Example:
      goldsmith generate runs/legal/model test.jsonl --limit 100 --output answers.jsonl
      goldsmith generate runs/legal/model --prompt "Is this clause binding?" --temperature 0.7
    """
    from goldsmith import workflows

    if (data is None) == (not prompts):
        raise ConfigError(
            "generate wants DATA or --prompt, and not both",
            remedy='for example: goldsmith generate MODEL --prompt "..."',
        )
    return workflows.generate(
        model,
        data,
        prompts=tuple(prompts or ()),
        columns=_columns(columns),
        output=output,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        limit=limit,
        on_bad_row="skip" if skip_bad_rows else "stop",
        device=device,
        dtype=dtype,
        revision=revision,
        quiet=quiet,
    )


@_command("One HTML page of a run or of score files: curves, and the gold token by token.")
def report(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Run folders, finished or not.")] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option("--scores", metavar="FILE", help="A score file; may be repeated, to compare."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: report.html in the run, else in this folder."),
    ] = None,
    max_examples: Annotated[int, typer.Option("--examples", min=1, help="Show so many, token by token.")] = 1000,
    serve: Annotated[bool, typer.Option("--serve", help="Serve it on this machine, as new as its files.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --serve; 0: a free one.")] = 0,
    as_json: JsonOption = False,
) -> Result:
    """Write one self-contained HTML page: it needs no network, and can be mailed or kept with the run.

    \b
    Example:
      goldsmith report runs/legal
      goldsmith report runs/legal --serve
      goldsmith report --scores base.jsonl --scores tuned.jsonl --output compared.html
    """
    from goldsmith import workflows

    if not serve:
        return workflows.report(runs or (), scores or (), output=output, max_examples=max_examples)
    if output is not None or as_json:
        raise ConfigError("--serve writes no file and prints no JSON", remedy="leave out --output and --json")
    workflows.serve_report(runs or (), scores or (), port=port, max_examples=max_examples)
    raise typer.Exit


@_command("Train on real gold in two minutes, and look at the result.")
def demo(
    output_dir: Annotated[str, typer.Option(metavar="FOLDER", help="The run folder.")] = "runs/demo",
    max_seconds: Annotated[float, typer.Option(min=1.0, help="Train at most so long.")] = 120.0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> Result:
    """Train a small model from nothing on the CMU Pronouncing Dictionary (spelling -> phones), and show what it learnt.

    \b
    Example:
      goldsmith demo --max-seconds 60
    """
    from goldsmith import workflows

    return workflows.demo(output_dir, max_seconds=max_seconds, quiet=quiet)


def _raise_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Entry point of the `goldsmith` command."""
    # SIGTERM (a scheduler's stop) is treated as Ctrl-C is; training puts its own handler in place while it can resume.
    signal.signal(signal.SIGTERM, _raise_interrupt)
    # A text that the terminal's encoding cannot show must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except KeyboardInterrupt as error:
        sys.exit(_report(error, as_json=False))
    sys.exit(0)


if __name__ == "__main__":
    main()
