"""Scores of a decoder block by its weights alone.

PruFed names a parameter-based and a magnitude-based strategy and defines neither; Sajjad et al.
(2004.03844) rank layers by the aggregate or the variance of their weights. The definitions here are
ours. Every score is divided by the number of entries it was taken over, so that blocks of different
shape, dense ones and mixtures of experts, compare. Norms, biases and routers do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import torch

from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import Decoder, Progress

PIECE: Final = 1 << 22
"""Entries that are summed at a time: a whole matrix in float64 would be four times a bf16 one."""


class Moments:
    """Sums over the entries of one tensor, in float64.

    Attributes:
        entries: n, their number.
        absolute: Σ|w|.
        plain: Σw.
        square: Σw².
    """

    def __init__(self, entries: int, absolute: float, plain: float, square: float) -> None:
        self.entries = entries
        self.absolute = absolute
        self.plain = plain
        self.square = square

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.entries + other.entries,
            self.absolute + other.absolute,
            self.plain + other.plain,
            self.square + other.square,
        )


Score = Callable[[Sequence[Moments]], float]
"""From the moments of a block's matrices to the block's score."""


def l1(matrices: Sequence[Moments]) -> float:
    """Return the mean over the matrices of ‖W‖₁ / n; every matrix counts alike."""
    return sum(one.absolute / one.entries for one in matrices) / len(matrices)


def l2(matrices: Sequence[Moments]) -> float:
    """Return the mean over the matrices of ‖W‖₂ / √n; every matrix counts alike."""
    return sum(math.sqrt(one.square / one.entries) for one in matrices) / len(matrices)


def mean_abs(matrices: Sequence[Moments]) -> float:
    """Return the mean of |w| over all entries of the block; every entry counts alike."""
    block = _pooled(matrices)
    return block.absolute / block.entries


def variance(matrices: Sequence[Moments]) -> float:
    """Return the variance of w over all entries of the block."""
    block = _pooled(matrices)
    return max(block.square / block.entries - (block.plain / block.entries) ** 2, 0.0)


def weight_scores(
    decoder: Decoder,
    score: Score,
    progress: Progress,
    origin: Callable[[str], Tensor] | None = None,
) -> list[float]:
    """Return the score of every block.

    Args:
        decoder: the model; its blocks are loaded one after the other.
        score: from moments to a number.
        progress: told about finished blocks.
        origin: from a parameter's name to the tensor that is subtracted from it first.

    Raises:
        MethodError: a weight is not finite, or has not the shape of its origin.
    """
    total = len(decoder.blocks)
    scores = []
    for index in range(total):
        matrices = []
        for module_name, module in decoder.linears(index).items():
            name = f"{module_name}.weight"
            weight = module.get_parameter("weight").detach()
            matrices.append(_moments(name, weight, origin(name) if origin else None))
        scores.append(score(matrices))
        progress("block", index + 1, total)
    return scores


def _moments(name: str, weight: Tensor, origin: Tensor | None) -> Moments:
    if origin is not None and origin.shape != weight.shape:
        raise MethodError(
            f"{name} is {list(weight.shape)} here and {list(origin.shape)} in the reference",
            "name the directory of the model that this one was tuned from",
        )
    sums = torch.zeros(3, dtype=_widest(weight), device=weight.device)
    for piece in _pieces(weight, origin):
        sums += torch.stack([piece.abs().sum(), piece.sum(), piece.square().sum()])
    absolute, plain, square = sums.tolist()
    if not absolute < float("inf"):
        raise MethodError(
            f"{name} holds NaN or infinity", "load the base again; its checkpoint is damaged"
        )
    return Moments(weight.numel(), absolute, plain, square)


def _pieces(weight: Tensor, origin: Tensor | None) -> Iterator[Tensor]:
    """Yield the entries of ``weight``, less those of ``origin``, a few million at a time."""
    rows = max(1, PIECE // weight[0].numel())
    wide = _widest(weight)
    for start in range(0, len(weight), rows):
        piece = weight[start : start + rows].to(wide)
        if origin is not None:
            piece = piece - origin[start : start + rows].to(device=weight.device, dtype=wide)
        yield piece


def _widest(weight: Tensor) -> torch.dtype:
    return torch.float32 if weight.device.type == "mps" else torch.float64  # mps has no float64


def _pooled(matrices: Sequence[Moments]) -> Moments:
    return sum(matrices, start=Moments(0, 0.0, 0.0, 0.0))
