"""The command line by itself: what is parsed and passed on, what is printed where, and the exit codes."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

import goldsmith
from goldsmith import errors
from goldsmith.cli import EXIT_CODES, _print_result, app

COMMANDS = {
    "train": ["recipe.yaml"],
    "score": ["model", "data.jsonl"],
    "compare": ["a.jsonl", "b.jsonl"],
    "generate": ["model", "data.jsonl"],
    "inspect": ["recipe.yaml"],
    "report": ["run"],
    "demo": [],
}
WORKFLOWS: dict[str, str] = {}


class Outcome:
    """A result as workflows return it."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self.values = {"nll": 0.5} if values is None else values

    def to_json(self) -> Mapping[str, Any]:
        return self.values

    def __str__(self) -> str:
        return "nll 0.5 nats a token"


class Workflows:
    """Stands for `goldsmith.workflows`: remembers the call, then does what the test wants."""

    def __init__(self) -> None:
        self.call: tuple[str, tuple[Any, ...], dict[str, Any]] | None = None
        self.act: Callable[[], Any] = Outcome

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def workflow(*args: Any, **kwargs: Any) -> Any:
            self.call = (name, args, kwargs)
            return self.act()

        return workflow


@pytest.fixture
def workflows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Workflows:
    """In a folder that has a `recipe.yaml`."""
    stand_in = Workflows()
    monkeypatch.setattr(goldsmith, "workflows", stand_in, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: {path: a/b}\ndata: {train: train.jsonl}\n")
    return stand_in


runner = CliRunner()


def run(*arguments: str) -> Any:
    return runner.invoke(app, list(arguments))


# --- help


def test_help_names_every_command_and_exit_code() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout
    for code, meaning in EXIT_CODES.items():
        assert f"{code:>4}  {meaning}" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_and_the_exit_codes(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    goldsmith {name}" in result.stdout or "Example:\n    goldsmith score" in result.stdout
    for code, meaning in EXIT_CODES.items():
        assert f"{code:>4}  {meaning}" in result.stdout
    assert "--json" in result.stdout


def test_the_exit_codes_are_those_of_the_errors() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__]
    assert {kind.exit_code for kind in kinds} <= set(EXIT_CODES)
    assert set(EXIT_CODES) == {0, 1, 2, 3, 4, 5, 6, 7, 75}


def test_help_is_fast_and_imports_nothing_heavy(repository: Path) -> None:
    program = (
        "import sys\n"
        "from goldsmith.cli import app\n"
        "sys.argv = ['goldsmith', '--help']\n"
        "try: app()\n"
        "except SystemExit as stop: code = stop.code\n"
        "print(code, sorted({'torch', 'transformers', 'numpy', 'pydantic', 'pyarrow'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository / "src")}
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert done.stdout.endswith("0 []\n")
    assert min(seconds) < 0.5


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("goldsmith ")


# --- usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["train", "recipe.yaml", "--no-such-option"],
        ["train", "recipe.yaml", "more.yaml"],
        ["score", "model"],
        ["score", "model", "data", "--tokens-per-microbatch", "0"],
        ["score", "model", "data", "--dtype", "int8"],
        ["score", "model", "data", "--columns", "prompt"],
        ["score", "model", "data", "--columns", "prompt=a", "--columns", "prompt=b"],
        ["compare", "a"],
        ["generate", "model"],
        ["generate", "model", "data", "--prompt", "x"],
        ["generate", "model", "data", "--temperature", "hot"],
        ["demo", "--max-seconds", "0"],
    ],
)
def test_wrong_usage_is_exit_code_2_and_says_why(workflows: Workflows, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr) > 20
    assert "Traceback" not in result.stderr
    assert workflows.call is None


def test_no_command_shows_the_help() -> None:
    assert "Exit codes of every command" in run().output


# --- what is passed on


def test_train_passes_the_recipe_with_its_overrides(workflows: Workflows, tmp_path: Path) -> None:
    result = run("train", "recipe.yaml", "--set", "training.epochs=7", "--set", "optimizer.learning_rate=1e-4", "-q")
    assert result.exit_code == 0, result.output
    assert workflows.call is not None
    name, (recipe,), keywords = workflows.call
    assert name == "train"
    assert (recipe.training.epochs, recipe.optimizer.learning_rate) == (7, 1e-4)
    assert recipe.data.train[0].path == f"{tmp_path}/train.jsonl"
    assert keywords == {"quiet": True}


def test_score_passes_its_options(workflows: Workflows) -> None:
    options = "--columns prompt=question --columns completion=1 --tokens -o s.jsonl --skip-bad-rows --max-length 9"
    assert run("score", "model", "data.jsonl", *options.split()).exit_code == 0
    assert workflows.call is not None
    name, arguments, keywords = workflows.call
    assert (name, arguments) == ("score", ("model", "data.jsonl"))
    assert keywords["columns"] == {"prompt": "question", "completion": 1}
    assert (keywords["with_tokens"], keywords["output"], keywords["on_bad_row"]) == (True, "s.jsonl", "skip")
    assert keywords["max_length"] == 9


def test_score_passes_what_is_new(workflows: Workflows) -> None:
    options = "--alternatives 5 --without-context --limit 3 -o s.parquet"
    assert run("score", "model", "data.jsonl", *options.split()).exit_code == 0
    assert workflows.call is not None
    keywords = workflows.call[2]
    assert (keywords["alternatives"], keywords["without_context"], keywords["limit"]) == (5, True, 3)
    assert (keywords["output"], keywords["tokens_per_microbatch"]) == ("s.parquet", None)


def test_compare_takes_any_number(workflows: Workflows) -> None:
    assert run("compare", "a", "b", "c", "data.jsonl", "--columns", "prompt=question", "--limit", "4").exit_code == 0
    assert workflows.call is not None
    name, arguments, keywords = workflows.call
    assert (name, arguments) == ("compare", ("a", "b", "c", "data.jsonl"))
    assert (keywords["columns"], keywords["limit"]) == ({"prompt": "question"}, 4)
    assert (keywords["max_length"], keywords["on_too_long"]) == (None, None)


def test_compare_takes_what_becomes_of_long_rows(workflows: Workflows) -> None:
    assert run("compare", "a", "b", "data.jsonl", "--max-length", "12", "--on-too-long", "left").exit_code == 0
    assert workflows.call is not None
    keywords = workflows.call[2]
    assert (keywords["max_length"], keywords["on_too_long"]) == (12, "left")


def test_generate_takes_prompts_in_place_of_data(workflows: Workflows) -> None:
    assert run("generate", "model", "-p", "one", "-p", "two").exit_code == 0
    assert workflows.call is not None
    assert workflows.call[1] == ("model", None)
    assert workflows.call[2]["prompts"] == ("one", "two")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_workflows_take_what_is_passed(workflows: Workflows, name: str) -> None:
    assert run(name, *COMMANDS[name]).exit_code == 0
    assert workflows.call is not None
    workflow, arguments, keywords = workflows.call
    # Not `import goldsmith.workflows as ...`, which would find the stand-in.
    real = importlib.import_module("goldsmith.workflows")
    assert workflow == WORKFLOWS.get(name, name)
    inspect.signature(vars(real)[workflow]).bind(*arguments, **keywords)


def test_the_dtypes_are_those_that_models_compute_in() -> None:
    from goldsmith import cli
    from goldsmith.models import precision

    assert get_args(cli.DtypeName) == get_args(precision.DtypeName)


# --- what is printed


@pytest.mark.parametrize("name", COMMANDS)
def test_text_or_exactly_one_json_object_on_standard_output(workflows: Workflows, name: str) -> None:
    def act() -> Outcome:
        print("a library prints")
        return Outcome(
            {"nll": float("nan"), "interval": (0.5, float("inf")), "output_dir": Path("runs/x"), "word": "é"}
        )

    workflows.act = act
    result = run(name, *COMMANDS[name], "--json")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    expected = {"nll": None, "interval": [0.5, None], "output_dir": "runs/x", "word": "é"}
    assert json.loads(result.stdout, parse_constant=pytest.fail) == expected
    assert result.stderr == "a library prints\n"
    text = run(name, *COMMANDS[name])
    assert text.stdout == "nll 0.5 nats a token\n"


def test_a_renderable_is_plain_and_unbroken_outside_a_terminal(workflows: Workflows) -> None:
    class Coloured(Outcome):
        def __rich__(self) -> str:
            return "[red]" + "long " * 60 + "[/red]"

    workflows.act = Coloured
    assert run("demo").stdout == "long " * 60 + "\n"


def test_a_closed_standard_output_is_no_bug(workflows: Workflows, monkeypatch: pytest.MonkeyPatch) -> None:
    """`goldsmith score ... -o FILE >&-`: Python has no stream then."""
    monkeypatch.setattr("sys.stdout", None)
    _print_result(workflows.train(), as_json=True)


def test_only_the_first_process_prints(workflows: Workflows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("train", "recipe.yaml", "--json").stdout == ""


# --- errors


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "GoldsmithError"])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_errors_for_users_have_their_exit_code_and_no_traceback(
    workflows: Workflows, name: str, flags: list[str]
) -> None:
    kind = getattr(errors, name)

    def act() -> None:
        raise kind("what was seen", remedy="what to do")

    workflows.act = act
    result = run("compare", "a", "b", *flags)
    assert result.exit_code == kind.exit_code
    assert result.stderr == "goldsmith: what was seen\n  Remedy: what to do\n"
    if flags:
        problem = {"kind": name, "message": "what was seen", "remedy": "what to do", "exit_code": kind.exit_code}
        assert json.loads(result.stdout) == {"error": problem}
    else:
        assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "exit_code", "words"),
    [
        (KeyboardInterrupt(), 75, "stopped by a signal"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/model"), 7, "No space left on device: runs/x/model"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs"), 7, "Permission denied: runs"),
        (MemoryError(), 7, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 7, "tokens_per_microbatch"),
    ],
)
def test_what_the_machine_does_is_no_bug(
    workflows: Workflows, error: BaseException, exit_code: int, words: str
) -> None:
    def act() -> None:
        raise error

    workflows.act = act
    result = run("compare", "a", "b")
    assert result.exit_code == exit_code
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bug_shows_its_traceback(workflows: Workflows) -> None:
    def act() -> None:
        raise ZeroDivisionError("division by zero")

    workflows.act = act
    result = run("compare", "a", "b", "--json")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "this is a bug in goldsmith" in result.stderr
    assert json.loads(result.stdout)["error"]["kind"] == "ZeroDivisionError"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such recipe"),
        ("model: {path: a/b}\ndata: {train: x}\noptimiser: {}\n", "nearest known key: `optimizer`"),
        ("model: {path: a/b}\ndata: {train: x}\ntraining: {epochs: three}\n", "'three' (text) was seen"),
    ],
)
def test_a_recipe_that_cannot_be_read(workflows: Workflows, tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "bad.yaml").write_text(text)
    result = run("train", "bad.yaml")
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert workflows.call is None


# --- in a process of its own

STAND_IN = """
import sys, time, types, goldsmith
from goldsmith.cli import main

class Outcome:
    def to_json(self): return {"word": "\\u0259"}
    def __str__(self): return "\\u0259" * 100_000

def compare(a, b, **options):
    print("started", file=sys.stderr, flush=True)
    time.sleep(float(a))
    return Outcome()

goldsmith.workflows = types.SimpleNamespace(compare=compare)
sys.argv = ["goldsmith", "compare", *sys.argv[1:]]
main()
"""


def start(repository: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", STAND_IN, *arguments],
        env={**os.environ, "PYTHONPATH": str(repository / "src"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_75(repository: Path, number: int) -> None:
    with start(repository, "60", "b") as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"started\n"
        process.send_signal(number)
        output, error = process.communicate(timeout=30)
    assert process.returncode == 75
    assert output == b""
    assert error.startswith(b"goldsmith: stopped by a signal")


def test_a_reader_that_has_gone_is_no_bug(repository: Path) -> None:
    with start(repository, "0", "b") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
        process.wait(timeout=30)
    assert process.returncode == 7
    assert error == b"started\n"


def test_an_encoding_that_cannot_show_a_text_is_no_bug(repository: Path) -> None:
    with start(repository, "0", "b", PYTHONIOENCODING="ascii") as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert output == b"?" * 100_000 + b"\n"
