"""Templates in their process: the text of `transformers`; a hostile one is refused, and nothing else lost."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2.sandbox
import pytest
from chat_families import FAMILIES, as_given, conversations, family_tokenizer
from data_examples import CHATML, chat, learnt
from transformers import PreTrainedTokenizerFast

from goldsmith.data import template_worker
from goldsmith.data.chat_plan import given
from goldsmith.data.chat_template import ChatTemplate, Failure, Job, TemplateProcess
from goldsmith.data.rendering import Renderer, RenderingConfig
from goldsmith.data.rows import Rejection
from goldsmith.errors import ConfigError

HELLO = [{"role": "user", "content": "Hello"}]
JOB = Job(messages=HELLO, tools=(), cuts=[(1, True)])


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    made = TemplateProcess(seconds=0.4, max_bytes=400 << 20)
    yield made
    made.close()


def one(process: TemplateProcess, template: str, job: Job = JOB) -> str | Failure:
    [[found]] = process.render(template, [job], variables={"bos_token": "<s>"}, now=datetime(2026, 1, 31, 12))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_transformers(family: str, shared_folder: object) -> None:
    tokenizer = family_tokenizer(family, "plain")
    template = ChatTemplate(tokenizer)
    for name, conversation in conversations(family).items():
        cuts = [(end, prompt) for end in range(1, len(conversation.messages) + 1) for prompt in (False, True)]
        messages = [given(message) for message in conversation.messages]
        [texts] = template.render([Job(messages=messages, tools=conversation.tools, cuts=cuts)])
        for (end, prompt), text in zip(cuts, texts, strict=True):
            expected: str | Exception
            try:
                expected = tokenizer.apply_chat_template(
                    [as_given(message) for message in conversation.messages[:end]],
                    tools=list(conversation.tools) or None,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            except Exception as error:  # of any kind: a template is foreign code
                expected = error
            if isinstance(text, Failure):
                assert isinstance(expected, Exception), (name, end, prompt, text)
                assert str(expected)[:40] in text.message
            else:
                assert text == expected, (name, end, prompt)


LOOP = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)
DOUBLING = (
    "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
    "{{ ns.s | length }}"
)
HOSTILE = {
    "loop": (LOOP, "time"),
    "doubling": (DOUBLING, "memory"),
    "power": ("{{ 9 ** (9 ** 9) }}", "time"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refused"),
    "class": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refused"),
    "globals": ("{{ raise_exception.__globals__['__builtins__'] }}", "refused"),
    "format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "refused"),
    "code": ("{{ strftime_now.__self__.__class__.__mro__ }}", "refused"),
    "change": ("{{ messages.append(1) }}", "refused"),
    "namespace": ("{% set ns = namespace(__init__=1) %}", "refused"),
    "range": ("{% for a in range(99999999) %}{% endfor %}", "refused"),
    "undefined": ("{{ messages[7].content }}", "refused"),
    "import": ("{% include '/etc/passwd' %}", "refused"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_and_the_next_text_rendered(name: str, process: TemplateProcess) -> None:
    template, kind = HOSTILE[name]
    began = time.monotonic()
    found = one(process, template)
    if name in ("globals", "code") and found == "":  # jinja2 gives nothing for what it hides
        return
    assert isinstance(found, Failure), str(found)[:200]
    assert found.kind in ({"memory", "died"} if kind == "memory" else {kind}), found
    assert time.monotonic() - began < 60
    assert one(process, "{{ bos_token }}{{ messages[0].content }}") == "<s>Hello"


@pytest.mark.parametrize("worst", ["{% set n = 9 %}{{ n ** (n ** n) }}", LOOP, DOUBLING])
def test_of_a_batch_only_the_offender_is_refused(worst: str, process: TemplateProcess) -> None:
    template = "{% if messages[0].content == 'bad' %}" + worst + "{% else %}{{ messages[0].content }}{% endif %}"
    words = ["a", "b", "bad", "c", "d"]
    jobs = [Job(messages=[{"role": "user", "content": word}], tools=(), cuts=[(1, False)]) for word in words]
    results = process.render(template, jobs, variables={}, now=datetime.now())
    assert [found for [found] in results if isinstance(found, str)] == ["a", "b", "c", "d"]
    assert isinstance(results[2][0], Failure)


ASKED_OF_THE_SANDBOX = (
    "{{ m.role }} {{ m['role'] }} {{ m.nothing }} {{ m.nothing is defined }} {{ m.keys is defined }} {{ m.get('role') }}",
    "{{ m.items }}",  # a method, although the message holds such a key
    "{% for key, value in m.items() %}{{ key }}={{ value }};{% endfor %}",
    "{{ m.content.upper() }} {{ m.content.split('l')[-1].strip('o') }} {{ m.content.startswith('He') }}",
    "{{ m.content.format(1) }}",
    "{{ '{0.__class__}'.format(m) }}",
    "{{ '{a[role]}'.format_map({'a': m}) }}",
    "{{ ('{0.__class__}'.format)(m) }}",
    "{{ m.content.__class__ }}",
    "{{ m.content.__class__.__mro__ }}",
    "{{ m.content['upper']() }} {{ m.content['__class__'] }}",
    "{{ m.__class__ }} {{ m.__len__ }}",
    "{{ m.update({'role': 'x'}) }}",
    "{{ m.pop('role') }}",
    "{{ messages.append(m) }}",
    "{{ messages.index(m) }} {{ messages.__class__ }}",
    "{% set ns = namespace(a=1, b=m) %}{% set ns.a = 2 %}{{ ns.a }} {{ ns.b.role }} {{ ns.c }} {{ ns.__class__ }} {{ ns._x }}",
    "{% set ns = namespace(_a=1) %}",
    "{% macro say(x, y='!') %}{{ x }}{{ y }}{{ caller is defined }}{% endmacro %}{{ say(m.role) }}{{ say('a', y='b') }}",
    "{% macro say() %}{{ caller() }}{% endmacro %}{% call say() %}inner{% endcall %}{{ say.name }}{{ say.__call__ }}",
    "{% for x in 'ab' %}{{ loop.index0 }}{{ loop.first }}{{ loop.cycle('p', 'q') }}{{ loop.__init__ }}{% endfor %}",
    "{{ m.content.upper(1) }}",
    "{{ m.content.join(['a', 'b']) }} {{ m.content.encode() }} {{ m.content | attr('upper') }}",
    "{{ say.unknown }}",
    "{{ range(3) | list }} {{ dict(a=1) }} {{ dict.fromkeys('ab') }} {{ dict.__class__ }}",
)


@pytest.mark.parametrize("text", ASKED_OF_THE_SANDBOX)
def test_the_faster_sandbox_answers_as_jinja2s_own(text: str) -> None:
    def answer(made: Any) -> str:
        messages = [{"role": "user", "content": "Hello", "items": "[]"}]
        answers = []
        for _ in range(2):  # the second time from memory
            try:
                answers.append(made.from_string(text).render(messages=messages, m=messages[0]))
            except Exception as error:
                answers.append(f"{type(error).__name__}: {error}")
        assert answers[0] == answers[1]
        assert messages == [{"role": "user", "content": "Hello", "items": "[]"}]
        return re.sub("0x[0-9a-f]+", "0x", answers[0])

    faster = template_worker.environment(datetime(2026, 1, 31))
    own = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    own.globals |= {name: faster.globals[name] for name in ("raise_exception", "strftime_now", "dict", "namespace")}
    assert answer(faster) == answer(own)


def test_a_template_that_never_ends_does_not_do_so_for_every_row() -> None:
    made = TemplateProcess(seconds=0.05)
    with pytest.raises(ConfigError, match="more than 8 conversations"):
        made.render(LOOP, [JOB] * 1000, variables={}, now=datetime.now())
    made.close()


def test_a_row_is_rejected_with_the_reason(bpe: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = TemplateProcess(seconds=0.3)
    monkeypatch.setattr("goldsmith.data.chat_template._SHARED", shared)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe.backend_tokenizer,
        eos_token="</s>",
        chat_template=CHATML + "{% if messages[0].content == 'bad' %}" + LOOP + "{% endif %}",
    )
    renderer = Renderer(tokenizer, RenderingConfig(), None)
    good, bad = chat(("user", "a"), ("assistant", "b")), chat(("user", "bad"), ("assistant", "b"))
    first, second, third = renderer.render([good, bad, good])
    shared.close()
    assert isinstance(second, Rejection)
    assert second.reason == "refused by the chat template"
    assert "longer than 0.3 s" in second.detail
    assert not isinstance(first, Rejection)
    assert not isinstance(third, Rejection)


def test_the_process_is_small_and_alone(process: TemplateProcess) -> None:
    one(process, "a")
    assert process._process is not None
    maps = f"/proc/{process._process.pid}/maps"
    if not os.path.exists(maps):
        pytest.skip("waits for a system with /proc")
    with open(maps) as lines:
        assert not any("torch" in line or "tokenizers" in line for line in lines)


def test_a_killed_process_is_started_anew(process: TemplateProcess) -> None:
    one(process, "a")
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    assert one(process, "{{ messages[0].content }}") == "Hello"


def test_the_date(bpe: PreTrainedTokenizerFast) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe.backend_tokenizer,
        eos_token="</s>",
        chat_template="{{ strftime_now('%d %b %Y') }}" + CHATML,
    )
    renderer = Renderer(tokenizer, RenderingConfig(date="2024-07-26"), None)
    ids = renderer.render_context(chat(("user", "a"), ("assistant", "b")))
    assert tokenizer.decode(ids).startswith("26 Jul 2024")
    assert RenderingConfig.model_validate({"date": datetime(2024, 7, 26).date()}).date == "2024-07-26"


def test_a_mistake_in_the_template_is_named() -> None:
    tokenizer = learnt("byte")
    template = ChatTemplate(tokenizer, text="\n{% if %}")
    with pytest.raises(ConfigError, match="mistake in line 2"):
        template.render([JOB])
    with pytest.raises(ConfigError, match="no chat template"):
        ChatTemplate(tokenizer).render([JOB])
