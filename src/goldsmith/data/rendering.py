"""Conversations to token ids with the weight of predicting each. Ids and weights are built together.

`plain_rendering` renders prompt and completion, `chat_rendering` chats by the tokenizer's template; here the two meet, and what
is common to them is done: the limit of length, and what a row says of its example.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import numpy as np
from transformers import PreTrainedTokenizerBase

from goldsmith.data.chat_rendering import ChatRenderer
from goldsmith.data.chat_template import ChatTemplate
from goldsmith.data.control_tokens import ControlTokens
from goldsmith.data.drafts import Draft
from goldsmith.data.encoding import Encoder
from goldsmith.data.plain_rendering import PlainRenderer
from goldsmith.data.rendering_config import RenderingConfig, template_text
from goldsmith.data.rows import Rejection
from goldsmith.data.truncation import LengthOptions, rejected_whole
from goldsmith.errors import DataError
from goldsmith.types import Conversation, TokenizedExample

__all__ = ["Renderer", "RenderingConfig"]


class Renderer:
    """Renders conversations with one tokenizer.

    Attributes:
        tokenizer, config, max_length, length_options: as given.
        chat_template: the text of the template that renders chats, or None for the tokenizer's own.
        straddling: the sources of the rows that straddled (see `num_straddles`) in the last call of `render`.
        control_texts: likewise of those in which words spell a control token (see `num_control_texts`).
        mismatching: likewise of chats that are trained on although a server is given another text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: RenderingConfig,
        max_length: int | None,
        *,
        keeps_long_rows: bool = False,
        length_options: LengthOptions = LengthOptions(),  # noqa: B008 - frozen
    ) -> None:
        """
        Args:
            tokenizer: of `transformers`; it is not changed.
            config: a relative `chat_template` is relative to the current directory.
            max_length: tokens of an example at most; None for no limit.
            keeps_long_rows: leave the limit to the loader, which may cut (`data.on_too_long`).
            length_options: what a rejection calls the limit.

        Raises:
            ConfigError: the template file cannot be read, or `joint` with a tokenizer that knows no character offsets.
        """
        self.tokenizer = tokenizer
        self.config = config
        self.max_length = max_length
        self.keeps_long_rows = keeps_long_rows
        self.length_options = length_options
        self.straddling: list[str] = []
        self.control_texts: list[str] = []
        self.mismatching: list[str] = []
        self.chat_template = template_text(config)
        controls = ControlTokens(tokenizer)
        encoder = Encoder(tokenizer, controls)
        now = None if config.date is None else datetime.fromisoformat(config.date)
        self._template = ChatTemplate(tokenizer, text=self.chat_template, now=now)
        self._plain = PlainRenderer(tokenizer, config, encoder, controls)
        self._chat = ChatRenderer(tokenizer, config, encoder, controls, self._template)

    @property
    def num_straddles(self) -> int:
        """Rows rendered so far in which tokenising context and gold as one text would give the context other ids than it has
        alone."""
        return self._plain.num_straddles + self._chat.num_straddles

    @property
    def num_control_texts(self) -> int:
        """Chats rendered so far in which words spell a control token, and were encoded as text."""
        return self._chat.num_control_texts

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be rendered."""
        return self._template.has_template

    @property
    def reads_date(self) -> bool:
        """Whether chats may hold the day on which they are rendered; `rendering.date` fixes it."""
        return self._template.reads_date

    @property
    def seen_end_ids(self) -> set[int]:
        """What ended the turns of the chats rendered so far; the cache of rows keeps it, and adds to it what it kept."""
        return self._chat.seen_end_ids

    @property
    def end_token_ids(self) -> list[int]:
        """What a server has to stop at, ascending: the end token, and what the template ends an assistant's turn with."""
        ends: set[int] = set()
        if self.tokenizer.eos_token_id is not None:
            ends.add(int(self.tokenizer.eos_token_id))
        if self.has_chat_template:
            ends |= self._chat.end_token_ids
        return sorted(ends)

    def render(self, conversations: Sequence[Conversation]) -> list[list[TokenizedExample] | Rejection]:
        """One entry a conversation, in order: its examples, or why it has none.

        Several examples where a chat is expanded; their ids are `example_id@turn`, the gold turns counted from 1.
        Nothing is cut here: an example that is longer than `max_length` rejects its row, unless `keeps_long_rows` leaves it in.

        Raises:
            ConfigError: a chat, but no template; or an end token is to be appended and the tokenizer has none.
        """
        self.straddling, self.control_texts, self.mismatching = [], [], []
        plain = [index for index, conversation in enumerate(conversations) if not conversation.is_chat]
        chat = [index for index, conversation in enumerate(conversations) if conversation.is_chat]
        drafts: dict[int, list[Draft] | Rejection] = {}
        if plain:
            drafts.update(zip(plain, self._plain.render([conversations[index] for index in plain]), strict=True))
            self.straddling += self._plain.straddling
        if chat:
            drafts.update(zip(chat, self._chat.render([conversations[index] for index in chat]), strict=True))
            self.straddling += self._chat.straddling
            self.control_texts += self._chat.control_texts
            self.mismatching += self._chat.mismatching
        return [self._examples(conversation, drafts[index]) for index, conversation in enumerate(conversations)]

    def render_context(self, conversation: Conversation) -> list[int]:
        """The ids that a server is given: the prompt, or the messages before the last assistant turn (all where there is none).

        Raises:
            DataError: the context is empty and the tokenizer has neither beginning nor end token, or the template fails.
            ConfigError: a chat, but no template.
        """
        if conversation.is_chat:
            return self._chat.context(conversation)
        context = self._plain.context(conversation)
        if context is None:
            raise DataError(f"{conversation.source}: the context is empty", remedy="give the row a prompt")
        return context

    def _examples(
        self, conversation: Conversation, drafts: list[Draft] | Rejection
    ) -> list[TokenizedExample] | Rejection:
        if isinstance(drafts, Rejection):
            return drafts
        examples = []
        for draft in drafts:
            example = self._example(conversation, draft)
            if isinstance(example, Rejection):
                return example
            examples.append(example)
        return examples

    def _example(self, conversation: Conversation, draft: Draft) -> TokenizedExample | Rejection:
        if not self.keeps_long_rows and self.max_length is not None and len(draft.token_ids) > self.max_length:
            return rejected_whole(conversation.source, len(draft.token_ids), self.max_length, self.length_options)
        return TokenizedExample(
            token_ids=np.array(draft.token_ids, dtype=np.int32),
            target_weights=draft.target_weights,
            example_id=draft.example_id,
            example_weight=conversation.example_weight,
            source=conversation.source,
            num_bytes=draft.num_bytes,
            turns=draft.turns,
        )
