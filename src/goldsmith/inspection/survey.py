"""One pass over all rows of a split: counts, lengths, findings and a sample; a few dozen bytes a row are kept."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from goldsmith.data.rendering import Renderer
from goldsmith.data.rows import Rejection
from goldsmith.data.truncation import Losses
from goldsmith.inspection.columns import Columns
from goldsmith.inspection.duplicates import find_in_other, find_repeated, find_same_input, row_hashes
from goldsmith.inspection.findings import BITS, KINDS, Finding, Level, Place, RowChecks
from goldsmith.inspection.lengths import Lengths, summarise
from goldsmith.inspection.visible import visible
from goldsmith.records import DataReport
from goldsmith.types import Conversation, TokenizedExample

__all__ = ["MAX_PLACES", "RoleShare", "Sample", "SplitSurvey", "Survey", "compare_with_eval"]

Rows = npt.NDArray[np.int64]

# Rows of a finding that are named; all are counted.
MAX_PLACES = 1000
# A sample of the epoch, for packing and for measuring.
_SAMPLED_LENGTHS = 1 << 14
_SAMPLED_EXAMPLES = 256
# Gold texts that are counted at a time; one of a share above 1/256 cannot be missed.
_COUNTED_GOLDS = 256
_COMMON_SHARE = 0.1
_COMMON_ROWS = 20
_OUTLIER = 10


@dataclass(kw_only=True)
class RoleShare:
    """What one role says in all rows together; characters, since tokens of a template belong to nobody."""

    messages: int = 0
    characters: int = 0
    gold_messages: int = 0
    gold_characters: int = 0


@dataclass(kw_only=True)
class Sample:
    """Examples drawn at random from an epoch: a row that is repeated twice is twice as likely.

    Attributes:
        lengths: of more examples than are kept whole.
        examples: kept whole.
        epoch_examples, epoch_tokens, epoch_gold_tokens: of a whole epoch, with `repeat`.
    """

    lengths: list[int] = field(default_factory=list)
    examples: list[TokenizedExample] = field(default_factory=list)
    epoch_examples: float = 0.0
    epoch_tokens: float = 0.0
    epoch_gold_tokens: float = 0.0
    _seen: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, example: TokenizedExample, repeat: float) -> None:
        """Take notice of an example that an epoch holds `repeat` times."""
        self.epoch_examples += repeat
        self.epoch_tokens += repeat * example.num_tokens
        self.epoch_gold_tokens += repeat * example.num_target_tokens
        copies = int(repeat) + (self._random.random() < repeat % 1)
        for _ in range(min(copies, 64)):
            self._seen += 1
            place = self._random.randrange(self._seen)
            _put(self.lengths, place, _SAMPLED_LENGTHS, example.num_tokens)
            _put(self.examples, place, _SAMPLED_EXAMPLES, example)


def _put(kept: list[Any], place: int, size: int, value: Any) -> None:
    if len(kept) < size:
        kept.append(value)
    elif place < size:
        kept[place] = value


@dataclass(frozen=True, kw_only=True)
class SplitSurvey:
    """A split as it will be trained on, or evaluated.

    Attributes:
        report: as `data.json` has it.
        lengths: of `total`, `context` and `gold` tokens of an example.
        roles: by name.
        first_examples: the first of the split, to be shown.
        bytes_a_row: memory that the survey kept for each row.
    """

    split: str
    report: DataReport
    lengths: dict[str, Lengths]
    roles: dict[str, RoleShare]
    sample: Sample
    first_examples: tuple[TokenizedExample, ...]
    findings: tuple[Finding, ...]
    bytes_a_row: int


class Survey:
    """Watches the rows of a split go by (`loader.watch_rows`), then says what it saw."""

    def __init__(
        self,
        renderer: Renderer,
        *,
        split: Literal["train", "eval"],
        tokens_per_microbatch: int,
        num_examples: int = 0,
    ) -> None:
        self.split = split
        self.table = Columns(
            {
                "input": np.uint64,
                "whole": np.uint64,
                "tokens": np.int32,
                "findings": np.uint32,
                "line": np.int32,
                "file": np.uint16,
            }
        )
        self._renderer = renderer
        self._checks = RowChecks(renderer, tokens_per_microbatch=tokens_per_microbatch)
        self._num_examples = num_examples
        self._first: list[TokenizedExample] = []
        self._files: list[str] = []
        self._file_numbers: dict[str, int] = {}
        self._counts: dict[str, Counter[int]] = {"total": Counter(), "context": Counter(), "gold": Counter()}
        self._roles: dict[str, RoleShare] = {}
        self._sample = Sample()
        self._golds = _CommonGolds()
        self._outside: dict[str, tuple[int, list[Place]]] = {}

    # --- what `watch_rows` calls

    def used(
        self,
        row: Conversation | TokenizedExample,
        examples: list[TokenizedExample],
        *,
        repeat: float,
        losses: Losses,
        straddles: bool,
        spells_control: bool = False,
        mismatches: bool = False,
    ) -> None:
        """A row that is trained on."""
        file, line = self._place(row.source)
        given, whole = row_hashes(row)
        self.table.append(
            input=given,
            whole=whole,
            tokens=sum(example.num_tokens for example in examples),
            findings=self._checks.bits(
                row, examples, losses, straddles=straddles, spells_control=spells_control, mismatches=mismatches
            ),
            line=line,
            file=file,
        )
        for example in examples:
            gold = example.num_target_tokens
            self._counts["total"][example.num_tokens] += 1
            self._counts["context"][example.num_tokens - gold] += 1
            self._counts["gold"][gold] += 1
            self._sample.add(example, repeat)
        if len(self._first) < self._num_examples:
            self._first.extend(examples[: self._num_examples - len(self._first)])
        if isinstance(row, TokenizedExample):
            return
        for message in row.messages:
            share = self._roles.setdefault(message.role, RoleShare())
            share.messages += 1
            share.characters += len(message.content)
            if self._renderer.config.trains(message.role) and message.weight > 0:
                share.gold_messages += 1
                share.gold_characters += len(message.content)
        self._golds.add(row)

    def dropped(self, row: Conversation | TokenizedExample) -> None:
        """A row that is left out for its length."""
        self._note("dropped", Place(source=row.source))

    def rejected(self, rejection: Rejection) -> None:
        """A row that cannot be used."""
        kind = "serving-mismatch" if rejection.reason == "serving mismatch" else "rejected"
        self._note(kind, Place(source=rejection.source, detail=visible(f"{rejection.reason}: {rejection.detail}")))

    # --- what it saw

    def place(self, row: int) -> str:
        """`file:line` of a row of the table."""
        return f"{self._files[self.table.value('file', row)]}:{self.table.value('line', row)}"

    def finish(self, report: DataReport, *, bad_rows_stop: bool) -> SplitSurvey:
        """Compare the rows with each other, and sum up."""
        self._mark("duplicate", find_repeated(self.table, "whole"))
        self._mark("same-input-other-gold", find_same_input(self.table, given="input", whole="whole"))
        lengths = {name: found for name, counts in self._counts.items() if (found := summarise(counts)) is not None}
        if lengths:
            self._mark_outliers(lengths["total"].percentiles[50])
        return SplitSurvey(
            split=self.split,
            report=report,
            lengths=lengths,
            roles=self._roles,
            sample=self._sample,
            first_examples=tuple(self._first),
            findings=tuple(self._findings(bad_rows_stop=bad_rows_stop)),
            bytes_a_row=self.table.bytes_a_row,
        )

    def _mark(self, kind: str, rows: Rows) -> None:
        self.table.set_bits("findings", rows, BITS[kind])

    def _mark_outliers(self, median: int) -> None:
        for first, tokens in self.table.blocks("tokens"):
            self._mark("outlier-length", np.flatnonzero(tokens > _OUTLIER * median) + first)

    def _findings(self, *, bad_rows_stop: bool) -> list[Finding]:
        config = self._renderer.config
        ends_are_trained = config.append_end_token and config.train_on_end_token
        found = []
        for kind, (count, places) in self._outside.items():
            level: Level | None = "warning" if kind == "rejected" and not bad_rows_stop else None
            found.append(self._finding(kind, count, places, level))
        for kind, bit in BITS.items():
            count, rows = self.table.rows_where("findings", bit, limit=MAX_PLACES)
            if count:
                level = "warning" if kind == "no-end-token" and not ends_are_trained else None
                found.append(self._finding(kind, count, self._places(kind, rows), level))
        found.extend(
            self._finding("same-gold", count, [Place(source=place, detail=text) for place in places])
            for text, count, places in self._golds.common(len(self.table))
        )
        order = {"error": 0, "warning": 1, "info": 2}
        return sorted(found, key=lambda finding: order[finding.level])

    def _places(self, kind: str, rows: list[int]) -> list[Place]:
        places = []
        for index, row in enumerate(rows):
            detail = None
            if kind == "duplicate" and index < 20:  # a search through the column each
                first = self.table.first_row("whole", self.table.value("whole", row))
                detail = None if first is None else f"as {self.place(first)}"
            places.append(Place(source=self.place(row), detail=detail))
        return places

    def _finding(self, kind: str, count: int, places: list[Place], level: Level | None = None) -> Finding:
        return Finding(
            kind=kind,
            level=level or KINDS[kind].level,
            split=self.split,
            count=count,
            meaning=KINDS[kind].meaning,
            remedy=KINDS[kind].remedy,
            places=tuple(places),
        )

    def _note(self, kind: str, place: Place) -> None:
        count, places = self._outside.get(kind, (0, []))
        if len(places) < MAX_PLACES:
            places.append(place)
        self._outside[kind] = (count + 1, places)

    def _place(self, source: str) -> tuple[int, int]:
        file, _, line = source.rpartition(":")
        if file not in self._file_numbers:
            self._file_numbers[file] = len(self._files)
            self._files.append(file)
        return self._file_numbers[file], int(line)


def compare_with_eval(train: Survey, evaluation: Survey) -> None:
    """Mark the rows of `train` that are in `evaluation` too; before `train.finish`."""
    same = find_in_other(train.table, evaluation.table, "whole")
    given = find_in_other(train.table, evaluation.table, "input")
    train._mark("in-eval", same)
    train._mark("input-in-eval", np.setdiff1d(given, same, assume_unique=True))


class _CommonGolds:
    """The gold texts that many rows share, in fixed memory (Misra and Gries 1982).

    A count may be too low by at most 1/257 of the rows, and is exact while there are no more than 256 different golds.
    """

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}
        self._seen: dict[bytes, tuple[str, list[str]]] = {}

    def add(self, conversation: Conversation) -> None:
        golds = [message.content for message in conversation.messages if message.role == "assistant"]
        if not golds or not golds[-1]:
            return
        text = golds[-1]
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        if key in self._counts:
            self._counts[key] += 1
            places = self._seen[key][1]
            if len(places) < 20:
                places.append(conversation.source)
        elif len(self._counts) < _COUNTED_GOLDS:
            self._counts[key] = 1
            self._seen[key] = (visible(text[:80]), [conversation.source])
        else:
            for other in list(self._counts):
                self._counts[other] -= 1
                if not self._counts[other]:
                    del self._counts[other], self._seen[other]

    def common(self, num_rows: int) -> list[tuple[str, int, list[str]]]:
        """(gold, count, first places) of those above a tenth of the rows, the most common first."""
        if num_rows < _COMMON_ROWS:
            return []
        found = [
            (self._seen[key][0], count, self._seen[key][1])
            for key, count in self._counts.items()
            if count > _COMMON_SHARE * num_rows
        ]
        return sorted(found, key=lambda one: -one[1])
