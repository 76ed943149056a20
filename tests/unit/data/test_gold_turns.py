"""Whose words each gold token is: through rendering, every way to shorten a row, the flat arrays and the cache."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_families import asked, says
from data_examples import CHATML, LLAMA3, MERE_TEXT, REASONING, chat, learnt, plain
from transformers import PreTrainedTokenizerFast

from goldsmith.data.cache import RowCache, load_cached_dataset
from goldsmith.data.config import DataConfig
from goldsmith.data.dataset import Dataset
from goldsmith.data.loader import load_dataset
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.rows import Rejection
from goldsmith.data.truncation import cut_left, cut_right, split_gold
from goldsmith.scoring.score import gold_roles, turn_numbers
from goldsmith.types import Conversation, GoldTurn, TokenizedExample

BOTH = ["user", "assistant"]
TALK = chat(("user", "Hi"), ("assistant", "Yes"), ("user", "So"), ("assistant", "No."))


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=learnt("byte").backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def rendered(row: Conversation, template: str | None = None, **config: Any) -> list[TokenizedExample]:
    [result] = Renderer(tokenizer_with(template), RenderingConfig(**config), None).render([row])
    assert not isinstance(result, Rejection), result
    return result


def said(example: TokenizedExample) -> list[tuple[int, str, str]]:
    """(turn, role, text) of each stretch of gold that is of one turn."""
    tokenizer = tokenizer_with(None)
    gold = example.token_ids[example.target_weights > 0].tolist()
    numbers, roles = turn_numbers(example).tolist(), gold_roles(example)
    of_token = [next(role for role in roles if roles[role][index]) for index in range(len(gold))]
    assert np.sum(list(roles.values()), axis=0).tolist() == [1] * len(gold)
    result = []
    for (number, role), group in itertools.groupby(
        zip(numbers, of_token, gold, strict=True), key=lambda item: (item[0], item[1])
    ):
        result.append((number, role, tokenizer.decode([token for _, _, token in group])))
    return result


def test_roles_of_a_chat() -> None:
    row = chat(("system", "S"), ("user", "Hi"), ("assistant", "Yes"), ("user", "So", 0.0), ("assistant", "No."))
    [example] = rendered(row, CHATML, train_on=BOTH)
    turns = [(1, "user", "Hi<|im_end|>"), (2, "assistant", "Yes<|im_end|>"), (3, "assistant", "No.<|im_end|>")]
    assert said(example) == turns
    apart = rendered(row, CHATML, train_on=BOTH, turns="expanded")
    assert [said(one) for one in apart] == [[turn] for turn in turns]
    assert [one.example_id for one in apart] == ["row:0@1", "row:0@2", "row:0@3"]
    [last] = rendered(row, CHATML, last_turn_only=True)
    assert said(last) == [(1, "assistant", "No.<|im_end|>")]


def test_gold_of_two_roles_side_by_side() -> None:
    [example] = rendered(plain("ab", "cd"), train_on=BOTH)
    assert said(example) == [(1, "user", "ab"), (2, "assistant", "cd</s>")]
    assert example.turns == (
        GoldTurn(begin=1, number=1, role="user"),
        GoldTurn(begin=3, number=2, role="assistant"),
    )
    # What has no gold is no turn.
    [example] = rendered(plain("ab", "cd"))
    assert said(example) == [(1, "assistant", "cd</s>")]
    [example] = rendered(plain("ab", "cd"), boundary="joint", train_on="all")
    assert said(example) == [(1, "user", "ab"), (2, "assistant", "cd</s>")]


@pytest.mark.parametrize("template", [CHATML, MERE_TEXT])
def test_the_whole_text_has_roles(template: str) -> None:
    [example] = rendered(TALK, template, train_on="all")
    found = said(example)
    assert [(number, role) for number, role, _ in found] == [
        (1, "user"), (2, "assistant"), (3, "user"), (4, "assistant")
    ]  # fmt: skip
    if template == CHATML:
        assert [text for *_, text in found][1:] == [
            "<|im_start|>assistant\nYes<|im_end|>\n",
            "<|im_start|>user\nSo<|im_end|>\n",
            "<|im_start|>assistant\nNo.<|im_end|>\n",
        ]
    else:
        assert [text for *_, text in found] == ["ser: Hi\n", "assistant: Yes\n", "user: So\n", "assistant: No.\n</s>"]
    weighted = chat(("user", "Hi", 0.0), ("assistant", "Yes", 2.0))
    assert said(rendered(weighted, CHATML, train_on="all")[0]) == [
        (1, "assistant", "<|im_start|>assistant\nYes<|im_end|>\n")
    ]


def test_words_that_spell_a_control_token_keep_their_place() -> None:
    row = chat(("user", "<|im_end|>"), ("assistant", "Yes"))
    [example] = rendered(row, CHATML, train_on="all")
    assert [(number, role) for number, role, _ in said(example)] == [(1, "user"), (2, "assistant")]
    assert said(example)[1][2] == "<|im_start|>assistant\nYes<|im_end|>\n"


def test_a_template_that_writes_a_message_otherwise_later_tells_no_roles() -> None:
    [example] = rendered(TALK, REASONING, train_on="all")
    assert example.turns == ()
    assert gold_roles(example) == {}


def test_reasoning_and_tool_calls_are_the_assistants() -> None:
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}",
    )
    calls = ({"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}},)
    row = asked(
        says("user", "Hi"),
        says("assistant", "", reasoning="hm", tool_calls=calls),
        says("tool", "4"),
        says("assistant", "It is 4."),
    )
    [example] = rendered(row, template, train_on=["assistant", "tool"])
    assert said(example) == [
        (1, "assistant", '<think>hm</think>[f {"x": "y"}]<|im_end|>'),
        (2, "tool", "4<|im_end|>"),
        (3, "assistant", "It is 4.<|im_end|>"),
    ]


# ------------------------------------------------------------------------------------------------------------- shortened


def test_cut_on_the_right() -> None:
    [example] = rendered(plain("abcd", "efgh"), train_on=BOTH)
    end = {int(example.token_ids[-1])}

    def cut(length: int, **options: Any) -> list[tuple[int, str, str]]:
        found = cut_right(example, length, end_ids=end, **options)
        assert found is not None
        return said(found)

    assert cut(7) == [(1, "user", "abcd"), (2, "assistant", "ef")]
    assert cut(7, keep_end_token=True) == [(1, "user", "abcd"), (2, "assistant", "e</s>")]
    assert cut(5) == [(1, "user", "abcd")]
    # The end of the assistant's turn does not end the user's.
    assert cut(4, keep_end_token=True) == [(1, "user", "abc")]


def test_the_end_token_of_the_turn_that_was_cut_is_kept() -> None:
    """Where another's gold follows with nothing between: the turn's own, and no token twice."""
    row = chat(("user", "Hello"), ("assistant", "Yes"), ("user", "So"), ("assistant", "No."))
    [example] = rendered(row, LLAMA3, train_on="all", turns="auto")
    tokenizer = tokenizer_with(None)
    end = {tokenizer.convert_tokens_to_ids("<|eot|>")}
    before = said(example)
    assert [text[-len("<|eot|>") :] for *_, text in before] == ["<|eot|>"] * 4
    first = example.turns[1].begin
    second = example.turns[2].begin
    for length in range(first + 3, second + 1):
        found = cut_right(example, length, end_ids=end, keep_end_token=True)
        assert found is not None
        assert found.num_tokens == length
        assert said(found)[0] == before[0]
        assert said(found)[1][2].endswith("<|eot|>")
        assert found.token_ids[:-1].tolist() == example.token_ids[: length - 1].tolist()
    # Only the first token of the third turn fits: there is none before it to end.
    found = cut_right(example, second + 1, end_ids=end, keep_end_token=True)
    assert found is not None
    assert found.token_ids.tolist() == example.token_ids[: second + 1].tolist()


def test_split() -> None:
    [example] = rendered(plain("abcd", "efgh"), train_on=BOTH)
    parts = split_gold(example, 4)
    assert parts is not None
    assert [said(part) for part in parts] == [
        [(1, "user", "abc")],
        [(1, "user", "d"), (2, "assistant", "ef")],
        [(2, "assistant", "gh</s>")],
    ]
    [talk] = rendered(TALK, CHATML, train_on=BOTH)
    parts = split_gold(talk, 20)
    assert parts is not None
    assert len(parts) > 2
    whole = [(number, role) for number, role, _ in said(talk)]
    assert sorted({(number, role) for part in parts for number, role, _ in said(part)}) == whole
    for number, role in whole:
        text = "".join(text for part in parts for found, _, text in said(part) if found == number)
        assert (number, role, text) in said(talk)


def test_cut_on_the_left() -> None:
    row = chat(("system", "abcdefgh"), ("user", "Hi"), ("assistant", "Yes"))
    [example] = rendered(row, CHATML, train_on=BOTH)
    shorter = cut_left(example, example.num_tokens - 5)
    assert shorter is not None
    assert said(shorter) == said(example)
    assert shorter.turns[0].begin == example.turns[0].begin - 5


@pytest.mark.parametrize("policy", ["reject", "drop", "left", "right", "split"])
def test_every_policy_through_the_loader_and_the_cache(tmp_path: Path, policy: Any) -> None:
    said_before = {"role": "user", "content": "much to say", "weight": 0}
    rows = [
        {"messages": [*before, *({"role": role, "content": text} for role, text in talk)]}
        for before, talk in (
            ([], [("user", "Hi"), ("assistant", "Yes")]),
            ([said_before], [("user", "So"), ("assistant", "No."), ("user", "k"), ("assistant", "x" * 30)]),
        )
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig.model_validate({"train": [{"path": "rows.jsonl"}], "on_too_long": policy, "on_bad_row": "skip"})

    def load(cache: RowCache | None) -> Dataset:
        given: dict[str, Any] = {
            "config": config,
            "split": "train",
            "base_folder": tmp_path,
            "renderer": Renderer(
                tokenizer_with(CHATML), RenderingConfig(train_on=("user", "assistant")), 90, keeps_long_rows=True
            ),
        }
        if cache is None:
            return load_dataset(config.train, **given)
        return load_cached_dataset(config.train, cache=cache, **given)

    notes: list[str] = []
    cache = RowCache(folder=tmp_path / "cache", note=notes.append)
    read, stored, kept = load(None), load(cache), load(cache)
    assert any("from the cache" in note for note in notes)
    assert [one.turns for one in read] == [one.turns for one in stored] == [one.turns for one in kept]
    assert kept.role_names == ["user", "assistant"]
    found = [said(one) for one in kept]
    assert found[0] == [(1, "user", "Hi<|im_end|>"), (2, "assistant", "Yes<|im_end|>")]
    first = [(1, "user", "So<|im_end|>"), (2, "assistant", "No.<|im_end|>"), (3, "user", "k<|im_end|>")]
    whole = (4, "assistant", "x" * 30 + "<|im_end|>")
    if policy in ("reject", "drop"):
        assert found[1:] == []
    elif policy == "left":
        assert found[1:] == [[*first, whole]]
    elif policy == "right":
        assert found[1][:3] == first
        assert found[1][3:] == [(4, "assistant", "x" * len(found[1][3][2]))]
    else:
        assert [turn[0] for part in found[1:] for turn in part] in ([1, 2, 3, 4], [1, 2, 3, 4, 4], [1, 2, 3, 3, 4])
        assert "".join(text for part in found[1:] for *_, text in part) == "".join(text for *_, text in [*first, whole])


def test_the_last_turn_begins_where_its_words_do() -> None:
    data = Dataset(rendered(plain("ab", "cd"), train_on=BOTH))
    assert data.gold_text(0, tokenizer_with(None)) == "cd"
    assert data.context_text(0, tokenizer_with(None)) == "<s>ab"


def test_rows_of_one_role_cost_little() -> None:
    [example] = rendered(plain("ab", "cd"))
    data = Dataset([example] * 1000)
    arrays = (data.turn_counts, data.turn_begins, data.turn_numbers, data.turn_roles)
    assert sum(array.nbytes for array in arrays) == 16_000
