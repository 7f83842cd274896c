"""Clients of lower rank in the global adapter's shape: they have its first ranks.

Write-back gives a client of rank r_i the first r_i rows of A and columns of B (HetLoRA,
2401.06432), so that is where its update belongs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from prufed_plugins.api import Part


def padded(parts: Iterable[Part], current: Mapping[str, Tensor]) -> Iterator[Part]:
    """Yield each part at the global rank r; the ranks it lacks are zero and masked out.

    Args:
        parts: A (r_i, k) and B (d, r_i) with r_i ≤ r.
        current: A (r, k) and B (d, r).
    """
    for part in parts:
        if all(tensor.shape == current[key].shape for key, tensor in part.tensors.items()):
            yield part
            continue
        tensors, masks = {}, {}
        for key, tensor in part.tensors.items():
            mask = part.masks[key]
            tensors[key] = _corner(tensor, torch.zeros(current[key].shape, dtype=tensor.dtype))
            present = torch.ones_like(tensor, dtype=torch.bool) if mask is None else mask
            masks[key] = _corner(present, torch.zeros(current[key].shape, dtype=torch.bool))
        yield replace(part, tensors=tensors, masks=masks)


def _corner(tensor: Tensor, into: Tensor) -> Tensor:
    rows, columns = tensor.shape
    into[:rows, :columns] = tensor
    return into
