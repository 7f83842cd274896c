"""The clients of one module side by side, for methods that are no sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prufed_plugins.aggregators.ranks import padded
from prufed_plugins.api import Merged, Part


@dataclass(frozen=True)
class Stack:
    """One tensor of n clients.

    Attributes:
        values: (n, ...) float64; zero where absent.
        present: (n, ...) bool, True where the client has the entry.
    """

    values: Tensor
    present: Tensor


def stack(
    parts: Iterable[Part], current: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, Stack]]:
    """Return the clients' names and their tensors by key, at the global rank.

    Memory is n times the module in float64.
    """
    clients: list[str] = []
    values: dict[str, list[Tensor]] = {key: [] for key in current}
    present: dict[str, list[Tensor]] = {key: [] for key in current}
    for part in padded(parts, current):
        clients.append(part.client)
        for key, tensor in part.tensors.items():
            mask = part.masks[key]
            there = torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask
            values[key].append(torch.where(there, tensor, 0.0).double())
            present[key].append(there)
    return clients, {
        key: Stack(
            _stacked(values[key], old, torch.float64), _stacked(present[key], old, torch.bool)
        )
        for key, old in current.items()
    }


def _stacked(tensors: list[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (n, ...), also for n = 0."""
    return torch.stack(tensors) if tensors else torch.zeros(0, *like.shape, dtype=dtype)


def deltas(stacked: Stack, old: Tensor) -> Tensor:
    """Return Δ_i = θ_i - g where present, else 0; (n, ...) float64."""
    return torch.where(stacked.present, stacked.values - old.double(), 0.0)


def assemble(
    values: Mapping[str, Tensor], stacks: Mapping[str, Stack], current: Mapping[str, Tensor]
) -> Merged:
    """Return ``values`` where any client has the entry, the old values elsewhere."""
    covered = {key: stacked.present.any(dim=0) for key, stacked in stacks.items()}
    tensors = {
        key: torch.where(covered[key], values[key], old.double()).to(old.dtype)
        for key, old in current.items()
    }
    entries = sum(mask.numel() for mask in covered.values())
    coverage = sum(int(mask.sum()) for mask in covered.values()) / entries
    return Merged(tensors, {"coverage": coverage}, covered)
