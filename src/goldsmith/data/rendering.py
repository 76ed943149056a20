"""Conversations to token ids with the weight of predicting each. Ids and weights are built together.

A plain row is tokenised as a server meets it: the prompt alone, then the completion. In a chat the ids before a turn
are those that a server is given for it, by the same template; where a later turn's context does not begin with what an
earlier turn was trained on (templates that drop reasoning from the history do that), the conversation is expanded, one
example a turn.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import jinja2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from goldsmith.data.rows import Rejection, shorten
from goldsmith.data.tokenizer import beginning_ids
from goldsmith.errors import ConfigError, DataError
from goldsmith.types import Conversation, Message, TokenizedExample

__all__ = ["Renderer", "RenderingConfig"]

# Stands for the assistant's words to see what the template puts around them. Letters only, so that no template trims it.
_SENTINEL = "goldsmithSentinelContent"


class RenderingConfig(BaseModel):
    """How a row becomes tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    boundary: Literal["separate", "joint"] = Field(
        default="separate",
        description="plain rows. separate: prompt and completion are tokenised apart, as a server does; "
        "joint: as one text, and a token that straddles the boundary is gold",
    )
    separator: str = Field(
        default="", description="text between prompt and completion of plain rows; it goes with the prompt"
    )
    chat_template: str | None = Field(default=None, min_length=1, description="a jinja file; null: the tokenizer's own")
    train_on: Literal["assistant"] = Field(default="assistant", description="the roles whose words are gold")
    append_end_token: bool = Field(
        default=True,
        description="gold ends with the end token, once; in chat only where the template itself writes none",
    )


class Renderer:
    """Renders conversations with one tokenizer.

    Attributes:
        tokenizer, config, max_length: as given.
        chat_template: the text of the template that renders chats, or None for the tokenizer's own.
        num_straddles: rows rendered so far in which tokenising prompt and completion as one text would give the prompt
            other ids than it has alone (plain rows, either boundary).
        straddling: the sources of these rows in the last call of `render`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: RenderingConfig,
        max_length: int | None,
        *,
        keeps_long_rows: bool = False,
    ) -> None:
        """
        Args:
            tokenizer: of `transformers`; it is not changed.
            config: a relative `chat_template` is relative to the current directory.
            max_length: tokens of an example at most; None for no limit.
            keeps_long_rows: leave the limit to the loader, which may cut (`data.on_too_long`).

        Raises:
            ConfigError: the template file cannot be read, or `joint` with a tokenizer that knows no character offsets.
        """
        self.tokenizer = tokenizer
        self.config = config
        self.max_length = max_length
        self.keeps_long_rows = keeps_long_rows
        self.straddling: list[str] = []
        self.chat_template = None if config.chat_template is None else _read_template(config.chat_template)
        self.num_straddles = 0
        self._turn_end_ids: set[int] = set()
        self._beginning = beginning_ids(tokenizer)
        if config.boundary == "joint" and not self._encode_plain.has_offsets:
            raise ConfigError(
                f"rendering.boundary joint needs a tokenizer with character offsets, which {type(tokenizer).__name__} lacks",
                remedy="use `boundary: separate`, or a tokenizer that has a tokenizer.json",
            )
        added = list(tokenizer.added_tokens_decoder.values())
        # Some vocabularies add runs of white space as tokens; those end no turn.
        self._added_token = _one_of(str(token) for token in added if str(token).strip())
        self._control_token = _one_of(str(token) for token in added if token.special)
        self._frame: tuple[str, str] | None = None

    # In a plain row a literal `</s>` is text that the user wrote; in a chat the template's markers are control tokens.
    @functools.cached_property
    def _encode_plain(self) -> _Encoder:
        return _Encoder(self.tokenizer, split_special_tokens=True)

    @functools.cached_property
    def _encode_chat(self) -> _Encoder:
        return _Encoder(self.tokenizer, split_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be rendered."""
        own = self.tokenizer.chat_template
        return self.chat_template is not None or (
            own is not None and not (isinstance(own, dict) and "default" not in own)
        )

    @property
    def end_token_ids(self) -> list[int]:
        """What a server has to stop at, ascending: the end token, and what the template ends an assistant's turn with."""
        ends = set(self._turn_end_ids)
        if self.tokenizer.eos_token_id is not None:
            ends.add(int(self.tokenizer.eos_token_id))
        if self.has_chat_template:
            asked, answered = Message(role="user", content="a"), Message(role="assistant", content=_SENTINEL)
            with contextlib.suppress(_RejectedError):  # a template of another shape: then the rows say it
                turn = self._turn([asked], answered, 1)
                if turn.end_token is not None:
                    ends.add(self._token_id(turn.end_token))
        return sorted(ends)

    def render(self, conversations: Sequence[Conversation]) -> list[list[TokenizedExample] | Rejection]:
        """One entry a conversation, in order: its examples, or why it has none.

        Several examples where a chat is expanded; their ids are `example_id@turn`, the gold turns counted from 1.
        A row is never cut: one that is longer than `max_length` is rejected.

        Raises:
            ConfigError: a chat, but no template; or an end token is to be appended and the tokenizer has none.
        """
        self.straddling = []
        plain = [index for index, conversation in enumerate(conversations) if not conversation.is_chat]
        chat = [index for index, conversation in enumerate(conversations) if conversation.is_chat]
        results: dict[int, list[TokenizedExample] | Rejection] = {}
        if plain:
            results.update(zip(plain, self._render_plain([conversations[index] for index in plain]), strict=True))
        if chat:
            results.update(zip(chat, self._render_chat([conversations[index] for index in chat]), strict=True))
        return [results[index] for index in range(len(conversations))]

    def render_context(self, conversation: Conversation) -> list[int]:
        """The ids that a server is given: the prompt, or the messages before the last assistant turn (all where there is none).

        Raises:
            DataError: the context is empty and the tokenizer has neither beginning nor end token, or the template fails.
            ConfigError: a chat, but no template.
        """
        if not conversation.is_chat:
            context = self._context(self._encode_plain([conversation.messages[0].content + self.config.separator])[0])
        else:
            turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
            messages = conversation.messages[: turns[-1]] if turns else conversation.messages
            try:
                context = self._encode_chat([self._apply(messages, add_generation_prompt=True)])[0] or None
            except _RejectedError as error:
                raise DataError(f"{conversation.source}: {error.reason}: {error.detail}") from error
        if context is None:
            raise DataError(f"{conversation.source}: the context is empty", remedy="give the row a prompt")
        return context

    # ------------------------------------------------------------------------------------------------------ plain rows

    def _render_plain(self, conversations: Sequence[Conversation]) -> list[list[TokenizedExample] | Rejection]:
        end = self._end_ids()
        prompts = [conversation.messages[0].content + self.config.separator for conversation in conversations]
        completions = [conversation.messages[1].content for conversation in conversations]
        wholes = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        prompt_ids = self._encode_plain(prompts)
        if self.config.boundary == "joint":
            whole_ids, completion_ids, context_ids = [], [], []
            for prompt, (ids, ends) in zip(prompts, self._encode_plain.with_ends(wholes), strict=True):
                first_gold = next((t for t, end_of_token in enumerate(ends) if end_of_token > len(prompt)), len(ids))
                whole_ids.append(ids)
                context_ids.append(ids[:first_gold])
                completion_ids.append(ids[first_gold:])
        else:
            whole_ids, completion_ids, context_ids = (
                self._encode_plain(wholes),
                self._encode_plain(completions),
                prompt_ids,
            )

        results: list[list[TokenizedExample] | Rejection] = []
        for row, conversation in enumerate(conversations):
            context = self._context(context_ids[row])
            gold = completion_ids[row]
            weight = conversation.messages[1].weight
            if context is None:
                results.append(
                    Rejection(
                        source=conversation.source,
                        reason="empty context",
                        detail="the prompt is empty, and the tokenizer has neither a beginning nor an end token to stand for "
                        "it; give the row a prompt, or set rendering.separator",
                    )
                )
            elif not gold or weight == 0:
                results.append(_no_gold(conversation))
            else:
                example = self._example(
                    conversation,
                    example_id=conversation.example_id,
                    token_ids=context + gold + end,
                    gold=[(len(context), len(context) + len(gold) + len(end), weight)],
                    num_bytes=len(completions[row].encode("utf-8")),
                )
                if not isinstance(example, Rejection):
                    alone = prompt_ids[row]
                    if whole_ids[row][: len(alone)] != alone:
                        self.num_straddles += 1
                        self.straddling.append(conversation.source)
                results.append(example if isinstance(example, Rejection) else [example])
        return results

    def _context(self, ids: list[int]) -> list[int] | None:
        """The beginning and `ids`; never empty: else the beginning token, else the end token, else None."""
        if self._beginning or ids:
            return self._beginning + ids
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return [int(token)]
        return None

    def _end_ids(self) -> list[int]:
        if not self.config.append_end_token:
            return []
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                "gold is to end with the end token, but the tokenizer has none (eos_token)",
                remedy="set eos_token in the tokenizer's tokenizer_config.json, or `rendering.append_end_token: false`",
            )
        return [int(self.tokenizer.eos_token_id)]

    def _example(
        self,
        conversation: Conversation,
        *,
        example_id: str,
        token_ids: list[int],
        gold: Sequence[tuple[int, int, float]],
        num_bytes: int,
    ) -> TokenizedExample | Rejection:
        """An example of which the spans `gold` (begin, end, weight) are predicted."""
        if not self.keeps_long_rows and self.max_length is not None and len(token_ids) > self.max_length:
            return Rejection(
                source=conversation.source,
                reason="longer than max_length",
                detail=f"{len(token_ids)} tokens, but max_length is {self.max_length}; shorten or remove the row, or raise "
                "data.max_length where the model can take more (a row is never cut)",
            )
        weights = np.zeros(len(token_ids), dtype=np.float32)
        for begin, end, weight in gold:
            weights[begin:end] = weight
        return TokenizedExample(
            token_ids=np.array(token_ids, dtype=np.int32),
            target_weights=weights,
            example_id=example_id,
            example_weight=conversation.example_weight,
            source=conversation.source,
            num_bytes=num_bytes,
        )

    # ------------------------------------------------------------------------------------------------------------ chats

    def _render_chat(self, conversations: Sequence[Conversation]) -> list[list[TokenizedExample] | Rejection]:
        self._require_template()
        turns: list[list[_Turn] | Rejection] = []
        for conversation in conversations:
            try:
                turns.append(self._turns(conversation))
            except _RejectedError as error:
                turns.append(Rejection(source=conversation.source, reason=error.reason, detail=error.detail))
        flat = [turn for found in turns if not isinstance(found, Rejection) for turn in found]
        contexts = iter(self._encode_chat([turn.context for turn in flat]))
        wholes = iter(self._encode_chat([turn.context + turn.gold for turn in flat]))

        results: list[list[TokenizedExample] | Rejection] = []
        for conversation, found in zip(conversations, turns, strict=True):
            if isinstance(found, Rejection):
                results.append(found)
                continue
            # Taken for every turn before any is judged, so that the iterators stay in step.
            ids = [(turn, next(contexts), next(wholes)) for turn in found]
            try:
                pieces = [(turn, context, self._gold_ids(turn, context, whole)) for turn, context, whole in ids]
            except _RejectedError as error:
                results.append(Rejection(source=conversation.source, reason=error.reason, detail=error.detail))
                continue
            results.append(self._assemble(conversation, pieces))
        return results

    def _assemble(
        self, conversation: Conversation, pieces: list[tuple[_Turn, list[int], list[int]]]
    ) -> list[TokenizedExample] | Rejection:
        """One example where every turn's context begins with all that came before it, in ids; else one a turn."""
        if not pieces:
            return _no_gold(conversation)
        token_ids: list[int] = []
        gold: list[tuple[int, int, float]] = []
        for turn, context, gold_ids in pieces:
            if context[: len(token_ids)] != token_ids:
                break
            token_ids = context + gold_ids
            gold.append((len(context), len(token_ids), turn.weight))
        if len(gold) == len(pieces):
            num_bytes = sum(turn.num_bytes for turn, _, _ in pieces)
            example = self._example(
                conversation, example_id=conversation.example_id, token_ids=token_ids, gold=gold, num_bytes=num_bytes
            )
            examples = [example]
        else:
            examples = [
                self._example(
                    conversation,
                    example_id=f"{conversation.example_id}@{number}",
                    token_ids=context + gold_ids,
                    gold=[(len(context), len(context) + len(gold_ids), turn.weight)],
                    num_bytes=turn.num_bytes,
                )
                for number, (turn, context, gold_ids) in enumerate(pieces, start=1)
            ]
        kept: list[TokenizedExample] = []
        for example in examples:
            if isinstance(example, Rejection):
                return example
            kept.append(example)
        self._turn_end_ids.update(gold_ids[-1] for turn, _, gold_ids in pieces if turn.has_end)
        return kept

    def _turns(self, conversation: Conversation) -> list[_Turn]:
        """The gold turns of a chat, as text: what the server is given, and what the assistant is to write.

        A turn of weight 0 is context like any other message.
        """
        found: list[_Turn] = []
        for index, message in enumerate(conversation.messages):
            if message.role != "assistant" or message.weight == 0:
                continue
            if index == 0:
                raise _RejectedError(
                    "nothing before the assistant",
                    "the first message is the assistant's, so no server is ever asked for it; give it `weight: 0`, or put "
                    "a user's or system's message before it",
                )
            control = self._control_token.search(message.content) if self._control_token is not None else None
            if control is not None:
                raise _RejectedError(
                    "control token in gold",
                    f"messages[{index}] is the assistant's and holds the control token {control.group()!r} as text, which the "
                    "tokenizer cannot tell from the template's own; remove it",
                )
            found.append(self._turn(conversation.messages[:index], message, index))
        return found

    def _turn(self, before: Sequence[Message], message: Message, index: int) -> _Turn:
        context = self._apply(before, add_generation_prompt=True)
        rendered = self._apply([*before, message], add_generation_prompt=False)
        if not context:
            raise _RejectedError("empty context", f"the template renders nothing before messages[{index}]")
        if not rendered.startswith(context):
            same = next((i for i, (a, b) in enumerate(zip(context, rendered, strict=False)) if a != b), len(rendered))
            raise _RejectedError(
                "serving mismatch",
                f"before messages[{index}] a server is given a text that ends with {shorten(context[same:])}, but with "
                f"the turn in place the template writes {shorten(rendered[same:])} there; use a template whose "
                "generation prompt is how an assistant's turn begins",
            )
        tail = rendered[len(context) :]
        words, after = self._split_turn(before, message, context, tail, index)
        end = self._added_token.search(after) if self._added_token is not None else None
        if end is not None:
            return _Turn(
                context=context, gold=words + after[: end.end()], gold_text=words + after[: end.start()],
                weight=message.weight, end_token=end.group(), appended_end=(),
            )  # fmt: skip
        # No end of turn in the template (some give it to the next turn): the end token is appended, else a model never stops.
        text = words + after.rstrip()
        return _Turn(
            context=context, gold=text, gold_text=text,
            weight=message.weight, end_token=None, appended_end=tuple(self._end_ids()),
        )  # fmt: skip

    def _split_turn(
        self, before: Sequence[Message], message: Message, context: str, tail: str, index: int
    ) -> tuple[str, str]:
        """The turn's text up to the end of the assistant's words, and what the template puts behind them.

        What stands around the words is seen from a second rendering with other words, not searched for: the words
        themselves may hold anything.
        """
        if self._frame is None or _fit(tail, message.content, self._frame) is None:
            probe = Message(role="assistant", content=_SENTINEL)
            rendered = self._apply([*before, probe], add_generation_prompt=False)
            parts = rendered[len(context) :].split(_SENTINEL)
            if not rendered.startswith(context) or len(parts) != 2:
                raise _RejectedError(
                    "serving mismatch",
                    f"the template does not write the words of messages[{index}] once and as they are; use another template",
                )
            self._frame = (parts[0], parts[1])
        split = _fit(tail, message.content, self._frame)
        if split is None:
            raise _RejectedError(
                "serving mismatch",
                f"the template changes the words of messages[{index}]: {shorten(message.content)} becomes {shorten(tail)}; "
                "write them as the template does, or use another template",
            )
        return split

    def _gold_ids(self, turn: _Turn, context: list[int], whole: list[int]) -> list[int]:
        """The ids of the turn's gold, such that `context` + these is what the rendered text means."""
        if whole[: len(context)] == context:
            gold = whole[len(context) :]
        else:
            # A token would straddle the boundary; the server's context cannot change, so the gold is tokenised apart.
            [gold] = self._encode_chat([turn.gold])
            if self._decode(context + gold) != self._decode(whole):
                raise _RejectedError(
                    "serving mismatch",
                    f"tokenised apart, as a server does, the turn {shorten(turn.gold)} reads {shorten(self._decode(gold))}; "
                    "use a template that ends its generation prompt with a control token",
                )
        if turn.end_token is not None and gold[-1:] != [self._token_id(turn.end_token)]:
            raise _RejectedError(
                "serving mismatch",
                f"the end of the turn, {turn.end_token!r}, is not a token of its own in {shorten(turn.gold)}",
            )
        if not gold:
            raise _RejectedError("no gold token", f"the turn {shorten(turn.gold)} has no token")
        return [*gold, *turn.appended_end]

    def _token_id(self, token: str) -> int:
        return int(cast("int", self.tokenizer.convert_tokens_to_ids(token)))

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The template's text, as `apply_chat_template` renders it."""
        self._require_template()
        given = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                given, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template has a mistake in line {error.lineno}: {error.message}",
                remedy="mend the template (rendering.chat_template, or the tokenizer's own)",
            ) from error
        except Exception as error:  # a template is foreign code, and may fail in any way on a row it was not made for
            roles = ", ".join(message.role for message in messages[:8])
            raise _RejectedError(
                "refused by the chat template",
                f"{type(error).__name__}: {shorten(str(error), 160)} (roles: {roles})",
            ) from error
        return str(text)

    def _require_template(self) -> None:
        if not self.has_chat_template:
            raise ConfigError(
                "the data has chats (`messages`), but the tokenizer has no chat template",
                remedy="set rendering.chat_template to a jinja file, or use rows with prompt and completion",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Turn:
    """One gold turn as text: `gold` follows `context`; `gold_text` is `gold` without the end of the turn."""

    context: str
    gold: str
    gold_text: str
    weight: float
    end_token: str | None
    appended_end: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.gold_text.encode("utf-8"))

    @property
    def has_end(self) -> bool:
        return self.end_token is not None or bool(self.appended_end)


class _RejectedError(Exception):
    """Carries a rejection out of the rendering of one conversation; never leaves this file."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class _Encoder:
    """Texts to ids, without the tokens that the tokenizer adds, never cut or padded.

    A tokenizer of the `tokenizers` library is called directly, as `transformers` does, but without the dictionary it builds a
    text: half the time. It is a copy, so that the caller's keeps its settings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, split_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._split_special_tokens = split_special_tokens
        self._backend: Tokenizer | None = None
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            # A backend with parts written in Python cannot be copied; then the slower way below gives the same ids.
            with contextlib.suppress(Exception):
                self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = split_special_tokens or tokenizer.split_special_tokens

    @property
    def has_offsets(self) -> bool:
        return self._backend is not None

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._backend is not None:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=self._split_special_tokens,
            truncation=False,
            padding=False,
            verbose=False,
        )
        return [[int(token) for token in ids] for ids in encoded["input_ids"]]

    def with_ends(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Ids, and for each the character of the text before which its token ends."""
        if self._backend is None:
            raise TypeError("the tokenizer knows no character offsets")
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, [end for _, end in encoding.offsets]) for encoding in encodings]


def _one_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds the first of the tokens, the longest where several begin; None for no tokens."""
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in ordered)) if ordered else None


def _fit(tail: str, content: str, frame: tuple[str, str]) -> tuple[str, str] | None:
    """Split `tail` behind the words where it is the frame around `content` (trimmed or not); None where it is not."""
    opening, closing = frame
    if not tail.endswith(closing):
        return None
    words = tail[: len(tail) - len(closing)]
    # The opening may be missing: where the content brings its own reasoning, templates put no empty one before it.
    for front in (opening, ""):
        if words.startswith(front) and words[len(front) :].strip() == content.strip():
            return words, closing
    return None


def _no_gold(conversation: Conversation) -> Rejection:
    return Rejection(
        source=conversation.source,
        reason="no gold token",
        detail="no token of the row is gold: its weights are 0, or the tokenizer knows no character of the completion",
    )


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the chat template {path} cannot be read: {error}", remedy="mend rendering.chat_template"
        ) from error
