"""Which examples a step holds: a function of (seed, batch size, step), whatever the machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from goldsmith.data.families import grouped_order
from goldsmith.data.packing import epoch_order, steps_per_epoch

__all__ = ["StepOrder"]


class StepOrder:
    """The steps of a run over a data set.

    Args:
        groups: int64 [E], the row of each example; see `epoch_order`.
        repeats: float64 [E], how often an epoch holds each.
        seed: of the run.
        batch_size: examples a step; the last step of an epoch may hold fewer.
        levels: int64 [R, L], the families of the rows, which then meet in a step; see `grouped_order`. None: rows are shuffled.
    """

    def __init__(
        self,
        groups: npt.NDArray[np.int64],
        repeats: npt.NDArray[np.float64],
        *,
        seed: int,
        batch_size: int,
        levels: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._groups = groups
        self._repeats = None if bool(np.all(repeats == 1.0)) else repeats
        self._seed = seed
        self._batch_size = batch_size
        self._levels = levels
        self._cached: tuple[int, npt.NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))
        # first_steps[e] updates are done when epoch e begins; filled as epochs are asked for, because with a fractional
        # `repeat` the parts of the rows drawn may differ in number.
        self._first_steps = [0]

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """int64 [M], the examples of an epoch in order."""
        if self._cached[0] != epoch:
            self._cached = (epoch, self._order(epoch))
        return self._cached[1]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._levels is None:
            return epoch_order(self._groups, seed=self._seed, epoch=epoch, repeats=self._repeats)
        return grouped_order(
            self._groups,
            self._levels,
            seed=self._seed,
            epoch=epoch,
            batch_size=self._batch_size,
            repeats=self._repeats,
        )

    def steps_before(self, epoch: int) -> int:
        """Steps of all epochs before `epoch`; `steps_before(3)` is the length of three epochs."""
        if self._repeats is None:
            return epoch * steps_per_epoch(len(self._groups), self._batch_size)
        while len(self._first_steps) <= epoch:
            examples = len(self.epoch(len(self._first_steps) - 1))
            self._first_steps.append(self._first_steps[-1] + steps_per_epoch(examples, self._batch_size))
        return self._first_steps[epoch]

    def step(self, step: int) -> tuple[int, npt.NDArray[np.int64]]:
        """Epoch and examples of update `step`, which counts from 1."""
        epoch = self._cached[0] if self._cached[0] >= 0 and self.steps_before(self._cached[0]) < step else 0
        while self.steps_before(epoch + 1) < step:
            epoch += 1
        start = (step - 1 - self.steps_before(epoch)) * self._batch_size
        return epoch, self.epoch(epoch)[start : start + self._batch_size]
