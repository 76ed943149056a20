"""The linear layers of one decoder layer, forward and backward by hand, with LoRA's factors beside them.

Linear layers of one input (query, key and value; gate and up) are computed together, and so are their factors: the input
and its gradient, which are the large tensors, are read and written once for all of them and not once each. What the
first factors make of the input is kept for the backward pass: the ranks together, beside some ten widths of the layer.

Legend: N rows, D width in, O width out, F rank (of the factors of all linear layers of an input).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from goldsmith.objective.linear_cross_entropy import product

__all__ = ["LINEARS", "PARAMETERS", "LayerLinears", "present"]

# The tensors of a layer in the order in which its autograd node takes them.
PARAMETERS = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.weight",
    "self_attn.v_proj.bias",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.o_proj.weight",
    "self_attn.o_proj.bias",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.gate_proj.bias",
    "mlp.up_proj.weight",
    "mlp.up_proj.bias",
    "mlp.down_proj.weight",
    "mlp.down_proj.bias",
)

LINEARS = tuple(name.removesuffix(".weight") for name in PARAMETERS if "_proj.weight" in name)


class LayerLinears:
    """Weights in the type of the products; outside of autograd.

    Args:
        tensors: of `PARAMETERS`, then A [F, D] and B [O, F] of each linear layer in the order of `lora`.
        lora: the linear layers that have factors, and the scale of their product.
        downs: in a backward pass, as the forward pass left them.
        needed: for each tensor whether it wants a gradient; all False outside of a backward pass.

    Attributes:
        own: the layer's own tensors, by name.
        needed: by name.
        downs: x A^T [N, F] of all factors of an input, by the first linear layer of that input; only where there are factors.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor | None],
        lora: Mapping[str, float],
        dtype: torch.dtype,
        *,
        downs: Mapping[str, torch.Tensor] | None = None,
        needed: Sequence[bool] = (),
    ) -> None:
        self.own = dict(zip(PARAMETERS, tensors, strict=False))
        self.downs = dict(downs or {})
        names = [*PARAMETERS, *(f"{name}.{factor}" for name in lora for factor in ("down", "up"))]
        self.needed = dict(zip(names, needed, strict=True)) if needed else dict.fromkeys(names, False)
        self._lora = lora
        self._dtype = dtype
        self._factors = dict(zip(names[len(PARAMETERS) :], tensors[len(PARAMETERS) :], strict=True))
        self._grads: dict[str, torch.Tensor] = {}

    def size(self, name: str) -> int:
        """O."""
        return present(self.own[f"{name}.weight"]).shape[0]

    def apply(
        self, names: Sequence[str], x_ND: torch.Tensor, *, out: Sequence[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """`x W^T + b`, and what the factors add, of each linear layer of the input x; written to `out` where that is given."""
        targets: Sequence[torch.Tensor | None] = out or [None] * len(names)
        ys = [torch.mm(x_ND, self._weight(name).T, out=y) for name, y in zip(names, targets, strict=True)]
        self._complete(names, x_ND, ys)
        return ys

    def apply_and_add(self, name: str, x_ND: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The same of the only linear layer of x, added to a residual, in its type."""
        if residual.dtype != self._dtype:
            return residual + self.apply([name], x_ND)[0]
        y = torch.addmm(residual, x_ND, self._weight(name).T)
        self._complete([name], x_ND, [y])
        return y

    def _complete(self, names: Sequence[str], x_ND: torch.Tensor, ys: Sequence[torch.Tensor]) -> None:
        for name, y in zip(names, ys, strict=True):
            bias = self.own[f"{name}.bias"]
            if bias is not None:
                y += bias.to(y.dtype)
        if factored := self._factored(names):
            down_NF = self.downs[names[0]] = x_ND @ self._down(factored).T
            for name, own in zip(factored, down_NF.split(self._ranks(factored), dim=1), strict=True):
                ys[names.index(name)].addmm_(own, self._factor(f"{name}.up").T, alpha=self._lora[name])

    def backward(
        self, names: Sequence[str], grads: Sequence[torch.Tensor], x_ND: torch.Tensor, *, wants_input: bool = True
    ) -> torch.Tensor:
        """The gradient of x, and in `gradients` those of the tensors of the linear layers of x.

        Args:
            grads: of each one's output, [N, O].
            wants_input: False leaves the gradient of x out; it is then empty.
        """
        for name, grad_NO in zip(names, grads, strict=True):
            if self.needed[f"{name}.weight"]:
                self._note(f"{name}.weight", product(grad_NO.T, x_ND))
            if self.needed[f"{name}.bias"]:
                self._note(f"{name}.bias", grad_NO.sum(dim=0))
        factored = self._factored(names)
        grad_down_NF = self._factors_backward(factored, names, grads, x_ND) if factored else None
        if not wants_input:
            return x_ND.new_empty(0)
        grad_x_ND = grads[0] @ self._weight(names[0])
        for name, grad_NO in zip(names[1:], grads[1:], strict=True):
            grad_x_ND.addmm_(grad_NO, self._weight(name))
        if grad_down_NF is not None:
            grad_x_ND.addmm_(grad_down_NF, self._down(factored))
        return grad_x_ND

    def _factors_backward(
        self, factored: Sequence[str], names: Sequence[str], grads: Sequence[torch.Tensor], x_ND: torch.Tensor
    ) -> torch.Tensor:
        """Notes the gradients of the factors; returns that of x A^T, [N, F]."""
        ranks = self._ranks(factored)
        down_NF = self.downs[names[0]]
        grad_down_NF = torch.empty_like(down_NF)
        parts = zip(factored, down_NF.split(ranks, dim=1), grad_down_NF.split(ranks, dim=1), strict=True)
        for name, down, grad_down in parts:
            grad_NO = grads[names.index(name)]
            self._note(f"{name}.up", product(grad_NO.T, down).mul_(self._lora[name]))
            torch.mm(grad_NO, self._factor(f"{name}.up"), out=grad_down).mul_(self._lora[name])
        for name, gradient in zip(factored, product(grad_down_NF.T, x_ND).split(ranks), strict=True):
            self._note(f"{name}.down", gradient)
        return grad_down_NF

    def note_norm(self, name: str, gradient: torch.Tensor | None) -> None:
        """The gradient of a norm's weight, which is computed elsewhere."""
        if gradient is not None:
            self._note(name, gradient)

    def gradients(self) -> list[torch.Tensor | None]:
        """In the order of the tensors; None for those that want none."""
        return [self._grads.get(name) if needed else None for name, needed in self.needed.items()]

    def _note(self, name: str, gradient: torch.Tensor) -> None:
        tensor = self.own[name] if name in self.own else self._factors[name]
        self._grads[name] = gradient.to(present(tensor).dtype)

    def _weight(self, name: str) -> torch.Tensor:
        return present(self.own[f"{name}.weight"]).to(self._dtype)

    def _factor(self, name: str) -> torch.Tensor:
        return present(self._factors[name]).to(self._dtype)

    def _factored(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self._lora]

    def _ranks(self, factored: Sequence[str]) -> list[int]:
        return [present(self._factors[f"{name}.down"]).shape[0] for name in factored]

    def _down(self, factored: Sequence[str]) -> torch.Tensor:
        """A of all of them under each other, [F, D]."""
        downs = [self._factor(f"{name}.down") for name in factored]
        return downs[0] if len(downs) == 1 else torch.cat(downs)


def present(tensor: torch.Tensor | None) -> torch.Tensor:
    """A tensor that every such layer has."""
    assert tensor is not None
    return tensor
