"""The recipe: every component's own `Config`, composed; YAML in, the resolved YAML out.

A recipe holds settings only. Each setting is declared once, in the file that uses it; here they are put together, read
with the place of every key remembered, and checked, so that a mistake is answered with its file, line, key, the value
seen and what was expected.

Paths. What a recipe *reads* (data, a model's folder, a chat template) lies relative to the recipe's own folder, so that
a recipe runs from anywhere. What it *writes* (`output_dir`) lies relative to the current directory. A path given with
`--set` is relative to the current directory, where it was typed. A model or tokenizer `path` is a folder where one
exists there, or where it is plainly written as one (it starts with `.`, `/` or `~`, or has more than one `/`); else it
is a hub id. Loading makes all of them absolute, so the resolved recipe in a run folder means the same wherever it is
read.

The YAML is version 1.2's core schema: `1e-4`, `2.0e-5` and `1e5` are numbers, only `true` and `false` are booleans, a
date is text. Anchors, aliases and tags are refused, and so are keys that occur twice.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from goldsmith.data.config import DataConfig, SourceConfig
from goldsmith.data.rendering import RenderingConfig
from goldsmith.data.rendering_config import BUILT_IN_TEMPLATES
from goldsmith.data.tokenizer import TokenizerConfig
from goldsmith.errors import ConfigError
from goldsmith.models.adapters import AdapterConfig
from goldsmith.models.load import ModelConfig
from goldsmith.objective.cross_entropy import ObjectiveConfig
from goldsmith.report.page import ReportConfig
from goldsmith.training.checkpoint import CheckpointConfig
from goldsmith.training.optimizer import OptimizerConfig
from goldsmith.training.trackers.config import TrackerConfigs
from goldsmith.training.trainer import EvaluationConfig, TrainingConfig

__all__ = ["Recipe", "load_recipe", "require_recipe"]

KeyPath = tuple[str | int, ...]

# A recipe is a page of settings. A larger file is almost surely the data, given by mistake, and slow to parse as YAML.
MAX_RECIPE_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_SHOWN_CHARACTERS = 60


class Recipe(BaseModel):
    """All settings of one run. Every value has a default but `model` and `data.train` (which rows given from Python replace).

    Building one in Python is like writing one: `Recipe.from_mapping({"model": {...}, "data": {"train": "a.jsonl"}})`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelConfig = Field(description="the model: a folder or hub id, or an architecture from nothing")
    tokenizer: TokenizerConfig = Field(
        default_factory=TokenizerConfig, description="the model's own, unless one is named"
    )
    adapter: AdapterConfig | None = Field(default=None, description="train an adapter; null: all of the model")
    data: DataConfig = Field(description="the gold: files to train on and to evaluate on")
    rendering: RenderingConfig = Field(default_factory=RenderingConfig, description="from rows to tokens and weights")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="what is minimised")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="how long, and how a step is cut")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="the update and its schedule")
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="when held-out gold is looked at"
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="when the state is saved, and how many stay"
    )
    report: ReportConfig = Field(
        default_factory=ReportConfig, description="what is scored to be shown token by token, before and after"
    )
    trackers: TrackerConfigs = Field(
        default=[], description="who else is told of steps and evaluations: names, or mappings with a `name`"
    )
    output_dir: str = Field(default="runs/run", min_length=1, description="the run folder")

    @model_validator(mode="after")
    def _check_across_components(self) -> Self:
        """What no component can see alone."""
        from_nothing = self.model.init is not None
        if from_nothing and self.tokenizer.train is None and self.tokenizer.path is None:
            raise ValueError(
                "model.init starts a model from nothing, so it has no tokenizer of its own; "
                "set tokenizer.train (for example `tokenizer: {train: {kind: character}}`) or tokenizer.path"
            )
        if not from_nothing and self.tokenizer.train is not None:
            raise ValueError(
                "tokenizer.train makes new token ids, which the embeddings of the loaded model.path know nothing of; "
                "remove tokenizer.train, or use model.init"
            )
        if self.data.is_streamed:
            if self.training.max_steps is None:
                raise ValueError("data.train is streamed and has no end; set training.max_steps")
            if self.tokenizer.train is not None:
                raise ValueError("tokenizer.train learns from all rows, but data.train is streamed; set tokenizer.path")
        if self.adapter is not None and from_nothing:
            raise ValueError("adapter trains beside frozen weights, but those of model.init are random; use model.path")
        if self.adapter is not None and self.training.trainable is not None:
            raise ValueError("adapter and training.trainable both choose what is trained; remove one of them")
        return self

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
        """Check settings given from Python as strictly as a file's. Paths are relative to the current directory.

        Args:
            values: nested mappings, as the YAML would give them.
            name: what errors call it.

        >>> recipe = Recipe.from_mapping({"model": {"path": "owner/name"}, "data": {"train": "train.jsonl"}})
        >>> recipe.model.path, recipe.data.train[0].repeat
        ('owner/name', 1.0)

        Raises:
            ConfigError: an unknown key, a missing one, or a value of the wrong type.
        """
        # Through JSON and back: plain values of our own, as a file gives them, and nothing shared with the caller.
        try:
            plain = json.loads(json.dumps(values, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{name}: a value that a recipe cannot hold: {error}",
                remedy="use strings, numbers, booleans, null, lists and mappings only",
            ) from error
        document = _Document(name=name, values=plain, lines={}, overrides={})
        return _absolute_paths(_validated(document), lambda key: Path.cwd())

    def to_yaml(self) -> str:
        """Every value, defaults included; `load_recipe` reads it back as an equal recipe."""
        return yaml.dump(
            self.model_dump(mode="json"),
            Dumper=_RecipeDumper,
            sort_keys=False,
            allow_unicode=True,
            width=120,
            default_flow_style=False,
        )

    def settings(self) -> dict[str, Any]:
        """Dotted key -> value of every leaf, defaults included; an empty list or mapping is a leaf."""
        return {_dotted(key): value for key, value in _leaves(self.model_dump(mode="json"))}

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Dotted key -> (this recipe's value, the other's) of each leaf that differs; None where one lacks the key."""
        mine, others = dict(_leaves(self.model_dump(mode="json"))), dict(_leaves(other.model_dump(mode="json")))
        return {
            _dotted(key): (mine.get(key), others.get(key))
            for key in dict.fromkeys([*mine, *others])
            if (key in mine) != (key in others) or mine.get(key) != others.get(key)
        }


def require_recipe(recipe: object) -> None:
    """Refuse what is no recipe, such as the name of its file.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"the recipe is of type {type(recipe).__name__}: {str(recipe)[:80]!r}",
            remedy="read a file with goldsmith.load_recipe(path), or give Recipe.from_mapping({...})",
        )


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, of_run: bool = False) -> Recipe:
    """Read a recipe, apply `key=value` overrides in order, check everything, and make its paths absolute.

    Args:
        path: the YAML file.
        overrides: such as `optimizer.learning_rate=1e-4` or `data.train.0.path=other.jsonl`; the value is read as YAML.
        of_run: the resolved recipe in a run folder; it names no rows where the run was given its rows from Python.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "french.yaml"
    >>> _ = file.write_text("model: {path: owner/name}\\ndata: {train: train.jsonl}\\n")
    >>> recipe = load_recipe(file, ["optimizer.learning_rate=1e-4"])
    >>> recipe.optimizer.learning_rate, recipe.training.batch_size, Path(recipe.data.train[0].path).name
    (0.0001, 64, 'train.jsonl')

    Raises:
        ConfigError: no such file, not a recipe, an unknown key (with the nearest known one), a missing key, or a value
            of the wrong type; the message names the file, the line and the dotted key of each problem.
    """
    file = Path(path)
    name = str(path)
    values, lines = _parse(_read_text(file), name)
    if values is None:
        raise ConfigError(
            f"{name}: the recipe is empty", remedy="a recipe needs at least `model:` and `data:` with `train:`"
        )
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name}: a recipe is a mapping of keys, but this file holds {_shown(values)}",
            remedy="begin with `model:` and `data:`",
        )
    # A section whose keys are all commented out is null in YAML: it means its defaults.
    values = {key: value for key, value in values.items() if value is not None}
    if "output_dir" not in values:
        # Named after the recipe; `recipe.yaml` is named by its folder, as in examples/pronunciation/recipe.yaml.
        stem = file.stem if file.stem != "recipe" else file.resolve().parent.name
        values["output_dir"] = f"runs/{stem or 'run'}"
    document = _Document(name=name, values=values, lines=lines, overrides={})
    for text in overrides:
        _apply_override(document, text)

    def folder_of(key: KeyPath) -> Path:
        typed = any(key[: len(override)] == override for override in document.overrides)
        return Path.cwd() if typed or key == ("output_dir",) else file.resolve().parent

    recipe = _validated(document)
    if not recipe.data.train and not of_run:
        place = document.place(("data", "train"))
        raise ConfigError(f"{place}: data.train: missing, and it has no default", remedy="name the files to train on")
    return _absolute_paths(recipe, folder_of)


# --- YAML -> plain values, with the line of every key


@dataclass(frozen=True, kw_only=True)
class _Document:
    """Plain values and where each came from.

    Attributes:
        name: the file, as the user wrote it.
        lines: key path -> line, from 1; empty for values given from Python.
        overrides: key path -> the `--set` text that gave it.
    """

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, int]
    overrides: dict[KeyPath, str]

    def place(self, key: KeyPath) -> str:
        """Where the nearest enclosing key that was written stands: `file:line` or the `--set` that gave it."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.overrides:
                return f"--set {self.overrides[key[:length]]}"
            if key[:length] in self.lines:
                return f"{self.name}:{self.lines[key[:length]]}"
        return self.name

    def line(self, key: KeyPath) -> int:
        """For sorting problems in the order in which the user meets them; overrides come last."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.overrides:
                return 1 << 30
            if key[:length] in self.lines:
                return self.lines[key[:length]]
        return 0


class _RecipeLoader(yaml.SafeLoader):
    """PyYAML's parser with YAML 1.2's core schema in place of 1.1's, in which `1e-4` is text and `no` is a boolean."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        # An alias is the only way for a short file to become a huge value, and a recipe has no need of it.
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"anchors and aliases (here {event.anchor!r}) are not part of a recipe",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


# Its own table, in place of the inherited one.
_RecipeLoader.yaml_implicit_resolvers = {}
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_TAG = "tag:yaml.org,2002:"
for _tag, _pattern, _first in (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    # `$` alone would let a trailing newline through.
    _RecipeLoader.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), _first)


class _RecipeDumper(yaml.SafeDumper):
    """Quotes what either schema would misread: YAML 1.1 readers and ours get the same values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML folds lines at Unicode's line breaks too, and loses them, unless they are escaped in double quotes.
        style = '"' if any(character in data for character in "\r\x85\u2028\u2029") else None
        return self.represent_scalar(f"{_TAG}str", data, style=style)


_RecipeDumper.add_representer(str, _RecipeDumper.represent_str)
_RecipeDumper.add_implicit_resolver(f"{_TAG}int", re.compile(rf"(?:{_INT.pattern})\Z"), list("-+0123456789"))
_RecipeDumper.add_implicit_resolver(f"{_TAG}float", re.compile(rf"(?:{_FLOAT.pattern})\Z"), list("-+.0123456789"))


def _at(name: str, line: int) -> str:
    """`file:line`; what was typed with `--set` has no line."""
    return name if name.startswith("--set ") else f"{name}:{line}"


def _read_text(file: Path) -> str:
    remedy = "give the path of a YAML file of settings"
    try:
        if file.is_dir():
            raise ConfigError(f"{file}: the recipe is a folder, not a file", remedy=remedy)
        with file.open("rb") as stream:
            data = stream.read(MAX_RECIPE_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such recipe", remedy=remedy) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{file}: the recipe cannot be read: {reason}", remedy=remedy) from error
    if len(data) > MAX_RECIPE_BYTES:
        raise ConfigError(f"{file}: larger than {MAX_RECIPE_BYTES} bytes, so not a recipe", remedy=remedy)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{file}:{line}: byte 0x{data[error.start]:02x} is not UTF-8 text, so this is not a recipe", remedy=remedy
        ) from error


def _parse(text: str, name: str) -> tuple[Any, dict[KeyPath, int]]:
    """Values, and the line of every key and list item.

    Raises:
        ConfigError: text that is no YAML, or YAML that no recipe can hold (aliases, tags, a key twice, infinity).
    """
    try:
        node = yaml.compose(text, Loader=_RecipeLoader)
        lines: dict[KeyPath, int] = {}
        values = None if node is None else _plain(node, (), lines, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = name if mark is None else _at(name, mark.line + 1)
        problem = error.problem or error.context or "not YAML"
        remedy = "mend the YAML at this line"
        if "'\\t'" in problem:
            problem, remedy = "a tab where YAML wants spaces", "indent with spaces; YAML does not allow tabs there"
        raise ConfigError(f"{place}: {problem}", remedy=remedy) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{name}: not YAML text: {' '.join(str(error).split())}", remedy="give a YAML file of settings"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply to be a recipe", remedy="give a YAML file of settings") from error
    return values, lines


def _plain(node: yaml.Node, key: KeyPath, lines: dict[KeyPath, int], name: str) -> Any:
    place = _at(name, node.start_mark.line + 1)
    if key:
        place = f"{place}: {_dotted(key)}"
    if len(key) > MAX_DEPTH:
        raise ConfigError(f"{name}: nested too deeply to be a recipe", remedy="give a YAML file of settings")
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{_at(name, line)}: a key must be a name, not a list or a mapping")
            inner = (*key, key_node.value)
            if inner in lines:
                raise ConfigError(
                    f"{_at(name, line)}: {_dotted(inner)}: the same key again; it is on line {lines[inner]} already",
                    remedy="keep one of the two",
                )
            lines[inner] = line
            mapping[key_node.value] = _plain(value_node, inner, lines, name)
        return mapping
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        items = []
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            items.append(_plain(item, (*key, index), lines, name))
        return items
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, place)
    raise ConfigError(f"{place}: the YAML tag {node.tag!r} is not part of a recipe", remedy="write the plain value")


def _scalar(node: yaml.ScalarNode, place: str) -> str | int | float | bool | None:
    kind, text = str(node.tag).removeprefix(_TAG), str(node.value)
    try:
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text)
        if kind == "float":
            number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
            if math.isfinite(number):
                return number
            raise ConfigError(f"{place}: {text} is not a finite number", remedy="write a finite number")
    except ValueError:
        raise ConfigError(f"{place}: {_shown(text)} is not a number of the kind {kind}") from None
    raise ConfigError(f"{place}: the YAML tag {node.tag!r} is not part of a recipe", remedy="write the plain value")


def _apply_override(document: _Document, text: str) -> None:
    """Put the value of one `key=value` into the document's values."""
    dotted, equals, value_text = text.partition("=")
    segments = [segment.strip() for segment in dotted.split(".")]
    if not equals or not all(segments):
        raise ConfigError(
            f"--set {text}: not of the form key=value", remedy="for example: --set optimizer.learning_rate=1e-4"
        )
    value, _ = _parse(value_text, f"--set {text}")
    container: Any = document.values
    key: KeyPath = ()
    for number, segment in enumerate(segments):
        index: str | int = segment
        if isinstance(container, list):
            if not segment.isdecimal() or int(segment) >= len(container):
                raise ConfigError(
                    f"--set {text}: {_dotted(key)} is a list of {len(container)}; it has no position {segment!r}",
                    remedy=f"count from 0, or set the whole list: --set {_dotted(key)}=...",
                )
            index = int(segment)
        elif not isinstance(container, dict):
            raise ConfigError(
                f"--set {text}: {_dotted(key)} holds {_shown(container)}, which has no key {segment!r}",
                remedy=f"set the whole of it: --set {_dotted(key)}=...",
            )
        key = (*key, index)
        if number == len(segments) - 1:
            container[index] = value
            # An override of a whole replaces what earlier ones said of its parts.
            for earlier in [earlier for earlier in document.overrides if earlier[: len(key)] == key]:
                del document.overrides[earlier]
            document.overrides[key] = text
            return
        if isinstance(container, dict) and container.get(segment) is None:
            container[segment] = {}
        container = container[index]


# --- plain values -> Recipe, with errors a person can act on


def _validated(document: _Document) -> Recipe:
    """Check the values strictly (text is no number, true is no number), and name every problem at its place."""
    try:
        return Recipe.model_validate_json(json.dumps(document.values), strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    # `max_steps: 1e5` is a whole number written as a float: take it as one where an integer is wanted.
    if _write_whole_floats_as_integers(document, errors):
        return _validated(document)
    problems: dict[KeyPath, _Problem] = {}
    for details in errors:
        problem = _problem(document, details)
        known = problems.get(problem.key)
        # A union gives one error for each of its members: they are one problem with several expectations.
        problems[problem.key] = problem if known is None else known.joined(problem)
    ordered = sorted(problems.values(), key=lambda problem: document.line(problem.key))
    texts = [f"{document.place(problem.key)}: {problem.text()}" for problem in ordered]
    remedy = next((problem.remedy for problem in ordered if problem.remedy is not None), None)
    if len(texts) == 1:
        raise ConfigError(texts[0], remedy=remedy)
    raise ConfigError(
        "\n".join([f"{document.name}: {len(texts)} problems", *(f"  {text}" for text in texts)]), remedy=remedy
    )


@dataclass(frozen=True, kw_only=True)
class _Problem:
    key: KeyPath
    statement: str
    expected: tuple[str, ...] = ()
    remedy: str | None = None

    def joined(self, other: _Problem) -> _Problem:
        expected = tuple(dict.fromkeys([*self.expected, *other.expected]))
        return _Problem(key=self.key, statement=self.statement, expected=expected, remedy=self.remedy or other.remedy)

    def text(self) -> str:
        expected = f"; expected {' or '.join(self.expected)}" if self.expected else ""
        key = f"{_dotted(self.key)}: " if self.key else ""
        return f"{key}{self.statement}{expected}"


def _problem(document: _Document, details: Mapping[str, Any]) -> _Problem:
    kind: str = details["type"]
    key = _key_of(document.values, details["loc"])
    if kind == "extra_forbidden":
        return _unknown_key(key)
    if kind == "missing":
        return _Problem(key=(*key, details["loc"][-1]), statement="missing, and it has no default")
    message: str = details["msg"]
    if kind == "json_invalid":  # the values came from json.dumps: only text with half a surrogate pair gets here
        return _Problem(key=(), statement="a text that is not Unicode (half of a surrogate pair)")
    if kind in {"value_error", "assertion_error"}:
        cause = details.get("ctx", {}).get("error")
        return _Problem(key=key, statement=str(cause) if cause is not None else message)
    for words, plainer in (
        ("an object", "a mapping of keys"),
        ("a valid array", "a list"),
        ("a valid ", "a " if "integer" not in message else "an "),
    ):
        message = message.replace(words, plainer)
    shown = f"{_shown(details['input'])} was seen"
    if not message.startswith("Input should be "):
        return _Problem(key=key, statement=f"{shown}; {message}")
    message = message.removeprefix("Input should be ")
    remedy = 'write "" for an empty text' if kind == "string_type" and details["input"] is None else None
    return _Problem(key=key, statement=shown, expected=(message,), remedy=remedy)


def _key_of(values: Any, location: Sequence[str | int]) -> KeyPath:
    """The written key that a pydantic location means: without union tags and positions that validation added."""
    key: list[str | int] = []
    for element in location:
        is_key = isinstance(values, dict) and element in values
        is_position = isinstance(values, list) and isinstance(element, int) and element < len(values)
        if is_key or is_position:
            key.append(element)
            values = values[element]
    return tuple(key)


def _write_whole_floats_as_integers(document: _Document, errors: Sequence[Mapping[str, Any]]) -> bool:
    changed = False
    for details in errors:
        value = details["input"]
        if (
            details["type"] not in {"int_type", "int_from_float"}
            or not isinstance(value, float)
            or not value.is_integer()
        ):
            continue
        key = _key_of(document.values, details["loc"])
        container: Any = document.values
        for element in key[:-1]:
            container = container[element]
        # A union's second member may report the same value again after it was changed.
        if isinstance(container[key[-1]], float):
            container[key[-1]] = int(value)
            changed = True
    return changed


def _unknown_key(key: KeyPath) -> _Problem:
    unknown = str(key[-1])
    known = [name for model in _models_at(key[:-1]) for name in model.model_fields]
    nearest = difflib.get_close_matches(unknown, known, n=1, cutoff=0.0)
    if not difflib.get_close_matches(unknown, known, n=1, cutoff=0.75):
        # A key in the wrong section (`learning_rate` under `training`) is more likely than a far-off spelling.
        elsewhere: dict[str, str] = {}
        for dotted in _known_keys(Recipe):
            elsewhere.setdefault(dotted.rpartition(".")[2], dotted)
        moved = difflib.get_close_matches(unknown, elsewhere, n=1, cutoff=0.75)
        nearest = [elsewhere[name] for name in moved] or nearest
    statement = f"unknown key; nearest known key: `{nearest[0]}`" if nearest else "unknown key"
    return _Problem(key=key, statement=f"{statement}; known here: {', '.join(known)}")


def _models_at(key: KeyPath) -> list[type[BaseModel]]:
    models: list[type[BaseModel]] = [Recipe]
    for element in key:
        if isinstance(element, int):
            continue
        models = [
            inner
            for model in models
            if element in model.model_fields
            for inner in _models_in(model.model_fields[element].annotation)
        ]
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_args(annotation):
        return [model for inner in typing.get_args(annotation) for model in _models_in(inner)]
    return []


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(field.annotation):
            yield from _known_keys(inner, f"{prefix}{name}.")


# --- paths


def _absolute_paths(recipe: Recipe, folder_of: Callable[[KeyPath], Path]) -> Recipe:
    """The same recipe with every path absolute; a model path that is a hub id stays as it is."""

    def file(text: str, key: KeyPath) -> str:
        # `/` of two paths keeps the second where it is absolute. Not resolved: a link stays the name the user gave it.
        return str(folder_of(key) / Path(text).expanduser())

    def model_folder(text: str | None, key: KeyPath) -> str | None:
        if text is None:
            return None
        folder = folder_of(key) / Path(text).expanduser()
        plainly_a_path = text.startswith((".", "/", "~")) or text.count("/") > 1
        return str(folder) if plainly_a_path or folder.is_dir() else text

    def sources(values: Sequence[SourceConfig], split: str) -> list[SourceConfig]:
        return [
            source
            if source.is_hub
            else source.model_copy(update={"path": file(source.path, ("data", split, index, "path"))})
            for index, source in enumerate(values)
        ]

    template = recipe.rendering.chat_template
    if template is not None and template not in BUILT_IN_TEMPLATES:
        template = file(template, ("rendering", "chat_template"))
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": model_folder(recipe.model.path, ("model", "path"))}),
            "tokenizer": recipe.tokenizer.model_copy(
                update={"path": model_folder(recipe.tokenizer.path, ("tokenizer", "path"))}
            ),
            "data": recipe.data.model_copy(
                update={
                    "train": sources(recipe.data.train, "train"),
                    "eval": sources(recipe.data.eval, "eval"),
                    "cache": file(recipe.data.cache, ("data", "cache"))
                    if isinstance(recipe.data.cache, str)
                    else recipe.data.cache,
                }
            ),
            "rendering": recipe.rendering.model_copy(update={"chat_template": template}),
            "output_dir": file(recipe.output_dir, ("output_dir",)),
        }
    )


# --- showing


def _dotted(key: KeyPath) -> str:
    return ".".join(str(element) for element in key)


def _shown(value: Any) -> str:
    """The value as a person wrote it, with its kind: `'many' (text)`."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > MAX_SHOWN_CHARACTERS:
        text = f"{text[:MAX_SHOWN_CHARACTERS]}..."
    kinds = {str: "text", bool: "a boolean", int: "an integer", float: "a number", list: "a list", dict: "a mapping"}
    kind = kinds.get(type(value))
    return text if kind is None else f"{text} ({kind})"


def _leaves(values: Any, key: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every scalar, and every empty list or mapping, with its key path."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(values, dict):
        items = list(values.items())
    elif isinstance(values, list):
        items = list(enumerate(values))
    if not items:
        yield key, values
    for element, value in items:
        yield from _leaves(value, (*key, element))
