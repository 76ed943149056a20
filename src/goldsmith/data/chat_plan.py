"""A chat made ready for its template: what the template is given, with the words of users that spell control tokens masked.

Where a template itself reads a marker out of an assistant's content (`</think>`), that marker is a control token there; which
those are is tried out, by rendering with and without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from goldsmith.data.chat_template import ChatTemplate, Failure, Job
from goldsmith.data.control_tokens import LOCATED, ControlTokens, Notation, is_private, strings_in
from goldsmith.data.drafts import RejectedError
from goldsmith.data.rendering_config import RenderingConfig
from goldsmith.data.rows import shorten
from goldsmith.types import Conversation, Message

__all__ = ["Plan", "make_plans", "refusal"]


@dataclass(kw_only=True)
class Plan:
    """One conversation and how it is to be rendered.

    Attributes:
        notation: of its texts.
        messages: as the template is given them.
        tools: likewise.
        kept: of an assistant's message the control tokens of its content that the template reads there.
        rejection: why it cannot be rendered.
    """

    conversation: Conversation
    notation: Notation
    messages: list[dict[str, Any]]
    tools: Sequence[Any]
    kept: dict[int, set[str]] = field(default_factory=dict)
    rejection: RejectedError | None = None

    def located(self, controls: ControlTokens, index: int) -> str:
        """The content of a message, each character but white space and what the template reads written as `LOCATED`."""
        content = self.conversation.messages[index].content
        kept = set(controls.pattern.findall(self.messages[index]["content"]))  # what is not masked
        shown, begin = [], 0
        for found in controls.pattern.finditer(content):
            if found.group() in kept:
                shown.append(_hidden(content[begin : found.start()]) + found.group())
                begin = found.end()
        return "".join([*shown, _hidden(content[begin:])])


def _hidden(text: str) -> str:
    return "".join(character if character.isspace() else LOCATED for character in text)


def given(message: Message) -> dict[str, Any]:
    """A message as `transformers` gives it to a template."""
    result: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        result["name"] = message.name
    if message.reasoning is not None:  # under both names that templates read
        result["thinking"] = result["reasoning_content"] = message.reasoning
    if message.tool_calls:
        result["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result


def refusal(failure: Failure, conversation: Conversation) -> RejectedError:
    roles = ", ".join(message.role for message in conversation.messages[:8])
    return RejectedError("refused by the chat template", f"{shorten(failure.message, 160)} (roles: {roles})")


def make_plans(
    conversations: Sequence[Conversation],
    *,
    template: ChatTemplate,
    controls: ControlTokens,
    config: RenderingConfig,
    can_encode_as_text: bool,
) -> list[Plan]:
    """One plan a conversation, in order.

    Args:
        can_encode_as_text: whether the tokenizer can; else a row that needs it is rejected.

    Raises:
        ConfigError: there is no template, or it has a mistake.
    """
    plans = []
    undecided: list[tuple[Plan, int]] = []
    for conversation in conversations:
        plan, open_messages = _plan(conversation, controls, config)
        if plan.notation.is_coded and plan.rejection is None:
            plan.rejection = _hindrance(plan, can_encode_as_text=can_encode_as_text)
        if plan.rejection is None:
            undecided.extend((plan, index) for index in open_messages)
        plans.append(plan)
    if undecided:
        _decide(undecided, template, controls)
    return plans


def _plan(conversation: Conversation, controls: ControlTokens, config: RenderingConfig) -> tuple[Plan, list[int]]:
    """The plan with everything masked that is to be, and which of the assistant's contents the template may read."""
    allowed = config.allow_control_tokens
    messages = [given(message) for message in conversation.messages]
    tools: Sequence[Any] = conversation.tools
    plan = Plan(conversation=conversation, notation=controls.raw, messages=messages, tools=tools)
    for message in conversation.messages:
        if controls.spells(message.role):
            plan.rejection = RejectedError(
                "control token in a role", f"the role {shorten(message.role)} spells a control token; mend the row"
            )
            return plan, []
    if allowed == "all":
        return plan, []
    spelling = [
        index
        for index, message in enumerate(conversation.messages)
        if not (allowed == "assistant" and message.role == "assistant") and _spells(messages[index], message, controls)
    ]
    if not spelling and not any(controls.spells(text) for text in strings_in(tools)):
        return plan, []
    plan.notation = controls.coded
    plan.tools = controls.mask_all(tools)
    for index in spelling:
        role = messages[index]["role"]
        messages[index] = {**controls.mask_all(messages[index]), "role": role}
    open_messages = [
        index
        for index in spelling
        if conversation.messages[index].role == "assistant" and controls.spells(conversation.messages[index].content)
    ]
    return plan, open_messages


def _spells(shown: dict[str, Any], message: Message, controls: ControlTokens) -> bool:
    if controls.spells(message.content):
        return True
    if len(shown) == 2:  # role and content, as most messages have
        return False
    return any(controls.spells(text) for text in strings_in(shown))


def _hindrance(plan: Plan, *, can_encode_as_text: bool) -> RejectedError | None:
    if not can_encode_as_text:
        return RejectedError(
            "control token in content",
            "a message spells a control token, which this tokenizer cannot keep apart from the template's own (it has no "
            "tokenizer.json); remove it, or set rendering.allow_control_tokens",
        )
    own = [given(message) for message in plan.conversation.messages]
    if any(is_private(text) for text in strings_in([*own, *plan.conversation.tools])):
        return RejectedError(
            "control token in content",
            "a message spells a control token, and another character of the row is of Unicode's private planes 15 and 16, which "
            "are needed to keep the two apart; remove one of them",
        )
    return None


def _decide(undecided: Sequence[tuple[Plan, int]], template: ChatTemplate, controls: ControlTokens) -> None:
    """Find which control tokens of an assistant's content the template reads there, and leave those unmasked."""

    def texts(contents: Iterable[tuple[Plan, int, str]]) -> list[str | Failure]:
        jobs = [
            Job(
                messages=[*plan.messages[:index], {**plan.messages[index], "content": content}],
                tools=plan.tools,
                cuts=[(index + 1, False)],
            )
            for plan, index, content in contents
        ]
        return [found if isinstance(found, Failure) else controls.unmask(found) for [found] in template.render(jobs)]

    own = [plan.conversation.messages[index].content for plan, index in undecided]
    as_they_are = texts((plan, index, content) for (plan, index), content in zip(undecided, own, strict=True))
    masked = texts((plan, index, controls.mask(content)) for (plan, index), content in zip(undecided, own, strict=True))
    for (plan, index), plainly, without in zip(undecided, as_they_are, masked, strict=True):
        if isinstance(plainly, Failure):  # a server is refused it, too
            plan.rejection = plan.rejection or refusal(plainly, plan.conversation)
        elif plainly != without:
            _decide_one(plan, index, plainly, texts, controls)


def _decide_one(
    plan: Plan,
    index: int,
    plainly: str,
    texts: Callable[[Iterable[tuple[Plan, int, str]]], list[str | Failure]],
    controls: ControlTokens,
) -> None:
    """Which control tokens of the content make a difference to the template, each alone or several together."""
    content = plan.conversation.messages[index].content
    spelt = controls.spelt_in(content) & controls.ids.keys()

    def changing(keeps: Sequence[set[str]]) -> list[bool]:
        """For each set, whether masking all tokens but these changes what the template writes."""
        found = texts((plan, index, controls.mask(content, keep=keep)) for keep in keeps)
        return [text != plainly for text in found]

    names = sorted(spelt)
    kept = {name for name, changes in zip(names, changing([spelt - {name} for name in names]), strict=True) if changes}
    if changing([kept]) == [True]:
        # Some are read together (both ends of the reasoning): those without which the others may be masked.
        others = [name for name in names if name not in kept]
        kept |= {
            name
            for name, changes in zip(others, changing([kept | {name} for name in others]), strict=True)
            if not changes
        }
        if changing([kept]) == [True]:
            kept = spelt
    plan.kept[index] = kept
    plan.messages[index]["content"] = controls.mask(content, keep=kept)
