"""HetLoRA's training: clients prune their own ranks (Cho et al. 2024, arXiv 2401.06432).

The aggregator ``hetlora`` merges adapters of unequal rank; this is the other half of the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from prufed_plugins.api import AdaptedModel, TrainingData, TuneResult, TuneStep
from prufed_plugins.names import split_factor
from prufed_plugins.params import HetLoraTunerParams
from prufed_plugins.tuners.lora import LoraTuner
from prufed_plugins.tuners.training import Penalty, add_gradient


class HetLoraTuner(LoraTuner):
    """LoRA on ``loss + λ T``, T being the size of the last ranks, which go if T has shrunk.

    ``T = Σ ‖B[:, k:]‖_F ‖A[k:, :]‖_F`` over the modules, with k = min(r − 1, ⌊γ r⌋) ranks to keep,
    at least ``r_min``. Where T is less after the training than before, the client goes on with k
    ranks. The published code takes round(γ r), which for γ = 0.99 is r itself up to r = 50: its
    tail is empty and no rank is ever pruned.
    """

    prunes_ranks = True

    def __init__(self, params: HetLoraTunerParams) -> None:
        super().__init__(params)
        self._params = params

    def penalty(self, model: AdaptedModel) -> Penalty | None:
        """Return what shrinks the last ranks; None where there are none to prune."""
        keep = self._kept(model)
        if keep is None or not self._params.lam:
            return None
        return lambda trained: add_tail_gradient(trained, keep, self._params.lam)

    def tune(
        self,
        model: AdaptedModel,
        data: TrainingData,
        seed: int,
        on_step: Callable[[TuneStep], None],
        *,
        round_index: int,
        pad_token_id: int,
    ) -> TuneResult:
        """Return the trained tensors, and as ``rank`` how many of their first ranks stay."""
        keep = self._kept(model)
        before = 0.0 if keep is None else tail_size(model.parameters, keep)
        result = super().tune(
            model, data, seed, on_step, round_index=round_index, pad_token_id=pad_token_id
        )
        if keep is None or tail_size(result.tensors, keep) >= before:
            return result
        return replace(result, rank=keep)

    def _kept(self, model: AdaptedModel) -> int | None:
        """Return k for the model's rank; None where it has the least it may have."""
        rank = next(
            len(tensor) for name, tensor in model.parameters.items() if split_factor(name)[1] == "A"
        )
        keep = kept_ranks(rank, self._params.gamma, self._params.r_min)
        return keep if keep < rank else None


def kept_ranks(rank: int, gamma: float, least: int) -> int:
    """Return min(r − 1, ⌊γ r⌋), or ``least`` where that is more: a tail is never empty by rounding.

    Args:
        rank: r ≥ 1.
        gamma: γ in (0, 1).
        least: r_min ≥ 1; a rank below it stays what it is.
    """
    return max(min(rank, least), min(rank - 1, int(gamma * rank)))


def tail_size(tensors: Mapping[str, Tensor], keep: int) -> float:
    """Return T = Σ ‖B[:, k:]‖_F ‖A[k:, :]‖_F over the modules."""
    with torch.no_grad():
        tails = _tails(tensors, keep)
        return sum(float(A.norm() * B.norm()) for A, B in tails.values())


def add_tail_gradient(parameters: Mapping[str, nn.Parameter], keep: int, lam: float) -> None:
    """Add the gradient of λ T: λ ‖A_t‖ B_t / ‖B_t‖ on B's tail, λ ‖B_t‖ A_t / ‖A_t‖ on A's.

    A tail of norm zero has no direction, and gets none: B is zero before the first step.

    Args:
        parameters: A (r, k) and B (d, r) by local name.
        keep: ranks before the tail.
        lam: λ ≥ 0.
    """
    for module, (A, B) in _tails(parameters, keep).items():
        sizes = float(A.detach().norm()), float(B.detach().norm())
        for name, tail, own, other in (
            (f"{module}.lora_A.weight", A, sizes[0], sizes[1]),
            (f"{module}.lora_B.weight", B, sizes[1], sizes[0]),
        ):
            if not own:
                continue
            gradient = torch.zeros_like(parameters[name])
            axis = 0 if name.endswith("lora_A.weight") else 1
            part = gradient.narrow(axis, keep, gradient.shape[axis] - keep)
            part.copy_(tail.detach() * (lam * other / own))
            add_gradient(parameters[name], gradient.detach())


def _tails(tensors: Mapping[str, Tensor], keep: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (A[k:, :], B[:, k:]) by module."""
    modules = {split_factor(name)[0] for name in tensors}
    return {
        module: (
            tensors[f"{module}.lora_A.weight"][keep:],
            tensors[f"{module}.lora_B.weight"][:, keep:],
        )
        for module in sorted(modules)
    }
