"""One matrix on its way through a pruner: read as (outputs, inputs), decided on, given back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from prufed_plugins.api import PrunedMatrix
from prufed_plugins.entries import clear, count, is_finite
from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

TILE: Final = 64
"""Columns that are transposed and rounded at once, few enough for the cache."""


@dataclass(frozen=True)
class Choice:
    """What a method decided for one matrix.

    Attributes:
        pruned: bool (rows, columns), True where the entry goes.
        weight: new float32 values (rows, columns); None where the kept entries stay as they are.
        squared_error: mean over tokens of ‖(W − W')x‖², where the method knows it.
        energy: mean over tokens of ‖Wx‖², which the error is relative to; likewise.
        report: further numbers for the report.
    """

    pruned: Tensor
    weight: Tensor | None = None
    squared_error: float | None = None
    energy: float | None = None
    report: Mapping[str, float] = field(default_factory=dict)


def as_matrix(module: nn.Module) -> Tensor:
    """Return a linear module's weight as (outputs, inputs), a view.

    GPT-2's ``Conv1D`` keeps its weight as (inputs, outputs).
    """
    return oriented(module, module.get_parameter("weight").detach())


def float_matrix(name: str, module: nn.Module) -> Tensor:
    """Return a linear module's weight as float32 (outputs, inputs).

    Raises:
        MethodError: it holds NaN or infinity.
    """
    matrix = as_matrix(module).float()
    if not is_finite(matrix):
        raise MethodError(
            f"{name}.weight holds NaN or infinity", "load the base again; its checkpoint is damaged"
        )
    return matrix


def absent(name: str, module: nn.Module, masks: Mapping[str, Tensor]) -> Tensor | None:
    """Return which entries of a module's weight an earlier prune removed, bool (rows, columns).

    None where it is not among the masks.
    """
    mask = masks.get(f"{name}.weight")
    if mask is None:
        return None
    return ~oriented(module, mask.to(module.get_parameter("weight").device))


@torch.no_grad()
def apply(
    name: str,
    module: nn.Module,
    choice: Choice,
    dtype: torch.dtype,
    report: Mapping[str, float],
    *,
    in_place: bool,
) -> PrunedMatrix:
    """Return a choice as a pruned matrix in the parameter's own layout and dtype.

    Args:
        name: full name of the module.
        module: the linear module.
        choice: what to prune and what the kept entries become.
        dtype: what the weight will be stored in; it is rounded to it.
        report: numbers for the report besides the sparsity.
        in_place: write into the module, whose own weight is then returned; otherwise it stays.

    Raises:
        MethodError: an updated weight is too large for ``dtype``.
    """
    parameter = module.get_parameter("weight").detach()
    weight = parameter if in_place else parameter.clone()
    matrix = oriented(module, weight)
    kept = ~choice.pruned.contiguous()
    if choice.weight is not None:
        for start in range(0, matrix.shape[1], TILE):
            part = slice(start, start + TILE)
            matrix[:, part] = choice.weight[:, part].contiguous().to(dtype)
    clear(matrix, kept)
    if not is_finite(matrix):
        raise MethodError(
            f"an updated weight of {name} is too large for {dtype}",
            "store the base in float32 or bfloat16",
        )
    return PrunedMatrix(
        name=f"{name}.weight",
        weight=weight,
        mask=oriented(module, kept).contiguous(),
        report={"sparsity": (kept.numel() - count(kept)) / kept.numel(), **report},
    )


def keep(name: str, module: nn.Module, masks: Mapping[str, Tensor], why: str) -> PrunedMatrix:
    """Return a matrix that stays as it is, with the reason in its report.

    Its mask is that of an earlier prune, or full; what that prune removed is zero in the module.
    """
    weight = module.get_parameter("weight").detach()
    before = masks.get(f"{name}.weight")
    if before is None:
        mask, sparsity = torch.ones_like(weight, dtype=torch.bool), 0.0
    else:
        mask = before.to(weight.device)
        clear(weight, mask)
        sparsity = (mask.numel() - count(mask)) / mask.numel()
    return PrunedMatrix(f"{name}.weight", weight, mask, {"sparsity": sparsity, why: 1.0})


def oriented(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return a view of a tensor: the module's own layout as (outputs, inputs), or back."""
    return tensor if isinstance(module, nn.Linear) else tensor.t()
