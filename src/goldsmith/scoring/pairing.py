"""Two models' scores of the same gold brought together, example by example: what stays in memory are numbers of each example.

Both are read once, in any order. The first one's tokens wait for the second's on the disk; of every pair the sums that a comparison
wants are kept, and of all gold tokens those that differ most, by themselves and by their kind.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import struct
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

from goldsmith.errors import DataError, MachineError
from goldsmith.scoring.tally import position_bins
from goldsmith.statistics import ExactSum
from goldsmith.types import GoldTurn, TokenScores

__all__ = ["KEPT_TOKENS", "PairedExample", "PairedToken", "Pairing", "TokenKind", "numbers_of", "pair_up"]

_T = TypeVar("_T")

# Tokens, and kinds of them, that are kept of all that differ.
KEPT_TOKENS = 100

# The first model's tokens wait in memory up to so many bytes, and in a file without a name above.
_BYTES_IN_MEMORY = 1 << 24
# Bytes of the texts, and log-probabilities behind them.
_HEADER = struct.Struct("<qq")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedExample:
    """One example under both models; `difference` is log P under the first minus log P under the second, in nats.

    Attributes:
        a, b: what each scored, without tokens, turns and the text of the context.
        start_log_probs: of the first gold token under both; None where it is unknown or not the same.
        has_same_tokens: whether both list the gold tokens, as many, with no text that is known to differ.
        is_differently_tokenized: whether the two are known to cut the gold into other tokens.
        has_same_context: False where the two are known to have scored the gold after other contexts: rendered otherwise.
    """

    a: TokenScores
    b: TokenScores
    start_log_probs: tuple[float, float] | None = None
    has_same_tokens: bool = False
    is_differently_tokenized: bool = False
    has_same_context: bool = True

    @property
    def example_id(self) -> str:
        return self.a.example_id

    @property
    def difference(self) -> float:
        return self.a.log_prob - self.b.log_prob

    @property
    def start_difference(self) -> float | None:
        """The difference on the first gold token alone; None where the first tokens are unknown or not the same."""
        return None if self.start_log_probs is None else self.start_log_probs[0] - self.start_log_probs[1]

    @property
    def has_same_length(self) -> bool:
        """False where the two are known to have scored gold of different byte lengths."""
        return not (self.a.num_bytes and self.b.num_bytes) or self.a.num_bytes == self.b.num_bytes

    def to_json(self) -> dict[str, object]:
        return {
            "example_id": self.example_id,
            "source": self.a.source or self.b.source,
            "log_prob": [self.a.log_prob, self.b.log_prob],
            "difference": self.difference,
            "start_difference": self.start_difference,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedToken:
    """One gold token under both models.

    Attributes:
        position: in the gold, from 1.
        log_probs: under the first and the second, nats.
    """

    example_id: str
    position: int
    text: str
    log_probs: tuple[float, float]

    @property
    def difference(self) -> float:
        return self.log_probs[0] - self.log_probs[1]

    def to_json(self) -> dict[str, object]:
        return {
            "example_id": self.example_id,
            "position": self.position,
            "text": self.text,
            "log_prob": list(self.log_probs),
            "difference": self.difference,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenKind:
    """All gold tokens of one text, where both models list the same tokens.

    Attributes:
        text: "" for tokens that end within a character, or whose text is not known.
        count: how many.
        difference: log P under the first minus log P under the second, nats, of all of them together.
    """

    text: str
    count: int
    difference: float

    @property
    def mean_difference(self) -> float:
        return self.difference / self.count

    def to_json(self) -> dict[str, object]:
        return {
            "text": self.text,
            "count": self.count,
            "difference": self.difference,
            "mean_difference": self.mean_difference,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """What two models' scores have in common. Lists are parallel to `pairs`.

    Attributes:
        pairs: the shared examples, in the order of the first.
        positions: of each the difference within each bin of positions; None unless all have the same tokens.
        roles: of each the difference of each role's tokens; None unless that is known of all.
        tokens: the gold tokens that differ most, largest first; at most `KEPT_TOKENS`.
        kinds: the kinds of gold token that differ most in sum, likewise.
        only: every token of the only shared example, where there is but one and both list the same tokens.
    """

    pairs: tuple[PairedExample, ...]
    num_only_a: int
    num_only_b: int
    positions: Sequence[Sequence[float]] | None
    roles: Sequence[Mapping[str, float]] | None
    tokens: tuple[PairedToken, ...]
    kinds: tuple[TokenKind, ...]
    only: tuple[PairedToken, ...]


def numbers_of(scores: TokenScores | Iterable[TokenScores], name: str) -> Iterator[TokenScores]:
    """The scores one by one, looked at.

    Raises:
        DataError: a log-probability that is not finite or above 0.
    """
    for score in [scores] if isinstance(scores, TokenScores) else scores:
        if not math.isfinite(score.log_prob) or score.log_prob > 0:
            raise DataError(f"{name}: example {score.example_id!r}: log_prob is {score.log_prob}, not finite and <= 0")
        yield score


def pair_up(
    a: TokenScores | Iterable[TokenScores],
    b: TokenScores | Iterable[TokenScores],
    *,
    names: tuple[str, str],
    tie_tolerance: float,
) -> Pairing:
    """Pair by `example_id`; each is gone through once, the first before the second.

    Raises:
        DataError: one of them is empty, holds an example twice or a log-probability that is not finite or above 0, or they share
            no example.
        MachineError: there is no room on the disk for the tokens of the first.
    """
    # What waits for its partner, and, from then on, the pair: in the order of the first.
    held: dict[str, _Waiting | _Pair] = {}
    tokens = _Tokens(tie_tolerance)
    with _Disk() as disk:
        for score in numbers_of(a, names[0]):
            if score.example_id in held:
                raise DataError(f"{names[0]}: example {score.example_id!r} is scored twice")
            held[score.example_id] = _Waiting(bare(score), disk.put(score), score.turns)
        if not held:
            raise DataError(f"{names[0]}: no example was scored")
        others: set[str] = set()
        first_b, num_shared = None, 0
        for score in numbers_of(b, names[1]):
            first_b = score.example_id if first_b is None else first_b
            waiting = held.get(score.example_id)
            if isinstance(waiting, _Pair) or score.example_id in others:
                raise DataError(f"{names[1]}: example {score.example_id!r} is scored twice")
            if waiting is None:
                others.add(score.example_id)
                continue
            num_shared += 1
            held[score.example_id] = _paired(waiting, disk, score, tokens)
        if first_b is None:
            raise DataError(f"{names[1]}: no example was scored")
    if not num_shared:
        raise DataError(
            f"{names[0]} and {names[1]} share no example: {len(held):,} ids such as {next(iter(held))!r} against "
            f"{len(others):,} such as {first_b!r}",
            remedy="score the same data with both models; ids come from the rows' `id`, else from the file's name",
        )
    found = [pair for pair in held.values() if isinstance(pair, _Pair)]
    return Pairing(
        pairs=tuple(pair.example for pair in found),
        num_only_a=len(held) - num_shared,
        num_only_b=len(others),
        positions=_of_all([pair.positions for pair in found]),
        roles=_of_all([pair.roles for pair in found]),
        tokens=tokens.largest(),
        kinds=tokens.kinds(),
        only=tokens.only if num_shared == 1 else (),
    )


def bare(scores: TokenScores) -> TokenScores:
    """Without what is not a number of the whole example."""
    return replace(scores, tokens=None, context=None, turns=())


class _Waiting:
    """An example of the first that waits for the second's; where its tokens lie."""

    __slots__ = ("offset", "scores", "turns")

    def __init__(self, scores: TokenScores, offset: int, turns: tuple[GoldTurn, ...]) -> None:
        self.scores, self.offset, self.turns = scores, offset, turns


class _Pair:
    """An example that both have, and what the breakdowns want of it."""

    __slots__ = ("example", "positions", "roles")

    def __init__(
        self, example: PairedExample, positions: array[float] | None, roles: Mapping[str, float] | None
    ) -> None:
        self.example, self.positions, self.roles = example, positions, roles


def _paired(waiting: _Waiting, disk: _Disk, other: TokenScores, tokens: _Tokens) -> _Pair:
    a = waiting.scores
    context, texts, log_probs = disk.get(waiting.offset)
    b = replace(
        bare(other),
        example_id=a.example_id,
        source=a.source if a.source == other.source else other.source,
        source_name=a.source_name if a.source_name == other.source_name else other.source_name,
    )
    start = None
    is_listed = texts is not None and other.tokens is not None
    has_same_tokens = False
    if texts and other.tokens:
        has_same_tokens = len(texts) == len(other.tokens) and all(
            not text or not token.text or text == token.text for text, token in zip(texts, other.tokens, strict=True)
        )
        first = other.tokens[0]
        if not texts[0] or not first.text or texts[0] == first.text:
            start = (log_probs[0], first.log_prob)
    counts = a.num_target_tokens, b.num_target_tokens
    example = PairedExample(
        a=a,
        b=b,
        start_log_probs=start,
        has_same_tokens=has_same_tokens,
        is_differently_tokenized=not has_same_tokens
        if is_listed
        else bool(counts[0] and counts[1]) and counts[0] != counts[1],
        has_same_context=context is None or other.context is None or context == other.context,
    )
    positions: array[float] | None = None
    differences: list[float] | None = None
    if has_same_tokens and texts is not None and other.tokens is not None:
        differences = [mine - token.log_prob for mine, token in zip(log_probs, other.tokens, strict=True)]
        positions = array(
            "d", (math.fsum(differences[low - 1 : high]) for low, high, _ in position_bins(len(differences)))
        )
        found = [text or token.text for text, token in zip(texts, other.tokens, strict=True)]
        tokens.add(a.example_id, found, log_probs, [token.log_prob for token in other.tokens])
    return _Pair(example, positions, _by_role(waiting.turns, other.turns, example.difference, differences))


def _by_role(
    a: tuple[GoldTurn, ...], b: tuple[GoldTurn, ...], whole: float, differences: Sequence[float] | None
) -> dict[str, float] | None:
    """The difference on each role's tokens; None where it is not known whose they are, or the two say otherwise."""
    turns = a or b
    if not turns or (a and b and a != b):
        return None
    if len({turn.role for turn in turns}) == 1:
        return {turns[0].role: whole}
    if differences is None:
        return None
    parts: dict[str, list[float]] = {}
    ends = [*(turn.begin for turn in turns[1:]), len(differences)]
    for turn, end in zip(turns, ends, strict=True):
        parts.setdefault(turn.role, []).extend(differences[turn.begin : end])
    return {role: math.fsum(part) for role, part in parts.items()}


def _of_all(values: Sequence[_T | None]) -> list[_T] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


class _Tokens:
    """The tokens that differ most as they go by, and every kind of them."""

    def __init__(self, tie_tolerance: float) -> None:
        self._tie_tolerance = tie_tolerance
        # (how far, example, -position) orders them; the largest are kept.
        self._heap: list[tuple[tuple[float, str, int], PairedToken]] = []
        self._kinds: dict[str, tuple[list[int], ExactSum]] = {}
        self.only: tuple[PairedToken, ...] = ()
        self._num_examples = 0

    def add(self, example_id: str, texts: Sequence[str], a: Sequence[float], b: Sequence[float]) -> None:
        self._num_examples += 1
        self.only = ()
        if self._num_examples == 1:
            self.only = tuple(
                _token(example_id, place, texts[place], a[place], b[place]) for place in range(len(texts))
            )
        for place, (text, mine, other) in enumerate(zip(texts, a, b, strict=True)):
            difference = mine - other
            kind = self._kinds.get(text)
            if kind is None:
                kind = self._kinds[text] = ([0], ExactSum())
            kind[0][0] += 1
            kind[1].add(difference)
            if abs(difference) <= self._tie_tolerance:
                continue
            if len(self._heap) == KEPT_TOKENS and abs(difference) < self._heap[0][0][0]:
                continue
            item = ((abs(difference), example_id, -place - 1), _token(example_id, place, text, mine, other))
            if len(self._heap) < KEPT_TOKENS:
                heapq.heappush(self._heap, item)
            else:
                heapq.heappushpop(self._heap, item)

    def largest(self) -> tuple[PairedToken, ...]:
        return tuple(token for _, token in sorted(self._heap, key=lambda item: item[0], reverse=True))

    def kinds(self) -> tuple[TokenKind, ...]:
        found = [
            TokenKind(text=text, count=count, difference=total.value) for text, ([count], total) in self._kinds.items()
        ]
        shown = (kind for kind in found if abs(kind.difference) > self._tie_tolerance)
        return tuple(heapq.nsmallest(KEPT_TOKENS, shown, key=lambda kind: (-abs(kind.difference), kind.text)))


def _token(example_id: str, place: int, text: str, mine: float, other: float) -> PairedToken:
    return PairedToken(example_id=example_id, position=place + 1, text=text, log_probs=(mine, other))


class _Disk:
    """Contexts, and tokens' texts and log-probabilities, put away and got back by where they lie."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_BYTES_IN_MEMORY, prefix="goldsmith-")  # noqa: SIM115 - closed on exit
        self._size = 0

    def __enter__(self) -> _Disk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError as failure:
            if error is None:
                raise _refused(failure) from failure

    def put(self, scores: TokenScores) -> int:
        """Where it lies; -1 where there is nothing to keep."""
        if scores.tokens is None and scores.context is None:
            return -1
        texts = None if scores.tokens is None else [token.text for token in scores.tokens]
        facts = json.dumps([scores.context, texts]).encode("ascii")
        log_probs = array("d", (token.log_prob for token in scores.tokens or ()))
        record = b"".join([_HEADER.pack(len(facts), len(log_probs)), facts, log_probs.tobytes()])
        offset = self._size
        try:
            self._file.write(record)
        except OSError as error:
            raise _refused(error) from error
        self._size += len(record)
        return offset

    def get(self, offset: int) -> tuple[str | None, list[str] | None, array[float]]:
        """Context, texts of the tokens, their log-probabilities; what is unknown is None or empty."""
        log_probs = array("d")
        if offset < 0:
            return None, None, log_probs
        try:
            self._file.seek(offset)
            num_bytes, count = _HEADER.unpack(self._file.read(_HEADER.size))
            context, texts = json.loads(self._file.read(num_bytes))
            log_probs.frombytes(self._file.read(8 * count))
        except OSError as error:
            raise _refused(error) from error
        return context, texts, log_probs


def _refused(error: OSError) -> MachineError:
    folder = os.environ.get("TMPDIR") or tempfile.gettempdir()
    return MachineError(
        f"{folder}: the tokens of the first model cannot be kept there while the second's are read: {error.strerror}",
        remedy="free disk space, or name a folder that has more as TMPDIR",
    )
