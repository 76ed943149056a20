"""Messages of a chat: OpenAI's shape (`role`, `content`, `tool_calls`) and ShareGPT's (`from`, `value`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from goldsmith.data.formats.checks import (
    BadRowError,
    checked_json,
    checked_spans,
    checked_text,
    checked_weight,
    parsed_json,
    wrong_type,
)
from goldsmith.data.rows import shorten
from goldsmith.types import Message

__all__ = ["ROLES", "MessageReader", "read_tools"]

ROLES: Final = ("system", "developer", "user", "assistant", "tool")

# Who speaks in a ShareGPT row; a `function_call` is the assistant's, and its value the call as JSON.
_SHAREGPT_ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}

_REASONING_KEYS: Final = ("reasoning", "reasoning_content", "thinking")
_MESSAGE_KEYS: Final = frozenset(
    ("role", "content", "weight", "spans", "name", "tool_calls", "tool_call_id", *_REASONING_KEYS)
)
_PLAIN_KEYS: Final = {"role", "content"}
# Type of a content part -> the key that holds its text (`text` does for all).
_PART_KEYS: Final = {"text": "text", "thinking": "thinking", "reasoning": "reasoning"}


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageReader:
    """Reads the messages of one source's rows.

    Attributes:
        ignored_keys: keys of a message that mean nothing here; any other unknown key that is not null rejects the row.
    """

    ignored_keys: Collection[str] = ()

    def read(self, value: object, name: str) -> list[Message]:
        """The messages of a list in OpenAI's shape; at least one.

        Args:
            value: of the row.
            name: of the field, for errors.
        """
        return [self._message(item, f"{name}[{index}]") for index, item in enumerate(_items(value, name))]

    def read_sharegpt(self, value: object, name: str) -> list[Message]:
        """The messages of a list in ShareGPT's shape; at least one."""
        return [self._sharegpt(item, f"{name}[{index}]") for index, item in enumerate(_items(value, name))]

    def _message(self, value: object, place: str) -> Message:
        if not isinstance(value, Mapping):
            raise wrong_type(value, place, "an object with role and content")
        if "role" not in value or ("content" not in value and not value.get("tool_calls")):
            raise _missing_key(value, place, "content" if "role" in value else "role")
        role = value["role"]
        if not isinstance(role, str) or role not in ROLES:
            raise BadRowError("unknown role", f"the role of {place} is {shorten(role)}; known are {', '.join(ROLES)}")
        content = value.get("content")
        if value.keys() == _PLAIN_KEYS and isinstance(content, str):  # nearly all of them
            return _not_empty(Message(role=role, content=checked_text(content, f"{place}.content", "content")), place)
        self._check_keys(value, place, _MESSAGE_KEYS)
        calls = _tool_calls(value.get("tool_calls"), f"{place}.tool_calls")
        if calls and role != "assistant":
            raise BadRowError("tool calls of another role", f"{place} has tool_calls, but its role is {role}")
        words, thoughts = _content(content, f"{place}.content", may_be_null=bool(calls))
        reasoning = _reasoning(value, place, thoughts)
        if reasoning is not None and role != "assistant":
            raise BadRowError("reasoning of another role", f"{place} has reasoning, but its role is {role}")
        return _not_empty(
            Message(
                role=role,
                content=words,
                weight=checked_weight(value.get("weight"), f"{place}.weight"),
                spans=checked_spans(value.get("spans"), f"{place}.spans", words),
                name=_optional_text(value.get("name"), f"{place}.name"),
                reasoning=reasoning,
                tool_calls=calls,
                tool_call_id=_optional_text(value.get("tool_call_id"), f"{place}.tool_call_id"),
            ),
            place,
        )

    def _sharegpt(self, value: object, place: str) -> Message:
        if not isinstance(value, Mapping):
            raise wrong_type(value, place, "an object with from and value")
        for key in ("from", "value"):
            if key not in value:
                raise _missing_key(value, place, key)
        self._check_keys(value, place, {"from", "value", "weight", "spans"})
        speaker = value["from"]
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise BadRowError("unknown role", f"`from` of {place} is {shorten(speaker)}; known are {known}")
        words = checked_text(value["value"], f"{place}.value", "message content")
        weight = checked_weight(value.get("weight"), f"{place}.weight")
        if speaker == "function_call":
            called = parsed_json(words, f"{place}.value")
            calls = _tool_calls(called if isinstance(called, list) else [called], f"{place}.value")
            if not calls:
                raise BadRowError("no tool call", f"{place} is a function_call, but its value is {shorten(words)}")
            return Message(role=role, content="", weight=weight, tool_calls=calls)
        spans = checked_spans(value.get("spans"), f"{place}.spans", words)
        return _not_empty(Message(role=role, content=words, weight=weight, spans=spans), place)

    def _check_keys(self, value: Mapping[Any, object], place: str, known: Collection[str]) -> None:
        for key, extra in value.items():
            if key not in known and extra is not None and key not in self.ignored_keys:
                shown = shorten(key, 30)
                raise BadRowError(
                    f"message key {shown}",
                    f"{place} has {shown}: {shorten(extra)}, which means nothing here; remove it, set it to null, or name it "
                    "in `ignore_message_keys` of the source",
                )


def _items(value: object, name: str) -> list[object] | tuple[object, ...]:
    if not isinstance(value, (list, tuple)):
        raise wrong_type(value, name, "a list of messages")
    if not value:
        raise BadRowError("no messages", f"the field {name!r} is an empty list")
    return value


def _missing_key(value: Mapping[Any, object], place: str, key: str) -> BadRowError:
    seen = ", ".join(shorten(found, 30) for found in list(value)[:8]) or "none"
    remedy = ""
    if key == "role" and "from" in value:
        remedy = (
            "; for `from` and `value` say `format: sharegpt`, with `columns: {conversations: ...}` naming the column"
        )
    elif key == "from" and "role" in value:
        remedy = "; for `role` and `content` say `format: chat`, with `columns: {messages: ...}` naming the column"
    return BadRowError(f"message without {key}", f"{place} has no {key!r}; its keys are {seen}{remedy}")


def _not_empty(message: Message, place: str) -> Message:
    if message.role == "assistant" and not message.tool_calls and not (message.reasoning or "").strip():
        words = message.content
        if not words or words.isspace():
            raise BadRowError(
                "empty completion",
                f"{place} is the assistant's, but its content is {shorten(words)}; there is nothing to learn",
            )
    return message


def _content(value: object, place: str, *, may_be_null: bool) -> tuple[str, list[str]]:
    """The words of a content that is text, null or a list of parts, and the thoughts among the parts."""
    if value is None and may_be_null:
        return "", []
    if not isinstance(value, (list, tuple)):
        return checked_text(value, place, "message content"), []
    words: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(value):
        where = f"{place}[{index}]"
        if not isinstance(part, Mapping) or "type" not in part:
            raise wrong_type(part, where, "a part such as {type: text, text: ...}")
        kind = part["type"]
        if not isinstance(kind, str) or kind not in _PART_KEYS:
            raise BadRowError(
                f"content part {shorten(kind, 30)}",
                f"{where} is of type {shorten(kind)}; goldsmith trains on text: parts of type {', '.join(_PART_KEYS)}",
            )
        key = _PART_KEYS[kind] if part.get(_PART_KEYS[kind]) is not None else "text"
        for other, extra in part.items():
            if other not in ("type", key) and extra is not None:
                raise BadRowError(
                    "content part key",
                    f"{where} has {shorten(other, 30)}: {shorten(extra)}, which means nothing here; remove it",
                )
        (words if kind == "text" else thoughts).append(checked_text(part.get(key), f"{where}.{key}", "content part"))
    return "".join(words), thoughts


def _reasoning(value: Mapping[Any, object], place: str, thoughts: list[str]) -> str | None:
    found = [key for key in _REASONING_KEYS if value.get(key) is not None]
    if len(found) + bool(thoughts) > 1:
        seen = " and ".join([*found, *(["a content part"] if thoughts else [])])
        raise BadRowError("reasoning twice", f"{place} has its reasoning in {seen}; keep one of them")
    if thoughts:
        return "".join(thoughts)
    return checked_text(value[found[0]], f"{place}.{found[0]}", "reasoning") if found else None


def _optional_text(value: object, name: str) -> str | None:
    return None if value is None else checked_text(value, name, "text")


def _tool_calls(value: object, place: str) -> tuple[Mapping[str, Any], ...]:
    """Each call as `{"type": "function", "function": {"name", "arguments"}}`, with an `id` where it has one."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise wrong_type(value, place, "a list of tool calls")
    return tuple(_tool_call(item, f"{place}[{index}]") for index, item in enumerate(value))


def _tool_call(value: object, place: str) -> Mapping[str, Any]:
    wanted = "an object {type: function, function: {name, arguments}}"
    if not isinstance(value, Mapping):
        raise wrong_type(value, place, wanted)
    kind = value.get("type")
    if kind not in (None, "function"):
        raise BadRowError("unknown tool call", f"{place}.type is {shorten(kind)}; known is 'function'")
    function, where = (value["function"], f"{place}.function") if "function" in value else (value, place)
    if not isinstance(function, Mapping):
        raise wrong_type(function, where, "an object with name and arguments")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise BadRowError("unknown tool call", f"{where}.name is {shorten(name)}; a call is {wanted}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed_json(arguments, f"{where}.arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise wrong_type(arguments, f"{where}.arguments", "an object of argument -> value, or that as JSON text")
    call: dict[str, Any] = {
        "type": "function",
        "function": {
            "name": checked_text(name, f"{where}.name", "name"),
            "arguments": checked_json(arguments, f"{where}.arguments"),
        },
    }
    own_id = value.get("id")
    return call if own_id is None else {"id": checked_text(own_id, f"{place}.id", "id"), **call}


def read_tools(value: object, name: str) -> tuple[Mapping[str, Any], ...]:
    """The definitions of a row's tools: a list of objects, or that as JSON text; none where it is null or empty."""
    if isinstance(value, str):
        value = parsed_json(value, name) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise wrong_type(value, name, "a list of tool definitions, or that as JSON text")
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise wrong_type(item, f"{name}[{index}]", "an object that defines a tool")
        checked_json(item, f"{name}[{index}]")
    return tuple(value)
