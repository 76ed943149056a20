"""Every published template, and tokenizers of each kind: the ids before a turn are the server's, the gold is what is added."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_families import (
    BEGINNING,
    END,
    FAMILIES,
    IM_END,
    PUBLISHED,
    TURN_ENDS,
    WRITTEN_HERE,
    as_given,
    asked,
    conversations,
    family_tokenizer,
    markers,
    says,
    template,
)
from transformers import PreTrainedTokenizerFast

from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.rows import Rejection
from goldsmith.types import Conversation, TokenizedExample

KINDS = ("byte", "metaspace", "plain")
PAGE = Path(__file__).resolve().parents[3] / "docs" / "chat_templates.md"
# To write the page anew: GOLDSMITH_WRITE_DOCS=1 pytest tests/unit/data/test_chat_families.py
WRITE = os.environ.get("GOLDSMITH_WRITE_DOCS") == "1"

pytestmark = pytest.mark.usefixtures("shared_folder")


@functools.cache
def renderer(family: str, kind: str, **config: Any) -> Renderer:
    return Renderer(family_tokenizer(family, kind), RenderingConfig(**config), None)


def template_text(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, end: int, *, prompt: bool) -> str:
    """By `transformers`, not by us."""
    return str(
        tokenizer.apply_chat_template(
            [as_given(message) for message in conversation.messages[:end]],
            tools=list(conversation.tools) or None,
            add_generation_prompt=prompt,
            tokenize=False,
        )
    )


def served(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, end: int) -> list[int]:
    return list(
        tokenizer.apply_chat_template(
            [as_given(message) for message in conversation.messages[:end]],
            tools=list(conversation.tools) or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    )


def runs(examples: list[TokenizedExample]) -> Iterator[tuple[list[int], list[int]]]:
    """Each gold run with all ids before it."""
    for example in examples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], example.target_weights > 0, [0]]).astype(int)))
        ids = example.token_ids.tolist()
        for begin, end in edges.reshape(-1, 2):
            yield ids[:begin], ids[begin:end]


def ends_of(family: str) -> list[str]:
    return TURN_ENDS.get(family, IM_END)


def outcome(family: str, kind: str, name: str, **config: Any) -> list[TokenizedExample] | Rejection:
    [result] = renderer(family, kind, **config).render([conversations(family)[name]])
    return result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_context_and_gold_are_what_a_server_and_the_template_say(family: str, kind: str) -> None:
    tokenizer = family_tokenizer(family, kind)
    found = renderer(family, kind)
    for name, conversation in conversations(family).items():
        before = found.num_straddles
        result = outcome(family, kind, name)
        turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        if isinstance(result, Rejection):
            assert TABLE[family][name] in result.reason, (name, result)
            with_mismatch = outcome(family, kind, name, serving_mismatch="train", unwritten="ignore")
            if isinstance(with_mismatch, Rejection):  # then the template itself will not have it
                assert with_mismatch.reason == "refused by the chat template", name
                assert TABLE[family][name] == "refused" or (name == "tools" and family in ("cohere", "gemma", "gemma3"))
            continue
        straddled = False
        pieces = list(runs(result))
        # A marker that is trained as a turn's stop stands beside no other gold, so every turn is a run of its own.
        assert len(pieces) == len(turns), name
        for (context, gold), index in zip(pieces, turns, strict=True):
            assert context == served(tokenizer, conversation, index), (name, index)
            p = template_text(tokenizer, conversation, index, prompt=True)
            q = template_text(tokenizer, conversation, index + 1, prompt=False)
            assert q.startswith(p)
            end = tokenizer.convert_ids_to_tokens(gold[-1])
            assert end in ends_of(family), name
            if family == "glm":  # the stop is the marker of whoever is next
                cut = q.rstrip("\n") + end
            else:
                cut = q[: q.rindex(end) + len(end)]
                assert not q[len(cut) :].strip() or family == "phi3"  # which closes every conversation
            whole = tokenizer(cut, add_special_tokens=False)["input_ids"]
            if whole[: len(context)] == context:
                assert gold == whole[len(context) :], (name, index)
            else:
                straddled = True
                assert tokenizer.decode(context + gold) == tokenizer.decode(whole)
            assert not set(gold[:-1]) & {tokenizer.convert_tokens_to_ids(token) for token in ends_of(family)}
        assert found.num_straddles - before == straddled, name
        bos = tokenizer.bos_token_id
        for example in result:
            ids = example.token_ids.tolist()
            assert ids.count(bos) == 1 if family in BEGINNING else tokenizer.bos_token is None
        assert found.render_context(conversation) == served(tokenizer, conversation, turns[-1])
        if kind == "plain":
            how = "together" if len(result) == 1 else "expanded"
            assert how == TABLE[family][name] or (len(turns) == 1 and TABLE[family][name] == "together"), (family, name)
    known = {tokenizer.convert_tokens_to_ids(token) for token in ends_of(family)[:1]}
    assert known <= set(found.end_token_ids)


def test_merges_do_cross_the_boundary() -> None:
    """Else the test above would show little."""
    for kind in ("byte", "metaspace"):
        tokenizer = family_tokenizer("llama3", kind)
        p = tokenizer("assistant\n\n", add_special_tokens=False)["input_ids"]
        whole = tokenizer("assistant\n\nHello!", add_special_tokens=False)["input_ids"]
        assert whole[: len(p)] != p


# What becomes of each family's conversations, with a tokenizer of which no token crosses a boundary.
NO = "not written"
TABLE: dict[str, dict[str, str]] = {
    family: dict(zip(("plain", "system", "thinking", "tools"), row, strict=True))
    for family, row in {
        "cohere": ("together", "together", NO, NO),
        "deepseek_r1_distill": ("mismatch", "mismatch", "mismatch", "mismatch"),
        "deepseekv3": ("mismatch", "mismatch", "mismatch", "mismatch"),
        "gemma": ("together", "refused", NO, NO),
        "gemma3": ("together", "together", NO, NO),
        "gemma4": ("together", "together", NO, "together"),
        "gptoss": ("expanded", "together", "expanded", "together"),
        "lfm2": ("together", "together", NO, NO),
        "llama3": ("together", "together", NO, NO),
        "llama3_1": ("together", "together", NO, "together"),
        "llama3_2": ("together", "together", NO, "together"),
        "nemotron_3_super": ("mismatch", "mismatch", "expanded", "mismatch"),
        "phi3": ("together", "together", NO, NO),
        "qwen2_5": ("together", "together", NO, "together"),
        "qwen3": ("expanded", "together", "expanded", "expanded"),
        "qwen3_5_nothink": ("expanded", "together", "mismatch", "together"),
        "qwen3_5_think": ("expanded", "together", "expanded", "together"),
        "qwen3_6": ("expanded", "together", "expanded", "together"),
        "qwen3_instruct_2507": ("together", "together", NO, "together"),
        "glm": ("together", "together", "expanded", "together"),
        "generation": ("together", "together", NO, NO),
    }.items()
}


def test_the_page_says_what_happens() -> None:
    """docs/chat_templates.md holds the table that is computed here."""
    rows = ["| family | plain | thinking | tools | turn ends with | beginning |", "|---|---|---|---|---|---|"]
    for family in FAMILIES:
        tokenizer = family_tokenizer(family, "plain")
        cells = []
        ends: list[str] = []
        for name in ("plain", "thinking", "tools"):
            result = outcome(family, "plain", name)
            if isinstance(result, Rejection):
                cells.append(result.reason)
                result = outcome(family, "plain", name, serving_mismatch="train", unwritten="ignore")
            else:
                cells.append("together" if len(result) == 1 else "expanded")
            if not isinstance(result, Rejection):
                ends += [str(tokenizer.convert_ids_to_tokens(gold[-1])) for _, gold in runs(result)]
        beginning = f"`{tokenizer.bos_token}`" if family in BEGINNING else "none"
        shown = ", ".join(f"`{end}`" for end in dict.fromkeys(ends))
        label = f"{family} (written for the test)" if family in WRITTEN_HERE else family
        rows.append(
            "| " + " | ".join([label, *cells, shown, beginning]).replace("<|", "<\\|").replace("|>", "\\|>") + " |"
        )
    text = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- table: written by tests/unit/data/test_chat_families.py -->\n", "<!-- end of the table -->\n"
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    computed = head + begin + "\n" + "\n".join(rows) + "\n\n" + end + tail
    if WRITE:
        PAGE.write_text(computed, encoding="utf-8")
    assert text == computed


# Read out of an assistant's content by some templates; there they are control tokens, as the issue of reasoning wants it.
READ = ("<think>", "</think>", "<|channel>", "<channel|>")


def control_ids(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    return [index for index in ids if index in added]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["byte", "metaspace"])
def test_words_that_spell_a_control_token_are_words(family: str, kind: str) -> None:
    """Every added token, special or not, in the words of everyone, one by one and all at once."""
    tokenizer = family_tokenizer(family, kind)
    found = renderer(family, kind, serving_mismatch="train")
    names = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    assert set(markers(family)) <= set(names)
    harmless = asked(says("user", "say x now"), says("assistant", "no x here"))
    tools = conversations(family)["tools"]
    has_tools = TABLE[family]["tools"] in ("together", "expanded")
    [expected] = found.render([harmless])
    assert not isinstance(expected, Rejection)
    rows, wanted = [], []
    for name in [*names, " ".join(names), "".join(names)]:
        own = "x" if any(token in name for token in READ) else name
        rows.append(asked(says("user", f"say {name} now"), says("assistant", f"no {own} here")))
        wanted.append(harmless)
        if has_tools and '"' not in name:
            answer = replace(tools.messages[2], content=f"18 {name} degrees")
            rows.append(replace(tools, messages=(*tools.messages[:2], answer, tools.messages[3])))
            wanted.append(tools)
    for row, plainly, result in zip(rows, wanted, found.render(rows), strict=True):
        if family == "gptoss" and isinstance(result, Rejection):  # which refuses its own channels in words
            assert "<|channel|>" in str(result.detail)
            continue
        assert not isinstance(result, Rejection), result
        [as_usual] = found.render([plainly])
        assert not isinstance(as_usual, Rejection)
        for example, usual in zip(result, as_usual, strict=True):
            ids = example.token_ids.tolist()
            assert control_ids(tokenizer, ids) == control_ids(tokenizer, usual.token_ids.tolist()), row
        # And nothing is lost: it reads as it was written (but for the mark that Metaspace has for a space).
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for message in row.messages[:-1]:
            content = message.content.replace("▁", " ") if kind == "metaspace" else message.content
            assert content in text or (message.role == "tool" and '"' in content), (content, text)
        if TABLE[family]["plain"] != "mismatch":
            assert found.render_context(row) == result[-1].token_ids[: len(found.render_context(row))].tolist()
    assert found.num_control_texts > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_opt_in(family: str) -> None:
    tokenizer = family_tokenizer(family, "byte")
    name = ends_of(family)[0]
    token = tokenizer.convert_tokens_to_ids(name)
    row = asked(says("user", f"say {name} now"), says("assistant", f"no {name} here"))
    counts = {}
    for allowed in ("none", "assistant", "all"):
        found = renderer(family, "byte", serving_mismatch="train", allow_control_tokens=allowed)
        [result] = found.render([row])
        assert not isinstance(result, Rejection), result
        counts[allowed] = result[0].token_ids.tolist().count(token)
    assert counts["all"] == counts["assistant"] + 1 == counts["none"] + 2
    # Then the context is the server's for this content, too.
    assert renderer(family, "byte", allow_control_tokens="all").render_context(row) == served(tokenizer, row, 1)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "qwen3_6", "nemotron_3_super"])
@pytest.mark.parametrize("kind", KINDS)
def test_reasoning_in_the_content_is_read_where_the_template_reads_it(family: str, kind: str) -> None:
    tokenizer = family_tokenizer(family, kind)
    found = renderer(family, kind)
    own = asked(says("user", "Hi"), says("assistant", "Hello!", reasoning="A greeting."))
    content = "<think>\nA greeting.\n</think>\nHello!"
    inside = asked(says("user", "Hi"), says("assistant", content))
    [[first], [second]] = found.render([own, inside])  # type: ignore[misc]
    assert first.token_ids.tolist() == second.token_ids.tolist()
    # A user's are words all the same, and so is any other control token in the assistant's content.
    mixed = asked(says("user", content), says("assistant", content.replace("Hello!", "<|im_end|>")))
    [result] = found.render([mixed])
    assert not isinstance(result, Rejection), result
    assert control_ids(tokenizer, result[0].token_ids.tolist()) == control_ids(tokenizer, first.token_ids.tolist())


def test_families_are_all_there() -> None:
    assert set(PUBLISHED) == {path.stem for path in (PAGE.parents[2] / "shared/data/chat_templates").glob("*.jinja")}
    assert set(END) | set(BEGINNING) <= set(FAMILIES)
    assert all(template(family) for family in FAMILIES)
