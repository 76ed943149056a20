"""For mkdocstrings: examples stand bare in docstrings (`>>> ...`), which Markdown takes for quotations. Here they are fenced."""

from __future__ import annotations

from typing import Any

import griffe


class DoctestsInFences(griffe.Extension):
    """Fences each paragraph that begins with `>>>` in the docstring of whatever is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """The same text with its examples in fences; indentation is kept."""
    paragraphs = []
    for paragraph in docstring.split("\n\n"):
        text = paragraph.lstrip("\n ")
        if text.startswith(">>> "):
            indent = " " * (len(paragraph.lstrip("\n")) - len(text))
            paragraph = f"{indent}```pycon\n{paragraph}\n{indent}```"
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)
