"""What a round's factors cannot hold of the mean product, kept as low-rank factors of its own.

A residual is B A with B (d, R) and A (R, k), added to the base and never trained. It adds up over
the rounds by placing factors side by side, which only a singular value decomposition keeps small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prufed_plugins.names import split_factor


@dataclass(frozen=True)
class Residual:
    """Factors of a residual.

    Attributes:
        left: B (d, R), float64.
        right: A (R, k), float64.
        discarded: share of the residual's Frobenius norm that was cut off.
    """

    left: Tensor
    right: Tensor
    discarded: float


def compressed(left: Tensor, right: Tensor, *, rank: int | None, floor: float) -> Residual:
    """Return the best approximation of ``left @ right`` at a rank (Eckart and Young).

    With B = Q_B R_B and Aᵀ = Q_A R_A, the singular values are those of R_B R_Aᵀ; no d x k matrix
    is formed. The roots of the singular values go into both factors.

    Args:
        left: (d, n) float64.
        right: (n, k) float64.
        rank: the most to keep; all if None.
        floor: singular values up to this are rounding errors and are dropped.
    """
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right.mT)
    outer, values, inner = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    present = int((values > floor).sum())
    kept = present if rank is None else min(rank, present)
    roots = values[:kept].sqrt()
    energy, lost = (float(values[begin:present].square().sum()) for begin in (0, kept))
    return Residual(
        left_basis @ outer[:, :kept] * roots,
        roots[:, None] * (inner[:kept] @ right_basis.mT),
        (lost / energy) ** 0.5 if energy else 0.0,
    )


def of_one_rank(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors of all modules at the largest of their ranks, padded with zeros.

    A PEFT adapter has one rank. Without a rank at all there is no residual.

    Args:
        factors: A (R, k) and B (d, R) by global name.
    """
    axes = {name: 0 if split_factor(name)[1] == "A" else 1 for name in factors}
    rank = max((tensor.shape[axes[name]] for name, tensor in factors.items()), default=0)
    padded = {}
    for name, tensor in factors.items() if rank else ():
        missing = rank - tensor.shape[axes[name]]
        pad = (0, 0, 0, missing) if axes[name] == 0 else (0, missing)
        padded[name] = torch.nn.functional.pad(tensor, pad) if missing else tensor
    return padded
