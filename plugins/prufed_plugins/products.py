"""Matrix products on a CPU, at the full width of its vectors.

In float32, torch leaves them to MKL, which uses AVX-512 on Intel's processors alone: on others that
have it, half their speed is lost. oneDNN, which torch brings for half precision and convolutions,
uses it on all of them. In half precision torch takes oneDNN's where the processor has instructions
that it can use, else loops that take four times as long as float32. Everywhere else these functions
are torch's own.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

SMALLEST: Final = 2**20
"""Multiply-adds from which on a product is worth the ten microseconds that oneDNN prepares it."""

LARGEST_PIECE: Final = 2048
SMALLEST_PIECE: Final = 32
"""Sides of the pieces that products are cut into: powers of two between these, so that there are
few shapes. For each shape it meets, oneDNN keeps half a megabyte of instructions."""

REGULAR: Final = 128
"""Tokens of a linear layer are not cut where they are a multiple of this, as in whole batches;
those that a router sends to an expert come in any number."""

WIDENED: Final = 1024
"""Tokens, and rows of a matrix, that are widened into float32 at once."""

_HEIGHT: Final = 512
"""Rows of a product that are made at once, before they are added to others."""


@cache
def mkl_is_narrow() -> bool:
    """Return whether this processor has wider vectors than MKL makes use of on it."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    mkl, onednn = torch.backends.mkl, torch.backends.mkldnn
    brought = mkl.is_available() and onednn.is_available()  # type: ignore[no-untyped-call]
    return wide and brought and "GenuineIntel" not in _processor()


@cache
def lacks_products(dtype: torch.dtype) -> bool:
    """Return whether oneDNN has no products of this half-precision dtype on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left·right, (m, k) by (k, n)."""
    if not _suits(left, right):
        return torch.mm(left, right)
    first, *rest = ((inner, _dense(right[inner].t())) for inner in pieces(0, left.shape[1]))
    parts = []
    for outer in pieces(0, left.shape[0], _HEIGHT):
        total = linear(left[outer, first[0]], first[1])
        for inner, weight in rest:
            total = linear(left[outer, inner], weight, plus=total)
        parts.append(total)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_product(to: Tensor, left: Tensor, right: Tensor, sign: int = 1) -> None:
    """Add ±left·right, (m, k) by (k, n), to a matrix (m, n) in place."""
    if not _suits(left, right):
        to.addmm_(left, right, alpha=sign)
        return
    for inner in pieces(0, left.shape[1]):
        weight = _dense(right[inner].t())
        for outer in pieces(0, left.shape[0], _HEIGHT):
            part = left[outer, inner]
            if min(part.shape) < SMALLEST_PIECE:
                to[outer].addmm_(part, right[inner], alpha=sign)
            else:  # oneDNN has no product that adds in place
                to[outer].add_(linear(part, weight), alpha=sign)


def pieces(start: int, stop: int, largest: int = LARGEST_PIECE) -> Iterator[slice]:
    """Cut a range into powers of two, as large as may be, and what is left below the smallest."""
    while start < stop:
        size = min(largest, 1 << (stop - start).bit_length() - 1)
        end = start + size if size >= SMALLEST_PIECE else stop
        yield slice(start, end)
        start = end


def linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None = None, plus: Tensor | None = None
) -> Tensor:
    """Return x·Wᵀ + b by oneDNN: inputs (…, k), weight (n, k), bias (n,), all float32 on a CPU.

    It is the operator that torch's own compiler makes of a linear layer. ``plus`` (…, n) is added.
    """
    operator = torch.ops.mkldnn._linear_pointwise
    weight = _dense(weight)
    if plus is None:
        result: Tensor = operator.default(inputs, weight, bias, "none", [], "")
    else:
        result = operator.binary(inputs, plus, weight, bias, "add")
    return result


class WideLinears(TorchFunctionMode):
    """While this context is entered, linear layers without gradients run at full speed.

    It covers what ``nn.Linear`` and GPT-2's ``Conv1D`` call: in float32 by :func:`linear`, wherever
    :func:`mkl_is_narrow`, and in half precision by :func:`widened`, wherever the processor
    :func:`lacks_products` of it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one of torch's functions."""
        if not kwargs and not torch.is_grad_enabled():
            if func is functional.linear and (layer := _layer_for(args[0], args[1].t())):
                return layer(*args)
            if func is torch.addmm and args[0].dim() == 1 and (layer := _layer_for(*args[1:])):
                return layer(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


def widened(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ + b in half precision, summed in float32 and rounded once.

    Args:
        inputs: (…, k).
        weight: (n, k), of the same dtype.
        bias: (n,).
    """
    tokens = inputs.reshape(-1, inputs.shape[-1])
    result = tokens.new_empty(tokens.shape[0], weight.shape[0])
    for x, part in zip(*(torch.split(one, WIDENED) for one in (tokens, result)), strict=True):
        wide = x.float()
        for first in range(0, weight.shape[0], WIDENED):
            rows = slice(first, first + WIDENED)
            some = weight[rows].float()
            compute = _layer_for(wide, some.t()) or functional.linear
            part[:, rows] = compute(wide, some, None if bias is None else bias[rows].float())
    return result.reshape(*inputs.shape[:-1], -1)


def _layer_for(left: Tensor, right: Tensor) -> Callable[..., Tensor] | None:
    """Return what computes a linear layer, (…, k) by (k, n), faster than torch, if anything."""
    if not _is_large(left, right):
        return None
    if left.dtype == torch.float32:
        return _linear_layer if mkl_is_narrow() else None
    return widened if lacks_products(left.dtype) else None


def _linear_layer(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ + b in few shapes, however many tokens there are."""
    tokens = inputs.reshape(-1, inputs.shape[-1])
    if tokens.shape[0] % REGULAR == 0:
        return linear(inputs, weight, bias)
    parts = []
    for part in pieces(0, tokens.shape[0]):
        compute = functional.linear if part.stop - part.start < SMALLEST_PIECE else linear
        parts.append(compute(tokens[part], weight, bias))
    return torch.cat(parts).reshape(*inputs.shape[:-1], -1)


def _suits(left: Tensor, right: Tensor) -> bool:
    """Return whether oneDNN does (…, k) by (k, n) in float32 faster than MKL."""
    return left.dtype == torch.float32 and _is_large(left, right) and mkl_is_narrow()


def _is_large(left: Tensor, right: Tensor) -> bool:
    """Return whether (…, k) by (k, n), on a CPU, is worth preparing."""
    return (
        left.dim() > 1
        and right.dim() == 2
        and left.dtype == right.dtype
        and left.device.type == right.device.type == "cpu"
        and left.numel() * right.shape[-1] >= SMALLEST
    )


def _dense(weight: Tensor) -> Tensor:
    """Return a matrix without gaps between its rows or columns: with them, oneDNN takes forever."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _processor() -> str:
    """Return what the system says of the processor, its vendor included."""
    linux = Path("/proc/cpuinfo")
    return linux.read_text() if linux.exists() else platform.processor()
