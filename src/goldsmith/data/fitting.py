"""Rendered rows within the limit: the policy of `truncation`, with the renderer that the rows came from."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from goldsmith.data.config import DataConfig
from goldsmith.data.rendering import Renderer
from goldsmith.data.rows import Rejection
from goldsmith.data.truncation import Fitted, LengthLimit, Losses, fit_row
from goldsmith.types import Conversation, TokenizedExample

__all__ = ["RowFitter"]


class RowFitter:
    """Fits rows to the renderer's `max_length` as `data.on_too_long` says."""

    def __init__(self, renderer: Renderer, config: DataConfig, *, parts_share_weight: bool = False) -> None:
        if config.on_too_long != "reject" and not renderer.keeps_long_rows:
            raise ValueError(f"on_too_long {config.on_too_long} needs a renderer that keeps long rows")
        self._renderer = renderer
        self._limit = LengthLimit(
            max_length=renderer.max_length,
            policy=config.on_too_long,
            end_token_after_cut=config.end_token_after_cut,
            parts_share_weight=parts_share_weight,
            options=renderer.length_options,
        )

    def fit(self, row: Conversation | TokenizedExample, examples: list[TokenizedExample] | Rejection) -> Fitted:
        """What becomes of a row that was rendered."""
        limit = self._limit.max_length
        if isinstance(examples, Rejection) or limit is None or all(one.num_tokens <= limit for one in examples):
            return Fitted(examples=examples, losses=Losses())
        return fit_row(
            row,
            examples,
            self._limit,
            render=self._render_again,
            token_starts=self._token_starts,
            count_bytes=self._count_bytes,
            end_ids=self._end_ids,
            beginning_id=self._renderer.tokenizer.bos_token_id,
        )

    @functools.cached_property
    def _end_ids(self) -> frozenset[int]:
        return frozenset(self._renderer.end_token_ids)

    def _render_again(self, conversation: Conversation) -> list[TokenizedExample] | Rejection:
        [result] = self._renderer.render([conversation])
        return result

    def _token_starts(self, text: str) -> list[int]:
        tokenizer = self._renderer.tokenizer
        if tokenizer.is_fast:
            found = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
            )
            return [int(begin) for begin, _ in found["offset_mapping"]]
        # No offsets: as if all tokens were of one length. The rendering that follows says whether enough was cut.
        count = len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
        return [len(text) * token // count for token in range(count)]

    def _count_bytes(self, ids: Sequence[int]) -> int:
        text = self._renderer.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return len(str(text).encode("utf-8"))
