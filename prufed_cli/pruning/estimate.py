"""How long a pass takes: its operations, counted, at rates measured on this machine just before.

A block's forward pass is timed itself, on a batch. What pruning adds is counted in three units,
each measured for some milliseconds: multiply-adds of a large product, passes over the entries of an
array, and single small operations. The factors below say how far the parts of the work fall short
of those rates; they were fitted to the times that the parts take on one thread. A benchmark,
``tests/benchmarks/test_plan_time.py``, prints what they foretell beside what prunes take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

_SIDE: Final = 512
_ENTRIES: Final = 1 << 22
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
_COLUMN: Final = 25
"""Small operations per column that is pruned."""
_SWEPT: Final = 24
"""Passes over a matrix to score, select and sweep its entries, and to sum up the error."""
_CHOSEN: Final = 11
"""Passes over a matrix to score its entries by its inputs, and select them at once."""
_SMALLEST: Final = 2
"""Passes over a matrix to select its smallest entries."""
_MERGED: Final = 4
"""Passes over a matrix to read it in one of the sub-models that are merged, check it and add it."""
_VOTED: Final = 12
"""Passes over a matrix to count votes and select by them."""
_MATRIX: Final = 8
"""Passes over a matrix to read, check, apply, pack and write it."""
_PUBLISHED: Final = 7
"""Passes over a sub-model to put it together, write it and hash it."""
_LOGITS: Final = 4
"""Passes over the logits to score tokens by them."""
_START: Final = 0.05
"""Seconds that a block takes however small it is."""


@dataclass(frozen=True)
class Rates:
    """How fast this machine is now, with what else runs on it.

    Attributes:
        product: seconds of one multiply-add of a large float32 product.
        entry: seconds to read one float32 entry and write it to new memory.
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
        inputs: columns of every distinct input of them.
        tokens: calibration tokens.
        forward: seconds in which all of them go through the block once.
        passes: how often they do; a pass that only looks at inputs ends before the last matrices.
        hessians: whether a Hessian of each input is gathered and factored, and its columns swept.
        targets: how many sub-models are made of it.
        merged: how many sub-models it is merged from.
    """

    shapes: Sequence[tuple[int, int]]
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

    square = torch.ones(_SIDE, _SIDE, device=device)
    array = torch.ones(_ENTRIES, device=device)
    few = torch.ones(64, device=device)
    scaled = few.clone()

    def multiply() -> None:
        product(square, square)

    def copy() -> None:
        array.clone()  # into new memory, as nearly every pass over a matrix does

    def step() -> None:
        for _ in range(_STEPS):
            torch.mul(few, few, out=scaled)

    for work in (multiply, copy, step):
        work()
    return Rates(
        seconds_of(multiply, device) / _SIDE**3,
        seconds_of(copy, device) / _ENTRIES,
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
        seconds += work.targets * entries * (_MATRIX + choosing) * rates.entry
        if work.hessians:
            once = entries * (_SWEEP * columns + _BLOCK) * rates.product
            seconds += work.targets * (once + columns * _COLUMN * rates.step)
    if work.hessians:
        squares = ((columns, columns**2) for columns in work.inputs)
        products = sum((_HESSIAN * work.tokens + _FACTOR * c) * square for c, square in squares)
        seconds += products * rates.product
    return seconds


def publish_seconds(entries: int, rates: Rates) -> float:
    """Return how long a sub-model of so many entries takes to be put together and published."""
    return entries * _PUBLISHED * rates.entry


def head_seconds(vocabulary: int, hidden: int, rates: Rates) -> float:
    """Return how long the output head takes to score a token."""
    return vocabulary * (hidden * rates.product + _LOGITS * rates.entry)
