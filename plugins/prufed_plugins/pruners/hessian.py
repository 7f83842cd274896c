"""What a linear layer's inputs tell a pruner: their second moments, accumulated over batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch

from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PANELS: Final = 8
"""Column panels of the upper triangle: 8 save 44 % of the full product's work."""

LARGEST_DAMPING: Final = 1.0


class InputNorms:
    """‖X_v‖₂ of every input channel v, as Wanda uses it (2306.11695, eq. 1).

    Attributes:
        columns: number of input channels.
        tokens: tokens seen so far.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.columns = columns
        self.tokens = 0
        self._squares = torch.zeros(columns, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add the inputs (tokens, columns) of one batch."""
        self._squares += inputs.float().square().sum(dim=0)
        self.tokens += inputs.shape[0]

    def second_moments(self) -> Tensor:
        """Return the mean of x_v² over tokens, (columns,)."""
        return self._squares / self.tokens


class InputHessian:
    """H = 2·XXᵀ/n of the inputs of one or more matrices, and its factor (2301.00774, §3).

    Only the blocks on and above the diagonal are accumulated. The factor is computed once, however
    many matrices share the input.

    Attributes:
        columns: number of input channels.
        tokens: tokens seen so far.
        damping: share of the mean diagonal added to it before factoring; the first one tried.
    """

    def __init__(self, columns: int, device: torch.device, damping: float = 0.01) -> None:
        self.columns = columns
        self.tokens = 0
        self.damping = damping
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add the inputs (tokens, columns) of one batch."""
        x = inputs.float()
        for start, end in _panels(self.columns):
            self._sum[start:end, start:].addmm_(x[:, start:end].t(), x[:, start:])
        self.tokens += x.shape[0]

    def second_moments(self) -> Tensor:
        """Return the mean of x_v² over tokens, (columns,)."""
        return self._sum.diagonal() / self.tokens

    def matrix(self) -> Tensor:
        """Return H, (columns, columns), symmetric and undamped."""
        hessian = self._sum * (2.0 / self.tokens)
        for start, end in _panels(self.columns):
            hessian[end:, start:end] = hessian[start:end, end:].t()
        return hessian

    @cached_property
    def factor(self) -> Factor:
        """The damped H as R·Rᵀ; the accumulated sum is released.

        Raises:
            MethodError: H is not positive definite even with a damping of 1.
        """
        reversed_ = self._sum.mul_(2.0 / self.tokens).flip(0, 1)
        del self._sum
        return _factorize_reversed(reversed_, self.damping)


@dataclass(frozen=True)
class Factor:
    """R upper triangular with H + λI = R·Rᵀ, so that R⁻¹ is the Cholesky factor U of H⁻¹.

    Attributes:
        upper: R, (columns, columns).
        dead: bool (columns,): channels that were zero on every token; H_jj is 1 there.
        damping: the share of the mean diagonal that was added in the end.
        added: λ, what that share came to.
        retries: how often the damping was raised before the factorization succeeded.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    added: float
    retries: int


def factorize(hessian: Tensor, damping: float) -> Factor:
    """Factor a Hessian as R·Rᵀ with R upper, raising the damping tenfold while that fails.

    R is the reversed Cholesky factor of the reversed matrix, so no inverse is ever formed.

    Args:
        hessian: (columns, columns), symmetric; only the triangle above the diagonal is read.
        damping: share of the mean diagonal to add at first.

    Raises:
        MethodError: not positive definite even with a damping of 1.
    """
    return _factorize_reversed(hessian.flip(0, 1), damping)


def _factorize_reversed(matrix: Tensor, damping: float) -> Factor:
    """Factor a Hessian whose rows and columns come in reverse order; it is overwritten."""
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    scale = float(diagonal.mean())
    added = 0.0
    retries = 0
    while True:
        diagonal += damping * scale - added
        added = damping * scale
        # an upper factor of the transpose: LAPACK takes and gives it without a transposed copy
        upper, failed = torch.linalg.cholesky_ex(matrix.mT, upper=True)
        if not int(failed):
            return Factor(upper.mT.flip(0, 1), dead.flip(0), damping, added, retries)
        if damping >= LARGEST_DAMPING:
            raise MethodError(
                f"the {matrix.shape[0]}×{matrix.shape[0]} Hessian of the calibration inputs is "
                f"not positive definite even with a damping of {damping:g}",
                "calibrate with more text, or use --method wanda, which needs no factorization",
            )
        damping = min(damping * 10, LARGEST_DAMPING)
        retries += 1


def _panels(columns: int) -> Iterator[tuple[int, int]]:
    width = -(-columns // PANELS)
    for start in range(0, columns, width):
        yield start, min(start + width, columns)
