"""Time our SparseGPT and the plainly written one on one matrix, factorization included.

    python time_sparsegpt.py ROWS COLUMNS THREADS TARGET

TARGET is a sparsity or n:m. Prints one JSON object: wall and CPU seconds of each, and how far their
masks agree. It runs in a process of its own, since the number of threads has to be set before the
first product.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from plain_sparsegpt import plain_sparsegpt
from torch import Tensor

from prufed_plugins.api import PruneTarget
from prufed_plugins.pruners.hessian import factorize
from prufed_plugins.pruners.sparsegpt import choose


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return a weight (rows, columns) and a correlated, well-conditioned Hessian of its inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(columns // 4, columns, generator=generator)
    hessian = inputs.t() @ inputs / (columns // 4) + 2.0 * torch.eye(columns)
    return 0.02 * torch.randn(rows, columns, generator=generator), hessian


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return a result, its wall seconds and its CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def compare(rows: int, columns: int, target: PruneTarget) -> dict[str, float]:
    """Time both on the same problem: ours four times, as the other one takes that much longer.

    What else the machine does then meets both for about as long; of ours, the mean counts.
    """
    weight, hessian = problem(rows, columns)

    def prune() -> tuple[Any, float, float]:
        taken = hessian.clone()
        return timed(lambda: choose(weight, factorize(taken, 0.01), target))

    runs = [prune()[1:] for _ in range(2)]
    (_, pruned), plain_wall, plain_cpu = timed(
        lambda: plain_sparsegpt(weight, hessian, target.sparsity or 0.0, target.pattern)
    )
    ours, *spent = prune()
    runs += [tuple(spent), prune()[1:]]
    return {
        "wall": sum(wall for wall, _ in runs) / len(runs),
        "cpu": sum(cpu for _, cpu in runs) / len(runs),
        "plain_wall": plain_wall,
        "plain_cpu": plain_cpu,
        "agreement": float((ours.pruned == pruned).float().mean()),
    }


def parse(target: str) -> PruneTarget:
    """Return the target that ``0.5`` or ``2:4`` names."""
    if ":" not in target:
        return PruneTarget(sparsity=float(target))
    n, m = target.split(":")
    return PruneTarget(pattern=(int(n), int(m)))


def main(rows: int, columns: int, threads: int, target: PruneTarget) -> None:
    """Warm up on a small problem, then print the comparison."""
    torch.set_num_threads(threads)
    compare(256, 256, target)
    print(json.dumps(compare(rows, columns, target)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), parse(sys.argv[4]))
