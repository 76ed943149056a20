"""What a recipe names, made: its tokenizer, its data, its model. Training and verifying begin with the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from goldsmith.data.cache import MIN_SOURCE_BYTES, RowCache, default_cache_folder, load_cached_dataset
from goldsmith.data.control_tokens import add_control_tokens
from goldsmith.data.dataset import Dataset
from goldsmith.data.loader import load_dataset, read_texts
from goldsmith.data.rendering import Renderer
from goldsmith.data.stream import ExampleStream
from goldsmith.data.tokenizer import add_words, load_tokenizer, train_tokenizer
from goldsmith.errors import ConfigError
from goldsmith.models.adapters import (
    Adapter,
    AdapterBase,
    adapter_base,
    attach_adapter,
    quantization_of,
    require_peft,
    select_trainable,
)
from goldsmith.models.embeddings import fit_embeddings, require_positions
from goldsmith.models.folder import load_config, resolve_model_folder, tokenizer_folder
from goldsmith.models.load import load_causal_lm
from goldsmith.models.new_model import init_causal_lm, own_positions
from goldsmith.models.precision import DtypeName, resolve_dtype
from goldsmith.recipe import Recipe

__all__ = [
    "RowList",
    "Rows",
    "causal_lm_of",
    "choose_trained",
    "compute_dtype_of",
    "dataset_of",
    "own_limit_of",
    "renderer_of",
    "row_cache_of",
    "stream_of",
    "tokenizer_of",
]

Rows = Iterable[Mapping[str, object]]
RowList = Sequence[Mapping[str, object]]


def tokenizer_of(recipe: Recipe, train_rows: RowList | None) -> PreTrainedTokenizerBase:
    """Learnt from the training rows, or loaded: the recipe's own, else the model's; with the recipe's chat template, if any.

    A template of the recipe and the control tokens that it writes become the tokenizer's own, and are saved with it.
    """
    if recipe.tokenizer.train is not None:
        contexts, golds = read_texts(
            recipe.data.train if train_rows is None else train_rows, config=recipe.data, base_folder=Path.cwd()
        )
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(
            recipe.tokenizer.train, [*contexts, recipe.rendering.separator], gold_texts=golds
        )
    else:
        tokenizer = _published_tokenizer(recipe)
        known = tokenizer.get_vocab()
        for token in recipe.model.new_tokens:
            if token in known:
                raise ConfigError(
                    f"model.new_tokens: {token!r} is a token of the model already, number {known[token]}",
                    remedy="take it out",
                )
        add_words(tokenizer, recipe.model.new_tokens)
    add_control_tokens(tokenizer, recipe.rendering)
    return tokenizer


def _published_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """As it was published: without what the recipe adds."""
    if recipe.tokenizer.path is not None:
        return load_tokenizer(recipe.tokenizer.path)
    assert recipe.model.path is not None
    folder, revision = tokenizer_folder(recipe.model.path, revision=recipe.model.revision)
    return load_tokenizer(folder, revision=revision)


def own_limit_of(recipe: Recipe) -> int | None:
    """The positions that the model's configuration names."""
    if recipe.model.path is not None:
        config = load_config(resolve_model_folder(recipe.model.path, revision=recipe.model.revision))
        return getattr(config.get_text_config(), "max_position_embeddings", None)
    assert recipe.model.init is not None
    return own_positions(recipe.model.init)


def renderer_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Renderer:
    """What renders the recipe's rows; who reads them applies `max_length`, by the policy `data.on_too_long`."""
    return Renderer(tokenizer, recipe.rendering, max_length, keeps_long_rows=True)


def dataset_of(
    recipe: Recipe,
    renderer: Renderer,
    split: Literal["train", "eval"],
    rows: Rows | None,
    *,
    note: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """The rows of a split, read and rendered, or taken from the cache; `rows` in memory take the place of the recipe's files.

    Args:
        note: told what the cache had, or could not keep.
    """
    share_weight = recipe.objective.normalization == "example"
    sources = recipe.data.train if split == "train" else recipe.data.eval
    cache = row_cache_of(recipe, note) if rows is None else None
    if cache is not None:
        return load_cached_dataset(
            sources,
            config=recipe.data,
            renderer=renderer,
            split=split,
            base_folder=Path.cwd(),
            parts_share_weight=share_weight,
            cache=cache,
        )
    return load_dataset(
        sources if rows is None else rows,
        config=recipe.data,
        renderer=renderer,
        base_folder=Path.cwd(),
        split=split,
        parts_share_weight=share_weight,
    )


def row_cache_of(recipe: Recipe, note: Callable[[str], None]) -> RowCache | None:
    """Where the recipe keeps tokenised rows; None for nowhere.

    A learnt tokenizer has read every row already, and it need not be the same the next time: then nothing is kept.

    Raises:
        ConfigError: a folder within the run's.
    """
    chosen = recipe.data.cache
    if chosen is False or recipe.tokenizer.train is not None:
        return None
    if chosen is True:
        return RowCache(folder=default_cache_folder(), min_source_bytes=MIN_SOURCE_BYTES, note=note)
    folder = Path(chosen)
    if folder.resolve().is_relative_to(Path(recipe.output_dir).resolve()):
        raise ConfigError(
            f"data.cache: {chosen} lies in the run folder {recipe.output_dir}, which holds what belongs to the run",
            remedy="choose a folder outside of it, which other runs can use too",
        )
    return RowCache(folder=folder, note=note)


def stream_of(recipe: Recipe, renderer: Renderer) -> ExampleStream:
    """The streamed training data of a recipe."""
    return ExampleStream(
        recipe.data.train,
        config=recipe.data,
        renderer=renderer,
        seed=recipe.training.seed,
        batch_size=recipe.training.batch_size,
        base_folder=Path.cwd(),
        parts_share_weight=recipe.objective.normalization == "example",
    )


def causal_lm_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device, *, dtype: DtypeName | None = None
) -> PreTrainedModel:
    """The published model, or the new one, on its device; `dtype` in place of the recipe's.

    It has a row of its embeddings for every token of the tokenizer; see `fit_embeddings`.

    Raises:
        ConfigError: `data.max_length` is beyond its learned positions.
    """
    causal_lm = _loaded_or_new(recipe, tokenizer, device, dtype=dtype)
    if recipe.data.max_length is not None:
        name = recipe.model.path or f"a new {causal_lm.config.model_type}"
        require_positions(causal_lm, recipe.data.max_length, name=name)
    return causal_lm


def _loaded_or_new(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device, *, dtype: DtypeName | None
) -> PreTrainedModel:
    if recipe.model.path is not None:
        if recipe.adapter is not None:
            require_peft()
        chosen = dtype or recipe.model.dtype
        causal_lm = load_causal_lm(
            recipe.model.path,
            revision=recipe.model.revision,
            dtype=chosen,
            device=device,
            quantization=quantization_of(recipe.adapter, _product_dtype(chosen, device)),
        )
        fit_embeddings(causal_lm, tokenizer, new_token_ids=_ids_of_new_tokens(recipe, tokenizer))
        return causal_lm
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


def compute_dtype_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """What training takes its products in: on a CPU float32 where the recipe names a half precision, which gains nothing there.

    Raises:
        ConfigError: float16, in which small gradients are lost where the loss is not scaled.
    """
    dtype = _product_dtype(recipe.model.dtype, device)
    if dtype == torch.float16:
        raise ConfigError(
            "model.dtype: float16 is for scoring only: small gradients would be lost in it, and the loss is not scaled",
            remedy="train in bfloat16 or float32; the result keeps the type of the model's files",
        )
    return dtype


def _product_dtype(dtype: DtypeName, device: torch.device) -> torch.dtype:
    resolved = resolve_dtype(dtype, device)
    return torch.float32 if device.type == "cpu" and resolved == torch.bfloat16 else resolved


def choose_trained(
    recipe: Recipe, causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, at_random: bool = False
) -> Adapter | None:
    """Freeze what the recipe does not train, and put its adapter into the model; None where it has none.

    To be done after the model's own randomness is silenced (an adapter's dropout is asked for) and before `LikelihoodModel`.

    Args:
        at_random: an adapter with both factors random and without dropout, for verifying.

    Raises:
        ConfigError: a name that matches nothing, or new tokens that would not be trained.
    """
    new_token_ids = _new_token_ids(recipe, causal_lm, tokenizer)
    if recipe.adapter is not None:
        assert recipe.model.path is not None
        if adapter_base(resolve_model_folder(recipe.model.path, revision=recipe.model.revision)) is not None:
            raise ConfigError(
                f"model.path: {recipe.model.path} is an adapter itself, and an adapter names one base model",
                remedy="give the merged model (RUN/model in place of RUN/adapter), or leave `adapter:` out",
            )
        return attach_adapter(
            causal_lm,
            recipe.adapter.model_copy(update={"dropout": 0.0}) if at_random else recipe.adapter,
            base=AdapterBase(path=recipe.model.path, revision=recipe.model.revision),
            seed=recipe.training.seed,
            new_token_ids=new_token_ids,
            at_random=at_random,
        )
    if recipe.training.trainable is not None:
        select_trainable(causal_lm, recipe.training.trainable)
        embeddings = [causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()]
        names = {id(module): name for name, module in causal_lm.named_modules()}
        for module in embeddings:
            if new_token_ids and module is not None and not module.weight.requires_grad:
                raise ConfigError(
                    f"training.trainable freezes {names[id(module)]}, but {len(new_token_ids)} tokens are new to the model "
                    f"and would stay as they are made, such as {tokenizer.convert_ids_to_tokens(new_token_ids[0])!r}",
                    remedy=f"add {names[id(module)]}.weight to training.trainable",
                )
    return None


def _ids_of_new_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Of the tokens that the recipe adds to a published tokenizer: those named, and those of its chat template."""
    vocabulary = tokenizer.get_vocab()
    if recipe.rendering.chat_template is None or recipe.tokenizer.train is not None:
        return [vocabulary[token] for token in recipe.model.new_tokens]
    # The tokenizer at hand has them already, perhaps out of the run folder; what is new only the published one can say.
    published = _published_tokenizer(recipe).get_vocab()
    return sorted(index for token, index in vocabulary.items() if token not in published)


def _new_token_ids(recipe: Recipe, causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the published model does not know: those that the recipe adds, and those beyond its own vocabulary."""
    if recipe.model.path is None:
        return []
    own = (
        load_config(resolve_model_folder(recipe.model.path, revision=recipe.model.revision))
        .get_text_config()
        .vocab_size
    )
    inputs: Any = causal_lm.get_input_embeddings()
    return sorted({*_ids_of_new_tokens(recipe, tokenizer), *range(own, inputs.weight.shape[0])})
