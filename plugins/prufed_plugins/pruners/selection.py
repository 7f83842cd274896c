"""Which entries to prune: exact counts, ties broken by index; or as the published code counts.

Exact: a group of n entries at sparsity s loses exactly ⌊s·n⌋ of them, the lower flat index first
among equals, so that s = 0 is the identity and two runs agree bit for bit.

Reference: the published SparseGPT and magnitude scripts sort the scores and remove every one that
is at most ``sorted[int(n·s)]``: one entry more than int(n·s), even at s = 0, and more still where
scores tie.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from prufed_plugins.entries import count as count_true
from prufed_plugins.errors import MethodError
from prufed_plugins.quickselect import kth_smallest

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import PruneTarget

COMPARED: Final = 32
"""Largest group whose ranks are counted by comparing its members pairwise; others are sorted."""

PIECE: Final = 2**18
"""Entries that are looked through for ties at once."""


def check_target(target: PruneTarget) -> None:
    """Refuse a target that no element-wise pruner can meet.

    Raises:
        MethodError: neither or both of sparsity and pattern are given, or one is out of range.
    """
    if target.layers is not None:
        raise MethodError(
            f"an element-wise pruner cannot drop {target.layers} layers",
            "use a layer pruner such as --method symmetric",
        )
    if (target.sparsity is None) == (target.pattern is None):
        raise MethodError(
            "an element-wise pruner needs either a sparsity or a pattern",
            "pass --sparsity 0.5 or --pattern 2:4",
        )
    if target.sparsity is not None and not 0.0 <= target.sparsity < 1.0:
        raise MethodError(
            f"sparsity {target.sparsity} is outside [0, 1)", "pass --sparsity 0.5, for example"
        )
    if target.pattern is not None and not 0 < target.pattern[0] < target.pattern[1]:
        n, m = target.pattern
        raise MethodError(
            f"pattern {n}:{m} must prune at least 1 and fewer than {m} of every {m} inputs",
            "pass --pattern 2:4, for example",
        )


def check_pattern(name: str, columns: int, pattern: tuple[int, int]) -> None:
    """Refuse a pattern that would leave nothing of a matrix.

    Raises:
        MethodError: ``columns`` is at most n; names the matrix.
    """
    n, m = pattern
    if columns <= n:
        raise MethodError(
            f"pattern {n}:{m} would remove all {columns} columns of {name}",
            "choose smaller groups, for example --pattern 2:4",
        )


def removed_count(sparsity: float, size: int) -> int:
    """Return ⌊sparsity · size⌋, with the sparsity read as the decimal a person typed.

    ``0.29 * 100`` is 28.999… in floating point; here it is 29.

    Raises:
        MethodError: the sparsity is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise MethodError(
            f"sparsity {sparsity} is outside [0, 1)", "give the share of entries to remove"
        )
    return math.floor(Fraction(repr(float(sparsity))) * size)


def pruned_count(sparsity: float, entries: int) -> int:
    """Return ⌊s·n⌋, with s read as the decimal it was typed as; everything at s = 1."""
    return entries if sparsity >= 1 else removed_count(sparsity, entries)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest scores of each row.

    Args:
        scores: (rows, n), finite.
        count: how many to mark, 0 ≤ count ≤ n.

    Returns:
        Bool (rows, n) with exactly ``count`` True per row; the lower index wins a tie.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_smallest(scores, count)
    chosen = scores <= threshold
    if count_true(chosen) > count * scores.shape[0]:
        _drop_late_ties(chosen, scores, threshold, count)
    return chosen


def smallest_transposed(scores: Tensor, count: int, out: Tensor | None = None) -> Tensor:
    """Mark the ``count`` smallest of all scores (columns, rows), ties by row, then column.

    Args:
        scores: (columns, rows), finite.
        count: how many to mark.
        out: (columns, rows), what to mark them in by 1 and 0 rather than in a new bool tensor; to
            compare into floats is several times as fast as into bools.
    """
    out = torch.empty_like(scores, dtype=torch.bool) if out is None else out
    if count == 0:
        return out.zero_()
    torch.le(scores, _kth_of_all(scores, count), out=out)
    if _marked(out) == count:
        return out
    columns, rows = scores.shape
    return out.copy_(smallest(scores.t().reshape(1, -1), count).reshape(rows, columns).t())


def at_most_threshold(scores: Tensor, sparsity: float, out: Tensor | None = None) -> Tensor:
    """Mark every score that is at most ``sorted[int(n·s)]``, as the published scripts do.

    Args:
        scores: any shape, n entries, finite.
        sparsity: in [0, 1].
        out: of the same shape, what to mark them in; see :func:`smallest_transposed`.

    Returns:
        Bool, the shape of ``scores``, or ``out``: at least int(n·s) + 1 are marked, or all of them.
    """
    out = torch.empty_like(scores, dtype=torch.bool) if out is None else out
    entries = scores.numel()
    rank = min(int(entries * sparsity) + 1, entries)
    return torch.le(scores, _kth_of_all(scores, rank), out=out)


def _marked(out: Tensor) -> int:
    """Return how many entries are marked in (rows, n) bools, or in floats by 1 and 0."""
    if out.dtype == torch.bool:
        return count_true(out)
    in_rows = out.sum(dim=-1).cpu()  # exact, and fifty times as fast as count_nonzero
    return int(in_rows.sum(dtype=torch.float64))


def _kth_smallest(scores: Tensor, count: int) -> Tensor:
    """Return the ``count``-th smallest score of each row, (rows, 1)."""
    if scores.shape[0] == 1:
        return _kth_of_all(scores, count).reshape(1, 1)
    if scores.device.type != "cpu":
        return scores.kthvalue(count, dim=-1, keepdim=True).values
    # numpy selects with vector instructions, several times faster than torch on the CPU.
    ordered = np.partition(scores.numpy(), count - 1, axis=-1)
    return torch.from_numpy(ordered[..., count - 1 : count].copy())  # lets the others go


def _kth_of_all(scores: Tensor, count: int) -> Tensor:
    """Return the ``count``-th smallest of all scores, a scalar."""
    if scores.device.type != "cpu":
        return scores.reshape(-1).kthvalue(count).values
    return torch.tensor(kth_smallest(scores.reshape(-1).numpy(), count), dtype=scores.dtype)


def _drop_late_ties(chosen: Tensor, scores: Tensor, threshold: Tensor, count: int) -> None:
    """Unmark, in place, the last entries at the threshold, where a row has more than the count.

    From the end and in pieces: weights in half precision tie by the thousand, and copies of a
    whole matrix would be most of a prune's memory.
    """
    surplus = _true_in_rows(chosen) - count
    rows = surplus.nonzero().squeeze(-1)
    end = scores.shape[1]
    while rows.numel():
        part = slice(max(end - max(PIECE // rows.numel(), 1), 0), end)
        tied = scores[rows, part] == threshold[rows]
        found, left = _true_in_rows(tied), surplus[rows]
        within = found > left  # where the first of those that go is in this piece
        if bool(within.any()):
            later = tied[within].flip(-1).cumsum(dim=-1, dtype=torch.int32).flip(-1)
            tied[within] &= later <= left[within, None]
        chosen[rows, part] ^= tied
        surplus[rows] = left - torch.minimum(found, left)
        rows, end = rows[found < left], part.start


def _true_in_rows(mask: Tensor) -> Tensor:
    """Return how many entries of each row are True, (rows,)."""
    if mask.device.type != "cpu":
        return mask.sum(dim=-1)
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=-1))  # torch widens all of it first


def smallest_of_groups(scores: Tensor, pattern: tuple[int, int]) -> Tensor:
    """Mark the n smallest scores of every m consecutive ones of each row.

    Args:
        scores: (rows, columns), finite.
        pattern: (n, m).

    Returns:
        Bool (rows, columns); the lower index wins a tie. Where m does not divide the columns, the
        last group of r loses min(n, r).
    """
    n, m = pattern
    rows, columns = scores.shape
    whole = columns - columns % m
    chosen = torch.empty_like(scores, dtype=torch.bool)
    members = scores[:, :whole].reshape(-1, m).t().contiguous()  # (m, groups)
    chosen[:, :whole] = smallest_members(members, n).t().reshape(rows, whole)
    if whole < columns:
        chosen[:, whole:] = smallest(scores[:, whole:], min(n, columns - whole))
    return chosen


def smallest_members(members: Tensor, count: int, out: Tensor | None = None) -> Tensor:
    """Mark the ``count`` smallest members of each group.

    In the small groups of hardware patterns the threshold comes from comparing whole members, which
    is many times faster than sorting millions of tiny groups.

    Args:
        members: (m, groups), finite.
        count: how many to mark of each group.
        out: (m, groups), what to mark them in; see :func:`smallest_transposed`.

    Returns:
        Bool (m, groups), or ``out``; the lower index wins a tie.
    """
    size = members.shape[0]
    out = torch.empty_like(members, dtype=torch.bool) if out is None else out
    if size > COMPARED:
        return out.copy_(smallest(members.t().contiguous(), count).t())
    if members.device.type == "cpu":  # elsewhere, asking for ties would wait for the device
        torch.le(members, _kth_member(members, count), out=out)
        if _marked(out) == count * members.shape[1]:
            return out
    return out.copy_(_ranks(members) < count)


def _kth_member(members: Tensor, count: int) -> Tensor:
    """Return the ``count``-th smallest member of each group, (groups,), by insertion."""
    lowest: list[Tensor] = []
    for rest in members.unbind():
        full = len(lowest) == count
        for place, held in enumerate(lowest):
            lowest[place] = torch.minimum(held, rest)
            if not full or place + 1 < count:  # what falls out at the end is nobody's
                rest = torch.maximum(held, rest)
        if not full:
            lowest.append(rest)
    return lowest[-1]


def _ranks(members: Tensor) -> Tensor:
    """Return each member's rank in its group, int8 (m, groups), the lower index first in a tie."""
    ranks = torch.zeros_like(members, dtype=torch.int8)
    for later in range(1, members.shape[0]):
        loses = members[:later] <= members[later]  # (later, groups): the earlier index goes first
        ranks[later] += loses.view(torch.int8).sum(dim=0, dtype=torch.int8)
        ranks[:later] += loses.logical_not_().view(torch.int8)
    return ranks
