"""FedEx-LoRA: the mean of the factors, and what it misses of the mean product as a residual.

Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models", https://arxiv.org/abs/2410.09432. The paper adds the residual to the base. Bases never
change here, so it travels in the adapter, as ranks that are not trained; published code adds its
transpose, which shows only where d ≠ k.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.products import A, B
from prufed_plugins.aggregators.residuals import compressed
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import FedExParams


class FedEx:
    """A' = Ā = Σ p_i A_i, B' = B̄ = Σ p_i B_i, and R' = R + Σ p_i B_i A_i - B̄ Ā.

    Then W + s (R' + B' A') = W + s (R + Σ p_i B_i A_i): exact, round after round. What is added is
    Σ p_i (B_i - B̄)(A_i - Ā), of rank at most (n - 1) r, so that R stays a product of factors
    [p_i (B_i - B̄)] and [A_i - Ā]. A client applies M_i ⊙ R where its product is masked, so its
    base stays the masked part of one global base; and since every client is sent the whole of R,
    one that has missed rounds is no worse off.

    An entry that a client lacks is taken to be the mean's, as ``heteagg`` takes it. Ranks must be
    equal; layers may differ. The diagnostics are ``residual_rank``, of R', and ``discarded``, the
    share of its norm that ``residual_rank`` has cut off in this round.
    """

    leaves_residual = True

    def __init__(self, params: FedExParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}
        self._before: Mapping[str, Tensor] = {}

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights, and the residual of the rounds before."""
        self._weights = client_weights(updates, self._params.beta)
        self._before = state.residual

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the means and the new residual; the parts are read twice.

        Memory is n times the module's factors in float64.
        """
        mean = coverage_mean(parts, current, self._weights)
        centre = {key: tensor.double() for key, tensor in mean.tensors.items()}
        lefts, rights, weights, size = [], [], [], 0.0
        for part in parts:
            whole = {key: _completed(part, key, centre[key]) for key in (A, B)}
            lefts.append(whole[B] - centre[B])
            rights.append(whole[A] - centre[A])
            weights.append(self._weights[part.client])
            size = max(size, float(whole[A].norm() * whole[B].norm()))
        lefts = [one * (w / sum(weights)) for one, w in zip(lefts, weights, strict=True)]
        if f"{module}.{A}" in self._before:
            lefts.append(self._before[f"{module}.{B}"].double())
            rights.append(self._before[f"{module}.{A}"].double())
        residual = compressed(
            torch.cat(lefts, dim=1),
            torch.cat(rights, dim=0),
            rank=self._params.residual_rank,
            floor=size * torch.finfo(torch.float32).eps,  # of what the clients sent
        )
        return Merged(
            mean.tensors,
            {
                **mean.diagnostics,
                "residual_rank": float(len(residual.right)),
                "discarded": residual.discarded,
            },
            mean.covered,
            {
                A: residual.right.float(),
                B: residual.left.float(),
            },
        )


def _completed(part: Part, key: str, mean: Tensor) -> Tensor:
    """Return one factor in float64, with the mean's entries where the client has none."""
    mask, values = part.masks[key], part.tensors[key].double()
    return values if mask is None else torch.where(mask, values, mean)
