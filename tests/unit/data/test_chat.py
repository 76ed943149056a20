"""Chats: the ids before a turn are the server's; what cannot be rendered so is expanded or refused, never trained wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
from data_examples import CHATML, LLAMA3, MERE_TEXT, NO_END_OF_TURN, OPENS_REASONING, REASONING, chat, learnt, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.rows import Rejection
from goldsmith.data.tokenizer import TrainedTokenizerConfig, train_tokenizer
from goldsmith.errors import ConfigError, DataError
from goldsmith.types import Conversation, TokenizedExample

TWO_TURNS = chat(("user", "Hi there"), ("assistant", "Hello!"), ("user", "What is 2 + 2?"), ("assistant", "It is 4."))
WITH_SYSTEM = chat(("system", "You are kind."), ("user", "Hi"), ("assistant", "Hello!"))


def templated(tokenizer: PreTrainedTokenizerFast, template: str) -> Renderer:
    """A renderer for a tokenizer that has `template` as its own."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token=tokenizer.unk_token,
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )
    return Renderer(copy, RenderingConfig(), None)


def served(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turn: int, template: str | None
) -> list[int]:
    """The ids that a server is given for the message `turn`."""
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages[:turn]]
    return list(
        tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


def rendered(renderer: Renderer, conversation: Conversation, num_messages: int) -> str:
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages[:num_messages]]
    return str(renderer.tokenizer.apply_chat_template(messages, chat_template=renderer.chat_template, tokenize=False))


def spans(example: TokenizedExample) -> list[tuple[int, int]]:
    """Runs of gold."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (example.target_weights > 0).astype(int), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def check(renderer: Renderer, conversation: Conversation) -> list[TokenizedExample] | Rejection:
    """The whole contract of a chat: each gold run continues exactly the server's ids, and says what the assistant said."""
    [result] = renderer.render([conversation])
    if isinstance(result, Rejection):
        return result
    tokenizer = renderer.tokenizer
    turns = [index for index, m in enumerate(conversation.messages) if m.role == "assistant" and m.weight > 0]
    runs = [(example, begin, end) for example in result for begin, end in spans(example)]
    assert len(runs) == len(turns)
    for (example, begin, end), turn in zip(runs, turns, strict=True):
        assert example.token_ids[:begin].tolist() == served(tokenizer, conversation, turn, renderer.chat_template)
        said = tokenizer.decode(example.token_ids[begin:end].tolist(), skip_special_tokens=False)
        assert conversation.messages[turn].content.strip() in said
        # Decoded, all of it reads as the template writes the conversation up to this turn's end.
        whole = rendered(renderer, conversation, turn + 1)
        # (By way of ids, since not every tokenizer gives every text back as it was.)
        whole = tokenizer.decode(tokenizer(whole, add_special_tokens=False)["input_ids"], skip_special_tokens=False)
        text = tokenizer.decode(example.token_ids[:end].tolist(), skip_special_tokens=False)
        stops = (text, text.removesuffix("</s>"), text.removesuffix("<|start|>"))
        assert whole.startswith(stops), (text, whole)
        ends = renderer.end_token_ids
        assert int(example.token_ids[end - 1]) in ends
        assert not set(example.token_ids[begin : end - 1].tolist()) & set(ends)
        weight = conversation.messages[turn].weight
        assert (example.target_weights[begin:end] == np.float32(weight)).all()
    if len(result) > 1:
        assert [example.example_id for example in result] == [f"row:0@{n}" for n in range(1, len(turns) + 1)]
    else:
        assert result[0].example_id == "row:0"
    bos = tokenizer.bos_token_id
    for example in result:
        # One at most, but for those that a user's text spells, which a server parses too.
        spelt = sum(m.content.count("<s>") for m in conversation.messages)
        assert example.token_ids.tolist().count(bos) <= 1 + spelt
        assert example.example_weight == conversation.example_weight
    last = [index for index, m in enumerate(conversation.messages) if m.role == "assistant"][-1]
    assert renderer.render_context(conversation) == served(tokenizer, conversation, last, renderer.chat_template)
    return result


def good(renderer: Renderer, conversation: Conversation) -> list[TokenizedExample]:
    result = check(renderer, conversation)
    assert not isinstance(result, Rejection), result
    return result


def refusal(renderer: Renderer, conversation: Conversation) -> Rejection:
    result = check(renderer, conversation)
    assert isinstance(result, Rejection)
    return result


@pytest.mark.parametrize("kind", ["character", "byte", "bpe", "unigram"])
@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_a_conversation_is_one_example(kind: str, template: str) -> None:
    renderer = templated(learnt(kind), template)
    [example] = good(renderer, TWO_TURNS)
    tokenizer = renderer.tokenizer
    end = "<|im_end|>" if template is CHATML else "<|eot|>"
    said = [tokenizer.decode(example.token_ids[a:b].tolist()) for a, b in spans(example)]
    assert said == ["Hello!" + end, "It is 4." + end]
    assert example.num_bytes == len("Hello!It is 4.")
    assert renderer.end_token_ids == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)])
    good(renderer, WITH_SYSTEM)


def test_a_template_that_renders_the_beginning_gets_no_second_one(bpe: PreTrainedTokenizerFast) -> None:
    [example] = good(templated(bpe, LLAMA3), TWO_TURNS)
    assert example.token_ids.tolist().count(bpe.bos_token_id) == 1
    assert int(example.token_ids[0]) == bpe.bos_token_id
    # And one that does not render it gets none, as a server's ids have none.
    [example] = good(templated(bpe, CHATML), TWO_TURNS)
    assert bpe.bos_token_id not in example.token_ids.tolist()


def test_reasoning_templates_are_expanded(bpe: PreTrainedTokenizerFast) -> None:
    renderer = templated(bpe, REASONING)
    first, second = good(renderer, TWO_TURNS)
    assert renderer.tokenizer.decode(second.token_ids[spans(second)[0][0] :].tolist()) == (
        "<think>\n\n</think>\n\nIt is 4.<|im_end|>"
    )
    assert "<think>" not in renderer.tokenizer.decode(second.token_ids[: spans(second)[0][0]].tolist())
    assert (first.num_bytes, second.num_bytes) == (
        len("<think>\n\n</think>\n\nHello!"),
        len("<think>\n\n</think>\n\nIt is 4."),
    )
    # A row may bring its own reasoning: then no empty block is put before it.
    own = chat(("user", "Hi"), ("assistant", "<think>\nhm\n</think>\n\nHello!"))
    [example] = good(renderer, own)
    assert renderer.tokenizer.decode(example.token_ids[spans(example)[0][0] :].tolist()) == (
        "<think>\nhm\n</think>\n\nHello!<|im_end|>"
    )
    good(renderer, own)  # with the frame of the earlier rows remembered, too
    good(renderer, TWO_TURNS)


def test_a_generation_prompt_that_the_conversation_lacks_is_refused(bpe: PreTrainedTokenizerFast) -> None:
    rejection = refusal(templated(bpe, OPENS_REASONING), TWO_TURNS)
    assert rejection.reason == "serving mismatch"
    assert "assistant\\n<think>\\n'" in rejection.detail
    assert "Hello!" in rejection.detail


def test_a_template_without_an_end_of_turn_stops_at_what_begins_the_next(bpe: PreTrainedTokenizerFast) -> None:
    renderer = templated(bpe, NO_END_OF_TURN)
    [example] = good(renderer, TWO_TURNS)
    stop = bpe.convert_tokens_to_ids("<|start|>")
    assert [int(example.token_ids[end - 1]) for _, end in spans(example)] == [stop, stop]
    assert example.num_bytes == len("Hello!It is 4.")
    assert renderer.end_token_ids == sorted([bpe.eos_token_id, stop])


def test_a_template_of_mere_text_gets_the_end_token(bpe: PreTrainedTokenizerFast) -> None:
    renderer = templated(bpe, MERE_TEXT)
    first, second = good(renderer, TWO_TURNS)  # the server's history has no end token, so this cannot be one example
    assert int(first.token_ids[-1]) == int(second.token_ids[-1]) == bpe.eos_token_id
    assert first.num_bytes == len(" Hello!")
    assert renderer.end_token_ids == [bpe.eos_token_id]


def test_turns_of_weight_0_are_context(bpe: PreTrainedTokenizerFast) -> None:
    renderer = templated(bpe, CHATML)
    row = chat(("user", "Hi"), ("assistant", "Hello!", 0.0), ("user", "What?"), ("assistant", "It is 4.", 0.5))
    [example] = good(renderer, row)
    assert len(spans(example)) == 1
    assert set(example.target_weights.tolist()) == {0.0, 0.5}
    assert refusal(renderer, chat(("user", "Hi"), ("assistant", "Hello!", 0.0))).reason == "no gold token"
    # A greeting nobody asked for cannot be served, but may be context.
    greeting = (("assistant", "Hi"), ("user", "What?"), ("assistant", "It is 4."))
    assert refusal(renderer, chat(*greeting)).reason == "nothing before the assistant"
    good(renderer, chat(("assistant", "Hi", 0.0), *greeting[1:]))


def test_a_conversation_may_end_with_the_user(bpe: PreTrainedTokenizerFast) -> None:
    renderer = templated(bpe, CHATML)
    [example] = good(renderer, chat(("user", "Hi"), ("assistant", "Hello!"), ("user", "What?")))
    assert example.target_weights[-1] > 0  # what comes after the last gold is not kept
    waiting = chat(("user", "Hi"))
    assert renderer.render_context(waiting) == served(renderer.tokenizer, waiting, 1, None)


@pytest.mark.parametrize(
    "content", ["<", "im_end", "\n", "assistant", "a\n", " Hello ", "|>", "user\n", "x<|", "think"]
)
def test_words_that_look_like_the_template(bpe: PreTrainedTokenizerFast, content: str) -> None:
    if not content.strip():
        content += "a"
    for template in (CHATML, LLAMA3, REASONING):
        renderer = templated(bpe, template)
        good(renderer, chat(("user", content), ("assistant", content), ("user", "a"), ("assistant", content)))


@functools.cache
def _cached(template: str, kind: str) -> Renderer:
    return templated(learnt(kind), template)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.text(max_size=8), st.text(min_size=1, max_size=8).filter(str.strip)), min_size=1, max_size=3),
    st.sampled_from([CHATML, LLAMA3, REASONING, NO_END_OF_TURN, MERE_TEXT]),
    st.sampled_from(["bpe", "byte", "unigram"]),
)
def test_any_words_are_rendered_as_served_or_refused(turns: list[tuple[str, str]], template: str, kind: str) -> None:
    renderer = _cached(template, kind)
    messages = [message for user, assistant in turns for message in (("user", user), ("assistant", assistant))]
    assert not isinstance(check(renderer, chat(*messages)), Rejection)


def test_a_template_that_changes_the_words_is_refused(bpe: PreTrainedTokenizerFast) -> None:
    renderer = templated(bpe, CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"))
    rejection = refusal(renderer, TWO_TURNS)
    assert rejection.reason == "not written by the chat template"
    renderer = templated(bpe, CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"))
    assert refusal(renderer, TWO_TURNS).reason == "not written by the chat template"


def test_a_template_may_refuse_or_break(bpe: PreTrainedTokenizerFast) -> None:
    refusing = CHATML + "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    renderer = templated(bpe, refusing)
    rejection = refusal(renderer, WITH_SYSTEM)
    assert rejection.reason == "refused by the chat template"
    assert "no system role" in rejection.detail
    good(renderer, TWO_TURNS)
    assert refusal(templated(bpe, "{{ messages[7].content }}"), TWO_TURNS).reason == "refused by the chat template"
    assert refusal(templated(bpe, "{{ 1 / 0 }}"), TWO_TURNS).reason == "refused by the chat template"
    with pytest.raises(DataError, match="no system role"):
        renderer.render_context(WITH_SYSTEM)
    with pytest.raises(ConfigError, match="mistake in line 1"):
        templated(bpe, "{% if %}").render([TWO_TURNS])


def test_a_tokenizer_without_a_template(bpe: PreTrainedTokenizerFast, template_file: Callable[[str], str]) -> None:
    renderer = Renderer(bpe, RenderingConfig(), None)
    assert not renderer.has_chat_template
    with pytest.raises(ConfigError, match="no chat template") as error:
        renderer.render([TWO_TURNS])
    assert "rendering.chat_template" in str(error.value)
    with pytest.raises(ConfigError, match="no chat template"):
        renderer.render_context(TWO_TURNS)
    given = Renderer(bpe, RenderingConfig(chat_template=template_file(CHATML)), None)
    assert given.has_chat_template
    good(given, TWO_TURNS)


def test_a_token_over_the_boundary_is_never_trained_on_as_one() -> None:
    """The generation prompt ends in text, so a tokenizer merges over it; the server's ids stay the context."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = train_tokenizer(
        TrainedTokenizerConfig(kind="bpe", vocab_size=400, special_tokens=("<|eot|>",)),
        ["assistant: Hello user: Hello Hello Hello"] * 5,
    )
    renderer = templated(tokenizer, template)
    row = chat(("user", "Hello"), ("assistant", "Hello"), ("user", "Hello"), ("assistant", "Hello"))
    merged = tokenizer("assistant: Hello", add_special_tokens=False)["input_ids"]
    apart = tokenizer("assistant: ", add_special_tokens=False)["input_ids"]
    assert merged[: len(apart)] != apart  # the case this test is about
    examples = good(renderer, row)
    assert len(examples) == 2


def test_a_tokenizer_that_marks_every_text(prepending: PreTrainedTokenizerFast) -> None:
    """Tokenised apart, gold would gain a space: so it is tokenised behind a line's end."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% else %}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    renderer = templated(prepending, template)
    examples = good(renderer, TWO_TURNS)
    said = [prepending.decode(e.token_ids[e.target_weights > 0].tolist(), skip_special_tokens=False) for e in examples]
    assert "".join(said).replace(" ", "") == "Hello!</s>Itis4.</s>"
    assert renderer.num_straddles == 1
    # Where the generation prompt ends with a control token, nothing straddles, and every turn is rendered.
    ending = (
        "{% for m in messages %}{{ m.role }}<unk>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant<unk>{% endif %}"
    )
    [example] = good(templated(prepending, ending), TWO_TURNS)
    assert len(spans(example)) == 2


def test_max_length_holds_for_every_part(bpe: PreTrainedTokenizerFast) -> None:
    whole = templated(bpe, CHATML)
    [example] = good(whole, TWO_TURNS)
    short = Renderer(whole.tokenizer, RenderingConfig(), example.num_tokens - 1)
    [rejection] = short.render([TWO_TURNS])
    assert isinstance(rejection, Rejection)
    assert rejection.reason == "longer than max_length"
    expanded = templated(bpe, REASONING)
    parts = good(expanded, TWO_TURNS)
    short = Renderer(expanded.tokenizer, RenderingConfig(), parts[0].num_tokens)  # the second turn is longer
    assert isinstance(short.render([TWO_TURNS])[0], Rejection)


def test_plain_and_chat_rows_in_one_batch(bpe: PreTrainedTokenizerFast) -> None:
    renderer = templated(bpe, CHATML)
    rows = [plain("Once", " upon"), TWO_TURNS, plain("a", "b"), chat(("assistant", "x")), WITH_SYSTEM]
    results = renderer.render(rows)
    for row, result in zip(rows, results, strict=True):
        [alone] = renderer.render([row])
        if isinstance(result, Rejection):
            assert result == alone
        else:
            assert not isinstance(alone, Rejection)
            assert [e.token_ids.tolist() for e in result] == [e.token_ids.tolist() for e in alone]
    assert isinstance(results[3], Rejection)
