"""The recipe reference, written from the settings themselves, so that it says what this version does.

python docs/recipe_page.py            prints the page
python docs/recipe_page.py --write    writes docs/recipe.md; a test sees to it that it is current
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from goldsmith.recipe import Recipe

PAGE = Path(__file__).parent / "recipe.md"

HEAD = """# Recipe reference

<!-- Written by docs/recipe_page.py from the settings' own definitions; change those, and run it with --write. -->

A recipe is a YAML file. Unknown keys are refused, with the nearest known one named. What a recipe reads lies relative to its own
folder; what it writes (`output_dir`), and paths given with `--set`, relative to the current directory. Only `model` and
`data.train` have no default. Any key can be given on the command line: `--set optimizer.learning_rate=1e-4`,
`--set data.train.0.path=other.jsonl`. The `recipe.yaml` that a run writes into its folder has every key with its value.

"""

WORDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true, false",
    type(None): "null",
    Any: "any value",
}
BOUNDS = (
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Ge, "ge", "≥"),
    (annotated_types.Lt, "lt", "<"),
    (annotated_types.Le, "le", "≤"),
)


def page() -> str:
    """The whole of docs/recipe.md."""
    parts = []
    for name, field in Recipe.model_fields.items():
        models = list(models_in(field.annotation))
        if not models:
            parts.append(f"## {name}\n\n{sentence(field)}\n\n{table({name: field})}")
            continue
        parts.append(f"## {name}\n\n{sentence(field)}\n")
        for model in models:
            # Of several, each says which it is.
            prefix = f"{name}.N." if is_list(field) else f"{name}."
            if len(models) > 1:
                parts.append(f"### {name}: {first(model)}\n")
            parts.append(section(model, prefix))
    return HEAD + "\n".join(part.rstrip("\n") + "\n" for part in parts)


def section(model: type[BaseModel], prefix: str) -> str:
    """A table of a model's keys, and below it those of the models within it."""
    parts = [table({f"{prefix}{name}": field for name, field in model.model_fields.items()})]
    shared: dict[type[BaseModel], list[str]] = {}
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            shared.setdefault(inner, []).append(f"{prefix}{name}{'.N' if is_list(field) else ''}")
    for inner, keys in shared.items():
        heading = ", ".join(f"`{key}`" for key in keys)
        parts.append(f"### {heading}\n\n{section(inner, '')}")
    return "\n".join(parts)


def table(fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key, field in fields.items():
        cells = (f"`{key}`", value(field), default(field), description(field))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def value(field: FieldInfo) -> str:
    """What may stand there, with its bounds."""
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for kind, name, sign in BOUNDS
        for item in field.metadata
        if isinstance(item, kind)
    ]
    text = words(field.annotation)
    if bounds:
        kind, null, _ = text.partition(" or null")
        text = f"{kind} {', '.join(bounds)}{null}"
    return text


def words(annotation: Any) -> str:
    """A type as a person writes its values."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{item}`" for item in arguments)
    if origin is typing.Annotated:
        return words(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(item) for item in arguments))
    if origin is list or (origin is tuple and arguments[-1:] == (Ellipsis,)):
        return f"list of {words(arguments[0]).replace('mapping', 'mappings')}"
    if origin is tuple:
        return f"list of {len(arguments)} {words(arguments[0])}s"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping to {words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping (below)"
    return WORDS[annotation]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "none: must be given"
    if field.default is PydanticUndefined:
        return ""
    if isinstance(field.default, float):
        return f"`{field.default:g}`"
    return f"`{json.dumps(field.default, ensure_ascii=False)}`"


def description(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def sentence(field: FieldInfo) -> str:
    text = description(field)
    return f"{text[:1].upper()}{text[1:]}."


def first(model: type[BaseModel]) -> str:
    """The name that chooses one of several."""
    return f"{model.model_fields['name'].default}"


def is_list(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is list


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for inner in typing.get_args(annotation):
        yield from models_in(inner)


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())
