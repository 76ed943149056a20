"""The program of the process that renders chat templates: foreign code, kept apart, bounded in memory and time.

It is started as a file by `chat_template.py`, and imports the standard library and jinja2 only, so that it starts at once and
holds nothing worth stealing. One line of JSON in is a batch; lines of JSON out are its results, in order. The environment is
that of `transformers` (filters, globals, extensions, sandbox): its text must be the text that a server gets.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

__all__ = ["environment", "main"]

# A conversation of this many characters is no row of anybody; a template that writes it multiplies.
_LONGEST_TEXT = 64_000_000
_SECONDS_BETWEEN_ANSWERS = 0.05
_KEPT_TEMPLATES = 64
_KEPT_VERDICTS = 4096
_DICT_ATTRIBUTES = frozenset(dir(dict))
# `format` and `format_map` are a way out of the sandbox, which wraps them.
_STR_METHODS = frozenset(name for name in dir(str) if not name.startswith("_")) - {"format", "format_map"}


class _Overtime(BaseException):
    """Raised by the alarm; no `Exception`, so that nothing on the way takes it for its own."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what stands between is written as it is, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without its attributes."""

    def __call__(self, *arguments: Any, **keywords: Any) -> dict[Any, Any]:
        return dict(*arguments, **keywords)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` that takes no name with an underscore in front, the way out of many a sandbox."""

    def __init__(*arguments: Any, **keywords: Any) -> None:  # so that `namespace(self=...)` works, as in jinja2
        own, rest = arguments[0], arguments[1:]
        values = dict(*rest, **keywords)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace takes no name with an underscore in front, such as {name!r}"
        )


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The immutable sandbox, faster: its verdicts are jinja2's own, but each is asked for once.

    They depend on the type of an object and on the name alone, and templates ask millions of times for few of them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._verdicts: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = (type(obj), attr)
        verdict = self._verdicts.get(key)
        if verdict is None:
            if len(self._verdicts) >= _KEPT_VERDICTS:  # a template may make up names
                self._verdicts.clear()
            verdict = self._verdicts[key] = super().is_safe_attribute(obj, attr, value)
        return verdict

    def getattr(self, obj: Any, attribute: str) -> Any:
        # What a message holds: jinja2 gets there by way of an exception.
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if type(obj) is str and attribute in _STR_METHODS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # These carry no mark by which jinja2 would forbid them; of them a macro alone is handed something of the context.
        kind = type(__obj)
        if kind is jinja2.runtime.Macro:
            args = (__context.eval_ctx, *args)
        elif __obj is not _Namespace and not (
            kind is types.BuiltinMethodType and type(__obj.__self__) is str and __obj.__name__ in _STR_METHODS
        ):
            return super().call(__context, __obj, *args, **kwargs)
        kwargs.pop("_block_vars", None)
        kwargs.pop("_loop_vars", None)
        return __obj(*args, **kwargs)


def environment(now: datetime) -> jinja2.Environment:
    """The sandbox that templates are compiled in; for them it is always `now`."""
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = now.strftime
    made.globals["dict"] = _Dict()
    made.globals["namespace"] = _Namespace
    return made


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `_Overtime` after so long, where the platform has alarms; the other process watches too."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _on_alarm(number: int, frame: Any) -> None:
    raise _Overtime


def _render(template: jinja2.Template, values: dict[str, Any], seconds: float) -> str | list[str]:
    """The text, or [kind, message] of what went wrong."""
    try:
        with _alarm(seconds):
            text = template.render(**values)
    except _Overtime:
        return ["time", f"it took longer than {seconds:g} s"]
    except MemoryError:
        return ["memory", "it took more memory than it may have"]
    except Exception as error:
        try:
            said = str(error)
        except Exception:
            said = ""
        return ["refused", f"{type(error).__name__}: {said}"[:2000]]
    if len(text) > _LONGEST_TEXT:
        return ["memory", f"it wrote {len(text):,} characters"]
    return text


def _compiled(kept: dict[tuple[str, str], Any], text: str, now: str, seconds: float) -> jinja2.Template | list[str]:
    key = (text, now)
    if key not in kept:
        if len(kept) >= _KEPT_TEMPLATES:
            kept.clear()
        try:
            with _alarm(seconds):
                made = environment(datetime.fromisoformat(now)).from_string(text)
            # One plain dictionary: every text copies it.
            made.globals = dict(made.globals)
            kept[key] = made
        except _Overtime:
            kept[key] = ["time", f"to read it took longer than {seconds:g} s"]
        except jinja2.TemplateSyntaxError as error:
            kept[key] = ["syntax", f"in line {error.lineno}: {error.message}"]
        except MemoryError:
            kept[key] = ["memory", "to read it took more memory than it may have"]
        except Exception as error:
            kept[key] = ["syntax", f"{type(error).__name__}: {error}"[:2000]]
    found: jinja2.Template | list[str] = kept[key]
    return found


def _answer(batch: dict[str, Any], kept: dict[tuple[str, str], Any]) -> None:
    seconds = float(batch["seconds"])
    pending: list[Any] = []
    last = time.monotonic()
    for job in batch["jobs"]:
        template = _compiled(kept, batch["template"], batch["now"], seconds)
        texts: list[Any] = []
        for end, add_generation_prompt in job["cuts"]:
            if isinstance(template, list):
                texts.append(template)
                continue
            values = {
                **batch["variables"],
                # Copies: a template may not change them, but nothing has to rest on that.
                "messages": job["messages"][:end],
                "tools": job["tools"],
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
            texts.append(_render(template, values, seconds))
        pending.append(texts)
        if time.monotonic() - last > _SECONDS_BETWEEN_ANSWERS:
            _write(pending)
            pending, last = [], time.monotonic()
    if pending:
        _write(pending)


def _write(results: list[Any]) -> None:
    sys.stdout.write(json.dumps(results) + "\n")
    sys.stdout.flush()


def main(max_bytes: int) -> None:
    """Answer batches until the input ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such bound on this platform: then time alone
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process stops it
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _on_alarm)
    kept: dict[tuple[str, str], Any] = {}
    _write(["ready"])
    for line in sys.stdin.buffer:
        _answer(json.loads(line), kept)


if __name__ == "__main__":
    main(int(sys.argv[1]))
