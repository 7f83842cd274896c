"""The published SparseGPT algorithm written plainly: what ours is compared and timed against.

Frantar & Alistarh, https://arxiv.org/abs/2301.00774, algorithm 1: invert the Hessian, take the
Cholesky factor of the inverse, and in blocks of 128 columns remove the smallest w²/U_jj², column by
column, pushing each column's error onto all later ones.

``exact`` removes by count, ties by index, silent channels first. Otherwise it selects as the
published code does: everything at or below ``sorted[int(n·s)]`` of a block, and all of a silent
channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def plain_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Return U, upper triangular with H⁻¹ = UᵀU."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * float(diagonal.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def plain_sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float = 0.0,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    damping: float = 0.01,
    *,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the pruned weight and the bool mask of pruned entries, both (rows, columns)."""
    weight = weight.clone()
    columns = weight.shape[1]
    dead = hessian.diagonal() == 0
    if not exact:
        weight[:, dead] = 0.0
    upper = plain_factor(hessian, damping)
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        current = weight[:, start:end].clone()
        errors = torch.zeros_like(current)
        inside = upper[start:end, start:end]
        if pattern is None:
            scores = current**2 / inside.diagonal() ** 2
            scores[:, dead[start:end]] = 0.0
            pruned[:, start:end] = select(scores, sparsity, exact)
        for column in range(end - start):
            if pattern is not None and column % pattern[1] == 0:
                group = slice(column, min(column + pattern[1], end - start))
                scores = current[:, group] ** 2 / inside.diagonal()[group] ** 2
                scores[:, dead[start:end][group]] = 0.0
                order = torch.sort(scores, dim=1, stable=True).indices[:, : pattern[0]]
                pruned[:, start:end][:, group].scatter_(1, order, True)
            gone = pruned[:, start + column]
            error = torch.where(gone, current[:, column], 0.0) / inside[column, column]
            current[:, column:] -= error[:, None] @ inside[column, column:][None]
            current[gone, column] = 0.0
            errors[:, column] = error
        weight[:, start:end] = current
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight, pruned if exact else pruned | dead


def select(scores: Tensor, sparsity: float, exact: bool) -> Tensor:
    """Return which of a block's scores go."""
    if not exact:
        return scores <= scores.flatten().sort().values[int(scores.numel() * sparsity)]
    order = torch.sort(scores.flatten(), stable=True).indices
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[order[: int(sparsity * scores.numel())]] = True
    return chosen.reshape(scores.shape)
