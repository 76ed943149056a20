"""Prompts and completions whose words spell control tokens: most often rows that a template has rendered beforehand."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from goldsmith.data.config import DataConfig, SourceConfig, source_name
from goldsmith.data.control_tokens import ControlTokens
from goldsmith.data.rows import Row
from goldsmith.data.sources import SourceReader, memory_part
from goldsmith.types import Conversation

__all__ = ["SpeltControls", "spelt_controls"]

# Whoever renders rows beforehand renders them all: the first ones show it.
NUM_ROWS = 1000
_SHOWN_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class SpeltControls:
    """Of the first rows of a source.

    Attributes:
        source: its name.
        num_rows: rows that were looked at.
        num_spelling: of these the rows that spell a control token of the tokenizer.
        tokens: how many rows spell each, the most frequent first.
    """

    source: str
    num_rows: int
    num_spelling: int
    tokens: Mapping[str, int]

    def __str__(self) -> str:
        found = ", ".join(f"{token} in {count:,}" for token, count in list(self.tokens.items())[:_SHOWN_TOKENS])
        found += ", ..." if len(self.tokens) > _SHOWN_TOKENS else ""
        return (
            f"{self.source}: {self.num_spelling:,} of the first {self.num_rows:,} rows spell control tokens ({found}), which are "
            "encoded as text; if the rows were rendered beforehand, give them as messages or set "
            "rendering.allow_control_tokens: all"
        )


def spelt_controls(
    sources: Sequence[SourceConfig] | Sequence[Mapping[str, Any]],
    *,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    allowed: Literal["none", "assistant", "all"] = "none",
    base_folder: Path = Path(),
    num_rows: int = NUM_ROWS,
) -> list[SpeltControls]:
    """The sources of which a row spells a control token where that is not allowed. Chats are left out: their template sees to it.

    Args:
        sources: files, or rows in memory; data sets of the hub are passed over, since looking costs the network.
        allowed: see `RenderingConfig.allow_control_tokens`.
        num_rows: of each source, the first.
    """
    if allowed == "all":
        return []
    controls = ControlTokens(tokenizer)
    found = []
    for name, conversations in _sources(sources, config, base_folder, num_rows):
        looked_at = num_spelling = 0
        tokens: Counter[str] = Counter()
        for conversation in conversations:
            looked_at += 1
            messages = [m for m in conversation.messages if not (allowed == "assistant" and m.role == "assistant")]
            spelt = set().union(*(controls.spelt_in(message.content) for message in messages))
            tokens.update(spelt)
            num_spelling += bool(spelt)
        if num_spelling:
            ordered = dict(sorted(tokens.items(), key=lambda item: (-item[1], item[0])))
            found.append(SpeltControls(source=name, num_rows=looked_at, num_spelling=num_spelling, tokens=ordered))
    return found


def _sources(
    sources: Sequence[SourceConfig] | Sequence[Mapping[str, Any]], config: DataConfig, base_folder: Path, num_rows: int
) -> Iterator[tuple[str, Iterator[Conversation]]]:
    files = [source for source in sources if isinstance(source, SourceConfig)]
    if not files:
        rows = [row for row in sources[:num_rows] if not isinstance(row, SourceConfig)]
        reader = SourceReader(SourceConfig(path="rows"), config=config)
        yield "rows", _conversations(reader, reader.read(memory_part(rows, name="rows")))
    for source in files:
        if not source.is_hub:
            reader = SourceReader(source, config=config)
            parts = (reader.read(part) for part in reader.parts(base_folder))
            rows_of_parts = itertools.islice(itertools.chain.from_iterable(parts), num_rows)
            yield source_name(source), _conversations(reader, rows_of_parts)


def _conversations(reader: SourceReader, rows: Iterator[Any]) -> Iterator[Conversation]:
    """Prompts and completions; rows that cannot be used are passed over, since loading counts them."""
    for row in rows:
        conversation = reader.convert(row) if isinstance(row, Row) else row
        if isinstance(conversation, Conversation) and not conversation.is_chat:
            yield conversation
