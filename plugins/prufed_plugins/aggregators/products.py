"""The mean of the clients' products Σ p_i B_i A_i, without ever forming a d x k matrix.

With B = [B_1 … B_n] (d, R), A = [p_1 A_1; … ; p_n A_n] (R, k) and R = Σ r_i, the mean is B A. From
B = Q_B R_B and Aᵀ = Q_A R_A, its singular values are those of R_B R_Aᵀ, an R x R matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from prufed_plugins.api import GlobalState, Merged, Part
from prufed_plugins.names import by_module

A = "lora_A.weight"
B = "lora_B.weight"

Split = Literal["left", "balanced"]
"""Where the singular values go: into B (FlexLoRA), or their roots into both factors."""


@dataclass(frozen=True)
class Factors:
    """One client's factors: ``left`` B_i (d, r_i), ``right`` A_i (r_i, k), float64."""

    client: str
    left: Tensor
    right: Tensor


def factors(part: Part) -> Factors:
    """Return a part's factors in float64, with zeros where it has no entry."""
    filled = {
        key: (tensor if (mask := part.masks[key]) is None else torch.where(mask, tensor, 0.0))
        for key, tensor in part.tensors.items()
    }
    return Factors(part.client, filled[B].double(), filled[A].double())


def stacked(parts: Iterable[Part], weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Return (B (d, R), A (R, k)) with B A = Σ p_i B_i A_i, p_i = w_i / Σ w_i.

    The weights stand on A alone: on both factors they would be squared (FLoRA, 2409.05976).
    """
    clients = [factors(part) for part in parts]
    total = sum(weights[client.client] for client in clients)
    lefts = torch.cat([client.left for client in clients], dim=1)
    rights = torch.cat(
        [client.right * (weights[client.client] / total) for client in clients], dim=0
    )
    return lefts, rights


def truncated(left: Tensor, right: Tensor, current: Mapping[str, Tensor], split: Split) -> Merged:
    """Return the best approximation of ``left @ right`` at the global rank (Eckart and Young).

    Ranks come in the order of their singular values, so that a client's first r_i ranks are the
    best of rank r_i. A rank that the product does not have gets zeros in B and keeps the old row
    of A: with zeros in both, no gradient would ever reach it.

    Args:
        left: (d, R) float64.
        right: (R, k) float64.
        current: the global A (r, k) and B (d, r).
        split: where the singular values go.
    """
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right.mT)
    outer, values, inner = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    rank = current[A].shape[0]
    threshold = max(left.shape[0], right.shape[1]) * torch.finfo(values.dtype).eps
    kept = min(rank, int((values > values[0] * threshold).sum()))
    outer, inner = left_basis @ outer[:, :kept], inner[:kept] @ right_basis.mT
    # LAPACK leaves the signs open: the largest entry of every column of B is made positive
    largest = outer.gather(0, outer.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)  # (1, kept)
    roots = values[:kept] if split == "left" else values[:kept].sqrt()
    new_a, new_b = current[A].double().clone(), torch.zeros_like(current[B], dtype=torch.float64)
    new_b[:, :kept] = outer * signs * roots
    new_a[:kept] = inner * signs.mT * (1.0 if split == "left" else roots[:, None])
    energy = float(values.square().sum())
    lost = float(values[kept:].square().sum())
    return Merged(
        {A: new_a.to(current[A].dtype), B: new_b.to(current[B].dtype)},
        {"discarded": (lost / energy) ** 0.5 if energy else 0.0, "product_rank": float(kept)},
        {A: None, B: None},
    )


def best_first(state: GlobalState) -> GlobalState:
    """Return an adapter of the same products, in the order of their singular values.

    Its first r_i ranks are the best approximation of rank r_i (Eckart and Young), where those of
    the factors as they stand may be anything: of a stack, a single client's.
    """
    tensors = dict(state.tensors)
    for names in by_module(state.tensors).values():
        current = {key: state.tensors[name] for key, name in names.items()}
        ordered = truncated(current[B].double(), current[A].double(), current, "balanced")
        tensors |= {names[key]: tensor for key, tensor in ordered.tensors.items()}
    return replace(state, tensors=tensors)
