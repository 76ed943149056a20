"""What of a model is trained when not all of it is: adapters of the LoRA family through `peft`, or parameters chosen by name.

`peft` puts its layers into the model itself, so everything that takes the model (packing, the objective, the trainer, the plain
path of `goldsmith verify`) takes an adapted one too. Adapted layers are frozen products plus a product of low rank; the gradient of
a frozen weight is never computed. `peft` is imported where an adapter is asked for, and nowhere else.

An adapter's folder is what `peft` writes: `adapter_config.json`, which names its base model, and `adapter_model.safetensors`.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from goldsmith.errors import ConfigError, ModelError
from goldsmith.models.quantized import has_packed_weights
from goldsmith.models.wording import one_line

__all__ = [
    "Adapter",
    "AdapterBase",
    "AdapterConfig",
    "adapter_base",
    "attach_adapter",
    "merge_adapter",
    "quantization_of",
    "require_peft",
    "select_trainable",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterConfig(BaseModel):
    """`adapter:` of a recipe; without it all of the model is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["lora", "dora", "rslora", "qlora"] = Field(
        "lora",
        description="lora (Hu 2021); dora (Liu 2024): direction and length of each weight apart; rslora (Kalajdzievski 2023): "
        "scaled by alpha / sqrt(rank) in place of alpha / rank; qlora (Dettmers 2023): lora on frozen weights of 4 bits",
    )
    rank: int = Field(16, gt=0, description="of the two factors")
    alpha: float = Field(32.0, gt=0.0, description="the product of the factors is scaled by alpha / rank")
    dropout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="of the adapter's input; above 0 the loss is random, equal in distribution only",
    )
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="the linear layers that get factors: all but the output layer, or globs over module names, whole "
        "(model.layers.1?.mlp.*) or their ends (q_proj)",
    )
    modules_to_save: tuple[str, ...] = Field(
        (), description="globs over the names of modules that are trained in full and saved with the adapter"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.target_modules == ():
            raise ValueError("target_modules is empty; name at least one module, or all-linear")
        if any(not pattern for pattern in (*self.target_modules, *self.modules_to_save)):
            raise ValueError("an empty name among target_modules or modules_to_save")
        return self


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter inside a model.

    Attributes:
        peft_model: `peft`'s own wrapper around the same model.
        config: as the recipe has it.
        num_modules: how many modules have factors.
        num_parameters: how many numbers are trained.
    """

    peft_model: Any
    config: AdapterConfig
    num_modules: int
    num_parameters: int

    def save(self, folder: Path) -> None:
        """Write the folder that `peft` loads: the adapter's weights and its configuration, which names the base model."""
        # The embeddings are not trained but for the rows and modules that belong to the adapter and are written as such.
        with _quietly():
            self.peft_model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        # A form for a person to fill in.
        (folder / "README.md").unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class AdapterBase:
    """The model that an adapter's folder is for: a folder or a hub id."""

    path: str
    revision: str | None


def require_peft() -> None:
    """Raises:
    ConfigError: `peft` is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "adapters need the package peft, which is not installed", remedy="pip install goldsmith[adapters]"
        )


def quantization_of(config: AdapterConfig | None, compute_dtype: torch.dtype) -> Any | None:
    """How the frozen weights are stored, for `load_causal_lm`: as `bitsandbytes` has it for qlora, None for the other kinds.

    On a CPU its numbers are tested; on a GPU it has not run.

    Args:
        compute_dtype: what products with the unpacked weights are taken in.

    Raises:
        ModelError: qlora without `bitsandbytes`, with a version that `transformers` does not take, or in float64.
    """
    if config is None or config.kind != "qlora":
        return None
    what = "adapter.kind: qlora keeps its frozen weights in 4 bits through bitsandbytes"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{what}, and the package bitsandbytes is not installed",
            remedy="use `kind: lora`, or `pip install goldsmith[qlora]`",
        )
    if compute_dtype == torch.float64:
        raise ModelError(f"{what}, which knows no float64", remedy="use float32, or `kind: lora`")
    from transformers import BitsAndBytesConfig

    with _quiet_import():
        import bitsandbytes  # noqa: F401

    config_class: Any = BitsAndBytesConfig
    try:
        return config_class(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    except ValueError as error:
        raise ModelError(f"{what}, but {one_line(error)}", remedy="pip install -U bitsandbytes") from error


def attach_adapter(
    causal_lm: PreTrainedModel,
    config: AdapterConfig,
    *,
    base: AdapterBase,
    seed: int = 0,
    new_token_ids: Sequence[int] = (),
    at_random: bool = False,
) -> Adapter:
    """Put an adapter into the model, in place: everything else is frozen. The model computes what it computed before.

    To be done before the model's layers are replaced by ones computed by hand, which know plain weights only.

    Args:
        base: what the adapter's folder will name as its base model.
        seed: of the random factor (the other one begins as zero). The global random state is left as it was.
        new_token_ids: tokens whose embeddings are trained as well, of the input and of the output.
        at_random: both factors random, so that no gradient is zero, and small beside the weights; for verifying.

    Raises:
        ConfigError: a pattern that no module matches, or one for modules that cannot be adapted.
        ModelError: embeddings that cannot be trained in part.
    """
    require_peft()
    assert not any("forward" in vars(module) for module in causal_lm.modules()), "layers are replaced already"
    import peft

    saved = _modules_to_save(causal_lm, config.modules_to_save)
    targets = _targets(causal_lm, config.target_modules, saved)
    is_tied = _is_tied(causal_lm)
    new_token_ids = sorted(set(new_token_ids))
    lora_config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        modules_to_save=saved or None,
        trainable_token_indices=_token_indices(causal_lm, new_token_ids, saved),
        use_rslora=config.kind == "rslora",
        use_dora=config.kind == "dora",
        fan_in_fan_out=isinstance(causal_lm.get_submodule(targets[0]), Conv1D),
        init_lora_weights=not at_random,
        ensure_weight_tying=is_tied and any(_is_embedding(causal_lm, name) for name in saved),
        base_model_name_or_path=base.path,
        revision=base.revision,
    )
    with _quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Drawn on the CPU whatever the device, so the factors are the same everywhere.
        peft_model: Any = peft.get_peft_model(causal_lm, lora_config)
    if at_random:
        _take_out_scaling(causal_lm)
    # It takes the name of the loaded folder; the recipe's own, with its revision, is what finds the model again.
    lora_config.base_model_name_or_path = base.path
    trained = [parameter for parameter in causal_lm.parameters() if parameter.requires_grad]
    return Adapter(
        peft_model=peft_model,
        config=config,
        num_modules=len(targets),
        num_parameters=sum(parameter.numel() for parameter in trained),
    )


@torch.no_grad()
def _take_out_scaling(causal_lm: PreTrainedModel) -> None:
    """So that random factors change a weight by a part of its size, whatever rank and alpha are.

    Noise that drowned the weights would raise the rounding of the model's float32 norms to what looks like a fault.
    """
    for module in causal_lm.modules():
        for name, factor in getattr(module, "lora_B", {}).items():
            adapted: Any = module
            factor.weight /= max(1.0, float(adapted.scaling[name]))
            if name in adapted.lora_magnitude_vector:  # DoRA's, which was that of the larger factors
                adapted.lora_magnitude_vector[name].update_layer(
                    base_layer=adapted.get_base_layer(),
                    lora_A=adapted.lora_A[name].weight,
                    lora_B=factor.weight,
                    scaling=adapted.scaling[name],
                )


def _targets(causal_lm: PreTrainedModel, patterns: str | tuple[str, ...], saved: Sequence[str]) -> list[str]:
    """Full names of the linear layers that get factors, in the model's order.

    The output layer is none of them: the objective multiplies by its weight itself, a chunk of gold at a time.
    """
    head: nn.Module = causal_lm.get_output_embeddings()
    names = [
        name
        for name, module in causal_lm.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and not any(name == whole or name.startswith(f"{whole}.") for whole in saved)
    ]
    if isinstance(patterns, tuple):
        names = _matching(names, patterns, key="adapter.target_modules", what="a linear layer below the output layer")
    kinds = {isinstance(causal_lm.get_submodule(name), Conv1D) for name in names}
    if len(kinds) != 1:
        raise ModelError(
            f"{type(causal_lm).__name__}: {'no linear layer' if not kinds else 'two kinds of linear layers'} to adapt",
            remedy="name those of one kind in adapter.target_modules",
        )
    return names


def _modules_to_save(causal_lm: PreTrainedModel, patterns: tuple[str, ...]) -> list[str]:
    names = [
        name
        for name, module in causal_lm.named_modules()
        if name and next(module.parameters(), None) is not None and not isinstance(module, nn.ModuleList)
    ]
    saved = (
        _matching(names, patterns, key="adapter.modules_to_save", what="a module with parameters") if patterns else []
    )
    outermost = [name for name in saved if not any(name.startswith(f"{other}.") for other in saved)]
    packed = [name for name in outermost if has_packed_weights(causal_lm.get_submodule(name))]
    if packed:
        raise ConfigError(
            f"adapter.modules_to_save: {packed[0]!r} has weights in 4 bits, which cannot be trained in full",
            remedy="leave it out, or use `kind: lora`",
        )
    decoder = next(name for name, module in causal_lm.named_modules() if module is causal_lm.get_decoder())
    if decoder in outermost:
        raise ConfigError(
            f"adapter.modules_to_save: {decoder!r} is the whole decoder",
            remedy="leave `adapter:` out to train all of it",
        )
    embeddings = [name for name in outermost if _is_embedding(causal_lm, name)]
    if embeddings and _is_tied(causal_lm):
        # peft keeps a copy of the input embedding, and ties the output layer to that where its name is known to it.
        inputs = next(name for name, module in causal_lm.named_modules() if module is causal_lm.get_input_embeddings())
        if inputs.rpartition(".")[2] != "embed_tokens":
            raise ConfigError(
                f"adapter.modules_to_save: {', '.join(embeddings)}: the input and output embeddings of "
                f"{type(causal_lm).__name__} are one tensor, which peft would take apart",
                remedy="leave them out; `model.new_tokens` trains the embeddings of new tokens with an adapter",
            )
        outermost = [name for name in outermost if name not in embeddings] + [inputs]
    return outermost


def _token_indices(
    causal_lm: PreTrainedModel, new_token_ids: Sequence[int], saved: Sequence[str]
) -> dict[str, list[int]] | None:
    """Module -> rows that are trained: of the input, and of the output where it is another tensor."""
    if not new_token_ids:
        return None
    modules: list[nn.Module] = [causal_lm.get_input_embeddings()]
    head = causal_lm.get_output_embeddings()
    if not _is_tied(causal_lm):
        modules.append(head)
    names = {id(module): name for name, module in causal_lm.named_modules()}
    indices = {names[id(module)]: list(new_token_ids) for module in modules if names[id(module)] not in saved}
    if indices and getattr(head, "bias", None) is not None and names[id(head)] not in saved:
        # peft's layer for trained rows multiplies by the weight and forgets the bias.
        raise ModelError(
            f"{type(causal_lm).__name__}: its output layer has a bias, so single rows of it cannot be trained",
            remedy=f"add {names[id(head)]} and {names[id(modules[0])]} to adapter.modules_to_save",
        )
    return indices or None


def _is_tied(causal_lm: PreTrainedModel) -> bool:
    inputs: Any = causal_lm.get_input_embeddings()
    output: Any = causal_lm.get_output_embeddings()
    return output is not None and inputs.weight is output.weight


def _is_embedding(causal_lm: PreTrainedModel, name: str) -> bool:
    module = causal_lm.get_submodule(name)
    return module is causal_lm.get_input_embeddings() or module is causal_lm.get_output_embeddings()


# ---------------------------------------------------------------------------------------------------- an adapter's folder


def adapter_base(folder: Path, *, name: str | None = None) -> AdapterBase | None:
    """The base model that the adapter in `folder` names; None where the folder holds no adapter, or a model too.

    A relative path is taken from the current directory, or from the adapter's folder where only that has it.

    Raises:
        ModelError: a damaged configuration, one without a base model, or an adapter of another family than LoRA.
    """
    file = folder / CONFIG
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    name = str(folder) if name is None else name
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        base, kind = values["base_model_name_or_path"], values["peft_type"]
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ModelError(
            f"{name}: {CONFIG} is not an adapter's configuration ({type(error).__name__}: {error})",
            remedy="give a folder written by peft's save_pretrained",
        ) from error
    if kind != "LORA" or values.get("megatron_config"):
        raise ModelError(
            f"{name}: an adapter of the kind {kind!r}; LoRA, DoRA and rsLoRA are read",
            remedy="merge it into its base model with peft (merge_and_unload, save_pretrained) and give that folder",
        )
    if not isinstance(base, str) or not base:
        raise ModelError(f"{name}: {CONFIG} names no base model", remedy="write its path into base_model_name_or_path")
    if not Path(base).expanduser().is_dir() and (folder / base).is_dir():
        base = str(folder / base)
    return AdapterBase(path=base, revision=values.get("revision"))


def merge_adapter(causal_lm: PreTrainedModel, folder: Path, *, name: str) -> PreTrainedModel:
    """The base model with the adapter of `folder` added into its weights, in the model's own (master) precision.

    Raises:
        ConfigError: `peft` is not installed.
        ModelError: the adapter's weights are missing, damaged, or do not fit the model.
    """
    require_peft()
    import peft

    refit = "check base_model_name_or_path in adapter_config.json, and that the adapter's tokenizer lies beside it"
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{name}: has no {WEIGHTS}", remedy="save the adapter with peft as safetensors")
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS}: damaged or cut off ({error})", remedy="copy the file again") from error
    try:
        with _quietly(), torch.random.fork_rng(devices=[]):
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            peft_model: Any = peft.get_peft_model(causal_lm, config)
            expected = peft.get_peft_model_state_dict(peft_model, save_embedding_layers=False).keys()
            result: Any = peft.set_peft_model_state_dict(peft_model, weights)
            lost = sorted({*(expected - weights.keys()), *result.unexpected_keys})
            if lost:
                raise ModelError(
                    f"{name}: {len(lost)} tensors of the adapter and of the model do not belong together, such as {lost[0]}",
                    remedy=refit,
                )
            merged: PreTrainedModel = peft_model.merge_and_unload()
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ModelError(f"{name}: the adapter does not fit its base model: {one_line(error)}", remedy=refit) from error
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    return merged


# -------------------------------------------------------------------------------------------------- parameters by their names


def select_trainable(causal_lm: PreTrainedModel, patterns: Sequence[str]) -> int:
    """Freeze every parameter that the patterns do not choose; how many numbers are trained.

    Globs over parameter names, in order; one that begins with `!` takes away what it matches. Where the first one does, all are
    chosen to begin with. A tied tensor is chosen by any of its names.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=11)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> select_trainable(model, ["model.layers.1.*", "!*.mlp.*", "!*_proj.weight"])
    16
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['model.layers.1.input_layernorm.weight', 'model.layers.1.post_attention_layernorm.weight']

    Raises:
        ConfigError: a pattern that matches no parameter, or nothing left to train.
    """
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    every_name = [name for group in names.values() for name in group]
    chosen = dict.fromkeys(names, bool(patterns) and patterns[0].startswith("!"))
    for pattern in patterns:
        matching = {name for name in every_name if fnmatchcase(name, pattern.removeprefix("!"))}
        if not matching:
            raise ConfigError(
                f"training.trainable: {pattern!r} matches no parameter{_nearest(pattern, every_name)}",
                remedy="use the model's own parameter names; * stands for any characters, ? for one",
            )
        for key, group in names.items():
            if matching.intersection(group):
                chosen[key] = not pattern.startswith("!")
    for key, parameter in parameters.items():
        parameter.requires_grad_(chosen[key])
    if not any(chosen.values()):
        raise ConfigError(
            f"training.trainable: {list(patterns)} leaves nothing to train", remedy="choose some parameters"
        )
    return sum(parameters[key].numel() for key, is_chosen in chosen.items() if is_chosen)


def _matching(names: Sequence[str], patterns: Iterable[str], *, key: str, what: str) -> list[str]:
    """Names that a pattern matches, whole or by their end, in order.

    Raises:
        ConfigError: a pattern that matches none.
    """
    found: set[str] = set()
    for pattern in patterns:
        own = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
        if not own:
            raise ConfigError(
                f"{key}: {pattern!r} matches no name of {what}{_nearest(pattern, names)}",
                remedy="use the model's own module names, whole or their last parts; * stands for any characters",
            )
        found |= own
    return [name for name in names if name in found]


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The names most like the pattern: whole, or their ends of as many parts as the pattern has."""
    pattern = pattern.removeprefix("!")
    parts = pattern.count(".") + 1
    endings = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names)
    candidates = [*endings, *names]
    matches = list(dict.fromkeys(difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.4)))
    return f"; the nearest are {', '.join(map(repr, matches))}" if matches else ""


@contextmanager
def _quietly() -> Iterator[None]:
    """peft warns of what is decided here, or is an error of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _quiet_import() -> Iterator[None]:
    """bitsandbytes warns of a kernel that it could fetch from the hub, for products that are not taken here."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
