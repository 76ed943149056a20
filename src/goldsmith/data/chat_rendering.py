"""Chats: before each gold turn the ids that a server is given, by the same template; then what the template adds for the turn.

For the turn k, `p` is the messages before it with the generation prompt, and `q` the messages up to it. The gold is what `q`
adds to `p`, up to the token that ends the turn. A conversation is one example where each turn's context begins, in ids, with all
that came before it; else it is expanded, one example a turn.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from goldsmith.data.chat_plan import Plan, given, make_plans, refusal
from goldsmith.data.chat_template import ChatTemplate, Failure, Job
from goldsmith.data.control_tokens import LOCATED, ControlTokens, strings_in
from goldsmith.data.drafts import Draft, Region, RejectedError, no_gold, token_weights, turn_weights
from goldsmith.data.encoding import Encoder
from goldsmith.data.plain_rendering import end_ids
from goldsmith.data.rendering_config import RenderingConfig
from goldsmith.data.rows import Rejection, shorten
from goldsmith.errors import ConfigError, DataError
from goldsmith.types import Conversation, Message

__all__ = ["ChatRenderer"]

# Stand for words, to see what the template puts around them. Letters only, so that no template trims them.
_WORDS: Final = "goldsmithSentinelWords"
_NEXT_WORDS: Final = "goldsmithSentinelAnswer"
# Templates take reasoning out of the content by these, whether or not the tokenizer has tokens for them.
_REASONING_MARKS: Final = r"</?think>"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """One gold turn as text, in the plan's notation.

    Attributes:
        context, gold: what a server is given, and what is to follow.
        gold_text: the gold as a person writes it, without what ends the turn.
        end_id: of the token that ends `gold`; None where the text has none.
        appended: ids that end it then.
        regions: where characters have weights of their own, in `context + gold`.
    """

    message: Message
    context: str
    gold: str
    gold_text: str
    end_id: int | None
    appended: tuple[int, ...]
    regions: tuple[Region, ...]

    @property
    def whole(self) -> str:
        return self.context + self.gold


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """What a template does around words, seen from a rendering of words that are known.

    Attributes:
        closing: what it puts at the end of every conversation that is not to go on; often empty.
        end_token: what it ends an assistant's turn with; None where it has nothing of its own.
        markers: in that case what begins the next turn after words, and after tool calls: the text before it, and the token.
        writes_once: whether it writes the assistant's words once.
    """

    closing: str
    end_token: str | None
    markers: dict[bool, tuple[str, str]]
    writes_once: bool


@dataclass(kw_only=True)
class _Wanted:
    """The gold turns of a plan, and where their texts are among the jobs."""

    plan: Plan
    turns: list[int]
    first_job: int
    located: dict[int, int]
    called: dict[int, int]


class ChatRenderer:
    """Renders chats.

    Attributes:
        num_straddles: rows so far in which a token of the whole text lies over the edge between a context and its gold.
        straddling: the sources of these rows in the last call of `render`.
        num_control_texts: rows so far in which somebody's words spell a control token and were encoded as text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: RenderingConfig,
        encoder: Encoder,
        controls: ControlTokens,
        template: ChatTemplate,
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._encoder = encoder
        self._controls = controls
        self._template = template
        self._seen_ends: set[int] = set()
        self.num_straddles = 0
        self.straddling: list[str] = []
        self.num_control_texts = 0

    @property
    def end_token_ids(self) -> set[int]:
        """What ends an assistant's turn, by the template and by the rows rendered so far."""
        names = [self._frame.end_token, *(token for _, token in self._frame.markers.values())]
        return self._seen_ends | {self._controls.ids[name] for name in names if name}

    def context(self, conversation: Conversation) -> list[int]:
        """The ids that a server is given before the last assistant turn (after all messages where there is none).

        Raises:
            DataError: the template refuses the messages, or renders nothing.
        """
        turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        end = turns[-1] if turns else len(conversation.messages)
        try:
            [plan] = self._plans([conversation])
            if plan.rejection is not None:
                raise plan.rejection
            [[text]] = self._template.render([Job(messages=plan.messages, tools=plan.tools, cuts=[(end, True)])])
            if isinstance(text, Failure):
                raise refusal(text, conversation)
        except RejectedError as error:
            raise DataError(f"{conversation.source}: {error.reason}: {error.detail}") from error
        [ids] = self._encoder([plan.notation.write(text)], plan.notation)
        if not ids:
            raise DataError(f"{conversation.source}: the context is empty", remedy="give the row a prompt")
        return ids

    def render(self, conversations: Sequence[Conversation]) -> list[list[Draft] | Rejection]:
        """One entry a conversation, in order: its drafts, or why it has none.

        Raises:
            ConfigError: there is no template, it has a mistake, or an end token is to be appended and the tokenizer has none.
        """
        self.straddling = []
        plans = self._plans(conversations)
        turns = self._whole_texts(plans) if self._config.train_on == "all" else self._turns(plans)
        encoded = self._encode(plans, turns)
        results: list[list[Draft] | Rejection] = []
        for plan in plans:
            found = turns[id(plan)]
            try:
                if isinstance(found, RejectedError):
                    raise found
                drafts = self._drafts(plan, found, encoded)
            except RejectedError as error:
                results.append(error.of(plan.conversation))
                continue
            self.num_control_texts += bool(drafts) and plan.notation.is_coded
            results.append(drafts or no_gold(plan.conversation))
        return results

    def _plans(self, conversations: Sequence[Conversation]) -> list[Plan]:
        return make_plans(
            conversations,
            template=self._template,
            controls=self._controls,
            config=self._config,
            can_encode_as_text=self._encoder.can_encode_as_text,
        )

    # ----------------------------------------------------------------------------------------------------------- texts

    def _turns(self, plans: Sequence[Plan]) -> dict[int, list[_Turn] | RejectedError]:
        """The gold turns of each plan as text, by the plan's identity."""
        result: dict[int, list[_Turn] | RejectedError] = {}
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

    def _turn(self, want: _Wanted, number: int, texts: list[list[str | Failure]]) -> _Turn:
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
        if not whole.startswith(context):
            context = self._shared_context(plan, index, context, whole, rendered[2:])
        tail = whole[len(context) :]
        if self._config.unwritten == "reject":
            called = self._text(plan, texts[want.called[index]][0]) if index in want.called else None
            self._require_written(plan, index, tail, called)
        gold, end = self._ended(plan, message, tail)
        gold_text = gold if end is None else gold[: -len(end)]
        return _Turn(
            message=message,
            context=context,
            gold=gold,
            gold_text=plan.notation.read(gold_text),
            end_id=None if end is None else plan.notation.token_id(end),
            # A template with no end of turn: the end token is appended, else a model never stops.
            appended=() if end is not None else tuple(end_ids(self._tokenizer, self._config)),
            regions=regions,
        )

    def _text(self, plan: Plan, found: str | Failure, *, is_located: bool = False) -> str:
        if isinstance(found, Failure):
            raise refusal(found, plan.conversation)
        return plan.notation.write_code(found) if is_located else plan.notation.write(found)

    def _without_closing(self, plan: Plan, text: str) -> str:
        closing = self._frame.closing
        return text.removesuffix(plan.notation.write(closing)) if closing else text

    def _shared_context(self, plan: Plan, index: int, served: str, whole: str, before: list[str | Failure]) -> str:
        """As much of what a server is given as the turn continues, where the recipe asks for that; else the row is rejected."""
        same = _num_shared(served, whole)
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
        if missing is None and not self._frame.writes_once:
            missing = "the content once"
        reasoning = shown.get("reasoning_content")
        if missing is None and reasoning is not None and write(reasoning).strip() not in tail:
            missing = f"the reasoning {shorten(plan.notation.read(write(reasoning)))}"
        for number, call in enumerate(shown.get("tool_calls", ())):
            if called is not None and f"{_WORDS}{number}z" not in called:
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
        if self._frame.end_token is not None or not self._frame.markers:
            last = None
            for last in plan.notation.pattern.finditer(tail):  # noqa: B007 - the last one
                pass
            if self._frame.end_token is not None and last is not None and not tail[last.end() :].strip():
                return tail[: last.end()], last.group()
            return tail.rstrip(), None
        marker = self._frame.markers.get(bool(message.tool_calls))
        if marker is None:
            return tail.rstrip(), None
        space, token = marker
        end = plan.notation.write(token)
        return tail + space + end, end

    def _other_turn(
        self, plan: Plan, message: Message, whole: str, places: list[int | None], regions: tuple[Region, ...]
    ) -> _Turn:
        """A turn that is nobody's to generate (`train_on` a user, say): its words, and what ends it."""
        own = [place for place in places if place is not None]
        begin, end = min(own), max(own) + 1
        last = None
        for last in plan.notation.pattern.finditer(whole, end):  # noqa: B007 - the last one
            pass
        has_end = last is not None and not whole[last.end() :].strip()
        gold = whole[begin : last.end() if has_end and last is not None else end]
        return _Turn(
            message=message,
            context=whole[:begin],
            gold=gold,
            gold_text=message.content.strip(),
            end_id=plan.notation.token_id(last.group()) if has_end and last is not None else None,
            appended=(),
            regions=regions,
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

    # ------------------------------------------------------------------------------------------------------------- all

    def _whole_texts(self, plans: Sequence[Plan]) -> dict[int, list[_Turn] | RejectedError]:
        """Of each plan one turn without a context: the whole text is gold."""
        jobs = []
        for plan in plans:
            cuts = [(end, False) for end in range(len(plan.messages), 0, -1)]
            weighted = any(message.weight != 1 or message.spans for message in plan.conversation.messages)
            jobs.append(Job(messages=plan.messages, tools=plan.tools, cuts=cuts if weighted else cuts[:1]))
        result: dict[int, list[_Turn] | RejectedError] = {}
        for plan, texts in zip(plans, self._template.render(jobs), strict=True):
            try:
                if plan.rejection is not None:
                    raise plan.rejection
                result[id(plan)] = [self._whole_text(plan, texts)]
            except RejectedError as error:
                result[id(plan)] = error
        return result

    def _whole_text(self, plan: Plan, texts: list[str | Failure]) -> _Turn:
        messages = plan.conversation.messages
        text = self._text(plan, texts[0])
        regions: list[Region] = []
        if len(texts) > 1:
            ends = [0]
            for number, found in enumerate(reversed(texts), start=1):
                part = self._without_closing(plan, self._text(plan, found)) if number < len(messages) else text
                if not text.startswith(part):
                    raise RejectedError(
                        "words without a place",
                        f"the template writes messages[{number - 1}] otherwise when more follow, so that its tokens cannot be "
                        "weighted; leave the weights out, or train on the assistant",
                    )
                ends.append(len(part))
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
        return _Turn(
            message=Message(role="all", content=text),
            context="",
            gold=text,
            gold_text=plan.notation.read(text),
            end_id=None,
            appended=() if ends_itself else tuple(end_ids(self._tokenizer, self._config)),
            regions=tuple(region for region in regions if region.begin < region.end),
        )

    # ------------------------------------------------------------------------------------------------------------- ids

    def _encode(
        self, plans: Sequence[Plan], turns: dict[int, list[_Turn] | RejectedError]
    ) -> dict[tuple[bool, str], list[int]]:
        """The ids of every context and whole of all plans, by notation and text."""
        result: dict[tuple[bool, str], list[int]] = {}
        for is_coded in (False, True):
            texts: dict[str, None] = {}
            for plan in plans:
                found = turns[id(plan)]
                if plan.notation.is_coded == is_coded and not isinstance(found, RejectedError):
                    for turn in found:
                        texts[turn.context] = texts[turn.whole] = None
            notation = self._controls.coded if is_coded else self._controls.raw
            for text, ids in zip(texts, self._encoder(list(texts), notation), strict=True):
                result[is_coded, text] = ids
        return result

    def _drafts(self, plan: Plan, turns: list[_Turn], encoded: dict[tuple[bool, str], list[int]]) -> list[Draft]:
        """One draft where every turn's context begins with all that came before it, in ids; else one a turn."""
        straddles = False
        pieces: list[tuple[_Turn, list[int], list[int], npt.NDArray[np.float32]]] = []
        for turn in turns:
            context = encoded[plan.notation.is_coded, turn.context]
            whole = encoded[plan.notation.is_coded, turn.whole]
            if plan.notation.is_coded:
                self._require_text(plan, turn, whole)
            ids, shift = self._gold_ids(plan, turn, context, whole)
            straddles = straddles or shift is not None
            weights = self._weights(plan, turn, context, ids, shift)
            pieces.append((turn, context, [*ids, *turn.appended], weights))
        pieces = [piece for piece in pieces if piece[3].any()]
        if not pieces:
            return []
        token_ids: list[int] = []
        all_weights: list[npt.NDArray[np.float32]] = []
        is_whole = self._config.turns != "expanded"
        if is_whole:
            for _, context, ids, weights in pieces:
                if context[: len(token_ids)] != token_ids:
                    is_whole = False
                    break
                all_weights += [np.zeros(len(context) - len(token_ids), dtype=np.float32), weights]
                token_ids = context + ids
        example_id = plan.conversation.example_id
        if is_whole:
            num_bytes = sum(len(turn.gold_text.encode("utf-8")) for turn, *_ in pieces)
            drafts = [self._draft(example_id, token_ids, np.concatenate(all_weights), num_bytes)]
        elif self._config.turns == "together":
            raise RejectedError(
                "turns cannot be trained together",
                "the template writes earlier turns otherwise once others follow, so that what one turn was trained on is not how "
                "the next one's context begins; set rendering.turns to auto or expanded",
            )
        else:
            drafts = [
                self._draft(
                    f"{example_id}@{number}",
                    context + ids,
                    np.concatenate([np.zeros(len(context), dtype=np.float32), weights]),
                    len(turn.gold_text.encode("utf-8")),
                )
                for number, (turn, context, ids, weights) in enumerate(pieces, start=1)
            ]
        drafts = [draft for draft in drafts if draft.target_weights.any()]
        if straddles:
            self.num_straddles += 1
            self.straddling.append(plan.conversation.source)
        ends = (turn for turn, *_ in pieces if turn.message.role == "assistant")
        self._seen_ends.update(end for turn in ends for end in (turn.end_id, *turn.appended) if end is not None)
        return drafts

    @staticmethod
    def _draft(example_id: str, token_ids: list[int], weights: npt.NDArray[np.float32], num_bytes: int) -> Draft:
        weights[0] = 0.0  # nothing comes before the first token to predict it
        return Draft(example_id=example_id, token_ids=token_ids, target_weights=weights, num_bytes=num_bytes)

    def _require_text(self, plan: Plan, turn: _Turn, whole: list[int]) -> None:
        """That the control tokens among the ids are those of the template, and none came out of words."""
        wanted = [plan.notation.token_id(found) for found in plan.notation.pattern.findall(turn.whole)]
        if [index for index in whole if index in self._controls.id_set] != wanted:
            raise RejectedError(
                "control token in content",
                f"the words spell a control token, and the tokenizer makes one of them even where it is told not to, in "
                f"{shorten(plan.notation.read(turn.whole))}; remove it",
            )

    def _gold_ids(self, plan: Plan, turn: _Turn, context: list[int], whole: list[int]) -> tuple[list[int], int | None]:
        """The ids that follow the context; and, where a token would straddle, how much earlier began the text they are from."""
        shift: int | None = None
        if whole[: len(context)] == context:
            gold = whole[len(context) :]
        else:
            # A token would straddle the boundary; the server's context cannot change, so the gold is tokenised apart.
            gold, shift = self._tokenised_apart(plan, turn, context, whole)
        if turn.end_id is not None and gold[-1:] != [turn.end_id]:
            raise RejectedError(
                "serving mismatch",
                f"the end of the turn is not a token of its own in {shorten(plan.notation.read(turn.gold))}",
            )
        if not gold:
            raise RejectedError("no gold token", f"the turn {shorten(plan.notation.read(turn.gold))} has no token")
        return gold, shift

    def _tokenised_apart(self, plan: Plan, turn: _Turn, context: list[int], whole: list[int]) -> tuple[list[int], int]:
        """The gold by itself; behind something that is taken off again where the tokenizer marks the beginning of a text."""
        meant = self._decode(whole)
        for lead in self._leads(plan):
            front, both = self._encoder([lead, lead + turn.gold], plan.notation)
            gold = both[len(front) :]
            if both[: len(front)] == front and self._decode(context + gold) == meant:
                return gold, len(lead)
        [alone] = self._encoder([turn.gold], plan.notation)
        raise RejectedError(
            "serving mismatch",
            f"tokenised apart, as a server does, the turn {shorten(plan.notation.read(turn.gold))} reads "
            f"{shorten(self._decode(alone))}; use a template that ends its generation prompt with a control token",
        )

    def _leads(self, plan: Plan) -> list[str]:
        """What to put before a text: nothing, a control token, and characters that seldom merge with what follows."""
        names = self._controls.names[:1]
        return ["", *(plan.notation.write(name) for name in names), "\n", "\x01"]

    def _weights(
        self, plan: Plan, turn: _Turn, context: list[int], gold: list[int], shift: int | None
    ) -> npt.NDArray[np.float32]:
        """Of the gold tokens, the one that ends the turn among them."""
        has_end = turn.end_id is not None or bool(turn.appended)
        own = gold[:-1] if turn.end_id is not None else gold
        if turn.regions:
            if not self._encoder.has_offsets:
                raise ConfigError(
                    "rows have weights for spans of characters, and the tokenizer knows no character offsets",
                    remedy="use a tokenizer that has a tokenizer.json, or weights for whole messages",
                )
            if shift is None:
                [found] = self._encoder.with_offsets([turn.whole], plan.notation)
                offsets = found.offsets[len(context) :]
            else:
                [lead] = [lead for lead in self._leads(plan) if len(lead) == shift][:1]
                [found] = self._encoder.with_offsets([lead + turn.gold], plan.notation)
                early = len(turn.context) - shift
                offsets = [(begin + early, end + early) for begin, end in found.offsets][-len(gold) :]
            weights = token_weights(offsets[: len(own)], turn.message.weight, turn.regions)
        else:
            weights = np.full(len(own), turn.message.weight, dtype=np.float32)
        return turn_weights(weights, self._config, has_end=has_end, end_weight=turn.message.weight)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    # ----------------------------------------------------------------------------------------------------------- frame

    @functools.cached_property
    def _frame(self) -> _Frame:
        """Seen from conversations that are known; a template that refuses those is taken to end its turns itself."""
        asked, answered = Message(role="user", content="a"), Message(role="assistant", content=_WORDS)
        calls = ({"type": "function", "function": {"name": _WORDS, "arguments": {}}},)
        calling = Message(role="assistant", content="", tool_calls=calls)
        cuts = [(1, False), (1, True), (2, False), (3, False)]
        words, called = self._template.render(
            [
                Job(messages=[given(message) for message in conversation], tools=(), cuts=cuts)
                for conversation in (
                    (asked, answered, Message(role="user", content=_NEXT_WORDS)),
                    (asked, calling, Message(role="tool", content=_NEXT_WORDS)),
                )
            ]
        )
        closing = self._closing(words)
        whole = words[2]
        if isinstance(whole, Failure) or _WORDS not in whole:
            return _Frame(closing=closing, end_token="", markers={}, writes_once=False)
        after = whole.removesuffix(closing).rpartition(_WORDS)[2]
        ends = self._controls.pattern.findall(after)
        markers = {}
        if not ends:
            for has_calls, texts in ((False, words), (True, called)):
                marker = self._marker(texts, closing)
                if marker is not None:
                    markers[has_calls] = marker
        return _Frame(
            closing=closing,
            end_token=ends[-1] if ends else None,
            markers=markers,
            writes_once=whole.count(_WORDS) == 1,
        )

    def _closing(self, texts: list[str | Failure]) -> str:
        """The control token that ends a conversation which is not to go on, whoever spoke last (Phi-3 writes one)."""
        ended, prompted = texts[:2]
        if isinstance(ended, Failure) or isinstance(prompted, Failure):
            return ""
        ended, prompted = self._controls.code(ended), self._controls.code(prompted)
        rest = ended[_num_shared(ended, prompted) :]
        is_token = self._controls.coded.pattern.fullmatch(rest) is not None
        return self._controls.decode(rest) if is_token else ""

    def _marker(self, texts: list[str | Failure], closing: str) -> tuple[str, str] | None:
        """What begins the turn after the assistant's: white space, and a control token."""
        ended, continued = texts[2:4]
        if isinstance(ended, Failure) or isinstance(continued, Failure):
            return None
        after = ended.removesuffix(closing).rpartition(_WORDS)[2]
        between = continued.rpartition(_NEXT_WORDS)[0].rpartition(_WORDS)[2]
        if not between.startswith(after):
            return None
        found = self._controls.pattern.search(between, len(after))
        if found is None or between[len(after) : found.start()].strip():
            return None
        return between[len(after) : found.start()], found.group()


def _renamed(message: Message) -> list[dict[str, Any]]:
    """The tool calls of a message, each with a name that is found again."""
    result = []
    for number, call in enumerate(message.tool_calls):
        name = f"{_WORDS}{number}z"
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


def _num_shared(first: str, second: str) -> int:
    """How many characters two texts have in common before they part."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(place for place in range(shorter) if first[place] != second[place])


def _shown(plan: Plan, text: str, begin: int) -> str:
    """The text from where two part, and from the control token before that."""
    starts = [found.start() for found in plan.notation.pattern.finditer(text, 0, begin)]
    return shorten(plan.notation.read(text[starts[-1] if starts else begin :]))
