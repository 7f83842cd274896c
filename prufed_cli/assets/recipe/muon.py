"""Muon: momentum whose update is orthogonalised, which a small model learns facts from much faster.

Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by a quintic Newton-Schulz iteration.

    Args:
        matrices: a stack, (n, rows, columns), rows at most columns.
        steps: iterations; after five all singular values lie between about 0.7 and 1.2.
    """
    x: Tensor = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, rows, rows)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon:
    """Updates weight matrices in place; matrices of one shape are orthogonalised together."""

    def __init__(self, parameters: Sequence[Tensor], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.stacks: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            self.stacks[tuple(sorted(parameter.shape))].append(parameter)
        self.velocity = {
            shape: torch.zeros(len(stack), *shape) for shape, stack in self.stacks.items()
        }

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """One update with Nesterov momentum and decoupled weight decay."""
        for shape, stack in self.stacks.items():
            gradient = torch.stack([_wide(p.grad) for p in stack if p.grad is not None])
            velocity = self.velocity[shape].mul_(self.momentum).add_(gradient)
            updates = orthogonalise(gradient + self.momentum * velocity)
            for parameter, update in zip(stack, updates, strict=True):
                tall = parameter.shape[0] > parameter.shape[1]
                scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.mul_(1 - rate * decay).add_(
                    update.mT if tall else update, alpha=-rate * scale
                )
                parameter.grad = None


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
