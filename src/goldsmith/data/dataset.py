"""The data set: examples in a few flat arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from goldsmith.records import DataReport
from goldsmith.types import GoldTurn, TokenizedExample

__all__ = ["Dataset", "DatasetBuilder", "gold_runs"]

# Examples whose arrays are joined at once.
_EXAMPLES_AT_ONCE = 1024


class Dataset(Sequence[TokenizedExample]):
    """Examples in flat arrays. Legend: E examples, N tokens and G gold turns of all together. Nothing here changes after loading.

    Attributes:
        token_ids: int32 [N], the examples end to end.
        target_weights: float32 [N].
        offsets: int64 [E + 1]; example i is `token_ids[offsets[i]:offsets[i + 1]]`.
        lengths: int64 [E], tokens.
        num_target_tokens: int64 [E], tokens of weight > 0.
        weight_sums: float64 [E], W(i).
        example_weights: float64 [E], u_i (the source's weight is in it).
        groups: int64 [E], counts rows from 0; the parts of a row share it and lie together.
        repeats: float64 [E], how often an epoch holds the example's row.
        num_bytes: int64 [E], see `TokenizedExample`.
        example_ids, sources: one an example; ids are unique.
        source_names: of the sources, in the order in which they were read.
        source_indices: int32 [E], index into `source_names`.
        turn_counts: int32 [E], how many gold turns an example has; 0 where they are not known.
        turn_begins, turn_numbers: int32 [G], see `GoldTurn`.
        turn_roles: int32 [G], index into `role_names`.
        role_names: of the messages that have gold.
        num_unknown_tokens: tokens that are the tokenizer's unknown token: text that it could not write.
        report: what became of every row.
    """

    def __init__(
        self,
        examples: Iterable[TokenizedExample],
        *,
        groups: Sequence[int] | None = None,
        repeats: Sequence[float] | None = None,
        source_names: Sequence[str] | None = None,
        known_sources: Sequence[str] = (),
        report: DataReport | None = None,
        unknown_id: int | None = None,
    ) -> None:
        """
        Args:
            examples: in order; copied.
            groups: default: every example is a row of its own.
            repeats: default: 1 each.
            source_names: the name of each example's source; default: one source without a name.
            known_sources: names that come first in the data set's `source_names`, whether an example has them or not.
            report: default: an empty one.
            unknown_id: the tokenizer's `unk_token_id`, to count.
        """
        builder = DatasetBuilder(known_sources)
        for index, example in enumerate(examples):
            builder.add(
                example,
                group=index if groups is None else groups[index],
                repeat=1.0 if repeats is None else repeats[index],
                source_name="" if source_names is None else source_names[index],
            )
        self._fill(builder, report or DataReport(), unknown_id)

    def _fill(self, builder: DatasetBuilder, report: DataReport, unknown_id: int | None) -> None:
        builder.flush()
        self.token_ids: npt.NDArray[np.int32] = _joined(builder.token_ids, np.int32)
        self.target_weights: npt.NDArray[np.float32] = _joined(builder.target_weights, np.float32)
        self.lengths: npt.NDArray[np.int64] = np.array(builder.lengths, dtype=np.int64)
        self.offsets: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.example_weights: npt.NDArray[np.float64] = np.array(builder.example_weights, dtype=np.float64)
        self.groups: npt.NDArray[np.int64] = np.array(builder.groups, dtype=np.int64)
        self.repeats: npt.NDArray[np.float64] = np.array(builder.repeats, dtype=np.float64)
        self.num_bytes: npt.NDArray[np.int64] = np.array(builder.num_bytes, dtype=np.int64)
        self.example_ids: list[str] = builder.example_ids
        self.sources: list[str] = builder.sources
        self.source_names: list[str] = list(builder.source_names)
        self.source_indices: npt.NDArray[np.int32] = np.array(builder.source_indices, dtype=np.int32)
        self.turn_counts: npt.NDArray[np.int32] = np.array(builder.turn_counts, dtype=np.int32)
        self.turn_begins: npt.NDArray[np.int32] = np.array(builder.turn_begins, dtype=np.int32)
        self.turn_numbers: npt.NDArray[np.int32] = np.array(builder.turn_numbers, dtype=np.int32)
        self.turn_roles: npt.NDArray[np.int32] = np.array(builder.turn_roles, dtype=np.int32)
        self.role_names: list[str] = list(builder.role_names)
        self._sum_up()
        self.num_unknown_tokens = 0 if unknown_id is None else int(np.count_nonzero(self.token_ids == unknown_id))
        self.report = report

    def _sum_up(self) -> None:
        self._turn_offsets = np.concatenate([[0], np.cumsum(self.turn_counts)]).astype(np.int64)
        starts = self.offsets[:-1]
        empty = len(self.example_ids) == 0
        self.weight_sums: npt.NDArray[np.float64] = (
            np.zeros(0) if empty else np.add.reduceat(self.target_weights, starts, dtype=np.float64)
        )
        self.num_target_tokens: npt.NDArray[np.int64] = (
            np.zeros(0, dtype=np.int64) if empty else np.add.reduceat(self.target_weights > 0, starts, dtype=np.int64)
        )

    @classmethod
    def of_arrays(
        cls,
        arrays: Mapping[str, npt.NDArray[Any]],
        *,
        example_ids: list[str],
        sources: list[str],
        source_names: list[str],
        role_names: list[str],
        num_unknown_tokens: int,
        report: DataReport,
    ) -> Dataset:
        """A data set that was taken apart into what it holds; `arrays` by the names of the attributes, but for what follows from
        others.
        """
        dataset = cls.__new__(cls)
        for name, array in arrays.items():
            setattr(dataset, name, array)
        dataset.offsets = np.concatenate([[0], np.cumsum(dataset.lengths)]).astype(np.int64)
        dataset.example_ids, dataset.sources, dataset.source_names = example_ids, sources, source_names
        dataset.role_names = role_names
        dataset._sum_up()
        dataset.num_unknown_tokens = num_unknown_tokens
        dataset.report = report
        return dataset

    def __len__(self) -> int:
        return len(self.example_ids)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...

    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        """One example, its arrays views of the data set's; or a list for a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        span = slice(int(self.offsets[position]), int(self.offsets[position + 1]))
        return TokenizedExample(
            token_ids=self.token_ids[span],
            target_weights=self.target_weights[span],
            example_id=self.example_ids[position],
            example_weight=float(self.example_weights[position]),
            source=self.sources[position],
            num_bytes=int(self.num_bytes[position]),
            turns=self._turns(position),
        )

    def _turns(self, position: int) -> tuple[GoldTurn, ...]:
        return tuple(
            GoldTurn(
                begin=int(self.turn_begins[index]),
                number=int(self.turn_numbers[index]),
                role=self.role_names[self.turn_roles[index]],
            )
            for index in range(int(self._turn_offsets[position]), int(self._turn_offsets[position + 1]))
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest example; 0 where there is none."""
        return int(self.lengths.max(initial=0))

    def numbered(self, first: int = 0) -> Iterator[tuple[int, TokenizedExample]]:
        """The examples from number `first` on, each with its row (see `groups`)."""
        for index in range(first, len(self)):
            yield int(self.groups[index]), self[index]

    def last_turn(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The ids before the last run of a turn's gold, and the run itself (its end token included).

        The first is what a server is given for that turn, unless a token straddles the boundary (`boundary: joint`).
        """
        example = self[index]
        first, end = gold_runs(example.target_weights)[-1]
        if example.turns:  # what comes right before may be gold too, of another's
            first = max(first, example.turns[-1].begin)
        return example.token_ids[:first], example.token_ids[first:end]

    def context_text(self, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """What stands before the last run of gold, for display: decoded, control tokens included."""
        return str(tokenizer.decode(self.last_turn(index)[0].tolist(), skip_special_tokens=False))

    def gold_text(self, index: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """The last run of gold, for display and for exact match: decoded, without special tokens."""
        return str(tokenizer.decode(self.last_turn(index)[1].tolist(), skip_special_tokens=True))

    def fingerprint(self) -> str:
        """SHA-256, in hex, over all that training depends on: ids, weights, rows, repeats and example ids, in order."""
        digest = hashlib.sha256()
        for array, kind in (
            (self.token_ids, "<i4"),
            (self.target_weights, "<f4"),
            (self.lengths, "<i8"),
            (self.example_weights, "<f8"),
            (self.groups, "<i8"),
            (self.repeats, "<f8"),
        ):
            digest.update(f"{kind}[{array.shape[0]}]".encode())
            digest.update(np.ascontiguousarray(array, dtype=np.dtype(kind)).data)
        digest.update(json.dumps(self.example_ids).encode("utf-8"))
        return digest.hexdigest()


class DatasetBuilder:
    """Collects examples; small arrays are joined as they come, so that memory holds few objects."""

    def __init__(self, known_sources: Sequence[str] = ()) -> None:
        self.token_ids: list[npt.NDArray[np.int32]] = []
        self.target_weights: list[npt.NDArray[np.float32]] = []
        self.lengths: list[int] = []
        self.example_weights: list[float] = []
        self.groups: list[int] = []
        self.repeats: list[float] = []
        self.num_bytes: list[int] = []
        self.example_ids: list[str] = []
        self.sources: list[str] = []
        self.source_names = {name: index for index, name in enumerate(known_sources)}
        self.source_indices: list[int] = []
        self.turn_counts: list[int] = []
        self.turn_begins: list[int] = []
        self.turn_numbers: list[int] = []
        self.turn_roles: list[int] = []
        self.role_names: dict[str, int] = {}
        self._pending: list[TokenizedExample] = []

    def add(self, example: TokenizedExample, *, group: int, repeat: float, source_name: str) -> None:
        self._pending.append(example)
        self.lengths.append(example.num_tokens)
        self.example_weights.append(example.example_weight)
        self.groups.append(group)
        self.repeats.append(repeat)
        self.num_bytes.append(example.num_bytes)
        self.example_ids.append(example.example_id)
        self.sources.append(example.source)
        self.source_indices.append(self.source_names.setdefault(source_name, len(self.source_names)))
        self.turn_counts.append(len(example.turns))
        for turn in example.turns:
            self.turn_begins.append(turn.begin)
            self.turn_numbers.append(turn.number)
            self.turn_roles.append(self.role_names.setdefault(turn.role, len(self.role_names)))
        if len(self._pending) >= _EXAMPLES_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self.token_ids.append(np.concatenate([example.token_ids for example in self._pending]))
            self.target_weights.append(np.concatenate([example.target_weights for example in self._pending]))
            self._pending = []

    def finish(self, report: DataReport, *, unknown_id: int | None = None) -> Dataset:
        """What was added, as a data set; arguments as of `Dataset`."""
        dataset = Dataset.__new__(Dataset)
        dataset._fill(self, report, unknown_id)
        return dataset


def gold_runs(target_weights: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
    """(begin, end) of each stretch of gold, one after another.

    >>> gold_runs(np.array([0, 0, 1, 2, 0, 1], dtype=np.float32))
    [(2, 4), (5, 6)]
    """
    edges = np.flatnonzero(np.diff(target_weights > 0, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _joined(arrays: list[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)
