"""What a linear layer's inputs tell a pruner: their second moments, accumulated over batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch

from prufed_plugins.errors import MethodError
from prufed_plugins.products import add_product, pieces, product

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PANEL: Final = 512
"""Rows of H that are accumulated at once, from the diagonal on: with 4096 columns that saves 44 %
of the full product's work."""

ADDED: Final = 1024
"""Tokens that are accumulated at once on a CPU, transposed first."""

LARGEST_DAMPING: Final = 1.0

WIDE: Final = 512
"""Columns that a product updates: enough for full speed, and few of them below the diagonal."""

LEAF: Final = 256
"""Columns that are factored as one, by LAPACK."""

LONGEST: Final = 1024
"""Finished columns that are taken into one product, and copied for it."""


class InputNorms:
    """‖X_v‖₂ of every input channel v, as Wanda uses it (2306.11695, eq. 1).

    Attributes:
        columns: number of input channels.
        tokens: tokens seen so far.
        sample: the inputs of a few of them, each as likely as any other, (at most ``sampled``,
            columns).
    """

    def __init__(self, columns: int, device: torch.device, sampled: int = 0) -> None:
        self.columns = columns
        self.tokens = 0
        self.sample = torch.empty(0, columns, dtype=torch.float32, device=device)
        self._sampled = sampled
        self._random = torch.Generator().manual_seed(0)
        self._keys = torch.empty(0)  # of the sampled tokens: the least of all
        self._squares = torch.zeros(columns, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor, sequences: int = 1) -> None:
        """Add the inputs (tokens, columns) of one batch, of however many sequences."""
        x = inputs.float()
        self._squares += x.square().sum(dim=0)
        self.tokens += x.shape[0]
        if self._sampled:
            self._draw(x)

    def _draw(self, x: Tensor) -> None:
        """Let every token of a batch have a random key, and keep those with the least of all."""
        keys = torch.cat((self._keys, torch.rand(x.shape[0], generator=self._random)))
        least = keys.topk(min(self._sampled, len(keys)), largest=False).indices.sort().values
        held = len(self._keys)
        stay, come = least[least < held].to(x.device), (least[least >= held] - held).to(x.device)
        self.sample = torch.cat((self.sample[stay], x[come]))
        self._keys = keys[least]

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
        sequences: sequences that they were of.
        damping: share of the mean diagonal added to it before factoring; the first one tried.
    """

    def __init__(self, columns: int, device: torch.device, damping: float = 0.01) -> None:
        self.columns = columns
        self.tokens = 0
        self.sequences = 0
        self.damping = damping
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor, sequences: int = 1) -> None:
        """Add the inputs (tokens, columns) of one batch of sequences."""
        if inputs.device.type == "cpu":
            for some in torch.split(inputs, ADDED):
                self._add_transposed(some.t().contiguous().float())
        else:  # a few large products, which keep a device busy
            x = inputs.float()
            for panel in pieces(0, self.columns, PANEL):
                self._sum[panel, panel.start :].addmm_(x[:, panel].t(), x[:, panel.start :])
        self.tokens += inputs.shape[0]
        self.sequences += sequences

    def _add_transposed(self, x: Tensor) -> None:
        """Add inputs (columns, tokens): in this layout, panels of columns are contiguous."""
        for panel in pieces(0, self.columns, PANEL):
            for part in pieces(panel.start, self.columns):
                add_product(self._sum[panel, part], x[panel], x[part].t())

    def second_moments(self) -> Tensor:
        """Return the mean of x_v² over tokens, (columns,)."""
        return self._sum.diagonal() / self.tokens

    @cached_property
    def factor(self) -> Factor:
        """The damped H as R·Rᵀ, in the memory of the accumulated sum.

        Raises:
            MethodError: H is not positive definite even with a damping of 1.
        """
        hessian = self._sum.mul_(2.0 / self.tokens)
        del self._sum
        return factorize(hessian, self.damping, silent=self.sequences / self.tokens)


@dataclass(frozen=True)
class Factor:
    """R upper triangular with H + λI = R·Rᵀ, so that R⁻¹ is the Cholesky factor U of H⁻¹.

    Attributes:
        upper: R, (columns, columns); the entries below the diagonal are not part of it.
        dead: bool (columns,): channels that were zero on every token.
        damping: the share of the mean diagonal that was added in the end.
        added: λ, what that share came to.
        retries: how often the damping was raised before the factorization succeeded.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    added: float
    retries: int

    def energy(self, weight: Tensor) -> float:
        """Return ½·tr(W·H·Wᵀ) of a weight W (rows, columns), H undamped: the mean of ‖Wx‖²."""
        alive = weight.masked_fill(self.dead, 0.0) if bool(self.dead.any()) else weight
        total = 0.0
        for panel in _backwards(0, weight.shape[1], WIDE):
            image = product(alive[:, panel], self.upper[panel, panel].triu())
            add_product(image, alive[:, : panel.start], self.upper[: panel.start, panel])
            total += float(torch.linalg.vector_norm(image)) ** 2
        damped = self.added * float(torch.linalg.vector_norm(alive)) ** 2
        return max(total - damped, 0.0) / 2


def factorize(hessian: Tensor, damping: float, *, silent: float = 1.0) -> Factor:
    """Factor a Hessian as R·Rᵀ with R upper, raising the damping tenfold while that fails.

    The published code sums 2·xxᵀ over tokens, divides by the number of sequences, and sets H_jj of
    a silent channel to 1, which then counts in the mean diagonal. Here the sum is divided by the
    number of tokens; the same 1 is then the number of sequences over that of tokens.

    Args:
        hessian: (columns, columns), symmetric; only the triangle above the diagonal is read. It is
            overwritten: with R above the diagonal, and below with itself, for the next attempt.
        damping: share of the mean diagonal to add at first.
        silent: H_jj of channels that were silent.

    Raises:
        MethodError: not positive definite even with a damping of 1.
    """
    _mirror(hessian)
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    diagonal[dead] = silent
    scale = float(diagonal.mean())
    retries = 0
    while True:
        added = damping * scale
        hessian.diagonal().copy_(diagonal + added)
        if _eliminate(hessian, 0, hessian.shape[0]):
            return Factor(hessian, dead, damping, added, retries)
        if damping >= LARGEST_DAMPING:
            raise MethodError(
                f"the {hessian.shape[0]}×{hessian.shape[0]} Hessian of the calibration inputs is "
                f"not positive definite even with a damping of {damping:g}",
                "calibrate with more text, or use --method wanda, which needs no factorization",
            )
        damping = min(float(f"{damping * 10:.12g}"), LARGEST_DAMPING)
        retries += 1
        _mirror(hessian.t())


def _eliminate(matrix: Tensor, start: int, stop: int) -> bool:
    """Overwrite the upper triangle of a symmetric matrix with R, where matrix = R·Rᵀ.

    The Cholesky factorization from the last columns to the first, of those from ``start`` to
    ``stop``: the later half of them is factored, what it accounts for is subtracted from the other
    half, and that is factored. So nearly all of the work is large products.

    Returns:
        Whether the matrix is positive definite; if not, its upper triangle is spoilt.
    """
    if stop - start <= LEAF:
        return _eliminate_leaf(matrix, slice(start, stop))
    leaves = -(-(stop - start) // LEAF)
    middle = stop - (1 << (leaves - 1).bit_length() - 1) * LEAF
    if not _eliminate(matrix, middle, stop):
        return False
    for finished in pieces(middle, stop, LONGEST):
        rows = matrix[:middle, finished].contiguous()
        for panel in pieces(start, middle, WIDE):
            transposed = rows[panel].t()
            add_product(matrix[: panel.start, panel], rows[: panel.start], transposed, sign=-1)
            matrix[panel, panel].sub_(product(rows[panel], transposed).triu())
    return _eliminate(matrix, start, middle)


def _eliminate_leaf(matrix: Tensor, part: slice) -> bool:
    corner = matrix[part, part]
    lower, failed = torch.linalg.cholesky_ex(corner.flip(0, 1))
    if int(failed):
        return False
    corner.copy_(lower.flip(0, 1) + corner.tril(-1))
    above = matrix[: part.start, part]
    above.copy_(product(above, inverse_of_upper(corner).t()))
    return True


def inverse_of_upper(upper: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix; what lies below is not read."""
    identity = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse


def _backwards(start: int, stop: int, width: int) -> Iterator[slice]:
    """Cut a range from its end into slices of ``width``, the first of them the remainder."""
    for end in range(stop, start, -width):
        yield slice(max(end - width, start), end)


def _mirror(matrix: Tensor) -> None:
    """Copy the upper triangle onto the lower one, in place."""
    for part in _backwards(0, matrix.shape[0], WIDE):
        matrix[part.stop :, part] = matrix[part, part.stop :].t()
        corner = matrix[part, part]
        corner.copy_(corner.triu() + corner.triu(1).t())
