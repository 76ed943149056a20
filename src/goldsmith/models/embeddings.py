"""The embeddings of a model: a row for every token of the tokenizer, and one for every position where those are learned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldsmith.errors import ConfigError
from goldsmith.models.quiet import quiet_transformers

__all__ = ["fit_embeddings", "require_positions"]


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


def require_positions(model: PreTrainedModel, max_length: int, *, name: str, option: str | None = None) -> None:
    """Refuse a limit beyond positions that are learned, one embedding each; rotary ones are computed for any length.

    Args:
        name, option: what the message calls the model and the setting of the limit (None: `data.max_length`).

    Raises:
        ConfigError: the model has fewer.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or max_length <= positions:
        return
    for path, module in model.named_modules():
        own = path.rpartition(".")[2]
        # A few rows more than positions (OPT) are an offset, and no room.
        if isinstance(module, nn.Embedding) and ("wpe" in own or "pos" in own):
            raise ConfigError(
                f"{option or 'data.max_length'}: {max_length}, but {name} has {positions} learned positions",
                remedy=f"set it to {positions} at most; what becomes of longer rows is said by on_too_long",
            )


def _num_rows(model: PreTrainedModel) -> int:
    inputs: Any = model.get_input_embeddings()
    return int(inputs.weight.shape[0])
