"""Wanda: prune each output's least |weight| × ‖input‖ (Sun et al., 2306.11695).

https://arxiv.org/abs/2306.11695
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from prufed_plugins.entries import clear
from prufed_plugins.pruners.hessian import InputNorms
from prufed_plugins.pruners.matrices import Choice
from prufed_plugins.pruners.selection import pruned_count, smallest, smallest_of_groups
from prufed_plugins.pruners.sequential import ElementPruner

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import PruneTarget
    from prufed_plugins.params import Threshold
    from prufed_plugins.pruners.collecting import Observed

SAMPLED: Final = 128
"""Tokens on whose outputs the error is measured: some per cent of noise, for some per cent of the
work."""


class Wanda(ElementPruner[InputNorms]):
    """Score S_uv = |W_uv|·‖X_v‖₂; every output row loses its ⌊s·k⌋ smallest, or n of every m.

    The published code counts int(s·k) in floating point, 28 of 100 at s = 0.29, and so does
    ``threshold: reference``; it sorts stably, hence there is no other difference.
    """

    def choose(
        self,
        weight: Tensor,
        observed: Observed[InputNorms] | None,
        target: PruneTarget,
        forced: Tensor | None,
    ) -> Choice:
        """Return what goes of one matrix; see :func:`choose`."""
        assert observed is not None
        return choose(weight, observed.statistic, target, self._params.threshold, forced)

    def new_statistic(self, columns: int, device: torch.device) -> InputNorms:
        """Return the norms of no inputs yet."""
        return InputNorms(columns, device, SAMPLED)

    def statistic_bytes(self, columns: int) -> int:
        """Return the size of the norms and of the sampled inputs."""
        return 4 * columns * (1 + SAMPLED)


def choose(
    weight: Tensor,
    norms: InputNorms,
    target: PruneTarget,
    threshold: Threshold = "exact",
    forced: Tensor | None = None,
) -> Choice:
    """Choose what to prune; the kept weights stay as they are.

    The error in the report is that of the outputs of the sampled inputs.

    Args:
        weight: float32 (rows, columns).
        norms: of the matrix's inputs.
        target: sparsity or pattern.
        threshold: how ⌊s·k⌋ is counted.
        forced: bool (rows, columns), entries that must go and are counted.
    """
    moments = norms.second_moments()
    scores = weight.abs().mul_(moments.sqrt())
    if forced is not None:
        scores.masked_fill_(forced, -1.0)
    columns = weight.shape[1]
    if target.pattern is not None:
        pruned = smallest_of_groups(scores, target.pattern)
    elif threshold == "reference":
        pruned = smallest(scores, int(columns * (target.sparsity or 0.0)))
    else:
        pruned = smallest(scores, pruned_count(target.sparsity or 0.0, columns))
    if forced is not None:
        pruned |= forced  # where there are more of them than the target asks for
    energy = _mean_square(norms.sample, weight)
    change = scores.copy_(weight)
    clear(change, pruned)
    return Choice(
        pruned,
        squared_error=_mean_square(norms.sample, change),
        energy=energy,
        report={"dead_channels": float((moments == 0).sum())},
    )


def _mean_square(inputs: Tensor, weight: Tensor) -> float | None:
    """Return the mean over inputs x (tokens, columns) of ‖Wx‖²; None where there are none."""
    if not len(inputs):
        return None
    norm = torch.linalg.vector_norm(inputs @ weight.t())
    return float(norm) ** 2 / len(inputs)
