"""Chat templates rendered in a process of their own, as a server's library renders them.

A template is a program that came with a tokenizer. It runs in jinja2's immutable sandbox, in a process that holds nothing else,
with a bound of memory and of time for each text: one that loops for ever or doubles a string is refused with the reason, and the
process started anew. Where a platform has no bound of memory for a process (Windows; macOS heeds it in part), that of time
holds.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from goldsmith.errors import ConfigError, MachineError

__all__ = ["ChatTemplate", "Failure", "Job", "TemplateProcess"]

_WORKER: Final = Path(__file__).with_name("template_worker.py")
_SECONDS_TO_START: Final = 120.0
# The process itself stops a text in time where it can; what it cannot interrupt (a huge power) is killed so much later.
_GRACE_SECONDS: Final = 1.0
_JOBS_AT_ONCE: Final = 256
_BOUNDS: Final = ("time", "memory", "died")
# So many texts without an end are no accident of some rows.
_MOST_OVERRUNS: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a text was not rendered.

    Attributes:
        kind: `refused` (the template raised), `syntax` (it cannot be read), or a bound: `time`, `memory`, `died` (of one).
        message: what was seen.
    """

    kind: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One conversation, rendered in several states.

    Attributes:
        messages: as a template is given them.
        tools: definitions; empty for none.
        cuts: for each text how many of the messages, and whether the generation prompt is added.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any]
    cuts: Sequence[tuple[int, bool]]


class _StalledError(Exception):
    """The process said nothing for too long, or ended."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.failure = Failure(kind=kind, message=message)


class TemplateProcess:
    """The process; started at the first text, and again whenever it was lost.

    Args:
        seconds: a text may take.
        max_bytes: of address space for the process.
    """

    def __init__(self, *, seconds: float = 10.0, max_bytes: int = 1 << 30) -> None:
        self.seconds = seconds
        self.max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._owner = -1
        self._overruns: Counter[str] = Counter()
        self._lock = threading.Lock()

    def render(
        self, template: str, jobs: Sequence[Job], *, variables: Mapping[str, Any], now: datetime
    ) -> list[list[str | Failure]]:
        """The texts of each job, one a cut.

        Args:
            template: its text.
            variables: further names that the template sees, such as `bos_token`.
            now: what the template takes for the present.

        Raises:
            MachineError: the process cannot be started.
            ConfigError: too many texts of this template exceed a bound.
        """
        head = {"template": template, "variables": dict(variables), "now": now.isoformat(), "seconds": self.seconds}
        results: list[list[str | Failure]] = []
        singly_until = 0  # jobs before this index go one by one, to find the one that stalls
        with self._lock:
            while len(results) < len(jobs):
                begin = len(results)
                batch = jobs[begin : begin + (1 if begin < singly_until else _JOBS_AT_ONCE)]
                try:
                    self._exchange(head, batch, results)
                except ConfigError:
                    self.close()
                    raise
                except _StalledError as error:
                    self.close()
                    if len(batch) == 1:
                        results.append([error.failure] * len(batch[0].cuts))
                        self._count_overruns(template, results[-1])
                    else:
                        singly_until = begin + len(batch)
        return results

    def _count_overruns(self, template: str, texts: Sequence[str | Failure]) -> None:
        worst = next((text for text in texts if isinstance(text, Failure) and text.kind in _BOUNDS), None)
        if worst is None:
            return
        self._overruns[template] += 1
        if self._overruns[template] > _MOST_OVERRUNS:
            raise ConfigError(
                f"the chat template exceeds its bounds on more than {_MOST_OVERRUNS} conversations: {worst.message}",
                remedy="use another template (rendering.chat_template); this one is not fit for these rows",
            )

    def close(self) -> None:
        """End the process, if this one started it."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        process.wait()

    def _exchange(self, head: dict[str, Any], batch: Sequence[Job], results: list[list[str | Failure]]) -> None:
        """Send the batch and append its results as they come."""
        self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        jobs = [{"messages": job.messages, "tools": list(job.tools) or None, "cuts": job.cuts} for job in batch]
        try:
            self._process.stdin.write(json.dumps({**head, "jobs": jobs}).encode("ascii") + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise _StalledError("died", "the process of the chat template ended") from error
        end = len(results) + len(batch)
        while len(results) < end:
            for texts in self._answer(self.seconds + _GRACE_SECONDS):
                results.append(
                    [text if isinstance(text, str) else Failure(kind=text[0], message=text[1]) for text in texts]
                )
                self._weary = self._weary or any(isinstance(text, list) and text[0] == "memory" for text in texts)
                self._count_overruns(head["template"], results[-1])
        if self._weary:  # its memory may be full of pieces
            self.close()

    _weary = False

    def _answer(self, seconds: float) -> list[Any]:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise _StalledError("time", f"it took longer than {self.seconds:g} s") from None
        if line is None:
            raise _StalledError("died", "it ended the process that it was rendered in (of too much memory, perhaps)")
        found: list[Any] = json.loads(line)
        return found

    def _start(self) -> None:
        if self._process is not None and self._owner != os.getpid():
            self._process = None  # inherited by a fork: the parent's
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._weary = False
        # -P: its own folder is none that modules are imported from.
        command = [sys.executable, "-P", str(_WORKER), str(self.max_bytes)]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=-1
            )
        except OSError as error:
            raise MachineError(
                f"the process that renders chat templates cannot be started: {error}",
                remedy="let this machine start another Python process",
            ) from error
        self._process, self._owner = process, os.getpid()
        answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers = answers
        threading.Thread(target=_read_lines, args=(process.stdout, answers), daemon=True).start()
        atexit.register(self.close)
        try:
            self._answer(_SECONDS_TO_START)
        except _StalledError as error:
            self.close()
            raise MachineError(
                f"the process that renders chat templates did not start: {' '.join(command)}",
                remedy="see whether this Python can import jinja2",
            ) from error


def _read_lines(stream: Any, answers: queue.SimpleQueue[bytes | None]) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed while reading
        for line in stream:
            answers.put(line)
    answers.put(None)


_SHARED = TemplateProcess()


class ChatTemplate:
    """The template of a tokenizer, or the one that takes its place.

    Attributes:
        has_template: whether there is one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text: str | None = None,
        now: datetime | None = None,
        process: TemplateProcess | None = None,
    ) -> None:
        """
        Args:
            text: in place of the tokenizer's own.
            now: what the template takes for the present; default: when this object was made.
            process: default: one that all share.
        """
        self._tokenizer = tokenizer
        self._text = text
        self._now = now or datetime.now()
        self._process = process or _SHARED

    @property
    def has_template(self) -> bool:
        own = self._tokenizer.chat_template
        return self._text is not None or (own is not None and not (isinstance(own, dict) and "default" not in own))

    @property
    def reads_date(self) -> bool:
        """Whether it may write the date (`strftime_now` is the only way in which a template learns it)."""
        own = self._text if self._text is not None else self._tokenizer.chat_template
        texts = own.values() if isinstance(own, dict) else [own or ""]
        return any("strftime_now" in text for text in texts)

    def render(self, jobs: Sequence[Job]) -> list[list[str | Failure]]:
        """The texts, as `apply_chat_template(..., tokenize=False)` gives them.

        Raises:
            ConfigError: there is no template, or it has a mistake.
        """
        if not self.has_template:
            raise ConfigError(
                "the data has chats (`messages`), but the tokenizer has no chat template",
                remedy="set rendering.chat_template to a jinja file, or use rows with prompt and completion",
            )
        # A tokenizer may have one template for tools and another for the rest.
        texts = [self._text or str(self._tokenizer.get_chat_template(None, list(job.tools) or None)) for job in jobs]
        results: list[list[str | Failure]] = [[] for _ in jobs]
        for text in dict.fromkeys(texts):
            chosen = [index for index, own in enumerate(texts) if own == text]
            rendered = self._process.render(
                text, [jobs[index] for index in chosen], variables=self._variables(), now=self._now
            )
            for index, found in zip(chosen, rendered, strict=True):
                results[index] = found
        for found in results:
            for result in found:
                if isinstance(result, Failure) and result.kind == "syntax":
                    raise ConfigError(
                        f"the chat template has a mistake {result.message}",
                        remedy="mend the template (rendering.chat_template, or the tokenizer's own)",
                    )
        return results

    def _variables(self) -> dict[str, Any]:
        def plain(value: Any) -> Any:
            return [str(item) for item in value] if isinstance(value, (list, tuple)) else str(value)

        return {name: plain(value) for name, value in self._tokenizer.special_tokens_map.items()}
