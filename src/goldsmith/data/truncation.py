"""What becomes of a row that is longer than `max_length`: nothing is ever cut without being counted.

Five policies (`data.on_too_long`): `reject` and `drop` cut nothing, `left` shortens the context, `right` shortens the gold, and
`split` makes several examples of which each predicts its own part of the gold. Whatever the policy, it adds up: every gold token
that was rendered is trained exactly once, or counted as lost.

    tokens kept = tokens rendered - tokens_lost + tokens_repeated          gold kept = gold rendered - gold_tokens_lost

Legend: T tokens of an example, L the limit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from goldsmith.data.gold_turns import kept_turns, turn_indices
from goldsmith.data.rows import Rejection
from goldsmith.records import FileReport
from goldsmith.types import Conversation, Message, TokenizedExample

__all__ = [
    "TOO_LONG",
    "Fitted",
    "LengthLimit",
    "LengthOptions",
    "LengthPolicy",
    "Losses",
    "cut_left",
    "cut_right",
    "fit_row",
    "rejected_whole",
    "shorten_context",
    "split_gold",
]

LengthPolicy = Literal["reject", "drop", "left", "right", "split"]
Render = Callable[[Conversation], "list[TokenizedExample] | Rejection"]
TokenStarts = Callable[[str], Sequence[int]]
CountBytes = Callable[[Sequence[int]], int]

# The reason that reports count a row by.
TOO_LONG = "longer than max_length"

# Renderings of a row that is being shortened. A shorter text may have more tokens than the longer one promised, by one or two.
_MAX_ATTEMPTS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthOptions:
    """What messages call the settings of the limit; None where there is no such setting to turn.

    >>> LengthOptions(max_length="--max-length").or_raise
    ', or raise --max-length where the model can take more'
    """

    max_length: str | None = "data.max_length"
    on_too_long: str | None = "data.on_too_long"

    @property
    def or_raise(self) -> str:
        """The end of a remedy."""
        return "" if self.max_length is None else f", or raise {self.max_length} where the model can take more"

    @property
    def raise_or_cut(self) -> str:
        """The same where rows are rejected for their length."""
        if self.on_too_long is None or self.max_length is None:
            return self.or_raise
        return f", raise {self.max_length} where the model can take more, or say with {self.on_too_long} what to do with such rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthLimit:
    """The limit and what to do at it.

    Attributes:
        max_length: tokens of an example at most; None for no limit.
        policy: see the module.
        end_token_after_cut: `right` only: gold that is cut keeps its end token, in the place of its last kept token.
        parts_share_weight: `split` only: the parts of an example share its weight in proportion to their W. Right for
            `normalization: example`, where an example's nll is divided by its own W; under `token` and `sum` each part keeps
            the whole weight, so that each gold token counts as much as it did.
        options: what messages call the limit and the policy.
    """

    max_length: int | None
    policy: LengthPolicy = "reject"
    end_token_after_cut: bool = False
    parts_share_weight: bool = False
    options: LengthOptions = LengthOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """What the limit cost. Adds up over rows.

    Attributes:
        rows_too_long: rows that were longer than the limit, whatever became of them.
        rows_dropped, rows_cut, rows_split: of these, left out by `drop`, cut by `left` or `right`, made several by `split`.
        tokens_lost, gold_tokens_lost: not trained on: cut off, or of rows that were rejected or dropped for their length.
        tokens_repeated: context tokens that the parts of split rows hold again.
    """

    rows_too_long: int = 0
    rows_dropped: int = 0
    rows_cut: int = 0
    rows_split: int = 0
    tokens_lost: int = 0
    gold_tokens_lost: int = 0
    tokens_repeated: int = 0

    def of_report(self) -> dict[str, int]:
        """As the fields of `records.FileReport`."""
        return {
            "too_long": self.rows_too_long,
            "dropped": self.rows_dropped,
            "cut": self.rows_cut,
            "split": self.rows_split,
            "tokens_lost": self.tokens_lost,
            "gold_tokens_lost": self.gold_tokens_lost,
            "tokens_repeated": self.tokens_repeated,
        }

    @classmethod
    def of_files(cls, files: Iterable[FileReport]) -> Losses:
        """The inverse, of all files together."""
        total = cls()
        for file in files:
            total += cls(
                rows_too_long=file.too_long,
                rows_dropped=file.dropped,
                rows_cut=file.cut,
                rows_split=file.split,
                tokens_lost=file.tokens_lost,
                gold_tokens_lost=file.gold_tokens_lost,
                tokens_repeated=file.tokens_repeated,
            )
        return total

    def __add__(self, other: Losses) -> Losses:
        return Losses(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(Losses)})

    def __sub__(self, other: Losses) -> Losses:
        return Losses(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in dataclasses.fields(Losses)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A row within the limit: its examples (none where `drop` left it out), or why it is rejected; and what that cost."""

    examples: list[TokenizedExample] | Rejection
    losses: Losses


def fit_row(
    row: Conversation | TokenizedExample,
    examples: list[TokenizedExample],
    limit: LengthLimit,
    *,
    render: Render,
    token_starts: TokenStarts,
    count_bytes: CountBytes,
    end_ids: Collection[int],
    beginning_id: int | None = None,
) -> Fitted:
    """Apply the policy to one rendered row.

    A row is one thing: where one of its examples (turns of an expanded chat) cannot be fitted, all of it is rejected or dropped.

    Args:
        row: the conversation, or a row that came tokenised: of such a one `left` cuts the ids.
        examples: of the row, as rendered without a limit; not changed.
        render: renders a shortened conversation anew (`left`).
        token_starts: the characters of a text at which its tokens begin (`left`).
        count_bytes: UTF-8 length of the text of some token ids (`right`, `split`).
        end_ids: tokens that end a turn (`right`).
        beginning_id: the tokenizer's beginning token (`left`).
    """
    longest = max(example.num_tokens for example in examples)
    if limit.max_length is None or longest <= limit.max_length:
        return Fitted(examples=examples, losses=Losses())
    tokens, gold = _totals(examples)
    if limit.policy == "drop":
        return Fitted(
            examples=[],
            losses=Losses(rows_too_long=1, rows_dropped=1, tokens_lost=tokens, gold_tokens_lost=gold),
        )
    kept: list[TokenizedExample] | Rejection
    if limit.policy == "left" and isinstance(row, Conversation):
        kept = _fit_left(row, examples, limit.max_length, limit.options, render, token_starts)
    elif limit.policy == "reject":
        kept = _rejection(
            row,
            f"{longest} tokens, but max_length is {limit.max_length}; shorten or remove the row"
            f"{limit.options.raise_or_cut}",
        )
    else:
        kept = []
        for example in examples:
            parts = _fit_ids(example, limit, count_bytes, end_ids, beginning_id)
            if parts is None:
                context = int(np.flatnonzero(example.target_weights)[0])
                kept = _rejection(
                    row,
                    f"{context} tokens stand before the gold, {example.num_tokens - context} from there on, and max_length is "
                    f"{limit.max_length}: no room is left; shorten or remove the row{limit.options.or_raise}",
                )
                break
            kept.extend(parts)
    if isinstance(kept, Rejection):
        return Fitted(examples=kept, losses=Losses(rows_too_long=1, tokens_lost=tokens, gold_tokens_lost=gold))
    kept_tokens, kept_gold = _totals(kept)
    repeated = 0
    if limit.policy == "split":
        repeated = sum(_repeated(example, kept) for example in examples)
    return Fitted(
        examples=kept,
        losses=Losses(
            rows_too_long=1,
            rows_cut=int(limit.policy != "split"),
            rows_split=int(limit.policy == "split"),
            tokens_lost=tokens + repeated - kept_tokens,
            gold_tokens_lost=gold - kept_gold,
            tokens_repeated=repeated,
        ),
    )


def cut_left(example: TokenizedExample, max_length: int, *, beginning_id: int | None = None) -> TokenizedExample | None:
    """The last `max_length` tokens, behind the beginning token where the example begins with it; the gold stays whole.

    None where no token of the context would be left.
    """
    overflow = example.num_tokens - max_length
    if overflow <= 0:
        return example
    first = int(example.token_ids[0] == beginning_id) if beginning_id is not None else 0
    if overflow >= int(np.flatnonzero(example.target_weights)[0]) - first:
        return None
    kept = np.r_[0:first, first + overflow : example.num_tokens]
    return dataclasses.replace(
        example,
        token_ids=example.token_ids[kept],
        target_weights=example.target_weights[kept],
        turns=kept_turns(example, kept),
    )


def cut_right(
    example: TokenizedExample,
    max_length: int,
    *,
    end_ids: Collection[int] = (),
    keep_end_token: bool = False,
    count_bytes: CountBytes = len,
) -> TokenizedExample | None:
    """The first `max_length` tokens, up to the last gold among them; None where none of them is gold.

    The gold loses its end, and its end token with it: a model must not learn to stop where the text was cut. `keep_end_token`
    puts the end token of the turn that was cut in the place of the last token that fits, where another gold token of the turn
    stands before it.
    """
    ids, weights = example.token_ids, example.target_weights
    if example.num_tokens <= max_length:
        return example
    gold = np.flatnonzero(weights[:max_length])
    if gold.size == 0:
        return None
    kept = np.arange(gold[-1] + 1)
    if keep_end_token and max_length >= 3 and np.all(weights[max_length - 2 : max_length + 1] > 0):
        # The turn goes on over the cut; its last token is the last before the next context, or before another's words.
        after = np.flatnonzero(weights[max_length:] == 0)
        last = max_length + int(after[0]) - 1 if after.size else example.num_tokens - 1
        last = min(last, _turn_end(example, max_length - 2))
        if last > max_length - 2 and int(ids[last]) in end_ids:
            kept = np.r_[0 : max_length - 1, last]
    cut_ids, cut_weights = ids[kept], weights[kept]
    words = [int(token) for token in cut_ids[cut_weights > 0] if int(token) not in end_ids]
    return dataclasses.replace(
        example,
        token_ids=cut_ids,
        target_weights=cut_weights,
        num_bytes=min(example.num_bytes, count_bytes(words)),
        turns=kept_turns(example, kept),
    )


def split_gold(
    example: TokenizedExample, max_length: int, *, share_weight: bool = False, count_bytes: CountBytes = len
) -> list[TokenizedExample] | None:
    """Several examples of at most `max_length` tokens: the context, then one of several consecutive parts of the rest.

    The parts are of like length, named `ID#1`, `ID#2`, ...; each gold token is in exactly one, the end token in the last. A part
    predicts its first token from the context alone. None where the context leaves no room.

    Args:
        share_weight: see `LengthLimit.parts_share_weight`.
    """
    if example.num_tokens <= max_length:
        return [example]
    ids, weights = example.token_ids, example.target_weights
    context = int(np.flatnonzero(weights)[0])
    room, rest = max_length - context, example.num_tokens - context
    if room < 1:
        return None
    num_parts = -(-rest // room)
    bounds = [context + rest * part // num_parts for part in range(num_parts + 1)]
    # A stretch of context between turns may fill a part; it predicts nothing, and is left out.
    spans = [(begin, end) for begin, end in itertools.pairwise(bounds) if np.any(weights[begin:end] > 0)]
    ends = _byte_ends(example, [end for _, end in spans], count_bytes)
    parts = []
    for number, (begin, end) in enumerate(spans, start=1):
        kept = np.r_[0:context, begin:end]
        part_weights = weights[kept]
        share = float(part_weights.sum(dtype=np.float64)) / example.weight_sum if share_weight else 1.0
        parts.append(
            dataclasses.replace(
                example,
                token_ids=ids[kept],
                target_weights=part_weights,
                example_id=f"{example.example_id}#{number}",
                example_weight=example.example_weight * share,
                num_bytes=ends[number] - ends[number - 1],
                turns=kept_turns(example, kept),
            )
        )
    return parts


def shorten_context(conversation: Conversation, num_tokens: int, token_starts: TokenStarts) -> Conversation | None:
    """The conversation with `num_tokens` tokens less of content, oldest content first; None where no content would be left.

    Only the contents of messages that are not the assistant's are cut, each from its left; a system message comes last. Their
    roles stay, so that a template writes all of its own marks.
    """
    others = [index for index, message in enumerate(conversation.messages) if message.role != "assistant"]
    order = sorted(others, key=lambda index: conversation.messages[index].role == "system")
    messages = list(conversation.messages)
    left = num_tokens
    for index in order:
        starts = token_starts(messages[index].content)
        if left < len(starts):
            messages[index] = _without_first(messages[index], starts[left])
            return dataclasses.replace(conversation, messages=tuple(messages))
        messages[index] = _without_first(messages[index], len(messages[index].content))
        left -= len(starts)
    return None


def _without_first(message: Message, characters: int) -> Message:
    spans = tuple(
        (max(0, begin - characters), end - characters, weight)
        for begin, end, weight in message.spans
        if end > characters
    )
    return dataclasses.replace(message, content=message.content[characters:], spans=spans)


def _fit_left(
    conversation: Conversation,
    examples: list[TokenizedExample],
    max_length: int,
    options: LengthOptions,
    render: Render,
    token_starts: TokenStarts,
) -> list[TokenizedExample] | Rejection:
    """Shorten the context's text and render it again, so that its ids are what a server makes of that text."""
    gold = _gold_ids(examples)
    num_tokens = 0
    overflow = max(example.num_tokens for example in examples) - max_length
    for _ in range(_MAX_ATTEMPTS):
        num_tokens += overflow
        shorter = shorten_context(conversation, num_tokens, token_starts)
        if shorter is None:
            break
        rendered = render(shorter)
        if isinstance(rendered, Rejection) or not np.array_equal(_gold_ids(rendered), gold):
            break  # the template does not take it, or what was cut is gold
        overflow = max(example.num_tokens for example in rendered) - max_length
        if overflow <= 0:
            return rendered
    return _rejection(
        conversation,
        f"max_length is {max_length}, and the gold ({len(gold)} tokens) with the least of its context and the template is longer; "
        f"shorten or remove the row{options.or_raise}",
    )


def _fit_ids(
    example: TokenizedExample,
    limit: LengthLimit,
    count_bytes: CountBytes,
    end_ids: Collection[int],
    beginning_id: int | None,
) -> list[TokenizedExample] | None:
    assert limit.max_length is not None
    if limit.policy == "split":
        return split_gold(example, limit.max_length, share_weight=limit.parts_share_weight, count_bytes=count_bytes)
    if limit.policy == "left":
        cut = cut_left(example, limit.max_length, beginning_id=beginning_id)
    else:
        cut = cut_right(
            example,
            limit.max_length,
            end_ids=end_ids,
            keep_end_token=limit.end_token_after_cut,
            count_bytes=count_bytes,
        )
    return None if cut is None else [cut]


def _turn_end(example: TokenizedExample, position: int) -> int:
    """The last position before the words of the turn after that of a gold token, as far as that is known."""
    if example.turns:
        following = int(turn_indices(example, np.array([position]))[0]) + 1
        if following < len(example.turns):
            return example.turns[following].begin - 1
    return example.num_tokens - 1


def rejected_whole(source: str, num_tokens: int, max_length: int, options: LengthOptions) -> Rejection:
    """An example that is too long where nothing may be cut."""
    return Rejection(
        source=source,
        reason=TOO_LONG,
        detail=f"{num_tokens} tokens, but max_length is {max_length}; shorten or remove the row{options.raise_or_cut}",
    )


def _rejection(row: Conversation | TokenizedExample, detail: str) -> Rejection:
    return Rejection(source=row.source, reason=TOO_LONG, detail=detail)


def _totals(examples: Sequence[TokenizedExample]) -> tuple[int, int]:
    return sum(example.num_tokens for example in examples), sum(example.num_target_tokens for example in examples)


def _gold_ids(examples: Sequence[TokenizedExample]) -> npt.NDArray[np.int32]:
    return np.concatenate([example.token_ids[example.target_weights > 0] for example in examples])


def _repeated(example: TokenizedExample, kept: Sequence[TokenizedExample]) -> int:
    parts = sum(part.example_id.startswith(f"{example.example_id}#") for part in kept)
    return int(np.flatnonzero(example.target_weights)[0]) * max(0, parts - 1)


def _byte_ends(example: TokenizedExample, ends: Sequence[int], count_bytes: CountBytes) -> list[int]:
    """0, then how many bytes of the gold text stand before each of `ends`; the last is all of it.

    Of the text up to there, since a token may hold a part of a character.
    """
    result = [0]
    for end in ends[:-1]:
        gold = example.token_ids[:end][example.target_weights[:end] > 0]
        result.append(max(result[-1], min(example.num_bytes, count_bytes([int(token) for token in gold]))))
    return [*result, example.num_bytes]
