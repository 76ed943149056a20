"""Where the memory of a step goes, buffer by buffer, before it is taken.

`memory_budget` is a formula over the shape of a model. It is written for decoder layers of the Llama kind, computed by hand
or by `transformers`; other kinds of layers take about as much for the same widths. It leaves out what the process takes for
itself (libraries, rows, the allocator's own losses).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from goldsmith.data.dataset import Dataset
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.quantized import num_weights, packed_bytes, packed_parts
from goldsmith.objective.linear_cross_entropy import default_chunk_size
from goldsmith.storage import format_bytes

__all__ = [
    "Checkpointing",
    "MemoryBudget",
    "MemoryTerm",
    "ModelShape",
    "StateDtype",
    "largest_microbatch",
    "memory_budget",
    "parse_bytes",
]

Checkpointing = Literal["none", "layers"]
StateDtype = Literal["float32", "bfloat16", "int8"]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What of a model the budget depends on. Counts are elements.

    Attributes:
        parameters, trainable, largest_parameter: of all, of those that are trained, of the largest of these.
        layers, width, inner: inner is that of the MLP, for a mixture of experts that of the experts of one token.
        query_width, key_width: heads times their width; keys and values have the latter.
        heads: of queries.
        vocabulary: rows of the output embedding.
        is_output_trained: whether the output embedding has a gradient.
        by_hand: whether layers are those of `models.decoder_layers`.
        element_bytes: of a parameter.
        product_bytes: of what matrix products take and give; 2 under autocast.
        device_type: logits come in larger chunks on `cuda`.
        packed_bytes, largest_packed: frozen weights in 4 bits: the bytes of all, with their scales, which are not among
            `parameters`; and the weights of the largest of these.
    """

    parameters: int
    trainable: int
    largest_parameter: int
    layers: int
    width: int
    inner: int
    query_width: int
    key_width: int
    heads: int
    vocabulary: int
    is_output_trained: bool
    by_hand: bool
    element_bytes: int
    product_bytes: int
    device_type: str = "cpu"
    packed_bytes: int = 0
    largest_packed: int = 0

    @classmethod
    def of(cls, model: LikelihoodModel) -> ModelShape:
        """The shape of a model as it is, trainable parameters included."""
        config: Any = model.causal_lm.config.get_text_config()
        packed = [parameter for parameter in model.causal_lm.parameters() if packed_parts(parameter)]
        parameters = [parameter for parameter in model.causal_lm.parameters() if not packed_parts(parameter)]
        trainable = [parameter.numel() for parameter in parameters if parameter.requires_grad]
        width, heads = config.hidden_size, config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or width // heads
        weight = model.head().weight_VD
        element_bytes = parameters[0].element_size()
        return cls(
            parameters=sum(parameter.numel() for parameter in parameters),
            trainable=sum(trainable),
            largest_parameter=max(trainable, default=0),
            layers=config.num_hidden_layers,
            width=width,
            inner=_inner_width(config, width),
            query_width=heads * head_width,
            key_width=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
            heads=heads,
            vocabulary=weight.shape[0],
            is_output_trained=weight.requires_grad,
            by_hand=model.num_layers_by_hand > 0,
            element_bytes=element_bytes,
            product_bytes=element_bytes if model.autocast_dtype is None else model.autocast_dtype.itemsize,
            device_type=model.device.type,
            packed_bytes=sum(packed_bytes(parameter) for parameter in packed),
            largest_packed=max((num_weights(parameter) for parameter in packed), default=0),
        )


def _inner_width(config: Any, width: int) -> int:
    inner = next(
        (value for name in ("intermediate_size", "ffn_dim", "n_inner") if (value := getattr(config, name, None))),
        4 * width,
    )
    experts = getattr(config, "num_experts_per_tok", None)
    return int(experts * (getattr(config, "moe_intermediate_size", None) or inner) if experts else inner)


@dataclass(frozen=True, kw_only=True)
class MemoryTerm:
    """One kind of buffer.

    Attributes:
        when: `always`; or only in the forward and backward pass (`gradient`) or the update of the weights (`update`).
    """

    name: str
    bytes: int
    when: Literal["always", "gradient", "update"]


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """The terms of one setting."""

    terms: tuple[MemoryTerm, ...]
    tokens: int
    gold_tokens: int
    activation_checkpointing: Checkpointing

    def bytes_of(self, *names: str) -> int:
        """The sum of these terms."""
        return sum(term.bytes for term in self.terms if term.name in names)

    def bytes_when(self, when: str) -> int:
        """The sum of a phase's terms."""
        return sum(term.bytes for term in self.terms if term.when == when)

    @property
    def total(self) -> int:
        """The most at one time: passes and update do not coincide."""
        return self.bytes_when("always") + max(self.bytes_when("gradient"), self.bytes_when("update"))

    def to_json(self) -> dict[str, Any]:
        """`memory.json` of a run."""
        return {
            "tokens": self.tokens,
            "gold_tokens": self.gold_tokens,
            "activation_checkpointing": self.activation_checkpointing,
            "bytes": {term.name: term.bytes for term in self.terms},
            "total_bytes": self.total,
        }

    def __str__(self) -> str:
        states = ", ".join(f"{term.name} {format_bytes(term.bytes)}" for term in self.terms if term.when == "always")
        return (
            f"{format_bytes(self.total)}: {states}; activations and logits of a micro-batch of {self.tokens:,} tokens "
            f"{format_bytes(self.bytes_when('gradient'))}"
        )


def memory_budget(
    shape: ModelShape,
    *,
    tokens: int,
    gold_tokens: int,
    activation_checkpointing: Checkpointing,
    state_dtype: StateDtype = "float32",
    step_in_backward: bool = False,
    measures_update: bool = True,
) -> MemoryBudget:
    """The buffers of a training step; no less than they are where the layers are of the Llama kind.

    Args:
        tokens, gold_tokens: of the largest micro-batch.
        state_dtype, step_in_backward: of the optimizer.
        measures_update: whether `update_to_weight` is measured: it wants the weights before the update.
    """
    element, product = shape.element_bytes, shape.product_bytes
    state_bytes = {"float32": 2.0 * element, "bfloat16": 4.0, "int8": 2.0 * (1.0 + 4.0 / 256)}[state_dtype]
    kept = {name: size * tokens for name, size in _layer_bytes_per_token(shape).items()}
    in_all_layers = activation_checkpointing == "none"
    copies, where = (shape.layers, "in all layers") if in_all_layers else (1, "in one layer")
    chunk = min(gold_tokens, default_chunk_size(shape.vocabulary, element_bytes=element, device_type=shape.device_type))
    # In half precision the logits exist in it and in float32.
    logit_bytes = element if product == element else 4 + product
    gradients = shape.largest_parameter if step_in_backward else shape.trainable
    before = gradients if measures_update else 0

    terms: list[tuple[str, float, Literal["always", "gradient", "update"]]] = [
        ("parameters", shape.parameters * element + shape.packed_bytes, "always"),
        ("gradients", gradients * element, "always"),
        ("optimizer state", shape.trainable * state_bytes, "always"),
    ]
    if product != element:
        terms.append(("parameters in half precision", shape.parameters * product, "gradient"))
    if shape.largest_packed:
        unpacked = shape.largest_packed * (element if product == element else element + product)
        terms.append(("weights of one projection, unpacked", unpacked, "gradient"))
    terms.append(("inputs of all layers", shape.layers * shape.width * tokens * element, "gradient"))
    terms += [(f"{name}, {where}", size * copies, "gradient") for name, size in kept.items()]
    terms += [
        ("backward pass of one layer", (4 * shape.inner + 3 * shape.width) * tokens * product, "gradient"),
        ("hidden states at gold and their gradient", 2 * shape.width * gold_tokens * element, "gradient"),
        ("logits of a chunk", chunk * shape.vocabulary * logit_bytes, "gradient"),
    ]
    if shape.is_output_trained:
        terms.append(("gradient of the output embedding", shape.vocabulary * shape.width * element, "gradient"))
    terms.append(("weights before the update", before * element, "update"))
    return MemoryBudget(
        terms=tuple(MemoryTerm(name=name, bytes=int(size), when=when) for name, size, when in terms),
        tokens=tokens,
        gold_tokens=gold_tokens,
        activation_checkpointing=activation_checkpointing,
    )


def _layer_bytes_per_token(shape: ModelShape) -> dict[str, int]:
    """What one layer keeps for its backward pass besides its input."""
    element, product = shape.element_bytes, shape.product_bytes
    kept = {
        "queries, keys, values": (shape.query_width + 2 * shape.key_width) * product,
        "attended values": shape.query_width * product,
        "normalisers of attention": shape.heads * element,
        "residual after attention": shape.width * element,
        "gate and up projections": 2 * shape.inner * product,
    }
    if not shape.by_hand:
        # Each product under autocast keeps its own copy of its input: three of the first norm's output, two of the second's.
        inputs = 2 * shape.width * element if product == element else 5 * shape.width * product
        kept["normalised inputs"] = 2 * shape.width * element + inputs
        kept["activated gate and gated product"] = 2 * shape.inner * product
    return kept


def largest_microbatch(data: Dataset, *, batch_size: int, tokens_per_microbatch: int) -> tuple[int, int]:
    """Tokens and gold tokens that no micro-batch of any step exceeds."""
    longest = int(data.lengths.max())
    step = _largest_sum(data.lengths, data, batch_size)
    tokens = max(longest, min(tokens_per_microbatch, step))
    return tokens, min(tokens, _largest_sum(data.num_target_tokens, data, batch_size))


def _largest_sum(values: Any, data: Dataset, batch_size: int) -> int:
    """Of `batch_size` examples, each as often as an epoch may hold it."""
    left, total = batch_size, 0
    for index in (-values).argsort(kind="stable"):
        copies = min(left, int(-(-data.repeats[index] // 1)))
        total += copies * int(values[index])
        left -= copies
        if left == 0:
            break
    return total


def parse_bytes(text: str | int) -> int:
    """A number of bytes, or one with a unit.

    >>> parse_bytes("8GB"), parse_bytes("1.5 GiB"), parse_bytes(4096)
    (8000000000, 1610612736, 4096)

    Raises:
        ValueError: not a size, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    if found is None or found.group(2).upper() not in UNITS or float(found.group(1)) <= 0:
        raise ValueError(f"{text!r} is not a size in memory; give bytes, or a number and a unit such as 8GB or 512MiB")
    return int(float(found.group(1)) * UNITS[found.group(2).upper()])
