"""From a folder, a hub id or a recipe's `init` to a causal language model to be trained, or a named refusal.

Every file is looked at before `transformers` is asked to load it, because it would otherwise fall back in silence:
initialise missing weights at random, read pickles, attach an adapter that lies in the folder, or take the decoder out
of an encoder-decoder.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from goldsmith.data.tokenizer import load_tokenizer
from goldsmith.errors import ConfigError, MachineError, ModelError
from goldsmith.models.adapters import adapter_base, merge_adapter
from goldsmith.models.quantized import copy_unpacked, keep_as_packed

__all__ = [
    "DtypeName",
    "ModelConfig",
    "fit_embeddings",
    "init_causal_lm",
    "load_causal_lm",
    "load_config",
    "parameter_dtype",
    "quiet_transformers",
    "resolve_device",
    "resolve_dtype",
    "resolve_model_folder",
    "silence_randomness",
    "stored_dtype",
    "tokenizer_folder",
]

# Typed as Any: its classmethods return different things for different flags, or are not annotated.
_auto_model: Any = AutoModelForCausalLM
_logging: Any = transformers_logging

DtypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# What of a hub repository describes the model; its weights are fetched by name afterwards.
_DESCRIPTION_FILES = ("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json")
_RANDOMNESS = re.compile(r"dropout|pdrop|layerdrop|drop_path|jitter")
# Keys that `transformers` moves into `rope_parameters`, on every architecture that has it.
_ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"})
# Known to every config, but decided elsewhere in the recipe or by goldsmith itself.
_NOT_FOR_INIT = {
    "dtype": "set `model.dtype`",
    "torch_dtype": "set `model.dtype`",
    "attn_implementation": "goldsmith brings its own attention",
    "architectures": "set `architecture`",
    "model_type": "set `architecture`",
}
_DEVICE_REMEDY = "use auto, cpu, cuda or cuda:N"
_PROGRESS_BAR_BYTES = 1 << 30


class ModelConfig(BaseModel):
    """The model of a recipe: either published weights (`path`) or a new model (`init`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(default=None, min_length=1, description="A folder, or an id on the Hugging Face hub.")
    revision: str | None = Field(default=None, description="Branch, tag or commit; for hub ids only.")
    dtype: DtypeName = Field(
        default="auto",
        description="What is computed in; `auto`: float32 on a CPU, bfloat16 on a GPU. On a CPU no training is in half precision. "
        "Master weights stay in float32.",
    )
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda`, `cuda:1`, ...")
    init: dict[str, Any] | None = Field(
        default=None,
        description="A new model with random weights: `architecture` (such as llama) and its own settings.",
    )
    new_tokens: tuple[str, ...] = Field(
        default=(),
        description="Texts that become one token each; their embeddings begin as the mean of all others, and are trained.",
    )

    @model_validator(mode="after")
    def _exactly_one_source(self) -> ModelConfig:
        if (self.path is None) == (self.init is None):
            seen = "neither" if self.path is None else "both"
            raise ValueError(f"give exactly one of `path` and `init`, {seen} given")
        if self.init is not None and self.revision is not None:
            raise ValueError("`revision` goes with `path`, not with `init`")
        if self.init is not None and not isinstance(self.init.get("architecture"), str):
            raise ValueError("`init` needs `architecture`, such as `llama`")
        if self.init is not None and self.new_tokens:
            raise ValueError("`new_tokens` goes with `path`; with `init` set `tokenizer.train.special_tokens`")
        if any(not token for token in self.new_tokens) or len(set(self.new_tokens)) != len(self.new_tokens):
            raise ValueError("`new_tokens` holds an empty text, or one twice")
        return self


def resolve_device(device: str = "auto") -> torch.device:
    """The device by name; `auto` is the current CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: not the name of a device.
        MachineError: a device that this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"model.device: {device!r} is not a device", remedy="use auto, cpu, cuda or cuda:N"
        ) from error
    if resolved.type == "cuda":
        num_devices = torch.cuda.device_count()
        if (resolved.index or 0) >= num_devices:
            raise MachineError(
                f"model.device: {device!r}, but PyTorch sees {num_devices} CUDA devices here",
                remedy="use `device: auto`, or install a PyTorch build that matches the GPU driver",
            )
    elif resolved.type != "cpu":
        raise ConfigError(f"model.device: {device!r} is not supported", remedy=_DEVICE_REMEDY)
    return resolved


def resolve_dtype(dtype: DtypeName, device: torch.device) -> torch.dtype:
    """What the forward pass computes in: `auto` is float32 on a CPU, bfloat16 (autocast) on a GPU that has it."""
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def parameter_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The master weights' dtype: float32, or float64 where float64 is computed in."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype that the weights had in their files (a new model: its parameters'); the result is exported in it."""
    stored = getattr(model, "stored_dtype", None)
    return stored if isinstance(stored, torch.dtype) else model.dtype


# ---------------------------------------------------------------------------------------------------- published weights


def load_causal_lm(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: DtypeName = "auto",
    device: str | torch.device = "auto",
    quantization: Any | None = None,
    frozen_weights: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A published causal language model: all of its weights and nothing but them, from safetensors only.

    The parameters are float32 (master weights; float64 for `dtype="float64"`), in evaluation mode, on `device`. What
    dtype the files hold is kept: see `stored_dtype`. Randomness is not touched: see `silence_randomness`.
    The folder of an adapter gives its base model with the adapter merged into it.

    Args:
        quantization: how weights that stay frozen are stored (a quantisation configuration of `transformers`).
        frozen_weights: for an adapter's folder: the model that it was trained in. What that keeps in 4 bits is merged into as it
            is there, unpacked, and not as the base model's files have it.

    Raises:
        ModelError: no such folder or hub id; no configuration or safetensors; remote code; not a causal language model;
            quantised; damaged files; weights that are missing, unexpected or of another shape; an adapter that does not
            fit its base model.
    """
    folder = resolve_model_folder(path, revision=revision)
    base = adapter_base(folder, name=str(path))
    if base is not None:
        model = load_causal_lm(base.path, revision=base.revision, dtype=dtype, device=device)
        if _has_tokenizer(folder):
            fit_embeddings(model, load_tokenizer(folder))
        if frozen_weights is not None:
            copy_unpacked(frozen_weights, model)
        return merge_adapter(model, folder, name=str(path))
    config = load_config(folder, name=str(path))
    weight_files = _weight_files(folder, name=str(path))
    stored = _check_weight_files(weight_files)
    resolved_device = device if isinstance(device, torch.device) else resolve_device(device)
    num_bytes = sum(file.stat().st_size for file in weight_files)
    # Weights of few bits cannot be moved afterwards.
    quantized = (
        {} if quantization is None else {"quantization_config": quantization, "device_map": {"": resolved_device}}
    )
    try:
        with quiet_transformers(progress_bar=num_bytes > _PROGRESS_BAR_BYTES):
            loaded, loading_info = _auto_model.from_pretrained(
                str(folder),
                config=config,
                dtype=parameter_dtype(resolve_dtype(dtype, resolved_device)),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                # Listed in the loading info, by name and shape, and refused there.
                ignore_mismatched_sizes=True,
                **quantized,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{path}: the weights do not fit the configuration: {_first_lines(error)}",
            remedy="check that config.json and the safetensors files belong together, or fetch the model again",
        ) from error
    _check_loading_info(loading_info, name=str(path))
    keep_as_packed(loaded)
    return _ready(loaded, resolved_device, stored, is_placed=quantization is not None)


def resolve_model_folder(path: str | Path, *, revision: str | None = None) -> Path:
    """The folder that holds the model: `path` itself, or the local copy of a hub id, fetched where it is not there yet.

    Raises:
        ModelError: neither a folder nor a hub id that can be reached.
        ConfigError: a revision for a folder.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConfigError(
                f"model.revision: {revision!r} given, but {path} is a folder",
                remedy="a revision goes with a hub id only",
            )
        return folder
    if folder.exists():
        raise ModelError(f"{path}: is a file, not a folder", remedy="give the folder that holds config.json")
    if not _HUB_ID.fullmatch(str(path)):
        raise ModelError(
            f"{path}: no such folder", remedy="check the path; a relative path starts at the current folder"
        )
    return _fetch_from_hub(str(path), revision)


def _fetch_from_hub(hub_id: str, revision: str | None) -> Path:
    # Imported here: it is only needed for hub ids, and takes a moment.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    no_folder = f"{hub_id}: no such folder"
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_DESCRIPTION_FILES)))
        # The first call resolved the revision to a commit, the folder's name: both calls must read the same one.
        names = _indexed_names(folder, name=hub_id) or ["model.safetensors", "adapter_model.safetensors"]
        snapshot_download(hub_id, revision=folder.name, allow_patterns=names)
    except GatedRepoError as error:
        raise ModelError(
            f"{no_folder}, and on the hub its licence must be accepted first",
            remedy=f"accept it at https://huggingface.co/{hub_id} and run `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{no_folder}, and the hub has no such model that you may read",
            remedy="check the spelling (owner/name); for a private model run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{no_folder}, and the model on the hub has no revision {revision!r}", remedy="check `model.revision`"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{no_folder}, and it is not a hub id either", remedy="check the path") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{no_folder}, and the hub could not be reached ({_first_lines(error)})",
            remedy="check the path if a folder was meant; for a hub id connect to the network, or fetch it elsewhere "
            f"(`hf download {hub_id}`) and give the folder",
        ) from error
    return folder


def load_config(folder: Path, *, name: str | None = None) -> PreTrainedConfig:
    """The configuration in `folder`, checked to be that of a decoder-only causal language model of `transformers`.

    Args:
        folder: holds config.json, or an adapter: then it is that of its base model.
        name: how messages call the model; the folder by default.

    Raises:
        ModelError: missing or invalid config.json; remote code; an unknown or another kind of model; quantised; an
            adapter beside a model.
    """
    name = str(folder) if name is None else name
    adapter_hint = "move the adapter into a folder of its own: a folder is the one or the other"
    base = adapter_base(folder, name=name)
    if base is not None:
        return load_config(resolve_model_folder(base.path, revision=base.revision), name=base.path)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{name}: has no config.json", remedy="give a folder written by save_pretrained")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{name}: holds an adapter beside the model (adapter_config.json)", remedy=adapter_hint)
    values = _read_json_object(config_file, name=name)
    _check_config_values(values, name=name)
    try:
        with quiet_transformers(progress_bar=False):
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its validators raise, their own class of Exception too
        raise ModelError(
            f"{name}: config.json is not valid for model type {values['model_type']!r}: {_first_lines(error)}",
            remedy=f"mend it; transformers {transformers.__version__} is what reads it here",
        ) from error
    if not isinstance(config, PreTrainedConfig):
        raise ModelError(f"{name}: config.json describes no model of transformers", remedy="use another model")
    return config


def _check_config_values(values: Mapping[str, Any], *, name: str) -> None:
    """Refuse, from config.json alone, what is not a decoder-only causal language model of `transformers` itself."""
    model_type = values.get("model_type")
    own_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
    if values.get("auto_map"):
        remedy = "goldsmith runs no code that comes with a model; use one that transformers has a class for"
        if own_class is not None:
            remedy += (
                f". transformers has its own class for {model_type!r} ({own_class}): if the weights are meant for it, "
                "delete `auto_map` from config.json in a local copy"
            )
        raise ModelError(f"{name}: config.json asks for code from the model's repository (auto_map)", remedy=remedy)
    if not isinstance(model_type, str):
        raise ModelError(f"{name}: config.json has no model_type", remedy="give a folder written by save_pretrained")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{name}: model type {model_type!r} is unknown to transformers {transformers.__version__}"
            + _nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
            remedy="check model_type in config.json; a model that is newer than this transformers needs an upgrade",
        )
    architectures = values.get("architectures") or []
    not_causal = "goldsmith trains decoder-only causal language models (text in, text out)"
    if values.get("is_encoder_decoder"):
        raise ModelError(f"{name}: {model_type!r} is an encoder-decoder model", remedy=not_causal)
    if own_class is None:
        raise ModelError(f"{name}: {model_type!r} is not a causal language model", remedy=not_causal)
    if architectures and own_class not in architectures:
        raise ModelError(
            f"{name}: holds {', '.join(map(str, architectures))}, which is not the causal language model {own_class}",
            remedy=not_causal,
        )
    if own_class.endswith("ForConditionalGeneration"):
        raise ModelError(f"{name}: {own_class} takes more than text", remedy=f"{not_causal}; use its text-only form")
    if values.get("quantization_config"):
        method = values["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise ModelError(
            f"{name}: its weights are quantised ({method})", remedy="train the model's unquantised original instead"
        )


def _indexed_names(folder: Path, *, name: str) -> list[str]:
    """The shards that the index of `folder` names, sorted; none where there is no index or a single file goes first.

    Raises:
        ModelError: an index that is damaged or points out of the folder.
    """
    index_file = folder / "model.safetensors.index.json"
    if not index_file.is_file() or (folder / "model.safetensors").is_file():
        return []
    weight_map = _read_json_object(index_file, name=name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{name}: {index_file.name} has no weight_map", remedy="fetch the model again")
    names = sorted({str(value) for value in weight_map.values()})
    for shard in names:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{name}: {index_file.name} names {shard!r}, which is not a safetensors file of the folder",
                remedy="fetch the model again",
            )
    return names


def _weight_files(folder: Path, *, name: str) -> list[Path]:
    shards = _indexed_names(folder, name=name)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelError(
            f"{name}: model.safetensors.index.json names {len(missing)} of {len(shards)} files that are not there: "
            + _shortened(missing),
            remedy="copy or fetch the missing files",
        )
    if shards:
        return [folder / shard for shard in shards]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED_SUFFIXES)
    if pickled:
        raise ModelError(
            f"{name}: holds pickled weights only ({_shortened(pickled)}), which can run code when they are read",
            remedy="convert them to safetensors where you trust them: load with transformers and call save_pretrained",
        )
    raise ModelError(
        f"{name}: has no weights (neither model.safetensors nor model.safetensors.index.json)",
        remedy="give a folder, or a hub id, that holds the model as safetensors",
    )


def _check_weight_files(files: list[Path]) -> torch.dtype:
    """Open every file, which checks its header against its size; return the dtype that most of the weights have.

    Raises:
        ModelError: a damaged or truncated file; weights that are not floating point.
    """
    num_elements: dict[str, int] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    view = tensors.get_slice(key)
                    num_elements.setdefault(view.get_dtype(), 0)
                    num_elements[view.get_dtype()] += _product(view.get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: damaged or cut off ({_first_lines(error)})", remedy="copy or fetch the file again"
            ) from error
    floating = {name: count for name, count in num_elements.items() if name in _SAFETENSORS_DTYPES}
    if not floating:
        seen = ", ".join(sorted(num_elements)) or "no tensors"
        raise ModelError(
            f"{files[0].parent}: the weights are in no floating point type that can be trained ({seen})",
            remedy="use the unquantised original",
        )
    return _SAFETENSORS_DTYPES[max(floating, key=lambda name: floating[name])]


def _check_loading_info(info: Mapping[str, Any], *, name: str) -> None:
    """Refuse a model of which anything was initialised at random, or left behind.

    Tied weights, and those that the architecture declares as safe to lack or to ignore, are not in the info.
    """
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} weights are missing from the files and would be random: {_shortened(missing)}",
            remedy="fetch the model again; a backbone without its output layer is not a causal language model",
        )
    mismatched = sorted(
        f"{key} ({tuple(in_file)}, not {tuple(in_model)})"
        for key, in_file, in_model in info.get("mismatched_keys") or ()
    )
    if mismatched:
        raise ModelError(
            f"{name}: {len(mismatched)} weights have another shape than config.json asks for: {_shortened(mismatched)}",
            remedy="check that config.json and the weights belong together",
        )
    unexpected = sorted(info.get("unexpected_keys") or ())
    if unexpected:
        raise ModelError(
            f"{name}: {len(unexpected)} weights in the files have no place in the model: {_shortened(unexpected)}",
            remedy="check that config.json (layers, biases, model_type) belongs to these weights",
        )
    if info.get("error_msgs"):
        raise ModelError(f"{name}: {_shortened(info['error_msgs'])}", remedy="fetch the model again")


# ----------------------------------------------------------------------------------------------------------- new models


def init_causal_lm(
    init: Mapping[str, Any],
    *,
    vocab_size: int,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    seed: int = 0,
    dtype: DtypeName = "auto",
    device: str | torch.device = "auto",
) -> PreTrainedModel:
    """A new model with random weights: the same for the same arguments, on every device.

    The global random state is left as it was.

    Args:
        init: `architecture` (a model type of transformers, such as llama) and settings of its configuration class.
        vocab_size: how many tokens the tokenizer has; `init["vocab_size"]` may be larger (padding), not smaller.
        bos_token_id, eos_token_id, pad_token_id: of the tokenizer, None where it has none.
        seed: of the random weights.

    Raises:
        ConfigError: an unknown architecture or setting (the nearest known one is named), or a value that it refuses.
    """
    settings = dict(init)
    architecture = settings.pop("architecture", None)
    own_class = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(architecture) if isinstance(architecture, str) else None
    if own_class is None or own_class.endswith("ForConditionalGeneration"):
        raise ConfigError(
            f"model.init.architecture: {architecture!r} is not a causal language model of transformers"
            + _nearest(str(architecture), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
            remedy="use a model type such as llama, qwen3, mistral or gpt2",
        )
    config_class = CONFIG_MAPPING[architecture]
    known = {field.name for field in dataclasses.fields(config_class) if field.init} | set(config_class.attribute_map)
    if "rope_parameters" in known:
        known |= _ROPE_KEYS
    known -= _NOT_FOR_INIT.keys()
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"model.init.{key}: not a setting of {architecture!r}{_nearest(key, known)}",
                remedy=_NOT_FOR_INIT.get(key, f"the settings are those of transformers' {config_class.__name__}"),
            )
    own_vocab_size = settings.setdefault("vocab_size", vocab_size)
    if not isinstance(own_vocab_size, int) or own_vocab_size < vocab_size:
        raise ConfigError(
            f"model.init.vocab_size: {own_vocab_size!r}, but the tokenizer has {vocab_size} tokens",
            remedy="leave it out, or give a larger number",
        )
    ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    for key, value in ids.items():
        # None must be said, too: the class's own default would be an id of another tokenizer.
        settings.setdefault(key, value)
    resolved_device = device if isinstance(device, torch.device) else resolve_device(device)
    compute_dtype = resolve_dtype(dtype, resolved_device)
    try:
        config = config_class(**settings)
        with quiet_transformers(progress_bar=False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Drawn on the CPU and in float32, so that device and dtype do not change the weights.
            model: Any = _auto_model.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # validators and constructors of transformers raise many kinds
        raise ConfigError(
            f"model.init: {architecture!r} cannot be built so: {_first_lines(error)}",
            remedy=f"the settings are those of transformers' {config_class.__name__}",
        ) from error
    model = model.to(parameter_dtype(compute_dtype))
    model.config.dtype = model.dtype
    model.config.architectures = [type(model).__name__]
    return _ready(model, resolved_device, model.dtype)


# ------------------------------------------------------------------------------------------------------- the vocabulary


def tokenizer_folder(path: str, *, revision: str | None = None) -> tuple[str, str | None]:
    """Where the tokenizer of a model is, and its revision: in the model's folder; of an adapter without one, the base's."""
    folder = Path(path).expanduser()
    base = adapter_base(folder, name=path) if folder.is_dir() and not _has_tokenizer(folder) else None
    return (path, revision) if base is None else tokenizer_folder(base.path, revision=base.revision)


def _num_rows(model: PreTrainedModel) -> int:
    inputs: Any = model.get_input_embeddings()
    return int(inputs.weight.shape[0])


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


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


# ----------------------------------------------------------------------------------------------------------- randomness


def silence_randomness(model: PreTrainedModel) -> dict[str, float | bool]:
    """Turn off everything that makes the loss random or adds to it: dropout, layer drop, router jitter, router losses.

    Both the configuration (some models read it while they run) and what the modules copied out of it are changed.

    Returns:
        What was changed: name to the value it had, configuration as `config.NAME`, modules by their path; empty where
        nothing was on.
    """
    changed: dict[str, float | bool] = {}
    configs: list[tuple[str, PreTrainedConfig]] = [("config", model.config)]
    for key in getattr(model.config, "sub_configs", {}) or {}:
        sub_config = getattr(model.config, key, None)
        if isinstance(sub_config, PreTrainedConfig):
            configs.append((f"config.{key}", sub_config))
    for prefix, config in configs:
        for key, value in list(vars(config).items()):
            if _is_randomness(key, value):
                changed[f"{prefix}.{key}"] = value
                setattr(config, key, 0.0)
            elif key == "output_router_logits" and value:
                changed[f"{prefix}.{key}"] = value
                setattr(config, key, False)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            if module.p > 0:
                changed[f"{path}.p"] = module.p
                module.p = 0.0
            continue
        for key, value in list(vars(module).items()):
            if _is_randomness(key, value):
                changed[f"{path}.{key}"] = value
                setattr(module, key, 0.0)
    return changed


def _is_randomness(key: str, value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and value != 0 and _RANDOMNESS.search(key) is not None


# -------------------------------------------------------------------------------------------------------------- reading


def _read_json_object(file: Path, *, name: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{name}: {file.name} is not valid JSON ({error})", remedy="mend or fetch the file") from error
    if not isinstance(values, dict):
        raise ModelError(
            f"{name}: {file.name} holds a {type(values).__name__}, not an object", remedy="mend or fetch the file"
        )
    return values


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


def _ready(model: Any, device: torch.device, stored: torch.dtype, *, is_placed: bool = False) -> PreTrainedModel:
    """On its device (where it `is_placed` already it is left there), in evaluation mode, with its files' dtype remembered."""
    try:
        model = (model if is_placed else model.to(device)).eval()
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"{model.num_parameters():,} parameters in {model.dtype} do not fit into the memory of {device}",
            remedy="use a smaller model or a device with more memory",
        ) from error
    model.stored_dtype = stored
    ready: PreTrainedModel = model
    return ready


def _nearest(word: str, known: Mapping[str, Any] | set[str]) -> str:
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; the nearest known one is {matches[0]!r}" if matches else ""


def _shortened(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(map(str, names[:limit])) + (f", ... ({rest} more)" if rest > 0 else "")


def _first_lines(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
