"""The gold turns of chats as text: what a server is given before each, and what the template adds for the turn.

For the turn k, `p` is the messages before it with the generation prompt, and `q` the messages up to it. The gold is what `q`
adds to `p`, up to the token that ends the turn.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from goldsmith.data.chat_frame import WORDS, Frame, num_shared, observe_frame
from goldsmith.data.chat_plan import Plan, refusal
from goldsmith.data.chat_template import ChatTemplate, Failure, Job
from goldsmith.data.control_tokens import LOCATED, ControlTokens, strings_in
from goldsmith.data.drafts import Region, RejectedError
from goldsmith.data.plain_rendering import end_ids
from goldsmith.data.rendering_config import RenderingConfig
from goldsmith.data.rows import shorten
from goldsmith.types import Message

__all__ = ["Turn", "TurnTexts"]

# Templates take reasoning out of the content by these, whether or not the tokenizer has tokens for them.
_REASONING_MARKS: Final = r"</?think>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One gold turn as text, in the plan's notation.

    Attributes:
        context, gold: what a server is given, and what is to follow.
        gold_text: the gold as a person writes it, without what ends the turn.
        end_id: of the token that ends `gold`; None where the text has none.
        appended: ids that end it then.
        regions: where characters have weights of their own, in `context + gold`.
        speakers: whose words the gold is: (character of `gold` from which on, role), ascending; empty where the template does not
            tell one message from the next.
        mismatches: whether a server is given more than `context`, which the turn does not continue.
    """

    message: Message
    context: str
    gold: str
    gold_text: str
    end_id: int | None
    appended: tuple[int, ...]
    regions: tuple[Region, ...]
    speakers: tuple[tuple[int, str], ...]
    mismatches: bool = False

    @property
    def whole(self) -> str:
        return self.context + self.gold


@dataclass(kw_only=True)
class _Wanted:
    """The gold turns of a plan, and where their texts are among the jobs."""

    plan: Plan
    turns: list[int]
    first_job: int
    located: dict[int, int]
    called: dict[int, int]


class TurnTexts:
    """Renders the gold turns of chats to text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: RenderingConfig,
        controls: ControlTokens,
        template: ChatTemplate,
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._controls = controls
        self._template = template

    @functools.cached_property
    def frame(self) -> Frame:
        """What the template does around words; a template that refuses to show it is taken to end its turns itself."""
        return observe_frame(self._template, self._controls)

    def turns(self, plans: Sequence[Plan]) -> dict[int, list[Turn] | RejectedError]:
        """The gold turns of each plan as text, by the plan's identity."""
        result: dict[int, list[Turn] | RejectedError] = {}
        jobs: list[Job] = []
        wanted: list[_Wanted] = []
        for plan in plans:
            try:
                if plan.rejection is not None:
                    raise plan.rejection
                wanted.append(self._wanted(plan, jobs))
            except RejectedError as error:
                result[id(plan)] = error
        texts = self._template.render(jobs)
        for want in wanted:
            try:
                result[id(want.plan)] = [self._turn(want, number, texts) for number in range(len(want.turns))]
            except RejectedError as error:
                result[id(want.plan)] = error
        return result

    def _wanted(self, plan: Plan, jobs: list[Job]) -> _Wanted:
        """Which turns are gold; adds the jobs that render them."""
        messages = plan.conversation.messages
        turns = [index for index, message in enumerate(messages) if self._is_gold(message)]
        if self._config.last_turn_only:
            turns = turns[-1:]
        if turns and turns[0] == 0 and messages[0].role == "assistant":
            raise RejectedError(
                "nothing before the assistant",
                "the first message is the assistant's, so no server is ever asked for it; give it `weight: 0`, or put "
                "a user's or system's message before it",
            )
        want = _Wanted(plan=plan, turns=turns, first_job=len(jobs), located={}, called={})
        cuts = [
            cut for index in turns for cut in ((index, True), (index + 1, False), (index, False))[: self._texts_a_turn]
        ]
        # What comes before the first message is no conversation that a template could render.
        cuts = [(max(end, 1), prompt) for end, prompt in cuts]
        jobs.append(Job(messages=plan.messages, tools=plan.tools, cuts=cuts))
        for index in turns:
            message, shown = messages[index], plan.messages[index]
            if message.spans or message.role != "assistant":
                want.located[index] = len(jobs)
                shown = {**shown, "content": plan.located(self._controls, index)}
                changed = [*plan.messages[:index], shown]
                jobs.append(Job(messages=changed, tools=plan.tools, cuts=[(index + 1, False)]))
            if message.tool_calls and message.role == "assistant" and self._config.unwritten == "reject":
                want.called[index] = len(jobs)
                changed = [*plan.messages[:index], {**plan.messages[index], "tool_calls": _renamed(message)}]
                jobs.append(Job(messages=changed, tools=plan.tools, cuts=[(index + 1, False)]))
        return want

    def _is_gold(self, message: Message) -> bool:
        if not self._config.trains(message.role):
            return False
        has_weight = message.weight > 0 or any(weight > 0 for _, _, weight in message.spans)
        return has_weight and (message.role == "assistant" or bool(message.content.strip()))

    @property
    def _texts_a_turn(self) -> int:
        return 3 if self._config.serving_mismatch == "train" else 2

    def _turn(self, want: _Wanted, number: int, texts: list[list[str | Failure]]) -> Turn:
        plan, index = want.plan, want.turns[number]
        begin = number * self._texts_a_turn
        rendered = texts[want.first_job][begin : begin + self._texts_a_turn]
        whole = self._without_closing(plan, self._text(plan, rendered[1]))
        message = plan.conversation.messages[index]
        places: list[int | None] | None = None
        if index in want.located:
            located = self._text(plan, texts[want.located[index]][0], is_located=True)
            places = self._places(plan, index, whole, located)
        regions = tuple(_regions(message, places)) if places is not None else ()
        if message.role != "assistant":
            assert places is not None
            return self._other_turn(plan, message, whole, places, regions)
        context = self._text(plan, rendered[0])
        if not context:
            raise RejectedError("empty context", f"the template renders nothing before messages[{index}]")
        mismatches = not whole.startswith(context)
        if mismatches:
            context = self._shared_context(plan, index, context, whole, rendered[2:])
        tail = whole[len(context) :]
        if self._config.unwritten == "reject":
            called = self._text(plan, texts[want.called[index]][0]) if index in want.called else None
            self._require_written(plan, index, tail, called)
        gold, end = self._ended(plan, message, tail)
        gold_text = gold if end is None else gold[: -len(end)]
        return Turn(
            message=message,
            context=context,
            gold=gold,
            gold_text=plan.notation.read(gold_text),
            end_id=None if end is None else plan.notation.token_id(end),
            # A template with no end of turn: the end token is appended, else a model never stops.
            appended=() if end is not None else tuple(end_ids(self._tokenizer, self._config)),
            regions=regions,
            speakers=((0, message.role),),
            mismatches=mismatches,
        )

    def _text(self, plan: Plan, found: str | Failure, *, is_located: bool = False) -> str:
        if isinstance(found, Failure):
            raise refusal(found, plan.conversation)
        return plan.notation.write_code(found) if is_located else plan.notation.write(found)

    def _without_closing(self, plan: Plan, text: str) -> str:
        closing = self.frame.closing
        return text.removesuffix(plan.notation.write(closing)) if closing else text

    def _shared_context(self, plan: Plan, index: int, served: str, whole: str, before: list[str | Failure]) -> str:
        """As much of what a server is given as the turn continues, where the recipe asks for that; else the row is rejected."""
        same = num_shared(served, whole)
        for text in (served, whole):
            for found in plan.notation.pattern.finditer(text):
                if found.start() < same < found.end():
                    same = found.start()
        if before:
            # What came before the turn is not to become gold: the two may part in the generation prompt only.
            common = self._without_closing(plan, self._text(plan, before[0]))
            if served.startswith(common) and same >= len(common):
                return served[:same]
        remedy = (
            "use a template whose generation prompt is how an assistant's turn begins, give the turn the reasoning that the prompt "
            "opens, or set rendering.serving_mismatch: train"
        )
        if before:
            remedy = "the two part before the generation prompt, so it cannot be trained on either"
        raise RejectedError(
            "serving mismatch",
            f"before messages[{index}] a server is given a text that ends with {_shown(plan, served, same)}, but with the turn in "
            f"place the template writes {_shown(plan, whole, same)} there; {remedy}",
        )

    def _require_written(self, plan: Plan, index: int, tail: str, called: str | None) -> None:
        """Reject where the template leaves out or changes what the row holds as gold."""
        # As the template was given it, in the notation of what it wrote.
        shown, write = plan.messages[index], plan.notation.write
        kept = [re.escape(write(token)) for token in plan.kept.get(index, ())]
        missing = None
        position = 0
        for piece in re.split("|".join([_REASONING_MARKS, *kept]), write(shown["content"])):
            words = piece.strip()
            found = tail.find(words, position)
            if found < 0:
                missing = f"the content {shorten(plan.notation.read(words))}"
                break
            position = found + len(words)
        if missing is None and not self.frame.writes_once:
            missing = "the content once"
        reasoning = shown.get("reasoning_content")
        if missing is None and reasoning is not None and write(reasoning).strip() not in tail:
            missing = f"the reasoning {shorten(plan.notation.read(write(reasoning)))}"
        for number, call in enumerate(shown.get("tool_calls", ())):
            if called is not None and f"{WORDS}{number}z" not in called:
                missing = missing or f"the tool call {shorten(json.dumps(call, ensure_ascii=False))}"
            for text in strings_in(list(_leaves(call.get("function", call).get("arguments", "")))):
                ways = (text.strip(), json.dumps(text, ensure_ascii=False)[1:-1])
                if not any(write(way) in tail for way in ways):
                    missing = missing or f"the argument {shorten(plan.notation.read(write(text)))} of a tool call"
        if missing is not None:
            raise RejectedError(
                "not written by the chat template",
                f"the template does not write {missing} of messages[{index}] as it is, but {shorten(plan.notation.read(tail))}; "
                "use a template that does, mend the row, or set rendering.unwritten: ignore",
            )

    def _ended(self, plan: Plan, message: Message, tail: str) -> tuple[str, str | None]:
        """The gold of the turn, and how the token that ends it stands in it; None where it has none."""
        if self.frame.end_token is not None or not self.frame.markers:
            last = None
            for last in plan.notation.pattern.finditer(tail):  # noqa: B007 - the last one
                pass
            if self.frame.end_token is not None and last is not None and not tail[last.end() :].strip():
                return tail[: last.end()], last.group()
            return tail.rstrip(), None
        marker = self.frame.markers.get(bool(message.tool_calls))
        if marker is None:
            return tail.rstrip(), None
        space, token = marker
        end = plan.notation.write(token)
        return tail + space + end, end

    def _other_turn(
        self, plan: Plan, message: Message, whole: str, places: list[int | None], regions: tuple[Region, ...]
    ) -> Turn:
        """A turn that is nobody's to generate (`train_on` a user, say): its words, and what ends it."""
        own = [place for place in places if place is not None]
        begin, end = min(own), max(own) + 1
        last = None
        for last in plan.notation.pattern.finditer(whole, end):  # noqa: B007 - the last one
            pass
        has_end = last is not None and not whole[last.end() :].strip()
        gold = whole[begin : last.end() if has_end and last is not None else end]
        return Turn(
            message=message,
            context=whole[:begin],
            gold=gold,
            gold_text=message.content.strip(),
            end_id=plan.notation.token_id(last.group()) if has_end and last is not None else None,
            appended=(),
            regions=regions,
            speakers=((0, message.role),),
        )

    def _places(self, plan: Plan, index: int, whole: str, located: str) -> list[int | None]:
        """For each character of a message's content where it stands in the text; None where the template trimmed it."""
        content = plan.conversation.messages[index].content
        shown = plan.located(self._controls, index)
        own = [place for place, character in enumerate(shown) if character == LOCATED]
        there = [place for place, character in enumerate(located) if character == LOCATED]
        fits = len(own) == len(there) and all(
            place < len(whole) and whole[place] == content[source] for source, place in zip(own, there, strict=True)
        )
        if not fits or not own:
            raise RejectedError(
                "words without a place",
                f"the template does not write the content of messages[{index}] once and as it is, so that its characters cannot be "
                "weighted; use another template, or weights for whole messages",
            )
        places: list[int | None] = [None] * len(content)
        for source, place in zip(own, there, strict=True):
            places[source] = place
        # White space and what was kept, between characters whose places are known.
        for (source, place), (next_source, next_place) in zip(
            zip(own, there, strict=True), list(zip(own, there, strict=True))[1:], strict=False
        ):
            if next_source - source == next_place - place:
                places[source:next_source] = range(place, next_place)
        return places

    def whole_texts(self, plans: Sequence[Plan]) -> dict[int, list[Turn] | RejectedError]:
        """Of each plan one turn without a context: the whole text is gold."""
        jobs = []
        for plan in plans:
            cuts = [(end, False) for end in range(len(plan.messages), 0, -1)]
            jobs.append(Job(messages=plan.messages, tools=plan.tools, cuts=cuts))
        result: dict[int, list[Turn] | RejectedError] = {}
        for plan, texts in zip(plans, self._template.render(jobs), strict=True):
            try:
                if plan.rejection is not None:
                    raise plan.rejection
                result[id(plan)] = [self._whole_text(plan, texts)]
            except RejectedError as error:
                result[id(plan)] = error
        return result

    def _whole_text(self, plan: Plan, texts: list[str | Failure]) -> Turn:
        messages = plan.conversation.messages
        text = self._text(plan, texts[0])
        regions: list[Region] = []
        is_weighted = any(message.weight != 1 or message.spans for message in messages)
        ends: list[int] = []
        try:
            ends = self._message_ends(plan, texts, text)
        except RejectedError:
            if is_weighted:
                raise
        if is_weighted:
            for index, message in enumerate(messages):
                spans: list[Region] = []
                if message.spans:
                    changed = [*plan.messages]
                    changed[index] = {**changed[index], "content": plan.located(self._controls, index)}
                    [[located]] = self._template.render(
                        [Job(messages=changed, tools=plan.tools, cuts=[(len(messages), False)])]
                    )
                    places = self._places(plan, index, text, self._text(plan, located, is_located=True))
                    spans = list(_regions(message, places))
                # A token takes the highest weight that it touches, so the message's goes around its spans.
                begin = ends[index]
                for span in [*spans, Region(ends[index + 1], ends[index + 1], 0.0)]:
                    regions += [Region(begin, span.begin, message.weight), span]
                    begin = span.end
        last = None
        for last in plan.notation.pattern.finditer(text):  # noqa: B007 - the last one
            pass
        ends_itself = last is not None and not text[last.end() :].strip()
        return Turn(
            message=Message(role="all", content=text),
            context="",
            gold=text,
            gold_text=plan.notation.read(text),
            end_id=None,
            appended=() if ends_itself else tuple(end_ids(self._tokenizer, self._config)),
            regions=tuple(region for region in regions if region.begin < region.end),
            speakers=tuple(zip(ends[:-1], (message.role for message in messages), strict=True)) if ends else (),
        )

    def _message_ends(self, plan: Plan, texts: list[str | Failure], text: str) -> list[int]:
        """0, then where the words of each message end in `text`; with each what the template writes around it."""
        ends = [0]
        for number, found in enumerate(reversed(texts), start=1):
            part = self._without_closing(plan, self._text(plan, found)) if number < len(texts) else text
            if not text.startswith(part):
                raise RejectedError(
                    "words without a place",
                    f"the template writes messages[{number - 1}] otherwise when more follow, so that its tokens cannot be "
                    "weighted; leave the weights out, or train on the assistant",
                )
            ends.append(max(ends[-1], len(part)))
        return ends


def _renamed(message: Message) -> list[dict[str, Any]]:
    """The tool calls of a message, each with a name that is found again."""
    result = []
    for number, call in enumerate(message.tool_calls):
        name = f"{WORDS}{number}z"
        has_function = isinstance(call.get("function"), dict)
        result.append(
            {**call, "function": {**call["function"], "name": name}} if has_function else {**call, "name": name}
        )
    return result


def _leaves(value: Any) -> Sequence[Any]:
    """What stands in the arguments of a call, without the names."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _regions(message: Message, places: list[int | None]) -> Sequence[Region]:
    found = []
    for begin, end, weight in message.spans:
        own = [place for place in places[begin:end] if place is not None]
        if own:  # else the template trimmed all of it
            found.append(Region(min(own), max(own) + 1, weight))
    return found


def _shown(plan: Plan, text: str, begin: int) -> str:
    """The text from where two part, and from the control token before that."""
    starts = [found.start() for found in plan.notation.pattern.finditer(text, 0, begin)]
    return shorten(plan.notation.read(text[starts[-1] if starts else begin :]))
