"""Wanda: prune each output's least |weight| × ‖input‖ (Sun et al., 2306.11695).

https://arxiv.org/abs/2306.11695
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from prufed_plugins.pruners.hessian import InputNorms
from prufed_plugins.pruners.selection import pruned_count, smallest, smallest_of_groups
from prufed_plugins.pruners.sequential import CalibratedPruner, Choice

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import PruneTarget
    from prufed_plugins.params import WandaParams


class Wanda(CalibratedPruner[InputNorms]):
    """Score S_uv = |W_uv|·‖X_v‖₂; every output row loses its ⌊s·k⌋ smallest, or n of every m."""

    result: Literal["masked"] = "masked"
    needs_calibration = True

    def __init__(self, params: WandaParams) -> None:
        super().__init__(InputNorms, choose)


def choose(weight: Tensor, norms: InputNorms, target: PruneTarget) -> Choice:
    """Choose what to prune; the kept weights stay as they are.

    Args:
        weight: float32 (rows, columns).
        norms: of the matrix's inputs.
        target: sparsity or pattern.
    """
    moments = norms.second_moments()
    scores = weight.abs() * moments.sqrt()
    if target.pattern is not None:
        pruned = smallest_of_groups(scores, target.pattern)
    else:
        pruned = smallest(scores, pruned_count(target.sparsity or 0.0, weight.shape[1]))
    return Choice(
        pruned,
        report={
            "dead_channels": float((moments == 0).sum()),
            "loss": float((weight.square() * moments)[pruned].sum()),
        },
    )
