"""Masks of a client's LoRA factors A (r, k) and B (d, r): which of their entries exist.

A mask is a bool tensor, True where the entry exists. Every party derives it alike, from (seed,
tensor name, shape) or from what all of them have, so that no mask is ever sent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prufed_plugins.errors import MethodError
from prufed_plugins.names import split_factor
from prufed_plugins.pruners.selection import removed_count

FactorMask = Literal["none", "nested", "magnitude", "rank", "structured"]
"""Where a client's LoRA factors are zero (LEGO, 2410.18287, readings R1, R2, R5, R6)."""


def nested_mask(shape: Sequence[int], sparsity: float, *, seed: int, name: str) -> Tensor:
    """Return a random mask that lies inside every mask of lower sparsity (LEGO, reading R1).

    Each entry has one draw u, the same at every sparsity; the ⌊sparsity · n⌋ entries of lowest u
    are removed, equal draws in the order of their index. The draw depends on (seed, name, shape)
    alone, neither on the device nor on the order of calls.

    Args:
        shape: shape of the tensor to mask.
        sparsity: share of entries to remove, in [0, 1).
        seed: the federation's mask seed.
        name: the tensor's *global* name.
    """
    text = json.dumps(["nested-mask", seed, name, list(shape)])
    entropy = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    size = math.prod(shape)
    # raw output of the bit generator: numpy promises its stream for ever, Generator's it does not
    draws = np.random.PCG64(entropy).random_raw(size)
    order = np.argsort(draws, kind="stable")
    return _without(torch.from_numpy(order), removed_count(sparsity, size)).reshape(tuple(shape))


def magnitude_mask(tensor: Tensor, sparsity: float) -> Tensor:
    """Return the mask that removes the ⌊sparsity · n⌋ smallest magnitudes (reading R2).

    Equal magnitudes are removed in the order of their index.
    """
    order = torch.argsort(tensor.detach().abs().float().flatten().cpu(), stable=True)
    return _without(order, removed_count(sparsity, tensor.numel())).reshape(tensor.shape)


def factor_masks(
    kind: FactorMask,
    tensors: Mapping[str, Tensor],
    sparsity: float,
    *,
    seed: int,
    base_masks: Mapping[str, Tensor] | None = None,
    base_weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the masks of one client's LoRA factors by the names of ``tensors``.

    - ``none``, and sparsity 0 of any kind: no masks; every entry exists.
    - ``nested``: :func:`nested_mask` of every factor.
    - ``magnitude``: :func:`magnitude_mask` of every factor. A factor that is zero throughout, as B
      is before the first epoch, has no magnitudes to go by and gets no mask.
    - ``rank``: the first ⌈(1 - sparsity) r⌉ ranks, as HetLoRA (2401.06432) truncates.
    - ``structured``: A keeps the input features with the most survivors in the base's mask, B the
      output features of largest L1 norm in ``base_weights``, or of most survivors without them.

    Args:
        kind: how to choose.
        tensors: ``<module>.lora_A.weight`` (r, k) and ``<module>.lora_B.weight`` (d, r).
        sparsity: share of each factor to remove, in [0, 1).
        seed: seed of the nested draw.
        base_masks: masks of the pruned base by ``<module>.weight``, each (d, k).
        base_weights: weights of the pruned base by the same names, each (d, k).

    Returns:
        bool masks; a name that is absent means every entry.

    Raises:
        MethodError: a name is no LoRA factor, or ``structured`` lacks a base mask that fits.
    """
    if kind == "none" or sparsity == 0:
        return {}
    masks = {}
    for name, tensor in tensors.items():
        module, factor = split_factor(name)
        if kind == "nested":
            masks[name] = nested_mask(tensor.shape, sparsity, seed=seed, name=name)
        elif kind == "magnitude":
            if bool(tensor.any()):
                masks[name] = magnitude_mask(tensor, sparsity)
        elif kind == "rank":
            masks[name] = _rank_mask(tensor, factor, sparsity)
        else:
            weight = f"{module}.weight"
            scores = _feature_scores(factor, weight, base_masks or {}, base_weights or {})
            masks[name] = _feature_mask(name, tensor, factor, scores, sparsity)
    return masks


def _without(order: Tensor, removed: int) -> Tensor:
    """Return a flat mask that is False at the first ``removed`` indices of ``order``."""
    mask = torch.ones(order.numel(), dtype=torch.bool)
    mask[order[:removed]] = False
    return mask


def _rank_mask(tensor: Tensor, factor: Literal["A", "B"], sparsity: float) -> Tensor:
    rank = tensor.shape[0] if factor == "A" else tensor.shape[1]
    kept = torch.arange(rank) < rank - removed_count(sparsity, rank)
    return (kept[:, None] if factor == "A" else kept[None, :]).expand(tensor.shape).clone()


def _feature_scores(
    factor: Literal["A", "B"],
    weight: str,
    base_masks: Mapping[str, Tensor],
    base_weights: Mapping[str, Tensor],
) -> Tensor:
    """Return one score per input feature (k,) for A, per output feature (d,) for B."""
    if weight not in base_masks:
        raise MethodError(
            f"factor mask 'structured' needs the base's mask of {weight}",
            "use a base pruned by a masking method, or factor_mask: nested",
        )
    mask = base_masks[weight].cpu()  # (d, k)
    if factor == "A":
        return mask.sum(dim=0)
    if weight in base_weights:  # Wanda leaves every row equally dense: density cannot rank rows
        return (base_weights[weight].detach().cpu().abs().float() * mask).sum(dim=1)
    return mask.sum(dim=1)


def _feature_mask(
    name: str, tensor: Tensor, factor: Literal["A", "B"], scores: Tensor, sparsity: float
) -> Tensor:
    features = tensor.shape[1] if factor == "A" else tensor.shape[0]
    if scores.numel() != features:
        raise MethodError(
            f"{name} has {features} features, the base's mask has {scores.numel()}",
            "the adapter and the base do not belong together",
        )
    order = torch.argsort(scores, stable=True)
    kept = _without(order, removed_count(sparsity, features))
    return (kept[None, :] if factor == "A" else kept[:, None]).expand(tensor.shape).clone()
