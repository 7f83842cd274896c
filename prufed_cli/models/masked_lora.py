"""A linear layer with a low-rank update that never fills the holes of a pruned weight.

With a product mask the layer computes ``y = x (W + s · M⊙(B A))ᵀ`` (SQFT's SparsePEFT, 2410.03750)
by making that weight once per forward: 2·d·k·r operations beside the 2·d·k·T of the one matmul over
T tokens. The backward pass makes it again rather than keep a copy of every layer alive in between.
Without a product mask it is ordinary LoRA, ``y = x Wᵀ + s · (x Aᵀ) Bᵀ`` (2106.09685).
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def is_transposed(layer: nn.Module) -> bool:
    """Return whether the layer keeps its weight as (k, d), as GPT-2's ``Conv1D`` does."""
    return isinstance(layer, Conv1D)


def feature_counts(layer: nn.Module) -> tuple[int, int]:
    """Return (d, k): the numbers of output and of input features."""
    rows, columns = cast(Tensor, layer.weight).shape
    return (columns, rows) if is_transposed(layer) else (rows, columns)


def effective_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Tensor | None,
    transposed: bool,
) -> Tensor:
    """Return ``W + s · M⊙(B A)``, added in the factors' dtype, in W's dtype and layout.

    Args:
        weight: (d, k), or (k, d) if ``transposed``.
        A: (r, k).
        B: (d, r).
        scaling: s.
        mask: M as uint8, which multiplies faster than bool, in the layout of ``weight``; None is 1
            throughout. Entries without it keep W's value exactly.
        transposed: whether the layout is (k, d).
    """
    scaled = B * scaling
    update = torch.mm(A.T, scaled.T) if transposed else torch.mm(scaled, A)
    if mask is not None:
        update.mul_(mask)
    return update.add_(weight).to(weight.dtype)


def multiplier(mask: Tensor, device: torch.device) -> Tensor:
    """Return a bool mask as the uint8 that :func:`effective_weight` multiplies by."""
    return mask.to(device, torch.bool).view(torch.uint8)


def folded(
    layer: nn.Module, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None
) -> nn.Module:
    """Return the layer with ``W + s · M⊙(B A)`` for its weight; the one given stays as it is.

    Args:
        layer: a linear layer.
        A: (R, k).
        B: (d, R).
        scaling: s.
        mask: M in the layout of the weight; None is 1 throughout.
    """
    weight = cast(Tensor, layer.weight)
    with torch.no_grad():
        changed = effective_weight(
            weight,
            A.to(weight.device, torch.float32),
            B.to(weight.device, torch.float32),
            scaling,
            None if mask is None else multiplier(mask, weight.device),
            is_transposed(layer),
        )
    twin = copy.copy(layer)
    twin._parameters = {**layer._parameters, "weight": nn.Parameter(changed, requires_grad=False)}
    return twin


class EffectiveLinear(torch.autograd.Function):
    """``x (W + s · M⊙(B (A·c)))ᵀ + bias`` with gradients for x, A and B.

    With G = gᵀ x the gradient of the effective weight, ``dB = s (M⊙G) (A·c)ᵀ`` and
    ``dA = s Bᵀ (M⊙G) · c``; c (k,) scales A's columns, 1 throughout without dropout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., k)
        A: Tensor,  # (r, k)
        B: Tensor,  # (d, r)
        columns: Tensor | None,  # (k,)
        weight: Tensor,
        bias: Tensor | None,  # (d,)
        mask: Tensor,
        scaling: float,
        transposed: bool,
    ) -> Tensor:
        """Return y (..., d)."""
        ctx.save_for_backward(x, A, B, columns, weight, mask)
        ctx.scaling, ctx.transposed = scaling, transposed
        scaled = A if columns is None else A * columns
        effective = effective_weight(weight, scaled, B, scaling, mask, transposed)
        return F.linear(x, effective.T if transposed else effective, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        x, A, B, columns, weight, mask = ctx.saved_tensors
        scaled = A if columns is None else A * columns
        g = gradient.reshape(-1, gradient.shape[-1])  # (T, d)
        tokens = x.reshape(-1, x.shape[-1])  # (T, k)
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            effective = effective_weight(weight, scaled, B, ctx.scaling, mask, ctx.transposed)
            dx = torch.mm(g, effective.T if ctx.transposed else effective).reshape(x.shape)
            del effective
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            G = torch.mm(tokens.T, g) if ctx.transposed else torch.mm(g.T, tokens)
            G = G.to(A.dtype).mul_(mask)
            G = G.T if ctx.transposed else G  # (d, k)
            dB = torch.mm(G, scaled.T).mul_(ctx.scaling)
            dA = torch.mm(B.T, G).mul_(ctx.scaling)
            dA = dA if columns is None else dA * columns
        return dx, dA, dB, None, None, None, None, None, None


class MaskedLora(nn.Module):
    """One frozen linear layer and the factors that adapt it.

    With a product mask, dropout drops input features of A, one draw per forward for all tokens,
    because the update is then a weight and no token has its own.

    Attributes:
        base_layer: the layer as it was.
        lora_A: (r, k), in float32 whatever the base's dtype.
        lora_B: (d, r), likewise.
        scaling: s.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        A: Tensor,
        B: Tensor,
        *,
        scaling: float,
        dropout: float,
        product_mask: Tensor | None,
    ) -> None:
        super().__init__()
        device = cast(Tensor, base_layer.weight).device
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(A.detach().to(device, torch.float32, copy=True))
        self.lora_B = nn.Parameter(B.detach().to(device, torch.float32, copy=True))
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        mask = None if product_mask is None else multiplier(product_mask, device)
        self.register_buffer("product_mask", mask, persistent=False)

    @property
    def weight(self) -> Tensor:
        """Return the base's weight, which models read to learn its dtype and device."""
        return cast(Tensor, self.base_layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output (..., d) for ``x`` (..., k)."""
        if self.product_mask is None:
            base: Tensor = self.base_layer(x)
            inner = F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A)  # (..., r)
            return (base + F.linear(inner, self.lora_B) * self.scaling).to(base.dtype)
        columns = None
        if self.training and self.dropout.p:
            columns = self.dropout(torch.ones_like(self.lora_A[0]))
        output: Tensor = EffectiveLinear.apply(  # type: ignore[no-untyped-call]
            x,
            self.lora_A,
            self.lora_B,
            columns,
            self.base_layer.weight,
            self.base_layer.bias,
            self.product_mask,
            self.scaling,
            is_transposed(self.base_layer),
        )
        return output
