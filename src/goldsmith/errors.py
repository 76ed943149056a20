"""Errors for users: each says what was seen and what to do, and carries the exit code of the command line.

`assert` and built-in exceptions are for programmers; these are for the person who wrote the recipe or the data.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GoldsmithError",
    "MachineError",
    "ModelError",
    "NumericalError",
    "StoppedBySignal",
]


class GoldsmithError(Exception):
    """A problem that the user can mend.

    Args:
        message: what was seen, with the place (file, line, field) and the value.
        remedy: what to do about it, one sentence; printed after the message.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(message if remedy is None else f"{message}\n  Remedy: {remedy}")


class ConfigError(GoldsmithError):
    """Usage or recipe: an unknown key, a value of the wrong type, no such recipe."""

    exit_code = 2


class DataError(GoldsmithError):
    """Data rejected: a missing or empty file, or rows that cannot be trained on."""

    exit_code = 3


class ModelError(GoldsmithError):
    """Model refused: not found, only pickled weights, or an architecture that fails the proof."""

    exit_code = 4


class NumericalError(GoldsmithError):
    """A non-finite loss or gradient; raised before the update, so that the weights are as they were."""

    exit_code = 5


class CheckpointError(GoldsmithError):
    """A checkpoint that is damaged: a file missing, or a hash that differs from the manifest."""

    exit_code = 6


class MachineError(GoldsmithError):
    """The environment: disk full, out of memory, a folder that is in use or belongs to another recipe."""

    exit_code = 7


class StoppedBySignal(GoldsmithError):  # noqa: N818 - it is no fault of anyone
    """Stopped by SIGINT or SIGTERM after a checkpoint; the same command resumes."""

    exit_code = 75
