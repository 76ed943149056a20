"""The vocabulary of a model: a row of the embeddings for every token of the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldsmith.models.quiet import quiet_transformers

__all__ = ["fit_embeddings"]


@torch.no_grad()
def fit_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, new_token_ids: Iterable[int] = ()
) -> int:
    """Give every token of the tokenizer a row of the embeddings; returns how many rows were added.

    A new row is the mean of the old ones, of the input and of the output embedding, so no random number is drawn and nothing
    depends on the device; tied embeddings stay tied. A model that has rows enough keeps them as they are, but for those named.

    Args:
        new_token_ids: tokens that are new although the model has a row for them (published models are often padded): such
            a row was never trained, and is set to the mean, too.
    """
    old = _num_rows(model)
    needed = 1 + max(tokenizer.get_vocab().values())
    added = max(0, needed - old)
    if added:
        with quiet_transformers(progress_bar=False), torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(needed, mean_resizing=False)
    new = sorted({*new_token_ids, *range(old, old + added)})
    if not new:
        return 0
    known = torch.ones(old + added, dtype=torch.bool)
    known[new] = False
    inputs: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    tensors = [inputs.weight]
    if output is not None:
        tensors += [] if output.weight is inputs.weight else [output.weight]
        tensors += [] if getattr(output, "bias", None) is None else [output.bias]
    for tensor in tensors:
        tensor[new] = tensor[known.to(tensor.device)].double().mean(dim=0).to(tensor.dtype)
    return added


def _num_rows(model: PreTrainedModel) -> int:
    inputs: Any = model.get_input_embeddings()
    return int(inputs.weight.shape[0])
