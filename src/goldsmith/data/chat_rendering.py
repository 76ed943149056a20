"""Chats: before each gold turn the ids that a server is given, by the same template; then what the template adds for the turn.

`chat_turns.py` has both as text. A conversation is one example where each turn's context begins, in ids, with all that came
before it; else it is expanded, one example a turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from goldsmith.data.chat_plan import Plan, make_plans, refusal
from goldsmith.data.chat_template import ChatTemplate, Failure, Job
from goldsmith.data.chat_turns import Turn, TurnTexts
from goldsmith.data.control_tokens import ControlTokens
from goldsmith.data.drafts import Draft, RejectedError, no_gold, token_weights, turn_weights
from goldsmith.data.encoding import Encoder
from goldsmith.data.gold_turns import gold_turns
from goldsmith.data.rendering_config import RenderingConfig
from goldsmith.data.rows import Rejection, shorten
from goldsmith.errors import ConfigError, DataError
from goldsmith.types import Conversation

__all__ = ["ChatRenderer"]


class ChatRenderer:
    """Renders chats.

    Attributes:
        num_straddles: rows so far in which a token of the whole text lies over the edge between a context and its gold.
        num_control_texts: rows so far in which somebody's words spell a control token and were encoded as text.
        straddling, control_texts: the sources of these rows in the last call of `render`.
        mismatching: of rows trained on although a server is given another text (`serving_mismatch: train`).
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
        self._texts = TurnTexts(tokenizer, config, controls, template)
        self.seen_end_ids: set[int] = set()
        self.num_straddles = 0
        self.num_control_texts = 0
        self.straddling: list[str] = []
        self.control_texts: list[str] = []
        self.mismatching: list[str] = []

    @property
    def end_token_ids(self) -> set[int]:
        """What ends an assistant's turn, by the template and by the rows rendered so far."""
        names = [self._texts.frame.end_token, *(token for _, token in self._texts.frame.markers.values())]
        return self.seen_end_ids | {self._controls.ids[name] for name in names if name}

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
        self.straddling, self.control_texts, self.mismatching = [], [], []
        plans = self._plans(conversations)
        turns = self._texts.whole_texts(plans) if self._config.train_on == "all" else self._texts.turns(plans)
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
            if drafts and plan.notation.is_coded:
                self.num_control_texts += 1
                self.control_texts.append(plan.conversation.source)
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

    def _encode(
        self, plans: Sequence[Plan], turns: dict[int, list[Turn] | RejectedError]
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

    def _drafts(self, plan: Plan, turns: list[Turn], encoded: dict[tuple[bool, str], list[int]]) -> list[Draft]:
        """One draft where every turn's context begins with all that came before it, in ids; else one a turn."""
        straddles = False
        pieces: list[tuple[Turn, list[int], list[int], npt.NDArray[np.float32]]] = []
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
        speakers: list[tuple[int, str]] = []
        is_whole = self._config.turns != "expanded"
        if is_whole:
            for turn, context, ids, weights in pieces:
                if context[: len(token_ids)] != token_ids:
                    is_whole = False
                    break
                all_weights += [np.zeros(len(context) - len(token_ids), dtype=np.float32), weights]
                token_ids = context + ids
                speakers += self._speakers(plan, turn, context, len(ids))
        example_id = plan.conversation.example_id
        if is_whole:
            num_bytes = sum(len(turn.gold_text.encode("utf-8")) for turn, *_ in pieces)
            drafts = [self._draft(example_id, token_ids, np.concatenate(all_weights), num_bytes, speakers)]
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
                    self._speakers(plan, turn, context, len(ids)),
                    number=number,
                )
                for number, (turn, context, ids, weights) in enumerate(pieces, start=1)
            ]
        drafts = [draft for draft in drafts if draft.target_weights.any()]
        if straddles:
            self.num_straddles += 1
            self.straddling.append(plan.conversation.source)
        if any(turn.mismatches for turn, *_ in pieces):
            self.mismatching.append(plan.conversation.source)
        ends = (turn for turn, *_ in pieces if turn.message.role == "assistant")
        self.seen_end_ids.update(end for turn in ends for end in (turn.end_id, *turn.appended) if end is not None)
        return drafts

    @staticmethod
    def _draft(
        example_id: str,
        token_ids: list[int],
        weights: npt.NDArray[np.float32],
        num_bytes: int,
        speakers: list[tuple[int, str]],
        *,
        number: int = 1,
    ) -> Draft:
        weights[0] = 0.0  # nothing comes before the first token to predict it
        turns = gold_turns(weights, speakers, first=number)
        return Draft(
            example_id=example_id, token_ids=token_ids, target_weights=weights, num_bytes=num_bytes, turns=turns
        )

    def _speakers(self, plan: Plan, turn: Turn, context: list[int], num_gold: int) -> list[tuple[int, str]]:
        """Whose words the gold is, by the position of tokens; a token over the edge of two messages is the later one's."""
        if len(turn.speakers) == 1:
            return [(len(context), turn.speakers[0][1])]
        if not turn.speakers or not self._encoder.has_offsets:
            return []
        [found] = self._encoder.with_offsets([turn.whole], plan.notation)
        ends = [end for _, end in found.offsets[len(context) : len(context) + num_gold]]
        begins = np.searchsorted(ends, [len(turn.context) + begin for begin, _ in turn.speakers], side="right")
        return [(len(context) + begin, role) for begin, (_, role) in zip(begins.tolist(), turn.speakers, strict=True)]

    def _require_text(self, plan: Plan, turn: Turn, whole: list[int]) -> None:
        """That the control tokens among the ids are those of the template, and none came out of words."""
        wanted = [plan.notation.token_id(found) for found in plan.notation.pattern.findall(turn.whole)]
        if [index for index in whole if index in self._controls.id_set] != wanted:
            raise RejectedError(
                "control token in content",
                f"the words spell a control token, and the tokenizer makes one of them even where it is told not to, in "
                f"{shorten(plan.notation.read(turn.whole))}; remove it",
            )

    def _gold_ids(self, plan: Plan, turn: Turn, context: list[int], whole: list[int]) -> tuple[list[int], int | None]:
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

    def _tokenised_apart(self, plan: Plan, turn: Turn, context: list[int], whole: list[int]) -> tuple[list[int], int]:
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
        self, plan: Plan, turn: Turn, context: list[int], gold: list[int], shift: int | None
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
