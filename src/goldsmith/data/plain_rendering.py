"""Plain rows: the prompt as a server tokenises it, then the completion and the end token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from goldsmith.data.control_tokens import ControlTokens
from goldsmith.data.drafts import Draft, Region, RejectedError, no_gold, token_weights, turn_weights
from goldsmith.data.encoding import Encoded, Encoder
from goldsmith.data.gold_turns import gold_turns
from goldsmith.data.rendering_config import RenderingConfig
from goldsmith.data.rows import Rejection
from goldsmith.data.tokenizer import beginning_ids
from goldsmith.errors import ConfigError
from goldsmith.types import Conversation, Message

__all__ = ["PlainRenderer", "end_ids"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """Ids of the prompt and of the completion, as the boundary cuts them; offsets are within the completion's text."""

    prompt: list[int]
    completion: list[int]
    prompt_offsets: list[tuple[int, int]] | None = None
    completion_offsets: list[tuple[int, int]] | None = None


class PlainRenderer:
    """Renders prompt and completion.

    Attributes:
        num_straddles: rows rendered so far in which tokenising prompt and completion as one text would give the prompt
            other ids than it has alone (either boundary).
        straddling: the sources of these rows in the last call of `render`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: RenderingConfig, encoder: Encoder, controls: ControlTokens
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._encoder = encoder
        self._controls = controls
        self._beginning = beginning_ids(tokenizer)
        self.num_straddles = 0
        self.straddling: list[str] = []
        if config.boundary == "joint" and not encoder.has_offsets:
            raise ConfigError(
                f"rendering.boundary joint needs a tokenizer with character offsets, which {type(tokenizer).__name__} lacks",
                remedy="use `boundary: separate`, or a tokenizer that has a tokenizer.json",
            )

    def context(self, conversation: Conversation) -> list[int] | None:
        """The ids that a server is given; None where there are none."""
        return self._begun(self._prompt_ids([conversation.messages[0].content + self._config.separator])[0])

    def render(self, conversations: Sequence[Conversation]) -> list[list[Draft] | Rejection]:
        """One entry a conversation: its draft, or why it has none.

        Raises:
            ConfigError: an end token is to be appended and the tokenizer has none; or spans have weights, and the tokenizer
                knows no character offsets.
        """
        end = end_ids(self._tokenizer, self._config)
        prompts = [conversation.messages[0].content + self._config.separator for conversation in conversations]
        completions = [conversation.messages[1].content for conversation in conversations]
        wholes = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        prompt_ids = self._prompt_ids(prompts)
        if self._config.boundary == "joint":
            rows, whole_ids = self._joint(prompts, wholes)
        else:
            whole_ids = self._prompt_ids(wholes)
            rows = [
                _Row(prompt=prompt, completion=completion)
                for prompt, completion in zip(prompt_ids, self._completion_ids(completions), strict=True)
            ]
            for index, conversation in enumerate(conversations):
                if any(message.spans for message in conversation.messages):
                    rows[index] = self._row_with_offsets(prompts[index], completions[index])

        self.straddling = []
        results: list[list[Draft] | Rejection] = []
        for index, (conversation, row) in enumerate(zip(conversations, rows, strict=True)):
            try:
                draft = self._draft(conversation, row, end)
            except RejectedError as error:
                results.append(error.of(conversation))
                continue
            if draft is None:
                results.append(no_gold(conversation))
                continue
            alone = prompt_ids[index]
            if whole_ids[index][: len(alone)] != alone:
                self.num_straddles += 1
                self.straddling.append(conversation.source)
            results.append([draft])
        return results

    def _draft(self, conversation: Conversation, row: _Row, end: list[int]) -> Draft | None:
        context = self._begun(row.prompt)
        if context is None:
            raise RejectedError(
                "empty context",
                "the prompt is empty, and the tokenizer has neither a beginning nor an end token to stand for it; give the "
                "row a prompt, or set rendering.separator",
            )
        if self._config.allow_control_tokens != "none":
            row = _without_end(row, end)
        prompt, completion = conversation.messages
        if not row.completion:
            return None
        pieces: list[npt.NDArray[np.float32]] = [np.zeros(len(context) - len(row.prompt), dtype=np.float32)]
        trains_prompt = self._config.trains(prompt.role) and not self._config.last_turn_only
        num_bytes = 0
        if trains_prompt:
            weights = _weights(prompt, row.prompt, row.prompt_offsets)
            pieces.append(turn_weights(weights, self._config, has_end=False, end_weight=0.0))
            num_bytes += _bytes(prompt, pieces[-1])
        else:
            pieces.append(np.zeros(len(row.prompt), dtype=np.float32))
        if self._config.train_on == "all":  # all but the first token, the one that the tokenizer puts there included
            pieces[0][:] = prompt.weight
        if self._config.trains(completion.role):
            weights = _weights(completion, row.completion, row.completion_offsets)
            weights = turn_weights(weights, self._config, has_end=bool(end), end_weight=completion.weight)
            num_bytes += _bytes(completion, weights)
        else:
            weights = np.zeros(len(row.completion) + len(end), dtype=np.float32)
        pieces.append(weights)
        weights = np.concatenate(pieces)
        weights[0] = 0.0
        if not weights.any():
            return None
        return Draft(
            example_id=conversation.example_id,
            token_ids=context + row.completion + end,
            target_weights=weights,
            num_bytes=num_bytes,
            turns=gold_turns(weights, [(0, prompt.role), (len(context), completion.role)]),
        )

    def _begun(self, ids: list[int]) -> list[int] | None:
        """The beginning and `ids`; never empty: else the beginning token, else the end token, else None."""
        # A prompt that is let through to spell control tokens may begin with it already.
        if self._config.allow_control_tokens == "all" and ids and ids[: len(self._beginning)] == self._beginning:
            return ids
        if self._beginning or ids:
            return self._beginning + ids
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return [int(token)]
        return None

    def _prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        if self._config.allow_control_tokens == "all":
            return self._encoder(prompts, self._controls.raw)
        return self._encoder.text(prompts)

    def _completion_ids(self, completions: list[str]) -> list[list[int]]:
        if self._config.allow_control_tokens == "none":
            return self._encoder.text(completions)
        return self._encoder(completions, self._controls.raw)

    def _joint(self, prompts: list[str], wholes: list[str]) -> tuple[list[_Row], list[list[int]]]:
        allowed = self._config.allow_control_tokens
        if allowed == "none":
            encoded = self._encoder.text_with_offsets(wholes)
        elif allowed == "all":
            encoded = self._encoder.with_offsets(wholes, self._controls.raw)
        else:
            encoded = []
            for prompt, whole in zip(prompts, wholes, strict=True):
                coded, places = self._controls.code_with_places(whole[len(prompt) :])
                places = [*range(len(prompt)), *(len(prompt) + place for place in places)]
                [found] = self._encoder.with_offsets([whole[: len(prompt)] + coded], self._controls.coded)
                offsets = [(places[begin], places[end]) for begin, end in found.offsets]
                encoded.append(Encoded(ids=found.ids, offsets=offsets))
        rows = []
        for prompt, found in zip(prompts, encoded, strict=True):
            boundary = len(prompt)
            cut = next((t for t, (_, end) in enumerate(found.offsets) if end > boundary), len(found.ids))
            rows.append(
                _Row(
                    prompt=found.ids[:cut],
                    completion=found.ids[cut:],
                    prompt_offsets=found.offsets[:cut],
                    completion_offsets=[(begin - boundary, end - boundary) for begin, end in found.offsets[cut:]],
                )
            )
        return rows, [found.ids for found in encoded]

    def _row_with_offsets(self, prompt: str, completion: str) -> _Row:
        if not self._encoder.has_offsets:
            raise ConfigError(
                "rows have weights for spans of characters, and the tokenizer knows no character offsets",
                remedy="use a tokenizer that has a tokenizer.json, or weights for whole messages",
            )
        allowed = self._config.allow_control_tokens

        def encode(text: str, *, as_text: bool) -> Encoded:
            found = (
                self._encoder.text_with_offsets([text])
                if as_text
                else self._encoder.with_offsets([text], self._controls.raw)
            )
            return found[0]

        front = encode(prompt, as_text=allowed != "all")
        back = encode(completion, as_text=allowed == "none")
        return _Row(
            prompt=front.ids, completion=back.ids, prompt_offsets=front.offsets, completion_offsets=back.offsets
        )  # fmt: skip


def end_ids(tokenizer: PreTrainedTokenizerBase, config: RenderingConfig) -> list[int]:
    """What is appended to gold that has no end of its own.

    Raises:
        ConfigError: the tokenizer has no end token.
    """
    if not config.append_end_token:
        return []
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "gold is to end with the end token, but the tokenizer has none (eos_token)",
            remedy="set eos_token in the tokenizer's tokenizer_config.json, or `rendering.append_end_token: false`",
        )
    return [int(tokenizer.eos_token_id)]


def _without_end(row: _Row, end: list[int]) -> _Row:
    """The row without the end token that its completion spells: it is appended to every row, once."""
    if not end or row.completion[-len(end) :] != end:
        return row
    offsets = row.completion_offsets
    return replace(
        row,
        completion=row.completion[: -len(end)],
        completion_offsets=None if offsets is None else offsets[: -len(end)],
    )


def _weights(message: Message, ids: list[int], offsets: list[tuple[int, int]] | None) -> npt.NDArray[np.float32]:
    if not message.spans:
        return np.full(len(ids), message.weight, dtype=np.float32)
    assert offsets is not None
    return token_weights(offsets, message.weight, [Region(*span) for span in message.spans])


def _bytes(message: Message, weights: npt.NDArray[np.float32]) -> int:
    """UTF-8 length of what is gold of the message: of its spans where it has weights for those."""
    if not weights.any():
        return 0
    if message.weight == 0:
        return sum(
            len(message.content[begin:end].encode("utf-8")) for begin, end, weight in message.spans if weight > 0
        )
    silent = sum(len(message.content[begin:end].encode("utf-8")) for begin, end, weight in message.spans if weight == 0)
    return len(message.content.encode("utf-8")) - silent
