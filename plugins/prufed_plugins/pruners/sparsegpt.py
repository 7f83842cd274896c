"""SparseGPT: one-shot pruning with the optimal update of what stays (Frantar & Alistarh, 2023).

https://arxiv.org/abs/2301.00774

The published algorithm inverts H, factors the inverse as UᵀU, and pushes the error of every
finished column onto all later ones. Here H = R·Rᵀ with R upper, hence U = R⁻¹, and no inverse is
formed: with D = W − W' on the finished columns, the columns B of the next block stand at

    W_B + (D[:, :i1] · R[:i1, B]) · R_BB⁻¹

which is what the pushed errors would have made of them. Most of that product is taken for a panel
of several blocks at once. Matrices are kept transposed, so that a column of W is contiguous, and
inside a block each column gathers the errors before it when its turn comes instead of being
rewritten after every one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from prufed_plugins.entries import count
from prufed_plugins.pruners.hessian import Factor, InputHessian, inverse_of_upper
from prufed_plugins.pruners.matrices import Choice
from prufed_plugins.pruners.selection import (
    at_most_threshold,
    pruned_count,
    smallest_members,
    smallest_transposed,
)
from prufed_plugins.pruners.sequential import ElementPruner

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import PruneTarget
    from prufed_plugins.params import SparseGPTParams, Threshold

PANEL: Final = 512
"""Columns that take the errors of all earlier ones by one product, large enough for full speed."""

GATHERED: Final = 16
"""Columns that take the errors of earlier ones by one product before they go one by one."""


class SparseGPT(ElementPruner[InputHessian]):
    """Every block of columns loses its ⌊s·rows·block⌋ least w²/U_jj²; or n of every m in a row.

    Nested sub-models: each has the dense weights pruned to its own sparsity, where the entries that
    the one before lost are chosen first.
    """

    def __init__(self, params: SparseGPTParams) -> None:
        def choose_matrix(
            weight: Tensor,
            observed: InputHessian | None,
            target: PruneTarget,
            forced: Tensor | None,
        ) -> Choice:
            assert observed is not None
            return choose(
                weight,
                observed.factor,
                target,
                params.block_size,
                threshold=params.threshold,
                forced=forced,
            )

        super().__init__(
            params,
            choose_matrix,
            lambda columns, device: InputHessian(columns, device, params.damping),
        )

    def statistic_bytes(self, columns: int) -> int:
        """Return the size of a Hessian; it is factored in place."""
        return 4 * columns * columns


@dataclass(frozen=True)
class _Rule:
    """How the entries of some columns are selected.

    Attributes:
        target: sparsity or pattern.
        threshold: how a sparsity is counted.
        free: bool (columns, 1), columns whose entries cost nothing; None where there are none.
        forced: bool (columns, rows), entries that must go; None where there are none.
    """

    target: PruneTarget
    threshold: Threshold
    free: Tensor | None
    forced: Tensor | None

    def of(self, part: slice) -> _Rule:
        """Return the rule of fewer columns."""
        free = None if self.free is None else self.free[part]
        forced = None if self.forced is None else self.forced[part]
        return _Rule(self.target, self.threshold, free, forced)


def choose(
    weight: Tensor,
    factor: Factor,
    target: PruneTarget,
    block_size: int = 128,
    *,
    threshold: Threshold = "exact",
    forced: Tensor | None = None,
) -> Choice:
    """Prune one matrix and update what stays.

    Channels that were silent throughout the calibration cost nothing: their entries go first. With
    ``threshold: exact`` no more go than the target says, and those that stay keep their values;
    ``reference`` removes all of them, as the published code does, whatever the target.

    Args:
        weight: float32 (rows, columns).
        factor: of the damped Hessian of the matrix's inputs.
        target: sparsity or pattern.
        block_size: columns that are selected together; made a multiple of m.
        threshold: ``exact`` removes ⌊s·n⌋ of the n entries of a block, ties by index; ``reference``
            every entry at or below the int(n·s)-th from 0, and at least one.
        forced: bool (rows, columns), entries that must go; no more in any block than the target
            removes of it.

    Returns:
        The choice. Its squared error is ½·tr(D·H·Dᵀ) with D = W − W' and H undamped.
    """
    wiped = threshold == "reference" and bool(factor.dead.any())
    values = weight.t().contiguous()  # (columns, rows)
    if wiped:
        values.masked_fill_(factor.dead[:, None], 0.0)
    rule = _Rule(
        target,
        threshold,
        factor.dead[:, None] if bool(factor.dead.any()) else None,
        None if forced is None else forced.t(),
    )
    pruned, costs = _sweep(values, factor, rule, _block_width(block_size, target))
    report = {"damping": factor.damping, "dead_channels": float(factor.dead.sum())}
    if factor.retries:
        report["damping_retries"] = float(factor.retries)
    if wiped:
        pruned |= factor.dead[:, None]
    if not count(pruned):
        return Choice(pruned.t(), squared_error=0.0, report=report)
    squared_error = max(float(costs[~factor.dead].sum()) / 2, 0.0)
    return Choice(pruned.t(), values.t(), squared_error, factor.energy(weight), report)


def _sweep(values: Tensor, factor: Factor, rule: _Rule, width: int) -> tuple[Tensor, Tensor]:
    """Prune all columns in place, block after block.

    Args:
        values: Wᵀ, (columns, rows); overwritten with W'ᵀ.
        factor: R.
        rule: what to select.
        width: columns of a block.

    Returns:
        The pruned entries (columns, rows), and each column's share of tr(D·H·Dᵀ), (columns,).
    """
    upper = factor.upper
    pruned = torch.empty_like(values, dtype=torch.bool)
    # D of the finished columns; of the others, what the finished ones push onto them: Rᵀ·D
    change = torch.empty_like(values)
    costs = torch.zeros_like(upper[0])
    for panel in _forwards(0, values.shape[0], max(PANEL // width, 1) * width):
        torch.mm(upper[: panel.start, panel].t(), change[: panel.start], out=change[panel])
        for part in _forwards(panel.start, panel.stop, width):
            pushed, done = change[part], slice(panel.start, part.start)
            pushed.addmm_(upper[done, part].t(), change[done])
            inverse = inverse_of_upper(upper[part, part])  # U_BB
            current = torch.addmm(values[part], inverse.t(), pushed)
            with _one_thread():
                errors, pruned[part] = _prune_block(current, inverse, rule.of(part))
            torch.sub(values[part], current, out=pushed)
            values[part] = current
            costs[part] = _squares(errors)
    return pruned, costs - factor.added * _squares(change)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run what is many small steps on one thread: waking others costs more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _prune_block(current: Tensor, inverse: Tensor, rule: _Rule) -> tuple[Tensor, Tensor]:
    """Prune one block of columns in place.

    Args:
        current: (block, rows), the columns with every earlier block's error pushed onto them;
            overwritten with the pruned columns.
        inverse: U_BB, (block, block).
        rule: what to select.

    Returns:
        The errors (w − w')/U_jj and the pruned entries, both (block, rows).
    """
    diagonal = inverse.diagonal()[:, None]
    errors = torch.empty_like(current)
    pattern = rule.target.pattern
    if pattern is None:
        group = GATHERED
        pruned = _select(_scores(current, diagonal, rule), rule)
    else:
        group = pattern[1]
        pruned = torch.empty_like(current, dtype=torch.bool)
    span = max(GATHERED // group, 1) * group
    for first in range(0, current.shape[0], span):
        _gather(current, errors, inverse, range(first), slice(first, first + span))
        for start in range(first, min(first + span, current.shape[0]), group):
            part = slice(start, start + group)
            _gather(current, errors, inverse, range(first, start), part)
            if pattern is not None:
                scores = _scores(current[part], diagonal[part], rule.of(part))
                pruned[part] = smallest_members(scores, min(pattern[0], scores.shape[0]))
            _prune_columns(current[part], inverse[part, part], pruned[part], errors[part])
    return errors, pruned


def _scores(current: Tensor, diagonal: Tensor, rule: _Rule) -> Tensor:
    """Return what removing each entry costs, (columns, rows); the least goes first."""
    scores = current.square().div_(diagonal.square())
    if rule.free is not None:
        scores.masked_fill_(rule.free, 0.0)
    if rule.forced is not None:
        scores.masked_fill_(rule.forced, -1.0)
    return scores


def _select(scores: Tensor, rule: _Rule) -> Tensor:
    """Mark what goes of a block of scores (block, rows)."""
    sparsity = rule.target.sparsity or 0.0
    if rule.threshold == "reference":
        return at_most_threshold(scores, sparsity)
    return smallest_transposed(scores, pruned_count(sparsity, scores.numel()))


def _squares(rows: Tensor) -> Tensor:
    """Return the sum of squares of each row."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()


def _gather(current: Tensor, errors: Tensor, inverse: Tensor, done: range, part: slice) -> None:
    """Push the errors of finished columns onto some later ones, in place."""
    if done:
        finished = slice(done.start, done.stop)
        current[part].addmm_(inverse[finished, part].t(), errors[finished], alpha=-1)


def _prune_columns(current: Tensor, inverse: Tensor, pruned: Tensor, errors: Tensor) -> None:
    """Prune a few columns one by one, in place, filling in their errors."""
    flags = pruned.view(torch.uint8)  # converted several times as fast as bool
    columns, gone, targets = current.unbind(), flags.to(current.dtype).unbind(), errors.unbind()
    diagonal = inverse.diagonal().tolist()
    for index, (column, goes, error) in enumerate(zip(columns, gone, targets, strict=True)):
        if index:
            column.addmv_(errors[:index].t(), inverse[:index, index], alpha=-1)
        torch.mul(column, goes, out=error)
        column -= error
        error /= diagonal[index]


def _forwards(start: int, stop: int, width: int) -> Iterator[slice]:
    for first in range(start, stop, width):
        yield slice(first, min(first + width, stop))


def _block_width(block_size: int, target: PruneTarget) -> int:
    """Return the block size, as a multiple of m where there is a pattern."""
    if target.pattern is None:
        return block_size
    m = target.pattern[1]
    return max(block_size // m, 1) * m
