"""Commands of goldsmith, each in a process of its own that may be killed, without importing torch for each.

A server (this file, run as a script) imports everything once and forks a child for each command. A child is a process
like any other: it holds its own locks, it gets signals, SIGKILL ends it and nothing else. What it inherits is made
unlike between children where a fresh process would be unlike too (the random state), so that a result which depends on
it would differ.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Command", "Forked", "Outcome", "Running", "forked"]

SOURCE = Path(__file__).resolve().parents[2] / "src"

# What changes or looks at files; an audit hook sees each before it happens.
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


@dataclass(frozen=True, kw_only=True)
class Command:
    """One process.

    Attributes:
        arguments: of `goldsmith`.
        script: Python to run in place of `goldsmith`.
        cwd: its current folder.
        env: added to the environment.
        watched: the run folder; events on its files are counted from 1.
        signals: event -> a signal that the process gets just before it.
        ignore_sigint: start as a shell starts what it puts in the background.
    """

    arguments: Sequence[str] = ()
    script: str | None = None
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    watched: Path | None = None
    signals: Mapping[int, int] = field(default_factory=dict)
    ignore_sigint: bool = False

    def ranks(self, number: int) -> list[Command]:
        """The same command once a rank, with the environment that `torchrun` gives."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
        return [
            replace(self, env={**self.env, **places, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(number)
        ]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a process ended: its exit code, or minus the signal that killed it; its own output, not shared with others."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float
    file_events: int | None


class Running:
    """Processes that were started together."""

    def __init__(self, server: Forked, pids: list[int], folders: list[Path]) -> None:
        self.pids = pids
        self._server = server
        self._folders = folders
        self._started = time.perf_counter()

    def signal(self, number: int, index: int = 0) -> None:
        """Send a signal; nothing happens where the process has ended (it stays a zombie until `wait`)."""
        os.kill(self.pids[index], number)

    def wait(self, timeout: float = 60.0) -> list[Outcome]:
        """Wait for all of them; after `timeout` they are killed and the test fails."""
        self._server.send({"wait_for": self.pids})
        try:
            codes = self._server.receive(timeout)
        except TimeoutError:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            self._server.receive(10.0)
            texts = "\n".join(_text(folder / "stderr")[-2000:] for folder in self._folders)
            raise AssertionError(f"still running after {timeout} s:\n{texts}") from None
        outcomes = []
        for code, folder in zip(codes, self._folders, strict=True):
            events = folder / "events"
            outcomes.append(
                Outcome(
                    exit_code=code,
                    stdout=_text(folder / "stdout"),
                    stderr=_text(folder / "stderr"),
                    seconds=time.perf_counter() - self._started,
                    file_events=int(events.read_text()) if events.exists() else None,
                )
            )
        return outcomes


def _text(path: Path) -> str:
    """Empty where the process died before it could open the file."""
    return path.read_text() if path.exists() else ""


class Forked:
    """The client of the server; one set of processes runs at a time."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(SOURCE),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._output = tempfile.TemporaryDirectory(prefix="goldsmith-forked-")
        self._number = 0
        self._buffer = b""
        atexit.register(self.close)

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._output.cleanup()

    def start(self, *commands: Command) -> Running:
        """Fork one process a command and return at once."""
        requests, folders = [], []
        for command in commands:
            self._number += 1
            folder = Path(self._output.name) / str(self._number)
            folder.mkdir()
            folders.append(folder)
            requests.append(
                {
                    "arguments": [str(argument) for argument in command.arguments],
                    "cwd": str(command.cwd),
                    "env": dict(command.env),
                    "script": command.script,
                    "signals": {str(event): int(number) for event, number in command.signals.items()},
                    "watched": None if command.watched is None else str(command.watched),
                    "ignore_sigint": command.ignore_sigint,
                    "output": str(folder),
                }
            )
        self.send(requests)
        return Running(self, self.receive(60.0), folders)

    def run(self, command: Command, timeout: float = 60.0) -> Outcome:
        """Run one process to its end."""
        return self.start(command).wait(timeout)[0]

    def prove(self, model: Path) -> None:
        """Let the server prove a model, which is then proven in every child: a quarter of a small run's time."""
        self.send({"prove": str(model)})
        self.receive(60.0)

    def send(self, value: Any) -> None:
        """A line to the server."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self, timeout: float) -> Any:
        """The next line of the server."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError
            data = os.read(self._process.stdout.fileno(), 65536)
            assert data, "the server ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


@functools.cache
def forked() -> Forked:
    """The one server of this test session, started when it is first asked for."""
    return Forked()


# --- the server


def serve() -> None:
    """Fork what is asked for, until standard input ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # A server that a test run in the background started would ignore SIGINT, and so would its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_everything()
    for line in requests:
        requested = json.loads(line)
        if "prove" in requested:
            _prove(Path(requested["prove"]))
            _answer(answers, None)
            continue
        if "wait_for" in requested:
            # Not before it is asked for: until then the process is at least a zombie, and its id is nobody else's.
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in requested["wait_for"]]
            _answer(answers, codes)
            continue
        pids = []
        for request in requested:
            pid = os.fork()
            if pid == 0:
                requests.close()
                answers.close()
                _be_the_command(request)
            pids.append(pid)
        _answer(answers, pids)


def _answer(answers: Any, value: Any) -> None:
    answers.write(json.dumps(value).encode() + b"\n")
    answers.flush()


def _import_everything() -> None:
    import torch
    from transformers import (  # noqa: F401 - so that no child imports it
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    import goldsmith.cli
    import goldsmith.workflows  # noqa: F401

    torch.set_num_threads(1)


def _prove(model: Path) -> None:
    from goldsmith.models.load import load_causal_lm
    from goldsmith.models.proof import prove
    from goldsmith.models.randomness import silence_randomness

    causal_lm = load_causal_lm(model, device="cpu")
    silence_randomness(causal_lm)
    prove(causal_lm.config, name=str(model))


def _be_the_command(request: Mapping[str, Any]) -> NoReturn:
    code = 1
    try:
        for number in range(1, signal.NSIG):
            if number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does
        signal.signal(signal.SIGINT, signal.SIG_IGN if request["ignore_sigint"] else signal.default_int_handler)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            file = os.open(f"{request['output']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        _unlike_other_children()
        events = _count_file_events(request)
        code = _command(request["arguments"]) if request["script"] is None else _script(request["script"])
        sys.stdout.flush()
        sys.stderr.flush()
        if request["watched"] is not None:
            Path(request["output"], "events").write_text(str(events[0]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _command(arguments: list[str]) -> int:
    from goldsmith.cli import main

    sys.argv = ["goldsmith", *arguments]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


def _script(source: str) -> int:
    exec(compile(source, "script", "exec"), {"__name__": "__main__"})
    return 0


def _unlike_other_children() -> None:
    import numpy as np
    import torch

    seed = int.from_bytes(os.urandom(4), "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _count_file_events(request: Mapping[str, Any]) -> list[int]:
    count = [0]
    watched = request["watched"]
    signals = {int(event): number for event, number in request["signals"].items()}
    if watched is None:
        return count
    prefix = watched.rstrip("/")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS:
            return
        # `shutil.rmtree` works with names relative to an open folder; it is used on folders of a run only.
        relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if not relative and not any(
            isinstance(argument, str | Path) and str(argument).startswith(prefix) for argument in arguments[:2]
        ):
            return
        count[0] += 1
        if count[0] in signals:
            os.kill(os.getpid(), signals[count[0]])

    sys.addaudithook(hook)
    return count


if __name__ == "__main__":
    serve()
