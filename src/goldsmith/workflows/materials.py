"""What a recipe names, made: its tokenizer, its data, its model. Training and verifying begin with the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldsmith.data.loader import Dataset, load_dataset, read_texts
from goldsmith.data.rendering import Renderer
from goldsmith.data.stream import ExampleStream
from goldsmith.data.tokenizer import load_tokenizer, train_tokenizer
from goldsmith.models.load import DtypeName, init_causal_lm, load_causal_lm, load_config, resolve_model_folder
from goldsmith.recipe import Recipe

__all__ = ["RowList", "Rows", "causal_lm_of", "dataset_of", "own_limit_of", "stream_of", "tokenizer_of"]

Rows = Iterable[Mapping[str, object]]
RowList = Sequence[Mapping[str, object]]


def tokenizer_of(recipe: Recipe, train_rows: RowList | None) -> PreTrainedTokenizerBase:
    """Learnt from the training rows, or loaded: the recipe's own, else the model's."""
    if recipe.tokenizer.train is not None:
        contexts, golds = read_texts(
            recipe.data.train if train_rows is None else train_rows, config=recipe.data, base_folder=Path.cwd()
        )
        return train_tokenizer(recipe.tokenizer.train, [*contexts, recipe.rendering.separator], gold_texts=golds)
    path = recipe.tokenizer.path or recipe.model.path
    assert path is not None
    return load_tokenizer(path, revision=recipe.model.revision if recipe.tokenizer.path is None else None)


def own_limit_of(recipe: Recipe) -> int | None:
    """The positions that the model's configuration names."""
    if recipe.model.path is not None:
        config = load_config(resolve_model_folder(recipe.model.path, revision=recipe.model.revision))
        return getattr(config.get_text_config(), "max_position_embeddings", None)
    assert recipe.model.init is not None
    return recipe.model.init.get("max_position_embeddings")


def dataset_of(recipe: Recipe, renderer: Renderer, split: Literal["train", "eval"], rows: Rows | None) -> Dataset:
    """The rows of a split, read and rendered; `rows` in memory take the place of the recipe's files."""
    sources = recipe.data.train if split == "train" else recipe.data.eval
    return load_dataset(
        sources if rows is None else rows,
        config=recipe.data,
        renderer=renderer,
        base_folder=Path.cwd(),
        split=split,
    )


def stream_of(recipe: Recipe, renderer: Renderer) -> ExampleStream:
    """The streamed training data of a recipe."""
    return ExampleStream(
        recipe.data.train,
        config=recipe.data,
        renderer=renderer,
        seed=recipe.training.seed,
        batch_size=recipe.training.batch_size,
        base_folder=Path.cwd(),
    )


def causal_lm_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device, *, dtype: DtypeName | None = None
) -> PreTrainedModel:
    """The published model, or the new one, on its device; `dtype` in place of the recipe's."""
    if recipe.model.path is not None:
        return load_causal_lm(
            recipe.model.path, revision=recipe.model.revision, dtype=dtype or recipe.model.dtype, device=device
        )
    assert recipe.model.init is not None
    return init_causal_lm(
        recipe.model.init,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=recipe.training.seed,
        dtype=dtype or recipe.model.dtype,
        device=device,
    )
