"""The folder of a published model: found, or fetched from the hub, and every file in it looked at before it is loaded.

`transformers` would otherwise fall back in silence: read pickles, attach an adapter that lies in the folder, or take the
decoder out of an encoder-decoder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from goldsmith.errors import ConfigError, ModelError
from goldsmith.models.adapters import adapter_base
from goldsmith.models.quiet import quiet_transformers
from goldsmith.models.wording import nearest_known, one_line, shortened

__all__ = [
    "check_weight_files",
    "has_tokenizer",
    "load_config",
    "model_files",
    "resolve_model_folder",
    "tokenizer_folder",
    "weight_files",
]

_SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_MODEL_FILES = (
    "*config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
)
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# What of a hub repository describes the model; its weights are fetched by name afterwards.
_DESCRIPTION_FILES = ("config.json", "generation_config.json", "adapter_config.json", "model.safetensors.index.json")


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
            f"{no_folder}, and the hub could not be reached ({one_line(error)})",
            remedy="check the path if a folder was meant; for a hub id connect to the network, or fetch it elsewhere "
            f"(`hf download {hub_id}`) and give the folder",
        ) from error
    return folder


def model_files(folder: Path) -> list[Path]:
    """The files that lie in a folder for a model, an adapter or a tokenizer; none where there is no folder."""
    return sorted(file for pattern in _MODEL_FILES for file in folder.glob(pattern))


def tokenizer_folder(path: str, *, revision: str | None = None) -> tuple[str, str | None]:
    """Where the tokenizer of a model is, and its revision: in the model's folder; of an adapter without one, the base's."""
    folder = Path(path).expanduser()
    base = adapter_base(folder, name=path) if folder.is_dir() and not has_tokenizer(folder) else None
    return (path, revision) if base is None else tokenizer_folder(base.path, revision=base.revision)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


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
            f"{name}: config.json is not valid for model type {values['model_type']!r}: {one_line(error)}",
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
            + nearest_known(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
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


def weight_files(folder: Path, *, name: str) -> list[Path]:
    shards = _indexed_names(folder, name=name)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelError(
            f"{name}: model.safetensors.index.json names {len(missing)} of {len(shards)} files that are not there: "
            + shortened(missing),
            remedy="copy or fetch the missing files",
        )
    if shards:
        return [folder / shard for shard in shards]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED_SUFFIXES)
    if pickled:
        raise ModelError(
            f"{name}: holds pickled weights only ({shortened(pickled)}), which can run code when they are read",
            remedy="convert them to safetensors where you trust them: load with transformers and call save_pretrained",
        )
    raise ModelError(
        f"{name}: has no weights (neither model.safetensors nor model.safetensors.index.json)",
        remedy="give a folder, or a hub id, that holds the model as safetensors",
    )


def check_weight_files(files: list[Path]) -> torch.dtype:
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
                    num_elements[view.get_dtype()] += math.prod(view.get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: damaged or cut off ({one_line(error)})", remedy="copy or fetch the file again"
            ) from error
    floating = {name: count for name, count in num_elements.items() if name in _SAFETENSORS_DTYPES}
    if not floating:
        seen = ", ".join(sorted(num_elements)) or "no tensors"
        raise ModelError(
            f"{files[0].parent}: the weights are in no floating point type that can be trained ({seen})",
            remedy="use the unquantised original",
        )
    return _SAFETENSORS_DTYPES[max(floating, key=lambda name: floating[name])]


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
