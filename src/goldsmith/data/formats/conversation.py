"""One row to a conversation, or to an example where its tokens are given; what does not fit the format is rejected."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from goldsmith.data.config import FIELDS, FormatName
from goldsmith.data.formats.checks import (
    BadRowError,
    checked_id,
    checked_row_weight,
    checked_spans,
    checked_text,
)
from goldsmith.data.formats.detection import column_names
from goldsmith.data.formats.messages import MessageReader, read_tools
from goldsmith.data.formats.tokens import read_tokens
from goldsmith.data.rows import Rejection, Row, shorten
from goldsmith.types import Conversation, Message, TokenizedExample

__all__ = ["RowConverter"]

# Between the parts of an Alpaca row that make its prompt.
_ALPACA_SEPARATOR: Final = "\n\n"


class RowConverter:
    """Rows of one source, all of one format, to conversations.

    Text is kept exactly as it is. A prompt may be empty (then the completion is unconditional); gold may not, white space alone
    included. `id` is text or an integer, `weight` a number above 0 (as text too, since CSV knows nothing else).

    Attributes:
        format: of every row.
    """

    def __init__(
        self,
        form: FormatName,
        *,
        columns: Mapping[str, str | int] | None = None,
        source_weight: float = 1.0,
        ignored_message_keys: Collection[str] = (),
        vocab_size: int | None = None,
    ) -> None:
        """
        Args:
            form: the format.
            columns: field -> name of the column that holds it; a field that is not mapped is looked for under its own name.
            source_weight: multiplies the row's weight.
            ignored_message_keys: see `MessageReader`.
            vocab_size: token ids of a row are below it.
        """
        self.format = form
        self._names = column_names(columns, FIELDS)
        self._source_weight = source_weight
        self._messages = MessageReader(ignored_keys=frozenset(ignored_message_keys))
        self._vocab_size = vocab_size
        # The columns that every row is asked for, found once.
        self._id, self._weight = self._name("id"), self._name("weight")

    def __call__(self, row: Row) -> Conversation | TokenizedExample | Rejection:
        """The conversation of a row; where it gives token ids the example, its `num_bytes` still 0; or why it has none."""
        try:
            if self.format == "tokens":
                return self._example(row)
            messages, is_chat = self._read(row.values)
            tools = read_tools(self._optional(row.values, "tools"), self._name("tools")) if is_chat else ()
            return Conversation(
                messages=messages,
                example_id=self._example_id(row),
                source=row.source,
                is_chat=is_chat,
                example_weight=self._example_weight(row.values),
                source_name=row.source_name,
                tools=tools,
            )
        except BadRowError as error:
            return Rejection(source=row.source, reason=error.reason, detail=error.detail)

    # ------------------------------------------------------------------------------------------------------- the formats

    def _read(self, values: Mapping[str, object]) -> tuple[tuple[Message, ...], bool]:
        """The messages of a row, and whether they are a chat."""
        if self.format == "prompt_completion":
            return self._prompt_completion(values)
        if self.format == "alpaca":
            return self._alpaca(values), False
        if self.format == "text":
            text = self._gold(self._needed(values, "text"), self._name("text"), "text")
            return self._plain(values, prompt="", gold=text), False
        field = "messages" if self.format == "chat" else "conversations"
        value, name = self._needed(values, field), self._name(field)
        if self.format == "chat":
            messages = self._messages.read(value, name)
        else:
            messages = self._messages.read_sharegpt(value, name)
            if system := self._optional_text(values, "system"):
                messages.insert(0, Message(role="system", content=system))
        _require_assistant(messages, name)
        return tuple(messages), True

    def _prompt_completion(self, values: Mapping[str, object]) -> tuple[tuple[Message, ...], bool]:
        prompt, completion = self._needed(values, "prompt"), self._needed(values, "completion")
        prompt_name, completion_name = self._name("prompt"), self._name("completion")
        prompt_is_list, completion_is_list = isinstance(prompt, (list, tuple)), isinstance(completion, (list, tuple))
        if not prompt_is_list and not completion_is_list:
            context = checked_text(prompt, prompt_name, "prompt")
            return self._plain(
                values, prompt=context, gold=self._gold(completion, completion_name, "completion")
            ), False
        # Message lists: what the assistant said in the prompt is context, what it says in the completion is gold.
        if self._optional(values, "spans") is not None:
            raise BadRowError(
                "bad span",
                f"{self._name('spans')!r} is for a completion that is text; here each message has `spans` of its own",
            )
        before: list[Message] = []
        if prompt_is_list:
            before = [_as_context(message) for message in self._messages.read(prompt, prompt_name)] if prompt else []
        elif text := checked_text(prompt, prompt_name, "prompt"):
            before = [Message(role="user", content=text)]
        if completion_is_list:
            after = self._messages.read(completion, completion_name)
            _require_assistant(after, completion_name)
        else:
            after = [Message(role="assistant", content=self._gold(completion, completion_name, "completion"))]
        return (*before, *after), True

    def _alpaca(self, values: Mapping[str, object]) -> tuple[Message, ...]:
        history = values.get("history")
        if history is not None and (not isinstance(history, (list, tuple)) or history):
            raise BadRowError(
                "history of an Alpaca row",
                f"the field 'history' is {shorten(history)}; a row of several turns is written as `messages`",
            )
        parts = [self._optional_text(values, "system"), self._needed_text(values, "instruction", "instruction")]
        parts.append(self._optional_text(values, "input"))
        prompt = _ALPACA_SEPARATOR.join(part for part in parts if part)
        return self._plain(
            values, prompt=prompt, gold=self._gold(self._needed(values, "output"), self._name("output"), "output")
        )

    def _plain(self, values: Mapping[str, object], *, prompt: str, gold: str) -> tuple[Message, ...]:
        spans = self._optional(values, "spans")
        return (
            Message(role="user", content=prompt),
            Message(
                role="assistant",
                content=gold,
                spans=() if spans is None else checked_spans(spans, self._name("spans"), gold),
            ),
        )

    def _example(self, row: Row) -> TokenizedExample:
        self._needed(row.values, "token_ids")  # that it is there
        ids, weights = read_tokens(
            row.values,
            ids_name=self._present(row.values, "token_ids"),
            weights_name=self._name("target_weights"),
            labels_name=self._name("labels"),
            vocab_size=self._vocab_size,
        )
        return TokenizedExample(
            token_ids=ids,
            target_weights=weights,
            example_id=self._example_id(row),
            example_weight=self._example_weight(row.values),
            source=row.source,
            num_bytes=0,
        )

    # -------------------------------------------------------------------------------------------------------- the fields

    def _name(self, field: str) -> str:
        """The column of a field, for errors too; where another field took it, a name that no column has."""
        names = self._names[field]
        return names[0] if names else f"\0{field}"

    def _present(self, values: Mapping[str, object], field: str) -> str:
        return next((name for name in self._names[field] if name in values), self._name(field))

    def _optional(self, values: Mapping[str, object], field: str) -> object:
        return values.get(self._name(field))

    def _needed(self, values: Mapping[str, object], field: str) -> object:
        for name in self._names[field]:
            if name in values:
                return values[name]
        seen = ", ".join(shorten(name, 30) for name in list(values)[:12]) or "none"
        seen += ", ..." if len(values) > 12 else ""
        remedy = f"`columns: {{{field}: ...}}` names another column, `format: ...` another format"
        if field == "prompt":
            remedy += '; for text without a prompt give an empty one, `"prompt": ""`'
        raise BadRowError(
            f"no {field}",
            f"no field {self._name(field)!r}, which a row of format {self.format} has; this one has {seen}; {remedy}",
        )

    def _needed_text(self, values: Mapping[str, object], field: str, what: str) -> str:
        return checked_text(self._needed(values, field), self._name(field), what)

    def _optional_text(self, values: Mapping[str, object], field: str) -> str:
        value = self._optional(values, field)
        return "" if value is None else checked_text(value, self._name(field), field)

    @staticmethod
    def _gold(value: object, name: str, what: str) -> str:
        text = checked_text(value, name, what)
        if not text or text.isspace():
            raise BadRowError(f"empty {what}", f"the field {name!r} is {shorten(text)}; there is nothing to learn")
        return text

    def _example_id(self, row: Row) -> str:
        own_id = row.values.get(self._id)
        return f"{row.source_name}:{row.ordinal}" if own_id is None else checked_id(own_id, self._id)

    def _example_weight(self, values: Mapping[str, object]) -> float:
        return checked_row_weight(values.get(self._weight), self._weight, source_weight=self._source_weight)


def _as_context(message: Message) -> Message:
    if message.role != "assistant":
        return message
    return Message(
        role=message.role,
        content=message.content,
        weight=0.0,
        name=message.name,
        reasoning=message.reasoning,
        tool_calls=message.tool_calls,
    )


def _require_assistant(messages: list[Message], name: str) -> None:
    if not any(message.role == "assistant" for message in messages):
        roles = ", ".join(message.role for message in messages[:8])
        raise BadRowError("no assistant message", f"the roles of {name!r} are {roles}; nothing in it is gold")
