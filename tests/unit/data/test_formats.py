"""Rows to conversations: what is right in each format, each way to be wrong with its reason and remedy, and detection."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldsmith.data.config import FormatName
from goldsmith.data.formats import RowConverter, detect_format
from goldsmith.data.rows import Rejection, Row
from goldsmith.errors import DataError
from goldsmith.types import Conversation, Message, TokenizedExample

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None]}}}


def row(values: dict[str, Any], line: int = 7) -> Row:
    return Row(values=values, source=f"f.jsonl:{line}", source_name="f", ordinal=line - 1)


def convert(
    values: dict[str, Any], form: FormatName | None = None, *, columns: Any = None, **keywords: Any
) -> Conversation | TokenizedExample | Rejection:
    found = form or detect_format([row(values)], columns=columns, source="f.jsonl")
    return RowConverter(found, columns=columns, **keywords)(row(values))


def good(values: dict[str, Any], form: FormatName | None = None, **keywords: Any) -> Conversation:
    conversation = convert(values, form, **keywords)
    assert isinstance(conversation, Conversation), conversation
    return conversation


def rejected(values: dict[str, Any], form: FormatName | None = None, **keywords: Any) -> Rejection:
    found = convert(values, form, **keywords)
    assert isinstance(found, Rejection), found
    assert found.source == "f.jsonl:7"
    assert len(found.detail) < 450
    found.detail.encode("utf-8")
    return found


def said(conversation: Conversation) -> list[tuple[str, str, float]]:
    return [(message.role, message.content, message.weight) for message in conversation.messages]


# --- prompt and completion


def test_plain_rows_keep_their_text_exactly() -> None:
    found = good({"prompt": " a\n", "completion": "\tb \x00", "other": 1})
    assert said(found) == [("user", " a\n", 1.0), ("assistant", "\tb \x00", 1.0)]
    assert (found.example_id, found.source, found.is_chat, found.example_weight) == ("f:6", "f.jsonl:7", False, 1.0)
    assert found.source_name == "f"
    assert good({"prompt": "", "completion": "b"}).messages[0].content == ""


def test_columns_ids_and_weights() -> None:
    columns = {"prompt": "q", "completion": "a", "id": "uid", "weight": "w"}
    found = good({"q": "x", "a": "y", "uid": 12, "w": "0.5"}, columns=columns, source_weight=3.0)
    assert (found.example_id, found.example_weight) == ("12", 1.5)
    assert good({"0": "x", "1": "y"}, columns={"prompt": 0, "completion": 1}).messages[1].content == "y"
    assert good({"prompt": "x", "completion": "y", "id": None, "weight": None}).example_id == "f:6"
    assert good({"prompt": "x", "completion": "y", "weight": ""}).example_weight == 1.0
    assert good({"prompt": "x", "completion": "y", "weight": 2}).example_weight == 2.0


def test_message_lists_as_prompt_or_completion_make_a_chat_of_which_the_completion_is_gold() -> None:
    before = [{"role": "system", "content": "s"}, USER, {**ASSISTANT, "content": "earlier"}, USER]
    found = good({"prompt": before, "completion": [ASSISTANT]})
    assert found.is_chat
    assert said(found) == [
        ("system", "s", 1), ("user", "q", 1), ("assistant", "earlier", 0), ("user", "q", 1), ("assistant", "a", 1),
    ]  # fmt: skip
    assert said(good({"prompt": "q", "completion": [ASSISTANT]})) == [("user", "q", 1), ("assistant", "a", 1)]
    assert said(good({"prompt": [USER], "completion": "a"})) == [("user", "q", 1), ("assistant", "a", 1)]
    tools = [{"type": "function", "function": {"name": "add"}}]
    found = good({"prompt": [USER], "completion": [{"role": "assistant", "tool_calls": [CALL]}], "tools": tools})
    assert found.tools == tuple(tools)
    assert rejected({"prompt": [USER], "completion": [USER]}).reason == "no assistant message"
    assert rejected({"prompt": [{"role": "user"}], "completion": "a"}).reason == "message without content"
    assert rejected({"prompt": [USER], "completion": "a", "spans": []}).reason == "bad span"


def test_spans_of_a_completion() -> None:
    spans = [{"begin": 4, "end": 6, "weight": 0}, {"begin": 0, "end": 4, "weight": 2.5}]
    found = good({"prompt": "p", "completion": "abcdef", "spans": spans})
    assert found.messages[1].spans == ((0, 4, 2.5), (4, 6, 0.0))
    assert good({"text": "abcdef", "spans": spans}).messages[1].spans == ((0, 4, 2.5), (4, 6, 0.0))
    chat = good({"messages": [USER, {"role": "assistant", "content": "abcdef", "spans": spans}]})
    assert chat.messages[1].spans == ((0, 4, 2.5), (4, 6, 0.0))


@pytest.mark.parametrize(
    ("spans", "reason", "shown"),
    [
        ("x", "wrong type", "'spans' must be a list of spans"),
        ([1], "wrong type", "spans[0]"),
        ([{"begin": 0, "end": 1}], "bad span", "'begin', 'end'"),
        ([{"begin": 0, "end": 1, "weight": 1, "label": "x"}], "bad span", "'label'"),
        ([{"begin": True, "end": 2, "weight": 1}], "wrong type", "spans[0].begin"),
        ([{"begin": 0.0, "end": 2, "weight": 1}], "wrong type", "spans[0].begin"),
        ([{"begin": -1, "end": 2, "weight": 1}], "bad span", "from -1 to 2"),
        ([{"begin": 2, "end": 2, "weight": 1}], "bad span", "not empty"),
        ([{"begin": 0, "end": 4, "weight": 1}], "bad span", "3 characters"),
        ([{"begin": 0, "end": 1, "weight": -1}], "bad weight", "spans[0].weight"),
        ([{"begin": 0, "end": 1, "weight": float("nan")}], "bad weight", "finite"),
        ([{"begin": 0, "end": 1, "weight": 1e39}], "bad weight", "from 1e-15 to 1e+15"),
        ([{"begin": 0, "end": 1, "weight": 1e-46}], "bad weight", "this weight is 0, or from 1e-15"),
        ([{"begin": 0, "end": 1, "weight": True}], "wrong type", "spans[0].weight"),
        ([{"begin": 0, "end": 1, "weight": None}], "wrong type", "spans[0].weight"),
        ([{"begin": 1, "end": 3, "weight": 1}, {"begin": 0, "end": 2, "weight": 1}], "overlapping spans", "ends at 2"),
    ],
)
def test_bad_spans(spans: Any, reason: str, shown: str) -> None:
    for values in ({"prompt": "p", "completion": "abc", "spans": spans}, {"text": "abc", "spans": spans}):
        found = rejected(values)
        assert (found.reason, shown in found.detail) == (reason, True), found
    found = rejected({"messages": [USER, {"role": "assistant", "content": "abc", "spans": spans}]})
    assert found.reason == reason
    assert "messages[1].spans" in found.detail


# --- chats


def test_chats() -> None:
    messages = [
        {"role": "system", "content": ""},
        USER,
        {**ASSISTANT, "weight": 0, "tool_calls": None},
        USER,
        ASSISTANT,
    ]
    found = good({"messages": messages, "prompt": "beside", "prompt_id": "x"})
    assert found.is_chat
    assert [m.role for m in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.weight for m in found.messages] == [1, 1, 0, 1, 1]
    assert good({"dialogue": [USER, ASSISTANT]}, columns={"messages": "dialogue"}).is_chat
    assert good({"messages": [{"role": "developer", "content": "d"}, USER, ASSISTANT]}).messages[0].role == "developer"


def test_everything_that_a_message_may_hold() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}], "name": "Ann"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [{"id": "c1", **CALL}]},
        {"role": "tool", "content": "4.5", "tool_call_id": "c1", "name": "add"},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "it is 4.5"}],
        },
    ]
    found = good({"messages": messages, "tools": json.dumps([CALL])})
    assert found.messages == (
        Message(role="user", content="q!", name="Ann"),
        Message(role="assistant", content="", reasoning="hm", tool_calls=({"id": "c1", **CALL},)),
        Message(role="tool", content="4.5", tool_call_id="c1", name="add"),
        Message(role="assistant", content="it is 4.5", reasoning="so"),
    )
    assert found.tools == (CALL,)


def test_reasoning_by_any_of_its_names() -> None:
    for key in ("reasoning", "reasoning_content", "thinking"):
        assert good({"messages": [USER, {**ASSISTANT, key: "t"}]}).messages[1].reasoning == "t"
    part = {"type": "reasoning", "text": "t"}
    assert good({"messages": [USER, {"role": "assistant", "content": [part]}]}).messages[1].reasoning == "t"
    assert good({"messages": [USER, {"role": "assistant", "content": "", "thinking": "t"}]}).messages[1].content == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"function": {"name": "f", "arguments": '{"x": "é"}'}}, {"x": "é"}),
        ({"name": "f", "arguments": {"x": 1}}, {"x": 1}),
        ({"type": "function", "function": {"name": "f", "arguments": ""}}, {}),
        ({"type": "function", "function": {"name": "f"}}, {}),
    ],
)
def test_tool_calls_become_one_shape(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = good({"messages": [USER, {"role": "assistant", "tool_calls": [given]}]})
    assert found.messages[1].tool_calls == ({"type": "function", "function": {"name": "f", "arguments": expected}},)


def test_keys_of_messages_that_mean_nothing() -> None:
    messages = [USER, {**ASSISTANT, "train": False}]
    assert rejected({"messages": messages}).reason == "message key 'train'"
    assert said(good({"messages": messages}, ignored_message_keys=("train",)))[1] == ("assistant", "a", 1)


# --- other formats


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": [2.5, null]}}', "weight": 0.5},
        {"from": "observation", "value": "3.5"},
        {"from": "gpt", "value": "a", "weight": None},
    ]
    found = good({"conversations": [{"from": "system", "value": "s"}, *turns], "tools": "[]"})
    assert found.is_chat
    assert said(found) == [
        ("system", "s", 1), ("user", "q", 1), ("assistant", "", 0.5), ("tool", "3.5", 1), ("assistant", "a", 1),
    ]  # fmt: skip
    assert found.messages[2].tool_calls == (CALL,)
    assert said(good({"conversations": turns, "system": "s"}))[0] == ("system", "s", 1)
    assert said(good({"conversations": turns, "system": ""}))[0] == ("user", "q", 1)
    assert rejected({"conversations": [{"from": "human", "value": "q"}]}).reason == "no assistant message"


def test_alpaca_is_plain() -> None:
    found = good({"instruction": "Add.", "input": "1 2", "output": "3", "text": None})
    assert (said(found), found.is_chat) == ([("user", "Add.\n\n1 2", 1), ("assistant", "3", 1)], False)
    assert said(good({"instruction": "Add.", "input": "", "output": "3"}))[0][1] == "Add."
    assert said(good({"instruction": "Add.", "output": "3", "system": "Be brief."}))[0][1] == "Be brief.\n\nAdd."
    assert good({"instruction": "Add.", "output": "3", "history": []}).messages[1].content == "3"
    assert (
        rejected({"instruction": "Add.", "output": "3", "history": [["a", "b"]]}).reason == "history of an Alpaca row"
    )


def test_text_is_all_gold() -> None:
    found = good({"text": " once\n"})
    assert (said(found), found.is_chat) == ([("user", "", 1), ("assistant", " once\n", 1)], False)
    assert good({"story": "once"}, columns={"text": "story"}).messages[1].content == "once"


def example(values: dict[str, Any], **keywords: Any) -> TokenizedExample:
    found = convert(values, **keywords)
    assert isinstance(found, TokenizedExample), found
    return found


def test_tokens() -> None:
    found = example({"token_ids": [1, 5, 2], "target_weights": [0, 0.5, 1], "id": "x", "weight": 2}, source_weight=2.0)
    assert found.token_ids.dtype == np.int32
    assert found.target_weights.dtype == np.float32
    assert (found.token_ids.tolist(), found.target_weights.tolist()) == ([1, 5, 2], [0, 0.5, 1])
    assert (found.example_id, found.example_weight, found.source) == ("x", 4.0, "f.jsonl:7")
    # As `transformers` has labels: not shifted, and that of the first token is never asked for.
    found = example({"input_ids": [1, 5, 2], "labels": [1, -100, 2], "attention_mask": [1, 1, 1]})
    assert found.target_weights.tolist() == [0, 0, 1]
    found = example({"ids": [1, 5], "labels": [-100, 5]}, columns={"token_ids": "ids"}, vocab_size=6)
    assert found.target_weights.tolist() == [0, 1]
    arrays = {"token_ids": np.array([1, 5]), "labels": np.array([-100, 5])}
    assert example(arrays).token_ids.tolist() == [1, 5]


@pytest.mark.parametrize(
    ("values", "reason", "shown"),
    [
        ({"token_ids": "1 2", "labels": [1]}, "wrong type", "'token_ids' must be a list of numbers"),
        ({"token_ids": [1, True], "labels": [1, 1]}, "wrong type", "token_ids[1]"),
        ({"token_ids": [1, 2.0], "labels": [1, 2]}, "wrong type", "token_ids[1]"),
        ({"token_ids": [1, None], "labels": [1, 2]}, "wrong type", "token_ids[1]"),
        ({"token_ids": [1], "labels": [-100]}, "too few tokens", "1 token ids"),
        ({"token_ids": [1, -1], "labels": [-100, -1]}, "no such token", "token_ids[1] is -1"),
        ({"token_ids": [1, 10], "labels": [-100, 10]}, "no such token", "below the 10 tokens"),
        ({"token_ids": [1, 1 << 70], "labels": [-100, 2]}, "no such token", "token_ids[1]"),
        ({"token_ids": [1, 2], "labels": [-100]}, "lengths differ", "'labels' has 1 entries, but 'token_ids' has 2"),
        ({"token_ids": [1, 2], "target_weights": [0, 1, 1]}, "lengths differ", "'target_weights' has 3"),
        ({"token_ids": [1, 2], "target_weights": [1, 1]}, "first token is gold", "target_weights[0] is 1"),
        ({"token_ids": [1, 2], "target_weights": [0, 0]}, "no gold token", "every weight is 0"),
        ({"token_ids": [1, 2], "target_weights": [0, -1]}, "bad weight", "target_weights[1] is -1"),
        ({"token_ids": [1, 2], "target_weights": [0, float("nan")]}, "bad weight", "nan"),
        ({"token_ids": [1, 2], "target_weights": [0, 1e39]}, "bad weight", "target_weights[1] is 1e+39"),
        ({"token_ids": [1, 2], "target_weights": [0, 1e-46]}, "bad weight", "from 1e-15 to 1e+15"),
        ({"token_ids": [1, 2], "target_weights": [0, 10**400]}, "bad weight", "target_weights[1]"),
        ({"token_ids": [1, 2], "target_weights": [0, True]}, "wrong type", "target_weights[1]"),
        ({"token_ids": [1, 2], "target_weights": [0, "1"]}, "wrong type", "target_weights[1]"),
        ({"token_ids": [1, 2], "labels": [1, -100]}, "no gold token", "label -100"),
        ({"token_ids": [1, 2, 3], "labels": [2, 3, -100]}, "shifted labels", "labels[0] is 2, the id of the next token"),
        ({"token_ids": [1, 2, 3], "labels": [-100, 9, 3]}, "label of another token", "labels[1] is 9"),
        ({"token_ids": [1, 2], "labels": [-100, 2], "target_weights": [0, 1]}, "weights and labels", "leave out one"),
        ({"token_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 0]}, "padded row", "attention_mask"),
        ({"token_ids": [1, 2], "labels": None, "target_weights": None}, "no target_weights or labels", "add one"),
    ],
)  # fmt: skip
def test_bad_tokens(values: dict[str, Any], reason: str, shown: str) -> None:
    found = rejected(values, "tokens", vocab_size=10)
    assert (found.reason, shown in found.detail) == (reason, True), found


# --- what is rejected


@pytest.mark.parametrize(
    ("values", "reason", "shown"),
    [
        (
            {"prompt": "p", "answer": "c"},
            "no completion",
            "this one has 'prompt', 'answer'; `columns: {completion: ...}`",
        ),
        ({"completion": "c"}, "no prompt", '"prompt": ""'),
        ({"prompt": "p", "completion": None}, "completion is null", "'completion' is null"),
        ({"prompt": "p", "completion": float("nan")}, "completion is null", "NaN"),
        ({"prompt": None, "completion": "c"}, "prompt is null", "'prompt' is null"),
        ({"prompt": "p", "completion": ""}, "empty completion", "''"),
        ({"prompt": "p", "completion": " \n\t"}, "empty completion", r"' \n\t'"),
        ({"prompt": "p", "completion": "\u3000"}, "empty completion", "nothing to learn"),
        ({"prompt": "p", "completion": 5}, "wrong type", "'completion' must be text, but is of type int: 5"),
        ({"prompt": {"p": 1}, "completion": "c"}, "wrong type", "is of type dict"),
        ({"prompt": ["p"] * 99, "completion": "c"}, "wrong type", "prompt[0]"),
        ({"prompt": "p", "completion": {"a": 1}}, "wrong type", "of type dict"),
        ({"prompt": "p", "completion": b"c"}, "wrong type", "of type bytes"),
        ({"prompt": "ab\ud800cd", "completion": "c"}, "not Unicode text", "U+D800 at character 3"),
        ({"prompt": "p", "completion": "\udfff"}, "not Unicode text", "'completion'"),
        ({"prompt": "p", "completion": "c", "id": 1.5}, "wrong type", "'id'"),
        ({"prompt": "p", "completion": "c", "id": True}, "wrong type", "'id'"),
        ({"prompt": "p", "completion": "c", "id": ""}, "empty id", "'id'"),
        ({"prompt": "p", "completion": "c", "id": "\ud800"}, "not Unicode text", "'id'"),
        ({"prompt": "p", "completion": "c", "id": 10**5000}, "wrong type", "<int>"),
        ({"prompt": "p", "completion": "c", "weight": 0}, "bad weight", "above 0"),
        ({"prompt": "p", "completion": "c", "weight": -1}, "bad weight", "-1"),
        ({"prompt": "p", "completion": "c", "weight": "heavy"}, "bad weight", "'heavy'"),
        ({"prompt": "p", "completion": "c", "weight": float("inf")}, "bad weight", "inf"),
        ({"prompt": "p", "completion": "c", "weight": 10**400}, "bad weight", "finite"),
        ({"prompt": "p", "completion": "c", "weight": 1e16}, "bad weight", "a row's weight is from 1e-15 to 1e+15"),
        ({"prompt": "p", "completion": "c", "weight": True}, "wrong type", "number"),
        ({"prompt": "p", "completion": "c", "weight": [1]}, "wrong type", "number"),
    ],
)
def test_rejected_plain_rows(values: dict[str, Any], reason: str, shown: str) -> None:
    found = rejected(values, "prompt_completion")
    assert (found.reason, shown in found.detail) == (reason, True), found


def assistant(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **fields}]}


@pytest.mark.parametrize(
    ("values", "reason", "shown"),
    [
        ({"prompt": "p"}, "no messages", "this one has 'prompt'"),
        ({"messages": "hello"}, "wrong type", "'messages' must be a list of messages"),
        ({"messages": None}, "wrong type", "None"),
        ({"messages": []}, "no messages", "empty list"),
        ({"messages": [USER]}, "no assistant message", "user"),
        ({"messages": ["hello"]}, "wrong type", "messages[0]"),
        ({"messages": [{"content": "x"}]}, "message without role", "'content'"),
        ({"messages": [{"role": "user"}]}, "message without content", "messages[0]"),
        ({"messages": [{"from": "human", "value": "x"}]}, "message without role", "`format: sharegpt`"),
        ({"messages": [USER, {"role": "gpt", "content": "x"}]}, "unknown role", "messages[1] is 'gpt'"),
        ({"messages": [USER, {"role": ["a"], "content": "x"}]}, "unknown role", "['a']"),
        (assistant(content=None), "message content is null", "messages[1].content"),
        (assistant(content=5), "wrong type", "messages[1].content"),
        (assistant(content=" "), "empty completion", "messages[1]"),
        (assistant(content=[]), "empty completion", "messages[1]"),
        (assistant(content=[{"text": "x"}]), "wrong type", "messages[1].content[0]"),
        (assistant(content=["x"]), "wrong type", "messages[1].content[0]"),
        (assistant(content=[{"type": "text", "text": 5}]), "wrong type", "messages[1].content[0].text"),
        (assistant(content=[{"type": "text"}]), "content part is null", "messages[1].content[0].text"),
        (assistant(content=[{"type": "text", "text": "x", "cache": 1}]), "content part key", "'cache': 1"),
        (assistant(content=[{"type": "image_url", "image_url": "x"}]), "content part 'image_url'", "trains on text"),
        (assistant(content="a", reasoning="r", thinking="t"), "reasoning twice", "reasoning and thinking"),
        (assistant(content=[{"type": "thinking", "text": "t"}], reasoning="r"), "reasoning twice", "a content part"),
        (assistant(content="a", reasoning=5), "wrong type", "messages[1].reasoning"),
        ({"messages": [{**USER, "reasoning": "r"}, ASSISTANT]}, "reasoning of another role", "role is user"),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ASSISTANT]}, "tool calls of another role", "role is user"),
        (assistant(content="a", tool_calls=[1]), "wrong type", "messages[1].tool_calls[0]"),
        (assistant(content="a", tool_calls=CALL), "wrong type", "a list of tool calls"),
        (assistant(tool_calls=[{"type": "code", "code": "x"}]), "unknown tool call", "'code'"),
        (assistant(tool_calls=[{"function": {"arguments": {}}}]), "unknown tool call", "function.name is None"),
        (assistant(tool_calls=[{"function": "add"}]), "wrong type", "messages[1].tool_calls[0].function"),
        (assistant(tool_calls=[{"name": "f", "arguments": "{"}]), "invalid JSON in a field", "tool_calls[0].arguments"),
        (assistant(tool_calls=[{"name": "f", "arguments": "[1]"}]), "wrong type", "argument -> value"),
        (assistant(tool_calls=[{"name": "f", "arguments": '{"x": NaN}'}]), "invalid JSON in a field", "NaN"),
        (assistant(tool_calls=[{"name": "f", "arguments": {"x": float("inf")}}]), "wrong type", "arguments['x']"),
        (assistant(tool_calls=[{"name": "f", "arguments": {"x": "\ud800"}}]), "not Unicode text", "arguments['x']"),
        (assistant(content="a", name=5), "wrong type", "messages[1].name"),
        (assistant(content="a", audio={"id": 1}), "message key 'audio'", "ignore_message_keys"),
        (assistant(content="a", weight=-1), "bad weight", "messages[1].weight"),
        (assistant(content="a", weight="x"), "bad weight", "messages[1].weight"),
        (assistant(content="a", weight=True), "wrong type", "messages[1].weight"),
        (assistant(content="\ud800"), "not Unicode text", "messages[1].content"),
        ({**assistant(content="a"), "tools": {"name": "f"}}, "wrong type", "'tools' must be a list"),
        ({**assistant(content="a"), "tools": ["f"]}, "wrong type", "tools[0]"),
        ({**assistant(content="a"), "tools": "[{"}, "invalid JSON in a field", "'tools' is not JSON"),
        ({**assistant(content="a"), "tools": [{"f": {1, 2}}]}, "wrong type", "tools[0]['f']"),
    ],
)
def test_rejected_chats(values: dict[str, Any], reason: str, shown: str) -> None:
    found = rejected(values, "chat")
    assert (found.reason, shown in found.detail) == (reason, True), found


@pytest.mark.parametrize(
    ("form", "values", "reason", "shown"),
    [
        ("sharegpt", {"messages": [USER]}, "no conversations", "this one has 'messages'"),
        ("sharegpt", {"conversations": [USER]}, "message without from", "`format: chat`"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "message without value", "'from'"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "unknown role", "`from` of conversations[0]"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": None}]}, "message content is null", "[0].value"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": ""}]}, "empty completion", "conversations[0]"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "x", "mood": 1}]}, "message key 'mood'", "1"),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "add(1)"}]},
            "invalid JSON in a field",
            "add",
        ),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "[]"}]}, "no tool call", "'[]'"),
        ("sharegpt", {"conversations": 1}, "wrong type", "a list of messages"),
        ("alpaca", {"instruction": "i", "response": "o"}, "no output", "`columns: {output: ...}`"),
        ("alpaca", {"instruction": None, "output": "o"}, "instruction is null", "'instruction'"),
        ("alpaca", {"instruction": "i", "output": "\n"}, "empty output", "nothing to learn"),
        ("alpaca", {"instruction": "i", "input": 3, "output": "o"}, "wrong type", "'input' must be text"),
        ("text", {"txt": "x"}, "no text", "this one has 'txt'"),
        ("text", {"text": ""}, "empty text", "nothing to learn"),
        ("text", {"text": ["x"]}, "wrong type", "'text' must be text"),
        ("tokens", {"ids": [1, 2]}, "no token_ids", "this one has 'ids'"),
    ],
)
def test_rejected_rows_of_other_formats(form: FormatName, values: dict[str, Any], reason: str, shown: str) -> None:
    found = rejected(values, form)
    assert (found.reason, shown in found.detail) == (reason, True), found


# --- detection


@pytest.mark.parametrize(
    ("values", "columns", "expected"),
    [
        ({"prompt": "p", "completion": "c", "x": 1}, None, "prompt_completion"),
        ({"prompt": "p", "messages": [USER, ASSISTANT]}, None, "chat"),
        ({"conversations": []}, None, "sharegpt"),
        ({"instruction": "i", "input": "", "output": "o"}, None, "alpaca"),
        ({"text": "t", "label": 1}, None, "text"),
        ({"input_ids": [1], "labels": [1]}, None, "tokens"),
        ({"token_ids": [1], "target_weights": [1]}, None, "tokens"),
        # What `columns` names decides, and a column that is one field is no other.
        ({"text": "t", "category": "c"}, {"prompt": "text", "completion": "category"}, "prompt_completion"),
        ({"prompt": "p", "completion": "c", "messages": []}, {"messages": "messages"}, "chat"),
        ({"prompt": "p", "completion": "c", "messages": []}, {"completion": "completion"}, "prompt_completion"),
        ({"question": "p", "completion": "c", "text": "t"}, {"prompt": "question"}, "prompt_completion"),
        # Columns of the whole recipe, and a source that has none of them.
        ({"messages": []}, {"prompt": "q", "completion": "a"}, "chat"),
        # A column without any value says less than one with.
        ({"prompt": "p", "completion": None, "messages": []}, None, "chat"),
        ({"prompt": "p", "completion": None}, None, "prompt_completion"),
    ],
)
def test_the_format_is_found_in_the_fields(values: dict[str, Any], columns: Any, expected: str) -> None:
    assert detect_format([row(values)], columns=columns, source="f.jsonl") == expected


def test_the_format_is_that_of_the_rows_that_have_one() -> None:
    rows = [row({"prompt": "p"}, 1), row({}, 2), row({"prompt": "p", "completion": "c"}, 3)]
    assert detect_format(rows, columns=None, source="f.jsonl") == "prompt_completion"


def test_two_formats_are_an_error_that_names_both() -> None:
    both = row({"prompt": "p", "completion": "c", "messages": [USER, ASSISTANT]})
    mixed = [row({"text": "t"}, 1), row({"messages": []}, 4)]
    with pytest.raises(DataError) as error:
        detect_format([both], columns=None, source="f.jsonl")
    for words in ("prompt_completion ('prompt', 'completion'; first at f.jsonl:7)", "chat ('messages'", "`format: "):
        assert words in str(error.value)
    with pytest.raises(
        DataError, match=r"chat \('messages'; first at f.jsonl:4\) and text \('text'; first at f.jsonl:1\)"
    ):
        detect_format(mixed, columns=None, source="f.jsonl")


def test_no_format_is_an_error_that_names_the_fields() -> None:
    with pytest.raises(DataError) as error:
        detect_format([row({"question": "q", "answer": "a"})], columns=None, source="f.jsonl")
    for words in (
        "f.jsonl:7 has the fields 'question', 'answer'",
        "alpaca: 'instruction', 'output'",
        "columns: {prompt",
    ):
        assert words in str(error.value)
    with pytest.raises(DataError, match='"prompt": ""'):
        detect_format([row({"completion": "q"})], columns=None, source="f.jsonl")
    with pytest.raises(DataError, match="the fields none"):
        detect_format([row({})], columns=None, source="f.jsonl")


# --- the page of the documentation


def test_the_rows_of_the_page_are_what_it_says(repository: Path) -> None:
    found: dict[str, list[Conversation | TokenizedExample]] = {}
    for section in (repository / "docs" / "formats.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        form = section.splitlines()[0].strip("`")
        for block in re.findall(r"```jsonl\n(.*?)```", section, re.DOTALL):
            for line in block.splitlines():
                values = json.loads(line)
                assert detect_format([row(values)], columns=None, source="f.jsonl") == form, line
                converted = convert(values)
                assert not isinstance(converted, Rejection), (line, converted)
                found.setdefault(form, []).append(converted)
    assert {form: len(items) for form, items in found.items()} == {
        "prompt_completion": 5, "chat": 4, "sharegpt": 2, "alpaca": 2, "text": 1, "tokens": 2,
    }  # fmt: skip
    one, two = found["tokens"]
    assert isinstance(one, TokenizedExample)
    assert isinstance(two, TokenizedExample)
    assert (one.target_weights > 0).tolist() == (two.target_weights > 0).tolist()


# --- anything at all

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(alphabet=st.characters(), max_size=5)
    | st.sampled_from(["\ud800", "user", "assistant", "gpt", "text", "{}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "weight", "from", "value", "type", "text", "tool_calls", "spans", "begin", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = ["prompt", "completion", "messages", "tools", "conversations", "instruction", "output", "text", "spans", "id"]
TOKEN_FIELDS = ["token_ids", "labels", "target_weights", "attention_mask"]


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(["prompt_completion", "chat", "sharegpt", "alpaca", "text", "tokens"]),
    st.dictionaries(st.sampled_from([*FIELDS, "weight", "x"]), VALUES)
    | st.dictionaries(st.sampled_from(TOKEN_FIELDS), st.lists(st.integers(-3, 5) | VALUES, max_size=3)),
)
def test_any_row_is_a_conversation_or_a_rejection(form: FormatName, values: dict[str, Any]) -> None:
    found = convert(values, form, vocab_size=4)
    if isinstance(found, TokenizedExample):
        assert found.target_weights[0] == 0
        assert found.target_weights.any()
        assert set(found.token_ids.tolist()) <= set(range(4))
    elif isinstance(found, Conversation):
        assert any(m.role == "assistant" for m in found.messages)
        assert found.example_weight > 0
        for message in found.messages:
            message.content.encode("utf-8")
    else:
        found.detail.encode("utf-8")
