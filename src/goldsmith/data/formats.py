"""Rows to conversations: which fields a row has, whether they are of the right type, and what is wrong where not.

A row is either *plain*, `prompt` and `completion`, or a *chat*, `messages` with `role` and `content`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from goldsmith.data.rows import FIELDS, Rejection, Row, shorten
from goldsmith.types import Conversation, Message

__all__ = ["ROLES", "to_conversation"]

ROLES: Final = ("system", "user", "assistant")

_OWN_NAMES: Final = {field: field for field in FIELDS}


def to_conversation(
    row: Row, *, columns: Mapping[str, str | int] | None = None, source_weight: float = 1.0
) -> Conversation | Rejection:
    """The conversation of a row, or why it has none.

    Text is kept exactly as it is. `prompt` may be empty (then the completion is unconditional); a completion or an
    assistant's turn may not, white space alone included. Roles are system, user and assistant. `id` is text or an
    integer, `weight` a number above 0 (as text too, since CSV knows nothing else); a message's `weight` may be 0.

    Args:
        row: of any source.
        columns: field -> name of the column that holds it; a field that is not mapped is looked for under its own name.
        source_weight: multiplies the row's weight.
    """
    try:
        return _conversation(row, columns or {}, source_weight)
    except _BadRowError as error:
        return Rejection(source=row.source, reason=error.reason, detail=error.detail)


class _BadRowError(Exception):
    """Carries a rejection out of the checks below; never leaves this file."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def _conversation(row: Row, columns: Mapping[str, str | int], source_weight: float) -> Conversation:
    values = row.values
    names = {field: str(columns.get(field, field)) for field in FIELDS} if columns else _OWN_NAMES
    is_chat = names["messages"] in values
    has_completion = names["completion"] in values
    if is_chat and has_completion:
        # Asked for by name decides; a data set often carries both forms of the same row.
        if "messages" in columns and "completion" not in columns:
            has_completion = False
        elif "completion" in columns and "messages" not in columns:
            is_chat = False
        else:
            raise _BadRowError(
                "two formats",
                f"the row has both {names['messages']!r} and {names['completion']!r}; say which with "
                "`columns: {messages: ...}` or `columns: {prompt: ..., completion: ...}`",
            )
    if is_chat:
        messages = _messages(values[names["messages"]], names["messages"])
    elif has_completion and names["prompt"] in values:
        prompt = _text(values[names["prompt"]], names["prompt"], "prompt")
        completion = _text(values[names["completion"]], names["completion"], "completion")
        if not completion or completion.isspace():
            raise _BadRowError(
                "empty completion",
                f"the field {names['completion']!r} is {shorten(completion)}; there is nothing to learn",
            )
        messages = (Message(role="user", content=prompt), Message(role="assistant", content=completion))
    else:
        raise _missing_fields(values, names)

    own_id = values.get(names["id"])
    return Conversation(
        messages=messages,
        example_id=f"{row.source_name}:{row.ordinal}" if own_id is None else _example_id(own_id, names["id"]),
        source=row.source,
        is_chat=is_chat,
        example_weight=source_weight * _row_weight(values.get(names["weight"]), names["weight"]),
    )


def _missing_fields(values: Mapping[str, object], names: Mapping[str, str]) -> _BadRowError:
    seen = ", ".join(shorten(name, 30) for name in list(values)[:12]) or "none"
    seen += ", ..." if len(values) > 12 else ""
    absent = [field for field in ("prompt", "completion") if names[field] not in values]
    remedy = "name the columns: `columns: {prompt: ..., completion: ...}` or `columns: {messages: ...}`"
    if absent == ["prompt"]:
        remedy += '; for text without a prompt give an empty one, `"prompt": ""`'
    reason = f"no {absent[0]}" if len(absent) == 1 else "no prompt and completion, no messages"
    looked_for = " and ".join(repr(names[field]) for field in absent)
    return _BadRowError(reason, f"no field {looked_for}; the row has {seen}; {remedy}")


def _text(value: object, name: str, what: str) -> str:
    """`value`, if it is text that UTF-8 can write."""
    if isinstance(value, str):
        if not value.isascii():
            _check_unicode(value, name)
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        shown = "null" if value is None else "NaN"
        raise _BadRowError(f"{what} is null", f"the field {name!r} is {shown}; give text or remove the row")
    raise _wrong_type(value, name, "text")


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = shorten(text[max(0, error.start - 10) : error.end + 10])
        raise _BadRowError(
            "not Unicode text",
            f"the field {name!r} has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start + 1}, "
            f"at {around}; it is half of a character, write the whole one",
        ) from None


def _wrong_type(value: object, name: str, wanted: str) -> _BadRowError:
    return _BadRowError(
        "wrong type", f"the field {name!r} must be {wanted}, but is of type {type(value).__name__}: {shorten(value)}"
    )


def _example_id(value: object, name: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 128:
        return str(value)
    if not isinstance(value, str):
        raise _wrong_type(value, name, "text or an integer (map `columns: {id: ...}` where the id has another name)")
    if not value:
        raise _BadRowError("empty id", f"the field {name!r} is empty; give an id, or null for none")
    _check_unicode(value, name)
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _wrong_type(value, name, "a number (map `columns: {weight: ...}` where the weight has another name)")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise _BadRowError("bad weight", f"the field {name!r} is {shorten(value)}; a weight is a finite number")
    return number


def _row_weight(value: object, name: str) -> float:
    if value is None or value == "":
        return 1.0
    weight = _number(value, name)
    if weight <= 0:
        raise _BadRowError("bad weight", f"the field {name!r} is {shorten(value)}; a row's weight is above 0")
    return weight


def _messages(value: object, name: str) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong_type(value, name, "a list of messages")
    if not value:
        raise _BadRowError("no messages", f"the field {name!r} is an empty list")
    messages = tuple(_message(item, f"{name}[{index}]") for index, item in enumerate(value))
    if not any(message.role == "assistant" for message in messages):
        roles = ", ".join(message.role for message in messages[:8])
        raise _BadRowError("no assistant message", f"the roles of {name!r} are {roles}; nothing in it is gold")
    return messages


def _message(value: object, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise _wrong_type(value, place, "an object with role and content")
    for key in ("role", "content"):
        if key not in value:
            seen = ", ".join(shorten(found, 30) for found in list(value)[:8]) or "none"
            raise _BadRowError(f"message without {key}", f"{place} has no {key!r}; its keys are {seen}")
    for key, extra in value.items():
        if key not in ("role", "content", "weight") and extra is not None:
            raise _BadRowError(
                f"message key {shorten(key, 30)}",
                f"{place} has {shorten(key, 30)}: {shorten(extra)}, which is not supported yet; remove it or set it to "
                "null",
            )
    role = value["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise _BadRowError("unknown role", f"the role of {place} is {shorten(role)}; known are {', '.join(ROLES)}")
    content = _text(value["content"], f"{place}.content", "message content")
    if role == "assistant" and (not content or content.isspace()):
        raise _BadRowError(
            "empty completion",
            f"{place} is the assistant's, but its content is {shorten(content)}; there is nothing to learn",
        )
    weight = value.get("weight")
    return Message(
        role=role, content=content, weight=1.0 if weight is None else _message_weight(weight, f"{place}.weight")
    )


def _message_weight(value: object, name: str) -> float:
    weight = _number(value, name)
    if weight < 0:
        raise _BadRowError("bad weight", f"the field {name!r} is {shorten(value)}; a message's weight is at least 0")
    return weight
