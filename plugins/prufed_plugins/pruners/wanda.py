"""Wanda: prune each output's least |weight| × ‖input‖ (Sun et al., 2306.11695).

https://arxiv.org/abs/2306.11695
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prufed_plugins.entries import clear
from prufed_plugins.pruners.hessian import InputNorms
from prufed_plugins.pruners.matrices import Choice
from prufed_plugins.pruners.selection import pruned_count, smallest, smallest_of_groups
from prufed_plugins.pruners.sequential import ElementPruner

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import PruneTarget
    from prufed_plugins.params import Threshold, WandaParams
    from prufed_plugins.pruners.collecting import Observed


class Wanda(ElementPruner[InputNorms]):
    """Score S_uv = |W_uv|·‖X_v‖₂; every output row loses its ⌊s·k⌋ smallest, or n of every m.

    The published code counts int(s·k) in floating point, 28 of 100 at s = 0.29, and so does
    ``threshold: reference``; it sorts stably, hence there is no other difference.
    """

    def __init__(self, params: WandaParams) -> None:
        def choose_matrix(
            weight: Tensor,
            observed: Observed[InputNorms] | None,
            target: PruneTarget,
            forced: Tensor | None,
        ) -> Choice:
            # what a smaller sparsity removes, a larger one does too: nothing has to be forced
            assert observed is not None
            return choose(weight, observed.statistic, target, params.threshold)

        super().__init__(params, choose_matrix, InputNorms)


def choose(
    weight: Tensor, norms: InputNorms, target: PruneTarget, threshold: Threshold = "exact"
) -> Choice:
    """Choose what to prune; the kept weights stay as they are.

    ``uncorrelated_error`` in the report is ‖(W − W')X‖²/‖WX‖² as it would be were the inputs
    uncorrelated. Their correlations, which the error itself takes, are not collected.

    Args:
        weight: float32 (rows, columns).
        norms: of the matrix's inputs.
        target: sparsity or pattern.
        threshold: how ⌊s·k⌋ is counted.
    """
    moments = norms.second_moments()
    scores = weight.abs().mul_(moments.sqrt())
    columns = weight.shape[1]
    if target.pattern is not None:
        pruned = smallest_of_groups(scores, target.pattern)
    elif threshold == "reference":
        pruned = smallest(scores, int(columns * (target.sparsity or 0.0)))
    else:
        pruned = smallest(scores, pruned_count(target.sparsity or 0.0, columns))
    energies = scores.square_()
    total = float(energies.sum())
    clear(energies, pruned)
    lost = float(energies.sum())
    return Choice(
        pruned,
        report={
            "dead_channels": float((moments == 0).sum()),
            "uncorrelated_error": lost / total if total else 0.0,
        },
    )
