"""HeteAgg refined by least squares, for adapters whose product carries the base's mask.

Where client i realises M_i ⊙ (B_i A_i), averaging A and B by themselves, as LEGO (2410.18287)
does, errs twice: the product of means is not the mean of products, and M_i varies inside rows and
columns. Both are lessened at the same rank by solving for B once more, as LoRA-FAIR (2411.14961)
does on dense adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.products import A, B, factors
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.errors import MethodError, UpdateError
from prufed_plugins.params import HeteAggLsParams

_BLOCK: Final = 256  # rows solved at a time


@dataclass(frozen=True)
class Side:
    """One client's part in the problem of one factor: p_i, L_i (d, r), R_i (r, k), M_i (d, k)."""

    share: float
    left: Tensor
    right: Tensor
    mask: Tensor | None


class HeteAggLS:
    """B' = argmin_B Σ p_i ‖M_i ⊙ (B Ā - B_i A_i)‖² + λ ‖B - B̄‖², row by row; A' = Ā.

    Ā and B̄ are HeteAgg's means. Every output row u has its own r x r system, with D_iu the diagonal
    matrix of M_i[u, :]::

        G_u = λ I + Σ p_i Ā D_iu Āᵀ      h_u = λ b̄_u + Σ p_i (b_iu A_i) D_iu Āᵀ      b_u = h_u G_u⁻¹

    λ = ``ridge`` · tr(Ā Āᵀ) / r keeps B near its mean: LoRA-FAIR found that moving it freely hurts
    the next round. With ``refine: both``, A's columns are then solved alike, for the new B.

    Without masks on products it is LoRA-FAIR's closed form; with one A for all and whole rows in
    M_i it is HeteAgg on the rows of B. Entries that no client has, and layers that none has, stay.
    """

    breaks: ClassVar[Mapping[str, str]] = {
        "C1": "what a client realises is matched, and zeros inside the factors belong to that",
        "C4": "B is fitted to the clients' products",
        "C7": "zeros inside the factors belong to the product that is matched",
        "C12": "the fit belongs to the whole matrix",
    }

    def __init__(self, params: HeteAggLsParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}
        self._base_masks: dict[str, Mapping[str, Tensor]] = {}

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights, and where the masks of the products are."""
        self._weights = client_weights(updates, self._params.beta)
        self._base_masks = {update.client: update.base_masks or {} for update in updates}

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the refined means; the parts are read two or three times.

        Memory is one matrix of the module's weight in float64 and one of bool, whatever the number
        of clients.
        """
        merged = coverage_mean(parts, current, self._weights)
        mean_a, mean_b = merged.tensors[A].double(), merged.tensors[B].double()
        new_a, new_b = (
            mean_a,
            _solve(mean_b, mean_a, self._sides(module, parts), self._params.ridge),
        )
        if self._params.refine == "both":
            turned = _turned(self._sides(module, parts))
            new_a = _solve(mean_a.mT, new_b.mT, turned, self._params.ridge).mT
        tensors = {}
        for key, new in ((A, new_a), (B, new_b)):
            present = merged.covered[key]
            kept = new if present is None else torch.where(present, new, current[key].double())
            tensors[key] = kept.to(current[key].dtype)
        moved = float((tensors[B].double() - mean_b).norm())
        size = float(mean_b.norm())
        return Merged(
            tensors,
            {**merged.diagnostics, "refined": moved / size if size else 0.0},
            merged.covered,
        )

    def _sides(self, module: str, parts: Iterable[Part]) -> Iterator[Side]:
        for part in parts:
            one = factors(part)
            mask = self._mask(part.client, module, (len(one.left), one.right.shape[1]))
            yield Side(self._weights[part.client], one.left, one.right, mask)

    def _mask(self, client: str, module: str, shape: tuple[int, int]) -> Tensor | None:
        """Return a client's M_i of one module; None where its product is not masked.

        Raises:
            UpdateError: the mask cannot be read, or does not fit.
        """
        try:
            mask = self._base_masks[client][f"{module}.weight"]
        except KeyError:
            return None
        except MethodError as error:
            raise UpdateError(client, error.message, error.hint) from error
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise UpdateError(
                client,
                f"the base's mask of {module} is {mask.dtype} of shape {list(mask.shape)}, "
                f"not bool of shape {list(shape)}",
                "the client's base is not a sub-model of this federation's base",
            )
        return mask


def _solve(mean: Tensor, basis: Tensor, sides: Iterable[Side], ridge: float) -> Tensor:
    """Return argmin_L Σ p_i ‖M_i ⊙ (L R - L_i R_i)‖² + λ ‖L - mean‖² with R the ``basis``.

    Args:
        mean: (d, r) float64.
        basis: R, (r, k) float64.
        sides: the clients; read once.
        ridge: λ in units of tr(R Rᵀ) / r.
    """
    rows, rank = mean.shape
    penalty = ridge * float(basis.square().sum()) / rank
    if penalty == 0.0:  # R is zero: every L fits alike
        return mean
    weight = torch.zeros(rows, basis.shape[1], dtype=torch.float64)  # Σ p_i M_i
    wanted = torch.zeros_like(mean)  # Σ p_i (L_i R_i) D_iu Rᵀ
    total = 0.0
    for side in sides:
        total += side.share
        for block in _blocks(rows):
            product = side.left[block] @ side.right
            if side.mask is None:
                weight[block] += side.share
            else:
                product = torch.where(side.mask[block], product, 0.0)
                weight[block].add_(side.mask[block], alpha=side.share)
            wanted[block] += side.share * (product @ basis.mT)
    # Σ_v w_uv R_v R_vᵀ for all rows u at once, over the pairs s ≤ t of the symmetric matrix
    upper = torch.triu_indices(rank, rank)
    pairs = (basis[upper[0]] * basis[upper[1]]).mT / total  # (k, r (r + 1) / 2)
    result = torch.empty_like(mean)
    for block in _blocks(rows):
        entries = weight[block] @ pairs
        system = torch.zeros(len(entries), rank, rank, dtype=torch.float64)
        system[:, upper[0], upper[1]] = entries
        system[:, upper[1], upper[0]] = entries
        system.diagonal(dim1=1, dim2=2).add_(penalty)
        right = penalty * mean[block] + wanted[block] / total
        result[block] = torch.linalg.solve(system, right)  # symmetric: h G⁻¹ = (G⁻¹ hᵀ)ᵀ
    return result


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, rows)) for start in range(0, rows, _BLOCK))


def _turned(sides: Iterable[Side]) -> Iterator[Side]:
    """Yield the problem of the other factor, (L R)ᵀ = Rᵀ Lᵀ."""
    for side in sides:
        mask = None if side.mask is None else side.mask.mT
        yield Side(side.share, side.right.mT, side.left.mT, mask)
