"""What can be wrong with a row: the kinds of findings, and the checks that need nothing but the row itself."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from goldsmith.data.rendering import Renderer
from goldsmith.data.truncation import Losses
from goldsmith.inspection.visible import HIDDEN
from goldsmith.types import Conversation, TokenizedExample

__all__ = ["KINDS", "Finding", "Kind", "Level", "Place", "RowChecks"]

Level = Literal["error", "warning", "info"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of finding.

    Attributes:
        level: error: what is trained is wrong, or a figure of the run will be; warning: likely a mistake; info: worth knowing.
        meaning: what such rows are.
        remedy: what to do.
    """

    level: Level
    meaning: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """A row of a finding: `file:line`, and what was seen there, if that differs from row to row."""

    source: str
    detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """All rows of a split that have one thing the matter with them.

    Attributes:
        count: how many.
        places: the first of them.
    """

    kind: str
    level: Level
    split: str
    count: int
    meaning: str
    remedy: str
    places: tuple[Place, ...]


KINDS: dict[str, Kind] = {
    # Found row by row, or by comparing rows; the order is that of the bits in the table of rows.
    "no-end-token": Kind(
        level="error",
        meaning="the gold does not end with an end token: the model never learns to stop",
        remedy="rendering.append_end_token: true, or a template that ends the assistant's turn",
    ),
    "doubled-beginning-token": Kind(
        level="error",
        meaning="two beginning tokens stand in front",
        remedy="take the beginning token out of the template or of the text",
    ),
    "in-eval": Kind(
        level="error",
        meaning="the same input with the same gold is in the held-out data: its nll measures memory",
        remedy="take these rows out of one of the two",
    ),
    "input-in-eval": Kind(
        level="warning",
        meaning="the same input, with other gold, is in the held-out data",
        remedy="take these rows out of one of the two, or split by input",
    ),
    "duplicate": Kind(
        level="warning",
        meaning="an earlier row has the same input and the same gold",
        remedy="remove them, or give a weight to the row that is meant to count more",
    ),
    "same-input-other-gold": Kind(
        level="warning",
        meaning="the same input has different gold elsewhere: no model can fit both with certainty",
        remedy="fine where several answers are right; else correct the wrong one",
    ),
    "cut": Kind(
        level="warning",
        meaning="longer than max_length: cut or split, as data.on_too_long says",
        remedy="raise data.max_length where the model can take more",
    ),
    "control-token-in-content": Kind(
        level="warning",
        meaning="the text, a tool call or a tool's definition spells a control token of the tokenizer",
        remedy="remove it where it is a remnant of another template",
    ),
    "serving-mismatch-trained": Kind(
        level="warning",
        meaning="trained on, although a server is given another text before the turn (rendering.serving_mismatch: train)",
        remedy="use a template whose generation prompt is how an assistant's turn begins",
    ),
    "unknown-token": Kind(
        level="warning",
        meaning="characters that the tokenizer cannot write became its unknown token",
        remedy="use a tokenizer with bytes to fall back on, or clean the text",
    ),
    "damaged-text": Kind(
        level="warning",
        meaning="a replacement character (U+FFFD), or UTF-8 that was read as another encoding (such as Ã© for é)",
        remedy="convert the text again from its source",
    ),
    "hidden-characters": Kind(
        level="warning",
        meaning="control characters, marks of text direction, or characters of no width",
        remedy="remove them; `--html` shows where they are",
    ),
    "gold-repeats-input": Kind(
        level="warning",
        meaning="the gold begins with the whole input: the model learns to repeat the question",
        remedy="take the input out of the gold, or use a format that trains on the gold alone",
    ),
    "gold-without-words": Kind(
        level="warning",
        meaning="the gold has no letter and no digit",
        remedy="look whether an answer is missing",
    ),
    "empty-context": Kind(
        level="warning",
        meaning="the input is empty or white space only",
        remedy="give these rows a prompt, or train on plain text knowingly",
    ),
    "straddle": Kind(
        level="info",
        meaning="as one text with the completion, the prompt would have other tokens than a server gives it",
        remedy="nothing with `boundary: separate`; a separator that the tokenizer splits at avoids it",
    ),
    "space-before-gold": Kind(
        level="info",
        meaning="the prompt ends with a space: most tokenizers write a word's space with the word",
        remedy="move the space to the front of the completion",
    ),
    "all-gold": Kind(
        level="info",
        meaning="every token but the first is gold",
        remedy="right for plain text; else the input is missing",
    ),
    "gold-turned-off": Kind(
        level="info",
        meaning="an assistant's message has weight 0",
        remedy="nothing, where that is meant",
    ),
    "longer-than-microbatch": Kind(
        level="info",
        meaning="longer than training.tokens_per_microbatch: a micro-batch by itself, which needs more memory than asked for",
        remedy="raise training.tokens_per_microbatch, or lower data.max_length",
    ),
    "outlier-length": Kind(
        level="info",
        meaning="more than ten times as long as the median row",
        remedy="look whether several rows ran together",
    ),
    # Of rows that are not in the table.
    "rejected": Kind(
        level="error",
        meaning="rows that cannot be used",
        remedy="mend them, or leave them out with data.on_bad_row: skip",
    ),
    "serving-mismatch": Kind(
        level="error",
        meaning="what would be trained is not what a server would be given; the rows are rejected",
        remedy="use a template whose generation prompt is how an assistant's turn begins",
    ),
    "dropped": Kind(
        level="warning",
        meaning="longer than max_length: left out, as data.on_too_long says",
        remedy="raise data.max_length where the model can take more",
    ),
    "same-gold": Kind(
        level="info",
        meaning="more than a tenth of the rows have one and the same gold",
        remedy="right for few classes; else look whether it is a placeholder",
    ),
}

# Kinds that have a bit in the table of rows.
BITS = {
    name: 1 << bit
    for bit, name in enumerate(KINDS)
    if name not in ("rejected", "serving-mismatch", "dropped", "same-gold")
}

# Two or three letters that UTF-8 read as Latin-1 or Windows-1252 leaves behind.
_DAMAGED = re.compile("\ufffd|Ã[\u0080-\u00bf\u0192\u201a-\u203a]|â€|Â[\u00a0-\u00bf]|ï»¿|ðŸ")
_WORD = re.compile(r"\w")
# An answer may well begin with a short input; with a whole sentence of it seldom.
_REPEATED_CHARACTERS = 20


class RowChecks:
    """Checks one row at a time; what it finds is a set of bits, see `BITS`."""

    def __init__(self, renderer: Renderer, *, tokens_per_microbatch: int) -> None:
        tokenizer = renderer.tokenizer
        self._renderer = renderer
        self._tokens_per_microbatch = tokens_per_microbatch
        self._beginning = tokenizer.bos_token_id
        self._ends: set[int] = set()
        self._not_ends: set[int] = set()
        unknown = tokenizer.unk_token_id
        self._unknown = None if unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) else unknown
        # Runs of white space that some vocabularies hold as added tokens control nothing.
        added = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()}, key=len, reverse=True)
        marks = [re.escape(token) for token in added if token.strip()]
        self._control = re.compile("|".join(marks)) if marks else None

    def bits(
        self,
        row: Conversation | TokenizedExample,
        examples: list[TokenizedExample],
        losses: Losses,
        *,
        straddles: bool,
        spells_control: bool = False,
        mismatches: bool = False,
    ) -> int:
        """What is the matter with the row; of one that came tokenised, what its tokens say."""
        names = [
            *self._of_examples(examples, is_cut=bool(losses.rows_cut)),
            *(self._of_texts(row) if isinstance(row, Conversation) else ()),
            *(["cut"] if losses.rows_cut or losses.rows_split else []),
            *(["straddle"] if straddles else []),
            *(["control-token-in-content"] if spells_control else []),
            *(["serving-mismatch-trained"] if mismatches else []),
        ]
        bits = 0
        for name in names:
            bits |= BITS[name]
        return bits

    def _of_examples(self, examples: list[TokenizedExample], *, is_cut: bool) -> Collection[str]:
        found: set[str] = set()
        for number, example in enumerate(examples, start=1):
            ids, weights = example.token_ids, example.target_weights
            if ids.shape[0] > self._tokens_per_microbatch:
                found.add("longer-than-microbatch")
            if self._beginning is not None and ids[0] == ids[1] == self._beginning:
                found.add("doubled-beginning-token")
            if weights[1:].all():
                found.add("all-gold")
            if self._unknown is not None and (ids == self._unknown).any():
                found.add("unknown-token")
            is_last_part = number == len(examples) or "#" not in example.example_id
            if not is_cut and is_last_part and not self._is_end(int(ids[np.flatnonzero(weights)[-1]])):
                found.add("no-end-token")
        return found

    def _is_end(self, token_id: int) -> bool:
        if token_id in self._ends:
            return True
        if token_id not in self._not_ends:
            self._ends.update(self._renderer.end_token_ids)
            if token_id not in self._ends:
                self._not_ends.add(token_id)
        return token_id in self._ends

    def _of_texts(self, conversation: Conversation) -> Collection[str]:
        found: set[str] = set()
        given: list[str] = []  # what stands before the first gold
        seen_gold = False
        before = ""
        for message in conversation.messages:
            text = message.content
            if self._control is not None and self._control.search(text):
                found.add("control-token-in-content")
            if not text.isascii() and _DAMAGED.search(text):
                found.add("damaged-text")
            if not text.isprintable() and HIDDEN.search(text):
                found.add("hidden-characters")
            if message.role != "assistant":
                if not seen_gold:
                    given.append(text)
            elif message.weight == 0 and not message.spans:
                found.add("gold-turned-off")
            else:
                seen_gold = True
                start = before.strip()
                if len(start) >= _REPEATED_CHARACTERS and text.lstrip().startswith(start):
                    found.add("gold-repeats-input")
                if text and not message.tool_calls and not _WORD.search(text):
                    found.add("gold-without-words")
                if not conversation.is_chat and before.endswith((" ", "\t")) and not text[:1].isspace():
                    found.add("space-before-gold")
            before = text
        if given and not any(text.strip() for text in given):
            found.add("empty-context")
        return found
