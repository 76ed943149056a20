"""Rows that were tokenised elsewhere: token ids with the weight of predicting each, or with labels as `transformers` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from goldsmith.data.formats.checks import WEIGHT_RANGE, BadRowError, is_weight, wrong_type
from goldsmith.data.rows import shorten

__all__ = ["IGNORED_LABEL", "read_tokens"]

# The label of a token that is not predicted.
IGNORED_LABEL: Final = -100

# A context that is padded is longer than a server's, and padding behind the gold is computed for nothing.
_MASK: Final = "attention_mask"


def read_tokens(
    values: Mapping[str, object], *, ids_name: str, weights_name: str, labels_name: str, vocab_size: int | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Token ids, int32 [T], and the weight of predicting each, float32 [T].

    Labels are not shifted: the label of a token is its own id, or -100 where it is context; so `transformers` has them. The
    first token is never predicted: its label counts as -100, as it does there, but a weight of it above 0 is an error.

    Args:
        values: of the row.
        ids_name, weights_name, labels_name: the columns; one of the latter two is there.
        vocab_size: ids are below it; None where that is unknown.

    Raises:
        BadRowError: see the messages.
    """
    ids = _integers(_listed(values.get(ids_name), ids_name), ids_name)
    if ids.shape[0] < 2:
        raise BadRowError(
            "too few tokens", f"the field {ids_name!r} has {ids.shape[0]} token ids; a context and a gold token are 2"
        )
    wrong = np.flatnonzero(ids < 0) if vocab_size is None else np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if wrong.size:
        limit = "" if vocab_size is None else f", below the {vocab_size} tokens of the tokenizer"
        raise BadRowError(
            "no such token",
            f"{ids_name}[{wrong[0]}] is {ids[wrong[0]]}; an id is 0 or above{limit}; give the rows that this model's "
            "tokenizer made",
        )
    _check_mask(values.get(_MASK))
    has_weights, has_labels = (values.get(name) is not None for name in (weights_name, labels_name))
    if has_weights and has_labels:
        raise BadRowError(
            "weights and labels", f"the row has both {weights_name!r} and {labels_name!r}; leave out one of them"
        )
    if not has_weights and not has_labels:
        raise BadRowError(
            "no target_weights or labels",
            f"neither {weights_name!r} nor {labels_name!r} says which tokens are gold; add one of them",
        )
    if has_weights:
        weights = _weights(_same_length(values[weights_name], weights_name, ids, ids_name), weights_name)
    else:
        weights = _from_labels(
            _same_length(values[labels_name], labels_name, ids, ids_name), labels_name, ids, ids_name
        )
    if not weights.any():
        raise BadRowError("no gold token", "no token of the row is gold: every weight is 0, or every label -100")
    return ids.astype(np.int32), weights


def _listed(value: object, name: str) -> list[object]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return list(value)
    raise wrong_type(value, name, "a list of numbers")


def _same_length(value: object, name: str, ids: npt.NDArray[np.int64], ids_name: str) -> list[object]:
    items = _listed(value, name)
    if len(items) != ids.shape[0]:
        raise BadRowError(
            "lengths differ",
            f"{name!r} has {len(items)} entries, but {ids_name!r} has {ids.shape[0]}; each token has one of its own",
        )
    return items


def _integers(items: list[object], name: str) -> npt.NDArray[np.int64]:
    if set(map(type, items)) - {int}:  # a boolean is of another type here
        index = next(i for i, item in enumerate(items) if type(item) is not int)
        raise wrong_type(items[index], f"{name}[{index}]", "an integer")
    try:
        return np.array(items, dtype=np.int64)
    except OverflowError:
        index = next(i for i, item in enumerate(items) if isinstance(item, int) and abs(item) >= 1 << 63)
        raise BadRowError(
            "no such token", f"{name}[{index}] is {shorten(items[index])}, which is no token id"
        ) from None


def _weights(items: list[object], name: str) -> npt.NDArray[np.float32]:
    for index, item in enumerate(items):
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise wrong_type(item, f"{name}[{index}]", "a number")
        if not is_weight(item):
            raise BadRowError("bad weight", f"{name}[{index}] is {shorten(item)}; a weight is 0, or {WEIGHT_RANGE}")
    weights = np.array(items, dtype=np.float64).astype(np.float32)
    if weights[0] != 0:
        raise BadRowError(
            "first token is gold",
            f"{name}[0] is {shorten(items[0])}, but nothing comes before the first token, so it is never predicted; put the "
            "beginning token in front, or set it to 0",
        )
    return weights


def _from_labels(items: list[object], name: str, ids: npt.NDArray[np.int64], ids_name: str) -> npt.NDArray[np.float32]:
    labels = _integers(items, name)
    is_gold = labels != IGNORED_LABEL
    wrong = np.flatnonzero(is_gold & (labels != ids))
    if wrong.size:
        index = int(wrong[0])
        shifted = is_gold[:-1]
        if shifted.any() and np.array_equal(labels[:-1][shifted], ids[1:][shifted]):
            raise BadRowError(
                "shifted labels",
                f"{name}[{index}] is {labels[index]}, the id of the next token; labels are not shifted here, as in "
                f"`transformers`: {name}[t] is {ids_name}[t], or {IGNORED_LABEL}",
            )
        raise BadRowError(
            "label of another token",
            f"{name}[{index}] is {labels[index]}, but {ids_name}[{index}] is {ids[index]}; a label is the token's own id, or "
            f"{IGNORED_LABEL} for context",
        )
    weights: npt.NDArray[np.float32] = is_gold.astype(np.float32)
    weights[0] = 0.0
    return weights


def _check_mask(value: object) -> None:
    if value is not None and 0 in _listed(value, _MASK):
        raise BadRowError("padded row", f"the field {_MASK!r} has a 0: the row is padded; give the ids without padding")
