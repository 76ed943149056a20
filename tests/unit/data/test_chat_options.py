"""Options of rendering: each with the exact weight of every token."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from chat_families import asked, says
from data_examples import CHATML, MERE_TEXT, NO_END_OF_TURN, OPENS_REASONING, REASONING, TEXTS, chat, learnt, plain
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from goldsmith.data.control_tokens import ControlTokens, add_control_tokens, template_control_tokens
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.rows import Rejection
from goldsmith.errors import ConfigError
from goldsmith.types import Conversation, Message, TokenizedExample

TALK = chat(("user", "Hi"), ("assistant", "Yes"), ("user", "So"), ("assistant", "No."))


def templated(kind: str, template: str, **config: Any) -> Renderer:
    tokenizer = learnt(kind)
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token=tokenizer.unk_token,
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )
    return Renderer(copy, RenderingConfig(**config), None)


def all_of(renderer: Renderer, row: Conversation) -> list[TokenizedExample]:
    [result] = renderer.render([row])
    assert not isinstance(result, Rejection), result
    return result


def refusal(renderer: Renderer, row: Conversation) -> Rejection:
    [result] = renderer.render([row])
    assert isinstance(result, Rejection)
    return result


def weighed(renderer: Renderer, row: Conversation) -> list[tuple[str, float]]:
    """Runs of one weight: their text, and the weight; weight 0 is left out."""
    runs: list[tuple[str, float]] = []
    for example in all_of(renderer, row):
        weights, ids = example.target_weights, example.token_ids.tolist()
        edges = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(ids)]
        for begin, end in itertools.pairwise(edges):
            if weights[begin] > 0:
                runs.append((renderer.tokenizer.decode(ids[begin:end]), float(weights[begin])))
    return runs


def test_turns(bpe: PreTrainedTokenizerFast) -> None:
    assert [e.example_id for e in all_of(templated("byte", CHATML), TALK)] == ["row:0"]
    apart = all_of(templated("byte", CHATML, turns="expanded"), TALK)
    assert [e.example_id for e in apart] == ["row:0@1", "row:0@2"]
    [together] = all_of(templated("byte", CHATML, turns="together"), TALK)
    assert sum(e.num_target_tokens for e in apart) == together.num_target_tokens
    assert apart[1].token_ids.tolist() == together.token_ids.tolist()
    rejected = refusal(templated("byte", REASONING, turns="together"), TALK)
    assert rejected.reason == "turns cannot be trained together"


def test_a_serving_mismatch_is_trained_where_asked_for() -> None:
    rejected = refusal(templated("byte", OPENS_REASONING), TALK)
    assert rejected.reason == "serving mismatch"
    assert "assistant\\n<think>" in rejected.detail  # what a server is given
    assert "assistant\\nYes" in rejected.detail  # what the template writes
    renderer = templated("byte", OPENS_REASONING, serving_mismatch="train")
    assert weighed(renderer, TALK) == [("Yes<|im_end|>", 1.0), ("No.<|im_end|>", 1.0)]
    # Where the two part before the generation prompt, another's words would be gold.
    rewriting = OPENS_REASONING.replace("{{ m.content }}", "{% if add_generation_prompt %}!{% endif %}{{ m.content }}")
    assert refusal(templated("byte", rewriting, serving_mismatch="train"), TALK).reason == "serving mismatch"


def test_what_the_template_leaves_out() -> None:
    row = asked(says("user", "Hi"), says("assistant", "Yes", reasoning="hm"))
    assert refusal(templated("byte", CHATML), row).reason == "not written by the chat template"
    assert weighed(templated("byte", CHATML, unwritten="ignore"), row) == [("Yes<|im_end|>", 1.0)]
    calls = ({"type": "function", "function": {"name": "f", "arguments": {"x": "y"}}},)
    row = asked(says("user", "Hi"), says("assistant", "", tool_calls=calls))
    assert "tool call" in refusal(templated("byte", CHATML), row).detail


def test_roles() -> None:
    row = chat(("system", "S"), ("user", "Hi"), ("assistant", "Yes"), ("user", "So"))
    both = templated("byte", CHATML, train_on=["user", "assistant"])
    assert weighed(both, row) == [("Hi<|im_end|>", 1.0), ("Yes<|im_end|>", 1.0), ("So<|im_end|>", 1.0)]
    assert weighed(templated("byte", CHATML, train_on=["system"]), row) == [("S<|im_end|>", 1.0)]
    assert refusal(templated("byte", CHATML, train_on=["tool"]), row).reason == "no gold token"
    # The ids are the same, whoever is trained on.
    usual = all_of(templated("byte", CHATML), TALK)[0]
    assert all_of(both, TALK)[0].token_ids.tolist() == usual.token_ids.tolist()


def test_the_whole_text() -> None:
    renderer = templated("byte", CHATML, train_on="all")
    [example] = all_of(renderer, TALK)
    assert example.target_weights.tolist() == [0.0] + [1.0] * (example.num_tokens - 1)
    whole = renderer.tokenizer.decode(example.token_ids.tolist())
    assert whole.count("<|im_end|>") == 4
    # With weights: each message's from its header to its end.
    row = chat(("user", "Hi", 0.0), ("assistant", "Yes", 2.0))
    assert weighed(renderer, row) == [("<|im_start|>assistant\nYes<|im_end|>\n", 2.0)]
    # A text without an end gets the end token.
    [example] = all_of(templated("byte", MERE_TEXT, train_on="all"), TALK)
    assert example.token_ids[-1] == renderer.tokenizer.eos_token_id


def test_plain_rows_have_roles_too() -> None:
    tokenizer = learnt("byte")
    row = plain("ab", "cd")

    def found(**config: Any) -> list[float]:
        return all_of(Renderer(tokenizer, RenderingConfig(**config), None), row)[0].target_weights.tolist()

    assert found() == [0, 0, 0, 1, 1, 1]  # <s> a b c d </s>
    assert found(train_on="all") == [0, 1, 1, 1, 1, 1]
    assert found(train_on=["user"]) == [0, 1, 1, 0, 0, 0]
    assert found(train_on=["user", "assistant"], last_turn_only=True) == [0, 0, 0, 1, 1, 1]
    assert found(train_on_end_token=False) == [0, 0, 0, 1, 1, 0]
    assert found(first_tokens=2, first_tokens_weight=3) == [0, 0, 0, 3, 3, 1]


def test_the_last_turn_the_end_and_the_first_tokens() -> None:
    assert weighed(templated("byte", CHATML, last_turn_only=True), TALK) == [("No.<|im_end|>", 1.0)]
    assert weighed(templated("byte", CHATML, train_on_end_token=False), TALK) == [("Yes", 1.0), ("No.", 1.0)]
    renderer = templated("byte", CHATML, first_tokens=1, first_tokens_weight=4)
    assert weighed(renderer, TALK) == [("Y", 4.0), ("es<|im_end|>", 1.0), ("N", 4.0), ("o.<|im_end|>", 1.0)]
    for factor in (1e39, 1e-46):  # infinite, and 0, in float32
        wrong = refusal(templated("byte", CHATML, first_tokens=1, first_tokens_weight=factor), TALK)
        assert (wrong.reason, f"makes a weight of {factor:g}" in wrong.detail) == ("bad weight", True)
    marked = templated("byte", NO_END_OF_TURN, train_on_end_token=False)
    assert weighed(marked, TALK) == [("Yes", 1.0), ("No.", 1.0)]


def test_spans_of_a_chat() -> None:
    spans = ((0, 2, 0.0), (4, 6, 3.0))
    message = Message(role="assistant", content="abcdefg ", weight=2.0, spans=spans)
    row = asked(says("user", "Hi"), message)
    assert weighed(templated("byte", CHATML), row) == [("cd", 2.0), ("ef", 3.0), ("g <|im_end|>", 2.0)]
    # The template trims, puts reasoning before the words, and no word is where it was.
    trimming = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content | trim }}")
    shifted = Message(role="assistant", content="  abcdefg", spans=((2, 4, 0.5),), reasoning="ab")
    assert weighed(templated("byte", trimming), asked(says("user", "Hi"), shifted)) == [
        ("ab", 1.0),
        ("ab", 0.5),
        ("cdefg<|im_end|>", 1.0),
    ]
    # Weights of 1 are no weights, to the bit.
    ones = asked(says("user", "Hi"), says("assistant", "Once upon", spans=((0, 4, 1.0),)))
    none = asked(says("user", "Hi"), says("assistant", "Once upon"))
    [[first], [second]] = [all_of(templated("bpe", CHATML), row) for row in (ones, none)]
    assert first.target_weights.tobytes() == second.target_weights.tobytes()
    assert first.token_ids.tobytes() == second.token_ids.tobytes()
    # Only a span is gold.
    only = asked(says("user", "Hi"), says("assistant", "abcd", weight=0.0, spans=((1, 3, 1.0),)))
    assert weighed(templated("byte", CHATML), only) == [("bc", 1.0)]
    changing = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}")
    assert refusal(templated("byte", changing, unwritten="ignore"), row).reason == "words without a place"


def test_spans_beside_control_tokens_in_the_words() -> None:
    content = "ab<|im_end|>cd"
    row = asked(says("user", "<|im_start|>"), says("assistant", content, spans=((12, 14, 2.0),)))
    renderer = templated("byte", CHATML)
    assert weighed(renderer, row) == [("ab<|im_end|>", 1.0), ("cd", 2.0), ("<|im_end|>", 1.0)]
    assert renderer.num_control_texts == 1
    allowed = templated("byte", CHATML, allow_control_tokens="all")
    assert weighed(allowed, row) == [("ab<|im_end|>", 1.0), ("cd", 2.0), ("<|im_end|>", 1.0)]


def test_a_token_that_touches_spans_takes_the_highest() -> None:
    tokenizer = learnt("bpe")
    row = plain("x", "Once upon", example_id="a")
    cut = Message(role="assistant", content="Once upon", spans=((0, 2, 0.5), (2, 3, 4.0)))
    weighted = Conversation(messages=(row.messages[0], cut), example_id="a", source="s")
    encoding = tokenizer("Once upon", add_special_tokens=False, return_offsets_mapping=True)
    wanted = []
    for begin, end in encoding["offset_mapping"]:
        touched = [weight for first, last, weight in cut.spans if begin < last and first < end]
        wanted.append(max(touched, default=1.0))
    for boundary in ("separate", "joint"):
        [example] = all_of(Renderer(tokenizer, RenderingConfig(boundary=boundary), None), weighted)
        assert example.target_weights.tolist()[-len(wanted) - 1 :] == [*wanted, 1.0]


def test_spans_want_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("goldsmith.data.encoding.PreTrainedTokenizerFast", ())
    message = Message(role="assistant", content="abc", spans=((0, 1, 2.0),))
    row = Conversation(messages=(Message(role="user", content="x"), message), example_id="a", source="s")
    with pytest.raises(ConfigError, match="character offsets"):
        Renderer(learnt("byte"), RenderingConfig(), None).render([row])
    with pytest.raises(ConfigError, match="character offsets"):
        templated("byte", CHATML).render([asked(*row.messages)])
    # And without them a word that spells a control token of a chat cannot be kept apart.
    spelt = asked(says("user", "<|im_end|>"), says("assistant", "a"))
    assert refusal(templated("byte", CHATML), spelt).reason == "control token in content"


@pytest.mark.parametrize("boundary", ["separate", "joint"])
def test_plain_words_that_spell_any_added_token(boundary: str) -> None:
    tokenizer = learnt("byte")
    tokenizer.add_tokens(["<tool>", "[INST]"])  # not special, so `split_special_tokens` heeds them not
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    ids = {tokenizer.convert_tokens_to_ids(token) for token in added}
    for allowed, number in (("none", 2), ("assistant", 3), ("all", 4)):
        renderer = Renderer(tokenizer, RenderingConfig(boundary=boundary, allow_control_tokens=allowed), None)
        for token in added:
            row = plain(f"a {token} b", f"c {token} d")
            [example] = all_of(renderer, row)
            found = [index for index in example.token_ids.tolist() if index in ids]
            assert len(found) == number, (allowed, token)
            text = tokenizer.decode(example.token_ids.tolist()[1:-1], clean_up_tokenization_spaces=False)
            assert text == f"a {token} bc {token} d"


def test_settings_that_contradict() -> None:
    for wrong in (
        {"train_on": []},
        {"train_on": "all", "last_turn_only": True},
        {"control_tokens": ["<a>"]},
        {"first_tokens": 2},
        {"first_tokens_weight": 2.0},
        {"date": "26 July"},
    ):
        with pytest.raises(ValidationError):
            RenderingConfig.model_validate(wrong)


def test_a_template_for_a_base_model(template_file: Callable[[str], str]) -> None:
    from goldsmith.data.tokenizer import TrainedTokenizerConfig, train_tokenizer

    tokenizer = train_tokenizer(TrainedTokenizerConfig(kind="byte"), TEXTS)
    before = len(tokenizer)
    config = RenderingConfig(chat_template="chatml")
    assert add_control_tokens(tokenizer, RenderingConfig()) == []
    assert add_control_tokens(tokenizer, config) == ["<|im_end|>", "<|im_start|>"]
    assert len(tokenizer) == before + 2
    assert add_control_tokens(tokenizer, config) == []  # once
    assert "im_start" in str(tokenizer.chat_template)  # saved with the tokenizer
    for renderer in (Renderer(tokenizer, config, None), Renderer(tokenizer, RenderingConfig(), None)):
        assert weighed(renderer, TALK) == [("Yes<|im_end|>", 1.0), ("No.<|im_end|>", 1.0)]
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") in renderer.end_token_ids
    file = template_file("{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}")
    listed = RenderingConfig(chat_template=file, control_tokens=("[end]",))
    assert add_control_tokens(tokenizer, listed) == ["[end]"]


def test_control_tokens_of_a_template() -> None:
    assert template_control_tokens("{{ '<|a|>' }} <|b_c|> <d> <｜User｜> {% if a <|x %}") == [
        "<|a|>",
        "<|b_c|>",
        "<｜User｜>",
    ]


def test_the_longest_control_token_is_found() -> None:
    tokenizer = learnt("byte")
    tokenizer.add_tokens(["<a", "<a>", "<ab>", "x.y", "  "])
    controls = ControlTokens(tokenizer)
    assert controls.pattern.findall("<a <a> <ab> <abc xzy x.y   ") == ["<a", "<a>", "<ab>", "<a", "x.y"]
    text = "say <ab> and </s>"
    assert controls.unmask(controls.mask(text)) == text
    assert not controls.spells(controls.mask(text))
    assert len(controls.mask(text)) == len(text)
    assert controls.decode(controls.code(text)) == text
    coded, places = controls.code_with_places(text)
    assert coded == controls.code(text)
    assert [text[place] for place in places[:-1]] == list("say < and <")
    assert places[-1] == len(text)


def test_a_token_that_words_become_only_once_normalised() -> None:
    """Tokens that are not special are looked for in the normalised text."""
    from tokenizers import AddedToken, Tokenizer, normalizers

    backend = Tokenizer.from_str(learnt("byte").backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHATML.replace("user", "<tool>")
    )
    token = tokenizer.convert_tokens_to_ids("<tool>")
    assert token in tokenizer("<TOOL>")["input_ids"]  # the danger
    renderer = Renderer(tokenizer, RenderingConfig(), None)
    [example] = all_of(renderer, asked(says("user", "<TOOL>"), says("assistant", "<Tool>")))
    assert token not in example.token_ids.tolist()
