"""What a chat template does around an assistant's words, seen from conversations whose words are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from goldsmith.data.chat_plan import given
from goldsmith.data.chat_template import ChatTemplate, Failure, Job
from goldsmith.data.control_tokens import ControlTokens
from goldsmith.types import Message

__all__ = ["WORDS", "Frame", "num_shared", "observe_frame"]

# Stand for words, to see what the template puts around them. Letters only, so that no template trims them.
WORDS: Final = "goldsmithSentinelWords"
_NEXT_WORDS: Final = "goldsmithSentinelAnswer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
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


def observe_frame(template: ChatTemplate, controls: ControlTokens) -> Frame:
    """Seen from conversations that are known; a template that refuses those is taken to end its turns itself."""
    asked, answered = Message(role="user", content="a"), Message(role="assistant", content=WORDS)
    calls = ({"type": "function", "function": {"name": WORDS, "arguments": {}}},)
    calling = Message(role="assistant", content="", tool_calls=calls)
    cuts = [(1, False), (1, True), (2, False), (3, False)]
    words, called = template.render(
        [
            Job(messages=[given(message) for message in conversation], tools=(), cuts=cuts)
            for conversation in (
                (asked, answered, Message(role="user", content=_NEXT_WORDS)),
                (asked, calling, Message(role="tool", content=_NEXT_WORDS)),
            )
        ]
    )
    closing = _closing(controls, words)
    whole = words[2]
    if isinstance(whole, Failure) or WORDS not in whole:
        return Frame(closing=closing, end_token="", markers={}, writes_once=False)
    after = whole.removesuffix(closing).rpartition(WORDS)[2]
    ends = controls.pattern.findall(after)
    markers = {}
    if not ends:
        for has_calls, texts in ((False, words), (True, called)):
            marker = _marker(controls, texts, closing)
            if marker is not None:
                markers[has_calls] = marker
    return Frame(
        closing=closing,
        end_token=ends[-1] if ends else None,
        markers=markers,
        writes_once=whole.count(WORDS) == 1,
    )


def _closing(controls: ControlTokens, texts: list[str | Failure]) -> str:
    """The control token that ends a conversation which is not to go on, whoever spoke last (Phi-3 writes one)."""
    ended, prompted = texts[:2]
    if isinstance(ended, Failure) or isinstance(prompted, Failure):
        return ""
    ended, prompted = controls.code(ended), controls.code(prompted)
    rest = ended[num_shared(ended, prompted) :]
    is_token = controls.coded.pattern.fullmatch(rest) is not None
    return controls.decode(rest) if is_token else ""


def _marker(controls: ControlTokens, texts: list[str | Failure], closing: str) -> tuple[str, str] | None:
    """What begins the turn after the assistant's: white space, and a control token."""
    ended, continued = texts[2:4]
    if isinstance(ended, Failure) or isinstance(continued, Failure):
        return None
    after = ended.removesuffix(closing).rpartition(WORDS)[2]
    between = continued.rpartition(_NEXT_WORDS)[0].rpartition(WORDS)[2]
    if not between.startswith(after):
        return None
    found = controls.pattern.search(between, len(after))
    if found is None or between[len(after) : found.start()].strip():
        return None
    return between[len(after) : found.start()], found.group()


def num_shared(first: str, second: str) -> int:
    """How many characters two texts have in common before they part."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(place for place in range(shorter) if first[place] != second[place])
