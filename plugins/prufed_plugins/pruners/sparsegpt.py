"""SparseGPT: one-shot pruning with the optimal update of what stays (Frantar & Alistarh, 2023).

https://arxiv.org/abs/2301.00774

The published algorithm inverts H, factors the inverse as UᵀU, and pushes the error of every
finished column onto all later ones. Here H = R·Rᵀ with R upper, hence U = R⁻¹, and no inverse is
formed: with D = W − W' on the finished columns, the columns B of the next block stand at

    W_B + (D[:, :i1] · R[:i1, B]) · R_BB⁻¹

which is what the pushed errors would have made of them. Most of that product is taken for a panel
of several blocks at once. Matrices are kept transposed, so that a column of W is contiguous, and
inside a block each half of a range of columns takes the errors of the other half by one product,
down to a few columns, each of which gathers the errors before it when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from prufed_plugins.entries import count
from prufed_plugins.products import add_product, product
from prufed_plugins.pruners.fused_block import can_fuse, prune_columns
from prufed_plugins.pruners.hessian import Factor, InputHessian, inverse_of_upper
from prufed_plugins.pruners.matrices import Choice
from prufed_plugins.pruners.selection import (
    at_most_threshold,
    pruned_count,
    smallest_members,
    smallest_transposed,
)
from prufed_plugins.pruners.sequential import ElementPruner
from prufed_plugins.threads import one_thread

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import PruneTarget
    from prufed_plugins.params import SparseGPTParams, Threshold
    from prufed_plugins.pruners.collecting import Observed

PANEL: Final = 512
"""Columns that take the errors of all earlier ones by one product, large enough for full speed."""

GROUP: Final = 16
"""Columns whose turns come one by one, where no pattern groups them."""


class SparseGPT(ElementPruner[InputHessian]):
    """Every block of columns loses its ⌊s·rows·block⌋ least w²/U_jj²; or n of every m in a row.

    Nested sub-models: each has the dense weights pruned to its own sparsity, where the entries that
    the one before lost are chosen first.
    """

    looks_at_outputs = True

    def __init__(self, params: SparseGPTParams) -> None:
        super().__init__(params)
        self._block_size, self._damping = params.block_size, params.damping

    def choose(
        self,
        weight: Tensor,
        observed: Observed[InputHessian] | None,
        target: PruneTarget,
        forced: Tensor | None,
    ) -> Choice:
        """Return what goes of one matrix, and what becomes of the rest; see :func:`choose`."""
        assert observed is not None
        factor, energy = observed.statistic.factor, observed.energy
        threshold = self._params.threshold
        choice = choose(
            weight, factor, target, self._block_size, threshold=threshold, forced=forced
        )
        if not choice.squared_error:
            return choice
        return replace(choice, energy=factor.energy(weight) if energy is None else energy)

    def new_statistic(self, columns: int, device: torch.device) -> InputHessian:
        """Return the Hessian of no inputs yet."""
        return InputHessian(columns, device, self._damping)

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
        forced: bool (rows, columns), entries that must go and are counted.

    Returns:
        The choice. Its squared error is ½·tr(D·H·Dᵀ) with D = W − W' and H undamped.
    """
    wiped = threshold == "reference" and bool(factor.dead.any())
    # (columns, rows); of a Conv1D that is the parameter itself, which has to stay
    values = weight.t().clone(memory_format=torch.contiguous_format)
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
    return Choice(pruned.t(), values.t(), squared_error, report=report)


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
    columns, rows = values.shape
    pruned = torch.empty_like(values, dtype=torch.bool)
    # D of the finished columns; of the others, what the finished ones push onto them: Rᵀ·D
    change = torch.empty_like(values)
    costs = torch.zeros_like(upper[0])
    pattern = rule.target.pattern
    block = _Block.make(min(width, columns), rows, pattern, values.device)
    for panel in _forwards(0, columns, max(PANEL // width, 1) * width):
        # with gaps between its rows, a matrix takes five times as long to turn
        earlier = upper[: panel.start, panel].contiguous().t()
        pushes = product(earlier, change[: panel.start])
        for part in _forwards(panel.start, panel.stop, width):
            pushed = pushes[part.start - panel.start : part.stop - panel.start]
            done = slice(panel.start, part.start)
            add_product(pushed, upper[done, part].t(), change[done])
            inverse = inverse_of_upper(upper[part, part])  # U_BB
            if part.stop - part.start < block.width:
                block = _Block.make(
                    part.stop - part.start, rows, rule.target.pattern, values.device
                )
            torch.add(values[part], product(inverse.t(), pushed), out=block.current)
            with one_thread():
                _prune_block(block, inverse, rule.of(part), pruned[part])
            diagonal = inverse.diagonal()
            costs[part] = _squares(block.removed) / diagonal.square()
            torch.sub(values[part], block.current, out=change[part])
            values[part] = block.current
    return pruned, costs - factor.added * _squares(change)


class _Column(NamedTuple):
    """Views of what one column's turn takes."""

    current: Tensor  # (rows,)
    gone: Tensor  # (rows,)
    removed: Tensor  # (rows,)
    earlier: Tensor | None  # (rows, k), what was removed of the columns of its group before it
    pushes: Tensor  # (k,), what they push onto it


class _Group(NamedTuple):
    """Columns that are selected together, or whose turns come without products between them."""

    part: slice
    current: Tensor  # (m, rows)
    gone: Tensor  # (m, rows)
    removed: Tensor  # (m, rows)
    columns: Sequence[_Column]


class _Push(NamedTuple):
    """What half of a range of columns, now finished, pushes onto the other half."""

    later: Tensor  # (b, rows), current
    pushes: Tensor  # (b, a)
    earlier: Tensor  # (a, rows), removed


@dataclass(frozen=True)
class _Block:
    """One block of columns at a time, in memory that the next one overwrites.

    The views that a column's turn takes are cut once: cutting them takes as long as the turn.

    Attributes:
        width: columns of a block.
        current: (width, rows), the columns with every earlier error pushed onto them.
        gone: (width, rows), 1 where an entry goes, else 0.
        removed: (width, rows), the values that go, w − w'.
        pushes: (width, width), −U_ij/U_ii at [j, i]: what column i pushes onto a later column j.
        steps: the order of work, a group's turns or a push; nothing where one kernel does it.
    """

    width: int
    current: Tensor
    gone: Tensor
    removed: Tensor
    pushes: Tensor
    steps: Sequence[_Group | _Push]

    @classmethod
    def make(
        cls, width: int, rows: int, pattern: tuple[int, int] | None, device: torch.device
    ) -> _Block:
        """Allocate the buffers for blocks of ``width`` columns and ``rows`` rows."""
        current, gone, removed = (torch.empty(width, rows, device=device) for _ in range(3))
        pushes = torch.empty(width, width, device=device)
        block = cls(width, current, gone, removed, pushes, ())
        if can_fuse(width, pattern, device):
            return block
        size = GROUP if pattern is None else pattern[1]
        return replace(block, steps=list(_steps(block, 0, width, size)))


def _steps(block: _Block, start: int, stop: int, size: int) -> Iterator[_Group | _Push]:
    """Order the work on a range of columns: one half, what it pushes onto the other, the other."""
    groups = -(-(stop - start) // size)
    if groups == 1:
        yield _group(block, slice(start, stop))
        return
    middle = start + (1 << (groups - 1).bit_length() - 1) * size
    earlier, later = slice(start, middle), slice(middle, stop)
    yield from _steps(block, start, middle, size)
    yield _Push(block.current[later], block.pushes[later, earlier], block.removed[earlier])
    yield from _steps(block, middle, stop, size)


def _group(block: _Block, part: slice) -> _Group:
    turns = [
        _Column(
            block.current[index],
            block.gone[index],
            block.removed[index],
            block.removed[part.start : index].t() if index > part.start else None,
            block.pushes[index, part.start : index],
        )
        for index in range(part.start, part.stop)
    ]
    return _Group(part, block.current[part], block.gone[part], block.removed[part], turns)


def _prune_block(block: _Block, inverse: Tensor, rule: _Rule, pruned: Tensor) -> None:
    """Prune one block of columns in place.

    Args:
        block: with its current columns; what was removed of them is filled in.
        inverse: U_BB, (width, width).
        rule: what to select.
        pruned: bool (width, rows), filled in.
    """
    diagonal = inverse.diagonal()[:, None]
    squares = diagonal.square()
    torch.div(inverse, -diagonal, out=block.pushes.t())
    pattern = rule.target.pattern
    if pattern is None:
        # what will be removed is not known yet: its place takes the scores
        scores = _scores(block.current, squares, rule, out=block.removed)
        _select(scores, rule, out=block.gone)
    if not block.steps:
        prune_columns(
            block.current,
            block.gone,
            block.removed,
            block.pushes,
            squares,
            pattern,
            rule.free,
            rule.forced,
        )
    for step in block.steps:
        if isinstance(step, _Push):
            add_product(step.later, step.pushes, step.earlier)
            continue
        if pattern is not None:
            part = step.part
            scores = _scores(step.current, squares[part], rule.of(part), out=step.removed)
            smallest_members(scores, min(pattern[0], len(scores)), out=step.gone)
            if rule.forced is not None:
                step.gone.masked_fill_(rule.forced[part], 1.0)
        for column in step.columns:
            if column.earlier is not None:
                column.current.addmv_(column.earlier, column.pushes)
            torch.mul(column.current, column.gone, out=column.removed)
    pruned.view(torch.uint8).copy_(block.gone)  # several times as fast as converting into bool
    block.current.sub_(block.removed)


def _scores(current: Tensor, squares: Tensor, rule: _Rule, out: Tensor) -> Tensor:
    """Return what removing each entry costs, w²/U_jj², (columns, rows); the least goes first."""
    scores = torch.mul(current, current, out=out).div_(squares)
    if rule.free is not None:
        scores.masked_fill_(rule.free, 0.0)
    if rule.forced is not None:
        scores.masked_fill_(rule.forced, -1.0)
    return scores


def _select(scores: Tensor, rule: _Rule, out: Tensor) -> None:
    """Mark in ``out``, by 1 and 0, what goes of a block of scores (block, rows)."""
    sparsity = rule.target.sparsity or 0.0
    if rule.threshold == "reference":
        at_most_threshold(scores, sparsity, out)
    else:
        smallest_transposed(scores, pruned_count(sparsity, scores.numel()), out)
    if rule.forced is not None:  # where there are more of them than the target asks for
        out.masked_fill_(rule.forced, 1.0)


def _squares(rows: Tensor) -> Tensor:
    """Return the sum of squares of each row."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()


def _forwards(start: int, stop: int, width: int) -> Iterator[slice]:
    for first in range(start, stop, width):
        yield slice(first, min(first + width, stop))


def _block_width(block_size: int, target: PruneTarget) -> int:
    """Return the block size, as a multiple of m where there is a pattern."""
    if target.pattern is None:
        return block_size
    m = target.pattern[1]
    return max(block_size // m, 1) * m
