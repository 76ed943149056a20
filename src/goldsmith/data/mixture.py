"""How often an epoch holds each row: the whole part of `repeat`, and a seeded choice for its fraction."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["copies_in_epoch"]


def copies_in_epoch(repeats: npt.NDArray[np.float64], random_keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """How many copies of each row one epoch holds.

    A row of repeat 2.25 is held twice, and a third time in about a quarter of the epochs. The rows that get the extra
    copy are drawn without replacement among the rows of the same repeat (that is, of the same source), and their number
    is the same in every epoch: the sum of the fractions, rounded half up. So an epoch's length does not depend on the seed.

    Args:
        repeats: float64 [R], one value a row, > 0 and finite.
        random_keys: uint64 [R], one random number a row; they decide which rows get the extra copy.

    Returns:
        int64 [R], >= 0; 0 only where the repeat is below 1.

    Raises:
        ValueError: a repeat that is not a finite number above 0.

    >>> copies_in_epoch(np.array([1.0, 0.5, 0.5, 3.0]), np.array([7, 9, 2, 4], dtype=np.uint64)).tolist()
    [1, 0, 1, 3]
    """
    if not np.all(np.isfinite(repeats) & (repeats > 0)):
        raise ValueError("every repeat must be a finite number above 0")
    whole = np.floor(repeats)
    fractions = repeats - whole
    # Rows of equal repeat lie together, in random order, and every 1/fraction-th of them is taken (systematic sampling).
    order = np.lexsort((random_keys, fractions))
    reached = np.floor(np.cumsum(fractions[order]) + 0.5)
    extra = np.zeros(repeats.shape[0], dtype=np.int64)
    extra[order] = np.diff(reached, prepend=0.0).astype(np.int64)
    return whole.astype(np.int64) + extra
