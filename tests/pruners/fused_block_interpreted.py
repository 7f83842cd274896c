"""Compares the kernel, as Triton's interpreter runs it on the CPU, with the steps in torch.

python fused_block_interpreted.py     with TRITON_INTERPRET=1; prints one JSON line per case
"""

from __future__ import annotations

import json

import torch

from prufed_plugins.api import PruneTarget
from prufed_plugins.pruners.fused_block import prune_columns
from prufed_plugins.pruners.sparsegpt import _Block, _prune_block, _Rule

CPU = torch.device("cpu")


def compare(width: int, rows: int, target: PruneTarget, *, marked: bool = False) -> None:
    """Prune one random block both ways."""
    torch.manual_seed(width + rows)
    weight = torch.randn(width, rows)
    weight[:, 0] = 1.0  # every score of a row a tie, but for the factor's diagonal
    inverse = (torch.randn(width, width) * 0.1).triu(1) + torch.eye(width) * 2.0
    free = (torch.rand(width, 1) < 0.2) if marked else None
    forced = (torch.rand(width, rows) < 0.3) if marked else None
    rule = _Rule(target, "exact", free, forced)
    block = _Block.make(width, rows, target.pattern, CPU)
    block.current.copy_(weight)
    pruned = torch.empty(width, rows, dtype=torch.bool)
    _prune_block(block, inverse, rule, pruned)
    current, removed = weight.clone(), torch.full_like(weight, float("nan"))
    gone = torch.full_like(weight, float("nan")) if target.pattern else pruned.float()
    squares = inverse.diagonal()[:, None].square()
    prune_columns(current, gone, removed, block.pushes, squares, target.pattern, free, forced)
    print(
        json.dumps(
            {
                "agreement": float((gone.bool() == pruned).float().mean()),
                "current": float((current - removed - block.current).abs().max()),
                "removed": float((removed - block.removed).abs().max()),
            }
        )
    )


if __name__ == "__main__":
    compare(128, 21, PruneTarget(sparsity=0.5))
    compare(100, 33, PruneTarget(sparsity=0.3))
    compare(128, 21, PruneTarget(pattern=(2, 4)))
    compare(126, 17, PruneTarget(pattern=(4, 8)))  # the last group is not whole
    compare(12, 40, PruneTarget(pattern=(3, 5)), marked=True)
    compare(64, 21, PruneTarget(pattern=(1, 4)), marked=True)  # more is forced than would go
