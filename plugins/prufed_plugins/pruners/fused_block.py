"""SparseGPT's steps inside one block of columns as a single Triton kernel, for CUDA devices.

Column after column in torch is three launches per column, each of which takes longer than its work.
Here a program keeps all columns of a block for some rows in registers, since rows depend on each
other only by the threshold of the whole block, which is found before. Triton comes with the CUDA
builds of torch.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

WIDEST: Final = 256
"""Columns of the widest block that a program can hold."""

ROWS: Final = 16
"""Rows per program: with 128 columns, 16 values of each array per thread."""

_COST_FREE: Final = 1
_FORCED: Final = 2


def can_fuse(width: int, pattern: tuple[int, int] | None, device: torch.device) -> bool:
    """Return whether blocks of so many columns can be pruned by the kernel on a device."""
    fits = width <= WIDEST and (pattern is None or pattern[1] <= width)
    return fits and device.type == "cuda" and find_spec("triton") is not None


def prune_columns(
    current: Tensor,
    gone: Tensor,
    removed: Tensor,
    pushes: Tensor,
    squares: Tensor,
    pattern: tuple[int, int] | None,
    free: Tensor | None,
    forced: Tensor | None,
) -> None:
    """Prune the columns of a block one by one, pushing each one's error onto the later, in place.

    Args:
        current: float32 (width, rows), the columns with every earlier error pushed onto them; what
            goes is not yet 0 afterwards.
        gone: float32 (width, rows), 1 where an entry goes; filled in where there is a pattern.
        removed: float32 (width, rows), filled in with the values that go.
        pushes: float32 (width, width), at [j, i] what column i pushes onto a later column j.
        squares: float32 (width, 1), U_jj².
        pattern: (n, m), where n of every m columns are selected here.
        free: bool (width, 1), columns whose entries cost nothing.
        forced: bool (width, rows), entries that must go.
    """
    import triton

    width, rows = current.shape
    n, m = pattern or (0, 0)
    special = torch.zeros_like(gone, dtype=torch.uint8)
    if free is not None:
        special.masked_fill_(free, _COST_FREE)
    if forced is not None:
        special.masked_fill_(forced, _FORCED)
    _kernel()[(triton.cdiv(rows, ROWS),)](
        current,
        gone,
        removed,
        pushes.contiguous(),
        squares.contiguous(),
        special,
        rows,
        width,
        n,
        M=m,
        WIDTH=triton.next_power_of_2(width),
        ROWS=ROWS,
    )


@cache
def _kernel() -> Any:
    """Return the kernel, which is compiled when it is first run; Triton is needed here alone."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def prune_rows(  # type: ignore[no-untyped-def]
        current,
        gone,
        removed,
        pushes,
        squares,
        special,
        rows,
        width,
        n,
        M: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        columns = tl.arange(0, WIDTH)[:, None]
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
        place = columns * rows + row
        inside = (columns < width) & (row < rows)
        values = tl.load(current + place, mask=inside, other=0.0)
        going = tl.load(gone + place, mask=inside, other=0.0)
        lost = tl.zeros_like(values)
        for column in range(0, width):
            if M > 0:  # noqa: SIM102  the compiler drops this where M is 0, and must
                if column % M == 0:
                    square = tl.load(squares + columns, mask=columns < width, other=1.0)
                    kind = tl.load(special + place, mask=inside, other=0)
                    scores = values * values / square
                    scores = tl.where(kind == 1, 0.0, scores)
                    scores = tl.where(kind == 2, -1.0, scores)
                    stop = tl.minimum(column + M, width)
                    group = (columns >= column) & (columns < stop)
                    for one in range(column, stop):
                        score = tl.sum(tl.where(columns == one, scores, 0.0), axis=0)[None, :]
                        before = (scores < score) | ((scores == score) & (columns < one))
                        rank = tl.sum(tl.where(group & before, 1, 0), axis=0)[None, :]
                        must = tl.sum(tl.where((columns == one) & (kind == 2), 1, 0), axis=0)
                        goes = tl.where((rank < n) | (must[None, :] > 0), 1.0, 0.0)
                        going = tl.where(columns == one, goes, going)
            own = columns == column
            value = tl.sum(tl.where(own, values * going, 0.0), axis=0)[None, :]
            lost = tl.where(own, value, lost)
            push = tl.load(
                pushes + columns * width + column,
                mask=(columns > column) & (columns < width),
                other=0.0,
            )
            values += push * value
        tl.store(current + place, values, mask=inside)
        tl.store(removed + place, lost, mask=inside)
        tl.store(gone + place, going, mask=inside)

    return prune_rows
