"""SparseGPT: one-shot pruning with the optimal update of what stays (Frantar & Alistarh, 2023).

https://arxiv.org/abs/2301.00774

The published algorithm inverts H, factors the inverse as UᵀU, and pushes the error of every
finished column onto all later ones. Here H = R·Rᵀ with R upper, hence U = R⁻¹, and no inverse is
formed: with D = W − W' on the finished columns, the columns B of the next block stand at

    W_B + (D[:, :i1] · R[:i1, B]) · R_BB⁻¹

which is what the pushed errors would have made of them. Matrices are kept transposed, so that a
column of W is contiguous, and inside a block each column gathers the errors before it when its turn
comes instead of being rewritten after every one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import torch

from prufed_plugins.pruners.hessian import Factor, InputHessian
from prufed_plugins.pruners.selection import pruned_count, smallest, smallest_members
from prufed_plugins.pruners.sequential import CalibratedPruner, Choice

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import PruneTarget
    from prufed_plugins.params import SparseGPTParams

GATHERED: Final = 16
"""Columns that take the errors of earlier ones by one product before they go one by one."""


class SparseGPT(CalibratedPruner[InputHessian]):
    """Every block of columns loses its ⌊s·rows·block⌋ least w²/U_jj²; or n of every m in a row."""

    result: Literal["masked"] = "masked"
    needs_calibration = True

    def __init__(self, params: SparseGPTParams) -> None:
        block, damping = params.block_size, params.damping
        super().__init__(
            lambda columns, device: InputHessian(columns, device, damping),
            lambda weight, hessian, target: choose(weight, hessian.factor, target, block),
        )


def choose(weight: Tensor, factor: Factor, target: PruneTarget, block_size: int = 128) -> Choice:
    """Prune one matrix and update what stays.

    Args:
        weight: float32 (rows, columns).
        factor: of the damped Hessian of the matrix's inputs.
        target: sparsity or pattern.
        block_size: columns that are selected together; rounded down to a multiple of m.

    Returns:
        The choice; ``loss`` in its report is tr(D·H·Dᵀ), the squared output error per token times
        two, damping included.
    """
    width = _block_width(block_size, target)
    values = weight.t().masked_fill(factor.dead[:, None], 0.0).contiguous()  # (columns, rows)
    pruned = torch.empty_like(values, dtype=torch.bool)
    change = torch.zeros_like(values)  # D
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, values.shape[0], width):
        part = slice(start, min(start + width, values.shape[0]))
        inverse = _inverse(factor.upper[part, part])  # U_BB
        pushed = factor.upper[:start, part].t() @ change[:start]
        current = torch.addmm(values[part], inverse.t(), pushed)
        errors, pruned[part] = _prune_block(current, inverse, target)
        torch.sub(values[part], current, out=change[part])
        values[part] = current
        loss += errors.square().sum(dtype=torch.float64)
    report = {
        "damping": factor.damping,
        "dead_channels": float(factor.dead.sum()),
        "loss": float(loss),
    }
    if not bool(pruned.any()):
        return Choice(pruned.t(), report=report)
    return Choice(pruned.t(), values.t(), report)


def _prune_block(current: Tensor, inverse: Tensor, target: PruneTarget) -> tuple[Tensor, Tensor]:
    """Prune one block of columns in place.

    Args:
        current: (block, rows), the columns with every earlier block's error pushed onto them;
            overwritten with the pruned columns.
        inverse: U_BB, (block, block).
        target: sparsity or pattern.

    Returns:
        The errors (w − w')/U_jj and the pruned entries, both (block, rows).
    """
    diagonal = inverse.diagonal()[:, None]
    errors = torch.zeros_like(current)
    if target.pattern is None:
        group = GATHERED
        pruned = _smallest_of_block(current / diagonal, target.sparsity or 0.0)
    else:
        group = target.pattern[1]
        pruned = torch.empty_like(current, dtype=torch.bool)
    span = max(GATHERED // group, 1) * group
    for first in range(0, current.shape[0], span):
        _gather(current, errors, inverse, range(first), slice(first, first + span))
        for start in range(first, min(first + span, current.shape[0]), group):
            part = slice(start, start + group)
            _gather(current, errors, inverse, range(first, start), part)
            if target.pattern is not None:
                scores = (current[part] / diagonal[part]).abs()
                pruned[part] = smallest_members(scores, target.pattern[0])
            _prune_columns(current[part], inverse[part, part], pruned[part], errors[part])
    return errors, pruned


def _gather(current: Tensor, errors: Tensor, inverse: Tensor, done: range, part: slice) -> None:
    """Push the errors of finished columns onto some later ones, in place."""
    if done:
        finished = slice(done.start, done.stop)
        current[part].addmm_(inverse[finished, part].t(), errors[finished], alpha=-1)


def _prune_columns(current: Tensor, inverse: Tensor, pruned: Tensor, errors: Tensor) -> None:
    """Prune a few columns one by one, in place, filling in their errors."""
    columns, gone, targets = current.unbind(), pruned.to(current.dtype).unbind(), errors.unbind()
    diagonal = inverse.diagonal().tolist()
    for index, (column, goes, error) in enumerate(zip(columns, gone, targets, strict=True)):
        if index:
            column.addmv_(errors[:index].t(), inverse[:index, index], alpha=-1)
        torch.mul(column, goes, out=error)
        column -= error
        error /= diagonal[index]


def _smallest_of_block(scores: Tensor, sparsity: float) -> Tensor:
    """Mark the ⌊s·n⌋ smallest |score| of a block (block, rows), ties by row, then column."""
    flat = scores.abs().t().reshape(1, -1)
    chosen = smallest(flat, pruned_count(sparsity, flat.shape[1]))
    return chosen.reshape(scores.shape[1], scores.shape[0]).t()


def _block_width(block_size: int, target: PruneTarget) -> int:
    """Return the block size, as a multiple of m where there is a pattern."""
    if target.pattern is None:
        return block_size
    m = target.pattern[1]
    return max(block_size // m, 1) * m


def _inverse(upper: Tensor) -> Tensor:
    identity = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse
