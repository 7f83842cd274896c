"""How long a pass takes: its operations, counted, at rates measured on this machine just before.

A block's forward pass is timed itself, on a batch. What pruning adds is counted in three units,
each measured for some milliseconds: multiply-adds of a large product, selecting the smaller half of
some entries, and single small operations. The factors below say what the parts of the work come to
in these units; they were fitted to prunes of random Llamas of 100 and 290 M parameters by one and
two threads of an AMD Zen 5. A benchmark, ``tests/benchmarks/test_plan_time.py``, prints what they
foretell beside what prunes take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_SIDE: Final = 512
_ENTRIES: Final = 1 << 20
_STEPS: Final = 200
_WINDOW: Final = 0.05
"""Seconds over which a rate is taken: several time slices of a core that is shared."""

_HESSIAN: Final = 0.56 / 0.7
"""Share of a full product that the panels above the diagonal come to, over their speed."""
_FACTOR: Final = 1 / 6 / 0.36
"""Multiply-adds of a Cholesky factorization per c³, over their speed."""
_SWEEP: Final = (1 / 2 + 1 / 5) / 0.7
"""Multiply-adds per rows·c² that bring changes to later columns, and, of the last matrix, what its
error is relative to, over their speed."""
_BLOCK: Final = 280
"""Multiply-adds per entry inside a block of columns."""
_COLUMN: Final = 16
"""Small operations per column that is pruned."""

# From here on per entry, in selections of one.
_SWEPT: Final = 2
"""To score, select and sweep the entries of a matrix, and to sum up the error."""
_CHOSEN: Final = 2
"""To score the entries of a matrix by its inputs, and select them at once."""
_SMALLEST: Final = 1.5
"""To select the smallest entries of a matrix."""
_MERGED: Final = 2.5
"""To read a matrix in one of the sub-models that are merged, check it and add it."""
_VOTED: Final = 8
"""To count the votes on a matrix and select by them."""
_MATRIX: Final = 2.5
"""To check a matrix, apply what was chosen, and pack its mask."""
_LOGITS: Final = 1
"""To score tokens by their logits."""

# And per byte.
_WRITTEN: Final = 1
"""To read a block and write it."""
_PUBLISHED: Final = 1.6
"""To put a sub-model together, write it and hash it."""
_START: Final = 0.05
"""Seconds that a block takes however small it is."""


@dataclass(frozen=True)
class Rates:
    """How fast this machine is now, with what else runs on it.

    Attributes:
        product: seconds of one multiply-add of a large float32 product.
        entry: seconds to select among many entries, per entry, on one thread, as most of what goes
            over the entries of a matrix runs on one.
        step: seconds of one operation on a few entries.
    """

    product: float
    entry: float
    step: float


@dataclass(frozen=True)
class BlockWork:
    """What one decoder block asks for.

    Attributes:
        shapes: (rows, columns) of the matrices to prune.
        width: bytes that an entry is stored in.
        inputs: columns of every distinct input of them.
        tokens: calibration tokens.
        forward: seconds in which all of them go through the block once.
        passes: how often they do; a pass that only looks at inputs ends before the last matrices.
        hessians: whether a Hessian of each input is gathered and factored, and its columns swept.
        targets: how many sub-models are made of it.
        merged: how many sub-models it is merged from.
    """

    shapes: Sequence[tuple[int, int]]
    width: int
    inputs: Sequence[int]
    tokens: int
    forward: float
    passes: float
    hessians: bool
    targets: int
    merged: int = 0


def measure_rates(device: torch.device) -> Rates:
    """Return the rates of a device; takes a fifth of a second."""
    import torch

    from prufed_plugins.products import product
    from prufed_plugins.pruners.selection import smallest
    from prufed_plugins.threads import one_thread

    square = torch.ones(_SIDE, _SIDE, device=device)
    entries = torch.rand(1, _ENTRIES, device=device)
    few = torch.ones(64, device=device)
    scaled = few.clone()

    def multiply() -> None:
        product(square, square)

    def select() -> None:
        with one_thread():
            smallest(entries, _ENTRIES // 2)

    def step() -> None:
        for _ in range(_STEPS):
            torch.mul(few, few, out=scaled)

    for work in (multiply, select, step):
        work()
    return Rates(
        seconds_of(multiply, device) / _SIDE**3,
        seconds_of(select, device) / _ENTRIES,
        seconds_of(step, device) / _STEPS,
    )


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the mean seconds of some work over some hundredths of a second.

    The mean, not the least: where other processes want the cores, the pass will feel it as well.
    The caller has run it once, for what only the first run takes.
    """
    import torch

    runs, taken = 0, 0.0
    started = time.perf_counter()
    while taken < _WINDOW:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        runs += 1
        taken = time.perf_counter() - started
    return taken / runs


def block_seconds(work: BlockWork, rates: Rates) -> float:
    """Return how long one block takes to calibrate, prune and write."""
    seconds = _START + work.passes * work.forward
    choosing = _SWEPT if work.hessians else _CHOSEN if work.passes else _SMALLEST
    if work.merged:
        choosing = _VOTED + work.merged * _MERGED
    for rows, columns in work.shapes:
        entries = rows * columns
        each = _MATRIX + choosing + _WRITTEN * work.width
        seconds += work.targets * entries * each * rates.entry
        if work.hessians:
            once = entries * (_SWEEP * columns + _BLOCK) * rates.product
            seconds += work.targets * (once + columns * _COLUMN * rates.step)
    if work.hessians:
        squares = ((columns, columns**2) for columns in work.inputs)
        products = sum((_HESSIAN * work.tokens + _FACTOR * c) * square for c, square in squares)
        seconds += products * rates.product
    return seconds


def publish_seconds(size: int, rates: Rates) -> float:
    """Return how long a sub-model of so many bytes takes to be put together and published."""
    return size * _PUBLISHED * rates.entry


def head_seconds(vocabulary: int, hidden: int, rates: Rates) -> float:
    """Return how long the output head takes to score a token."""
    return vocabulary * (hidden * rates.product + _LOGITS * rates.entry)
