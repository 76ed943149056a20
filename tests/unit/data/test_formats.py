"""Rows to conversations: what is right, and each way to be wrong with its reason and remedy."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goldsmith.data.formats import to_conversation
from goldsmith.data.rows import Rejection, Row
from goldsmith.types import Conversation

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


def convert(values: dict[str, Any], **keywords: Any) -> Conversation | Rejection:
    return to_conversation(Row(values=values, source="f.jsonl:7", source_name="f", ordinal=6), **keywords)


def good(values: dict[str, Any], **keywords: Any) -> Conversation:
    conversation = convert(values, **keywords)
    assert isinstance(conversation, Conversation), conversation
    return conversation


def test_plain_rows_keep_their_text_exactly() -> None:
    found = good({"prompt": " a\n", "completion": "\tb \x00", "other": 1})
    assert [(m.role, m.content, m.weight) for m in found.messages] == [
        ("user", " a\n", 1.0),
        ("assistant", "\tb \x00", 1.0),
    ]
    assert (found.example_id, found.source, found.is_chat, found.example_weight) == ("f:6", "f.jsonl:7", False, 1.0)
    assert good({"prompt": "", "completion": "b"}).messages[0].content == ""


def test_columns_ids_and_weights() -> None:
    columns = {"prompt": "q", "completion": "a", "id": "uid", "weight": "w"}
    found = good({"q": "x", "a": "y", "uid": 12, "w": "0.5"}, columns=columns, source_weight=3.0)
    assert (found.example_id, found.example_weight) == ("12", 1.5)
    assert good({"0": "x", "1": "y"}, columns={"prompt": 0, "completion": 1}).messages[1].content == "y"
    assert good({"prompt": "x", "completion": "y", "id": None, "weight": None}).example_id == "f:6"
    assert good({"prompt": "x", "completion": "y", "weight": ""}).example_weight == 1.0
    assert good({"prompt": "x", "completion": "y", "weight": 2}).example_weight == 2.0


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


def test_a_row_of_both_formats_needs_columns() -> None:
    both = {"prompt": "p", "completion": "c", "messages": [USER, ASSISTANT]}
    assert isinstance(convert(both), Rejection)
    assert good(both, columns={"messages": "messages"}).is_chat
    assert not good(both, columns={"completion": "completion"}).is_chat


@pytest.mark.parametrize(
    ("values", "reason", "shown"),
    [
        ({}, "no prompt and completion, no messages", "the row has none"),
        ({"text": "t", "b": 1}, "no prompt and completion, no messages", "'text', 'b'; name the columns: `columns: {prompt"),
        ({"prompt": "p", "answer": "c"}, "no completion", "'prompt', 'answer'"),
        ({"completion": "c"}, "no prompt", '"prompt": ""'),
        ({"prompt": "p", "completion": None}, "completion is null", "'completion' is null"),
        ({"prompt": "p", "completion": float("nan")}, "completion is null", "NaN"),
        ({"prompt": None, "completion": "c"}, "prompt is null", "'prompt' is null"),
        ({"prompt": "p", "completion": ""}, "empty completion", "''"),
        ({"prompt": "p", "completion": " \n\t"}, "empty completion", r"' \n\t'"),
        ({"prompt": "p", "completion": "\u3000"}, "empty completion", "nothing to learn"),
        ({"prompt": "p", "completion": 5}, "wrong type", "'completion' must be text, but is of type int: 5"),
        ({"prompt": ["p"] * 99, "completion": "c"}, "wrong type", "is of type list: ['p', 'p'"),
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
        ({"prompt": "p", "completion": "c", "weight": True}, "wrong type", "number"),
        ({"prompt": "p", "completion": "c", "weight": [1]}, "wrong type", "number"),
        ({"messages": "hello"}, "wrong type", "'messages' must be a list of messages"),
        ({"messages": None}, "wrong type", "None"),
        ({"messages": []}, "no messages", "empty list"),
        ({"messages": [USER]}, "no assistant message", "user"),
        ({"messages": ["hello"]}, "wrong type", "messages[0]"),
        ({"messages": [{"content": "x"}]}, "message without role", "'content'"),
        ({"messages": [{"role": "user"}]}, "message without content", "messages[0]"),
        ({"messages": [{"from": "human", "value": "x"}]}, "message without role", "'from', 'value'"),
        ({"messages": [USER, {"role": "gpt", "content": "x"}]}, "unknown role", "messages[1] is 'gpt'"),
        ({"messages": [USER, {"role": ["a"], "content": "x"}]}, "unknown role", "['a']"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "unknown role", "'tool'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message content is null", "messages[1].content"),
        ({"messages": [USER, {"role": "assistant", "content": [{"text": "x"}]}]}, "wrong type", "messages[1].content"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "empty completion", "messages[1]"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [1]}]}, "message key 'tool_calls'", "not supported yet"),
        ({"messages": [{**USER, "name": "Ann"}, ASSISTANT]}, "message key 'name'", "'Ann'"),
        ({"messages": [USER, {**ASSISTANT, "weight": -1}]}, "bad weight", "messages[1].weight"),
        ({"messages": [USER, {**ASSISTANT, "weight": "x"}]}, "bad weight", "messages[1].weight"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "not Unicode text", "messages[1].content"),
    ],
)  # fmt: skip
def test_rejections(values: dict[str, Any], reason: str, shown: str) -> None:
    found = convert(values)
    assert isinstance(found, Rejection)
    assert (found.source, found.reason) == ("f.jsonl:7", reason)
    assert shown in found.detail
    assert len(found.detail) < 400
    found.detail.encode("utf-8")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(alphabet=st.characters(), max_size=5)
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "weight", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "id", "weight", "x"]), VALUES))
def test_any_row_is_a_conversation_or_a_rejection(values: dict[str, Any]) -> None:
    found = convert(values)
    if isinstance(found, Conversation):
        assert any(m.role == "assistant" and m.content.strip() for m in found.messages)
        assert found.example_weight > 0
        for message in found.messages:
            message.content.encode("utf-8")
    else:
        found.detail.encode("utf-8")
