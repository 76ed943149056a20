"""Proof, before a model is trained, that packed execution gives what the model gives for each row alone.

The model's own configuration is shrunk in width and depth; every distinct kind of layer stays. Rows of several lengths,
on both sides of the (shrunk) sliding window and position thresholds, go through `LikelihoodModel` in one pack and
through the model's own forward one by one. Log-probabilities of every token are compared, which proves the attention,
the positions and the output head (scale, soft cap, bias) at once. What fails is refused, and the reason is named.

Every tensor of the shrunk model is counted on the meta device before any memory is taken, so a configuration that
cannot be shrunk is refused too, never built in full.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from goldsmith.data.packing import pack
from goldsmith.data.shared_context import pack_shared
from goldsmith.errors import ModelError
from goldsmith.models.attention import SharedContextError
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.quiet import quiet_transformers
from goldsmith.models.wording import one_line
from goldsmith.types import PackedBatch, TokenizedExample

__all__ = ["TOLERANCE", "Proof", "prove", "shrink"]

# Largest difference of a log-probability in float32, in nats. The families that hold differ by at most 2e-5 (rounding,
# amplified by the large random weights); every planted fault of the tests differs by more than 1e-2.
TOLERANCE = 2e-4

# Each is smaller than some of the rows' lengths and larger than others.
_WINDOW = 6
_POSITION_THRESHOLD = 8
_MAX_POSITIONS = 48
# The row of 6 repeats the first tokens of the row of 19: a model that looks ahead scores them differently.
_ROW_LENGTHS = (11, 3, 19, 2, 7, 6)
_LONG_ROW, _PREFIX_ROW = 2, 5

_VOCABULARY = 61
_MAX_PARAMETERS = 4_000_000
_SEEDS = (20, 21)

_HOW_ELSE = "goldsmith trains packed only: choose a model without it"
# Layer kinds, as transformers names them, that carry a state from token to token, whatever row the token belongs to.
_STATEFUL_KINDS = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "recurrent"})
# Rotary frequencies that depend on the longest position in the batch, so on the other rows of the pack.
_LENGTH_DEPENDENT_ROPE = frozenset({"longrope", "dynamic", "su"})


@dataclass(frozen=True, kw_only=True)
class Proof:
    """That packed equals alone for a configuration.

    Attributes:
        name: of the model, as the user calls it.
        model_type: the architecture.
        largest_difference: of a log-probability in nats, over all tokens, at most `TOLERANCE`.
        row_lengths: tokens of each row that was packed.
        num_layers: of the shrunk model.
        layer_kinds: every distinct kind of layer of the model, in order of appearance.
        shares_contexts: rows that carry their context once get the same log-probabilities too. Where it is not so (a window,
            a soft cap, latent attention, another device) every row is packed with its own context, which is never wrong.
    """

    name: str
    model_type: str
    largest_difference: float
    row_lengths: tuple[int, ...]
    num_layers: int
    layer_kinds: tuple[str, ...]
    shares_contexts: bool


_proofs: dict[str, Proof] = {}


def prove(config: PreTrainedConfig, *, name: str, device: torch.device | str = "cpu") -> Proof:
    """Prove that a model of this configuration may be trained packed. The result is kept for the process.

    No weights are needed, nothing of the model's real size is allocated and no random state changes.

    Args:
        config: of the whole model, as loaded.
        name: how messages call the model.
        device: where to compute; another device may run another attention kernel.

    Raises:
        ModelError: packed differs from alone, naming the layer or feature; or the proof could not be carried out.
    """
    values = json.dumps(config.to_dict(), sort_keys=True, default=str)
    key = hashlib.sha256(f"{type(config).__name__} {torch.device(device)} {values}".encode()).hexdigest()
    if key not in _proofs:
        _refuse_known(config, name)
        with quiet_transformers(progress_bar=False):
            _proofs[key] = _carry_out(shrink(config, name=name), name, torch.device(device))
    return dataclasses.replace(_proofs[key], name=name)


def _refuse_known(config: PreTrainedConfig, name: str) -> None:
    """Features that are known to break packing, seen in the configuration alone."""
    label = f"{name} ({config.model_type})"
    for rope_type in _rope_types(config.to_dict()):
        if rope_type in _LENGTH_DEPENDENT_ROPE:
            raise ModelError(
                f"{label}: its rotary embedding ({rope_type}) changes with the longest row in the batch, so packed "
                "rows would change each other",
                remedy=f"{_HOW_ELSE}, such as its variant for shorter contexts",
            )
    stateful = [str(kind) for kind in config.to_dict().get("layer_types") or () if str(kind) in _STATEFUL_KINDS]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{label}: transformers has no causal language model for it", remedy="use another model")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if stateful or getattr(model_class, "_is_stateful", False):
        kind = stateful[0] if stateful else "recurrent"
        raise ModelError(
            f"{label}: its {kind} layers carry a state from token to token, so packed rows would see each other",
            remedy=_HOW_ELSE,
        )


def _rope_types(values: Mapping[str, Any]) -> Iterator[str]:
    """Every rope type of a configuration, whether it has one for all layers or one for each kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        found = values.get(key)
        if isinstance(found, Mapping):
            for entry in (found, *(value for value in found.values() if isinstance(value, Mapping))):
                kind = entry.get("rope_type", entry.get("type"))
                if isinstance(kind, str):
                    yield kind


# ----------------------------------------------------------------------------------------------------------- shrinking

_TOKEN_ID = re.compile(r"_token_(id|index)s?$")
_VOCABULARY_KEY = re.compile(r"vocab_size")
_WINDOW_KEYS = frozenset(
    {
        "sliding_window",
        "sliding_window_size",
        "window_size",
        "attention_window_size",
        "local_attention",
        "attention_chunk_size",
    }
)
_POSITION_KEYS = frozenset({"max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"})
_THRESHOLD_KEYS = frozenset({"original_max_position_embeddings", "floor_scale", "log_scaling_n_floor"})
_HEADS_KEY = re.compile(r"^(n_heads?|num_heads|(num_)?(encoder_|decoder_)?attention_heads)$")
_KEY_VALUE_HEADS_KEYS = frozenset({"num_key_value_heads", "num_kv_heads", "multi_query_group_num"})
_EXPERTS_KEY = re.compile(r"^(num|n|moe_num)_(local_|routed_)?experts$")
_WIDTH_KEY = re.compile(
    r"(_|^)(size|dim|rank|width|dff|d_inner|d_model|n_embd|n_inner|ffn_dim)(_mlp|_per_layer_input)?$"
)
_SOFT_CAP_KEY = re.compile(r"soft_?cap")
# Said again by the other keys, or of no meaning without the real weights.
_DROPPED_KEYS = frozenset({"qk_head_dim", "quantization_config", "auto_map", "transformers_version", "_name_or_path"})


def shrink(config: PreTrainedConfig, *, name: str) -> PreTrainedConfig:
    """The same kind of model, tiny: narrow, few tokens, short window, and as few layers as hold every kind of layer.

    Sizes that were equal stay equal; key-value heads stay as many, fewer or one; the width stays equal to, below or
    above heads times head width.

    Raises:
        ModelError: the configuration does not shrink to at most a few million parameters, or cannot be built.
    """
    values = {key: value for key, value in config.to_dict().items() if key not in _DROPPED_KEYS}
    native = type(config).attribute_map
    narrow = _narrow(values, native)
    config_class = type(config)
    try:
        whole = _on_meta(config_class.from_dict(narrow))
        kinds = _layer_kinds(whole)
    except Exception as error:  # whatever a constructor of another's raises
        raise ModelError(
            f"{name} ({config.model_type}): cannot be shrunk for the proof that it may be packed: {one_line(error, 200)}",
            remedy="use another model; please report this one",
        ) from error
    shrunk = config_class.from_dict(narrow)
    for depth in _depths(kinds):
        candidate = _with_depth(narrow, native, depth, len(kinds))
        try:
            shallow_config = config_class.from_dict(candidate)
            shallow = _on_meta(shallow_config)
        except Exception:
            continue
        # Some configurations count layers from the end, so it must be seen that no kind was lost or is new.
        if set(_layer_kinds(shallow)) == set(kinds):
            shrunk, whole = shallow_config, shallow
            break
    largest_name, largest = max(
        ((key, tensor.numel()) for key, tensor in whole.state_dict().items()), key=lambda item: item[1]
    )
    if sum(parameter.numel() for parameter in whole.parameters()) > _MAX_PARAMETERS:
        raise ModelError(
            f"{name} ({config.model_type}): its configuration does not shrink for the proof that it may be packed: "
            f"{largest_name} keeps {largest:,} elements",
            remedy="use another model; please report this one",
        )
    return shrunk


def _narrow(values: Mapping[str, Any], native: Mapping[str, str]) -> dict[str, Any]:
    """Every size made small; `native` maps the usual names to those of this configuration."""

    def size_of(name: str) -> int:
        found = values.get(native.get(name, name))
        return found if isinstance(found, int) else 0

    vocabulary = min(size_of("vocab_size") or _VOCABULARY, _VOCABULARY)
    old_heads = size_of("num_attention_heads") or 4
    old_hidden = size_of("hidden_size") or 64
    old_head_dim = size_of("head_dim") or max(1, old_hidden // old_heads)
    heads = min(old_heads, 4)
    head_dim = _head_dim(values)
    hidden = heads * head_dim
    if old_hidden < old_heads * old_head_dim:
        hidden //= 2
    elif old_hidden > old_heads * old_head_dim:
        hidden = hidden * 3 // 2
    hidden = max(heads, hidden // heads * heads)
    new_widths = {old_head_dim: head_dim, old_hidden: hidden}

    def smaller(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {inner: smaller(str(inner), inner_value) for inner, inner_value in value.items()}
        if _TOKEN_ID.search(key):
            if isinstance(value, int):
                return value % vocabulary if value >= 0 else value
            return [item % vocabulary for item in value] if isinstance(value, list) else value
        if isinstance(value, list) and _WIDTH_KEY.search(key):
            return [smaller(key, item) for item in value]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            return value
        if _SOFT_CAP_KEY.search(key):
            # Low enough that scores and logits of order 1 feel it, not so low that nothing else is felt.
            return min(value, 0.5 if "att" in key else 5.0)
        if key in _THRESHOLD_KEYS:
            return type(value)(min(value, _POSITION_THRESHOLD))
        if not isinstance(value, int):
            return value
        if _VOCABULARY_KEY.search(key):
            return min(value, vocabulary)
        if key in _WINDOW_KEYS:
            return min(value, _WINDOW)
        if key in _POSITION_KEYS:
            return min(value, _MAX_POSITIONS)
        if _HEADS_KEY.search(key):
            return min(value, 4)
        if key in _KEY_VALUE_HEADS_KEYS:
            return heads if value == old_heads else min(value, max(1, heads // 2))
        if _EXPERTS_KEY.search(key):
            # Expert groups must divide the experts, so grouped ones keep their number; narrow experts are cheap.
            return value if (values.get("n_group") or 1) > 1 else min(value, 8)
        if key in ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"):
            return min(value, 4)
        if key == "rotary_dim":
            return max(2, value * head_dim // old_head_dim // 2 * 2)
        if _WIDTH_KEY.search(key) and (value > 16 or value in new_widths):
            return new_widths.setdefault(value, 16 + 8 * (len(new_widths) - 2))
        return value

    return {key: smaller(key, value) for key, value in values.items()}


def _head_dim(values: Mapping[str, Any]) -> int:
    """The least width of a head of which every rotary part is an even number of at least 2."""
    parts = {1.0}

    def collect(found: Mapping[str, Any]) -> None:
        for key, value in found.items():
            if isinstance(value, Mapping):
                collect(value)
            elif key in ("partial_rotary_factor", "rotary_pct") and isinstance(value, (int, float)) and value > 0:
                parts.add(float(value))

    collect(values)
    for width in range(8, 129, 8):
        if all(int(width * part) % 2 == 0 and int(width * part) >= 2 for part in parts):
            return width
    return 128


def _depths(kinds: Sequence[object]) -> list[int]:
    """How many layers to try, least first: the shortest beginning that holds every kind, at least two layers."""
    if not kinds:
        return []
    needed = 1 + max(kinds.index(kind) for kind in dict.fromkeys(kinds))
    return [depth for depth in dict.fromkeys((max(2, needed), 2 * needed)) if depth < len(kinds)]


def _with_depth(values: Mapping[str, Any], native: Mapping[str, str], depth: int, whole: int) -> dict[str, Any]:
    """`values` for the first `depth` of `whole` layers: their number, and every list that has an entry a layer."""
    cut = {
        key: value[:depth] if isinstance(value, (list, tuple)) and len(value) == whole else value
        for key, value in values.items()
    }
    cut[native.get("num_hidden_layers", "num_hidden_layers")] = depth
    return cut


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory, to read shapes and classes from."""
    auto_model: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: PreTrainedModel = auto_model.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return model


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers, in order; none where they are not one list of modules."""
    decoder: Any = model
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for module in decoder.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def _layer_kinds(model: PreTrainedModel) -> list[tuple[object, ...]]:
    """What tells the kinds of layers apart: classes, shapes and plain settings of all parts, and the config's lists."""
    layers = _layers(model)
    lists = [
        value
        for value in vars(model.config).values()
        # A list of indices (`moe_layers`) has as many entries by chance, and would make every layer a kind of its own.
        if layers
        and isinstance(value, (list, tuple))
        and len(value) == len(layers)
        and list(value) != [*range(len(value))]
    ]
    kinds = []
    for index, layer in enumerate(layers):
        parts: list[object] = [str(value[index]) for value in lists]
        for path, module in layer.named_modules():
            settings = sorted(
                # Floating point differs in value from layer to layer (scales by depth), which is no other kind.
                (key, "a number" if isinstance(value, float) else str(value))
                for key, value in vars(module).items()
                if isinstance(value, (bool, int, float, str, type(None)))
                and not key.startswith("_")
                and not re.search(r"idx|index|layer_id|layer_number", key)
            )
            shapes = sorted((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False))
            parts.append((path, type(module).__name__, str(settings), str(shapes)))
        kinds.append(tuple(parts))
    return kinds


def _label(model: PreTrainedModel, index: int) -> str:
    """How a message calls a layer, such as `Gemma2DecoderLayer, sliding_attention`."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    layer = type(_layers(model)[index]).__name__
    return f"{layer}, {kinds[index]}" if kinds is not None and index < len(kinds) else layer


# ----------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True, kw_only=True)
class _Trace:
    """Log-probabilities [N - S] of all rows laid end to end, and each layer's output [N, D]."""

    log_probs: torch.Tensor
    layer_outputs: list[torch.Tensor]


def _carry_out(config: PreTrainedConfig, name: str, device: torch.device) -> Proof:
    label = f"{name} ({config.model_type})"
    text_config = config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None) or _MAX_POSITIONS
    vocabulary = text_config.vocab_size
    lengths = tuple(min(length, longest) for length in _ROW_LENGTHS)
    # A second set of weights is tried, since a router may flip on a near-tie; a fault fails on both.
    for seed in _SEEDS:
        try:
            model = _random_model(config, seed).to(device)  # type: ignore[arg-type]
            if any(key.rpartition(".")[2] == "sinks" for key, _ in model.named_parameters()):
                raise ModelError("uses attention sinks, which packed attention does not compute")
            rows = _rows(lengths, vocabulary, seed)
            others = [*rows]
            others[_LONG_ROW] = _rows(lengths, vocabulary, seed + 100)[_LONG_ROW]
            alone = _run_alone(model, rows)
            likelihood = LikelihoodModel(model).eval()
            packed = _run_packed(likelihood, rows)
            disturbed = _run_packed(likelihood, others)
        except ModelError as error:
            raise ModelError(f"{label}: {error.message}", remedy=error.remedy or _HOW_ELSE) from error
        except Exception as error:  # whatever a model's own forward raises
            raise ModelError(
                f"{label}: cannot be run packed: {type(error).__name__}: {one_line(error, 200)}", remedy=_HOW_ELSE
            ) from error
        difference = _largest(packed.log_probs - alone.log_probs)
        failure = _failure(model, alone, packed, disturbed, lengths)
        if failure is None:
            return Proof(
                name=name,
                model_type=config.model_type,
                largest_difference=difference,
                row_lengths=lengths,
                num_layers=len(_layers(model)),
                layer_kinds=tuple(dict.fromkeys(_label(model, index) for index in range(len(_layers(model))))),
                shares_contexts=_shares_contexts(model, likelihood, rows),
            )
    raise ModelError(
        f"{label}: packed rows do not get the log-probabilities that they get alone: {failure} "
        f"(largest difference {difference:.2g}, allowed {TOLERANCE:.0e})",
        remedy=_HOW_ELSE,
    )


def _failure(
    model: PreTrainedModel, alone: _Trace, packed: _Trace, disturbed: _Trace, lengths: Sequence[int]
) -> str | None:
    """What is wrong, in words; None where nothing is."""
    starts = np.cumsum([0, *(length - 1 for length in lengths)])
    prefix = slice(starts[_PREFIX_ROW], starts[_PREFIX_ROW + 1])
    num_prefix = lengths[_PREFIX_ROW] - 1
    same_in_long = slice(starts[_LONG_ROW], starts[_LONG_ROW] + num_prefix)
    if not _largest(alone.log_probs[prefix] - alone.log_probs[same_in_long]) <= TOLERANCE:
        return "by itself already the model looks ahead: it is not causal"
    if not _largest(packed.log_probs - alone.log_probs) <= TOLERANCE:
        pairs = zip(alone.layer_outputs, packed.layer_outputs, strict=True)
        for index, (expected, got) in enumerate(pairs):
            if got.shape != expected.shape:
                # A layer by hand leaves out, as the last one, what predicts nothing: the last token of each row.
                predicts = torch.ones(len(expected), dtype=torch.bool)
                predicts[np.cumsum(lengths) - 1] = False
                expected = expected[predicts]
            scale = max(1.0, float(expected.abs().max()))
            # Tighter than the log-probabilities: it is known by now that a layer or the head is wrong, not rounding.
            if expected.shape != got.shape or not _largest(got - expected) <= TOLERANCE / 10 * scale:
                return f"they differ from layer {index} on ({_label(model, index)})"
        return "all layers agree, the output head does not (logit scale, soft cap or bias)"
    unchanged = torch.ones(len(packed.log_probs), dtype=torch.bool)
    unchanged[starts[_LONG_ROW] : starts[_LONG_ROW + 1]] = False
    if not _largest((disturbed.log_probs - packed.log_probs)[unchanged]) <= TOLERANCE:
        return "a change in one row changes the others"
    return None


def _random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Weights large enough that attention is far from uniform and every bias and norm matters."""
    auto_model: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_model.from_config(config, dtype=torch.float32, trust_remote_code=False)
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape)
                if parameter.ndim < 2:
                    # On top of its initial value: a norm's scale is 1 in some families, 0 in others.
                    parameter.add_(0.3 * noise)
                elif id(parameter) in embeddings:
                    parameter.copy_(noise)
                else:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    model.train(False)
    model.requires_grad_(False)
    return model


def _rows(lengths: Sequence[int], vocabulary: int, seed: int) -> list[TokenizedExample]:
    """Random rows; every token but the first is a target."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(0, vocabulary, size=length).astype(np.int32) for length in lengths]
    ids[_PREFIX_ROW] = ids[_LONG_ROW][: lengths[_PREFIX_ROW]].copy()
    rows = []
    for number, token_ids in enumerate(ids):
        weights = np.ones(len(token_ids), dtype=np.float32)
        weights[0] = 0.0
        rows.append(
            TokenizedExample(
                token_ids=token_ids,
                target_weights=weights,
                example_id=str(number),
                example_weight=1.0,
                source=f"proof:{number}",
                num_bytes=0,
            )
        )
    return rows


def _run_alone(model: PreTrainedModel, rows: Sequence[TokenizedExample]) -> _Trace:
    """The model's own forward, one row at a time, with its plain ("eager") attention: full logits, nothing of ours."""
    model.set_attn_implementation("eager")
    log_probs = []
    outputs: list[list[torch.Tensor]] = []
    for row in rows:
        ids = torch.from_numpy(row.token_ids.astype(np.int64)).to(model.device)[None]
        with torch.no_grad(), _record_layers(model) as row_outputs:
            logits = model(input_ids=ids, use_cache=False).logits
        outputs.append(row_outputs)
        log_probs.append(torch.log_softmax(logits[0, :-1].float(), dim=-1).gather(1, ids[0, 1:, None]).squeeze(1))
    layer_outputs = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    return _Trace(log_probs=torch.cat(log_probs).cpu(), layer_outputs=layer_outputs)


def _run_packed(likelihood: LikelihoodModel, rows: Sequence[TokenizedExample]) -> _Trace:
    batch: PackedBatch = pack(rows, range(len(rows))).to(likelihood.device)
    with torch.no_grad(), _record_layers(likelihood.causal_lm) as outputs:
        log_probs = likelihood(batch).log_probs_K
    return _Trace(log_probs=log_probs.float().cpu(), layer_outputs=outputs)


@contextmanager
def _record_layers(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """The output [N, D] of each layer of the batch's only sequence, in order."""
    outputs: list[torch.Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        outputs.append(first.detach().reshape(-1, first.shape[-1]).float().cpu())

    handles = [layer.register_forward_hook(record) for layer in _layers(model)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _shares_contexts(model: PreTrainedModel, likelihood: LikelihoodModel, rows: Sequence[TokenizedExample]) -> bool:
    """Whether three rows that carry their context once get what they get alone, in the model's own attention."""
    context, family = rows[0], []
    for row in (rows[1], rows[3], rows[4]):
        weights = np.concatenate([np.zeros_like(context.target_weights), np.ones_like(row.target_weights)])
        token_ids = np.concatenate([context.token_ids, row.token_ids])
        family.append(dataclasses.replace(row, token_ids=token_ids, target_weights=weights))
    longest = max(row.num_tokens for row in family)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
    if longest > limit or not likelihood.shares_contexts(longest):
        return False
    batch = pack_shared(family, range(len(family)), min_saved=1).to(likelihood.device)
    try:
        with torch.no_grad():
            shared = likelihood(batch).log_probs_K.float().cpu()
    except SharedContextError:
        return False
    alone = _run_alone(model, family).log_probs
    likelihood.use_packed_attention()
    is_gold = torch.cat([torch.from_numpy(row.target_weights[1:] > 0) for row in family])
    return _largest(shared - alone[is_gold]) <= TOLERANCE


def _largest(difference: torch.Tensor) -> float:
    """The largest absolute value; NaN where there is one, so that no comparison with it holds."""
    return float(difference.abs().max()) if difference.numel() else 0.0
