"""`transformers` without its warnings and bars."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

__all__ = ["quiet_transformers"]

# Typed as Any: its functions are not annotated.
_logging: Any = transformers_logging


@contextmanager
def quiet_transformers(*, progress_bar: bool) -> Iterator[None]:
    """Without its warnings (each becomes an error of ours, or does not matter) and, if asked for, its progress bar."""
    verbosity = _logging.get_verbosity()
    had_bar = _logging.is_progress_bar_enabled()
    _logging.set_verbosity(logging.CRITICAL)
    if not progress_bar:
        _logging.disable_progress_bar()
    try:
        yield
    finally:
        _logging.set_verbosity(verbosity)
        if had_bar and not progress_bar:
            with warnings.catch_warnings():
                # huggingface_hub warns where the user's environment keeps its bars off; they stay off then.
                warnings.simplefilter("ignore")
                _logging.enable_progress_bar()
