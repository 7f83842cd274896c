"""Gives the new global adapter back to a client: Algorithm 2 of LEGO, second half.

Every client of the federation gets it, not only those of the round (2410.18287, "applied to each
of the client SLMs").
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prufed_plugins.api import GlobalState
from prufed_plugins.errors import MethodError
from prufed_plugins.names import in_layers, split_factor


def write_back(
    state: GlobalState,
    *,
    masks: Mapping[str, Tensor] | None,
    kept_layers: Sequence[int],
    scaling: float,
    rank: int,
    own: Mapping[str, Tensor] | None = None,
    share: float = 0.0,
    personal: Collection[str] = (),
    window: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Return a client's next adapter: the global one on its layers and mask, in its own scale.

    ``θ_i = where(m_i, (1 - ρ) g sqrt(s/s_i) + ρ θ_i, 0)``: absent entries are zero, so the client
    keeps its sparsity. A client of lower rank gets the first r_i ranks, as HetLoRA truncates
    (2401.06432).

    Args:
        state: the global adapter.
        masks: the client's masks by global name; absent names, or None, mean every entry.
        kept_layers: global indices of the client's layers.
        scaling: s_i.
        rank: r_i, at most the global rank.
        own: the client's tensors by global name, in its own scale; needed for ``share``.
        share: ρ in [0, 1], the part of its own values that the client keeps.
        personal: the factors, ``A`` or ``B``, that the client keeps whole: ρ = 1 (FedSA-LoRA,
            2410.01463).
        window: the r_i global ranks that the client gets, in its order (FedRolex, 2212.01548); the
            first by default.

    Returns:
        New tensors by global name, for the client's layers only, in the dtypes of the state.

    Raises:
        MethodError: the rank, the window, the scaling, the share or a shape does not fit, or a mask
            or the client's own tensor is unknown or missing.
    """
    _check(state, scaling, rank, share)
    _check_window(window, rank, state.rank)
    names = [name for name in state.tensors if in_layers(name, kept_layers)]
    _check_names("mask", set(masks or ()) - set(names), "unknown")
    if share > 0 or personal:
        _check_names("own tensor", set(names) - set(own or ()), "missing")
    factor = math.sqrt(state.scaling / scaling)
    result = {}
    for name in names:
        source = ranks_of(name, state.tensors[name], range(rank) if window is None else window)
        values = source if factor == 1.0 else source.double() * factor
        part = 1.0 if split_factor(name)[1] in personal else share
        if part > 0 and own is not None:
            kept = _fitting("own tensor", name, own[name], source.shape)
            values = (1 - part) * values.double() + part * kept.double()
        values = values.to(source.dtype)
        mask = masks.get(name) if masks is not None else None
        if mask is not None:
            fitting = _fitting("mask", name, mask, source.shape)
            values = torch.where(fitting, values, torch.zeros_like(values))
        result[name] = values.clone(memory_format=torch.contiguous_format)
    return result


def with_own(
    state: GlobalState, own: Mapping[str, Tensor], *, scaling: float, rank: int
) -> GlobalState:
    """Return the state with a client's adapter in the place of the global one, where it has one.

    Args:
        state: the global adapter.
        own: the client's tensors by global name, in its own scale.
        scaling: s_i.
        rank: r_i; its ranks are the first.
    """
    factor = math.sqrt(scaling / state.scaling)
    tensors = dict(state.tensors)
    for name, tensor in own.items():
        tensors[name] = state.tensors[name].clone()
        ranks_of(name, tensors[name], range(rank)).copy_(tensor.double() * factor)
    return replace(state, tensors=tensors)


def _check(state: GlobalState, scaling: float, rank: int, share: float) -> None:
    if not 0 <= share <= 1:
        raise MethodError(f"share {share} is outside [0, 1]", "0 takes the global adapter whole")
    if not (math.isfinite(scaling) and scaling > 0):
        raise MethodError(f"scaling is {scaling}", "give a positive number")
    if not 1 <= rank <= state.rank:
        raise MethodError(
            f"rank {rank} is not between 1 and the global rank {state.rank}",
            f"give the client a rank of at most {state.rank}",
        )


def _check_window(window: Sequence[int] | None, rank: int, global_rank: int) -> None:
    if window is not None and (
        len(window) != rank or len(set(window) & set(range(global_rank))) != rank
    ):
        raise MethodError(
            f"window {list(window)} is not {rank} of the {global_rank} ranks",
            "report it to the author of the aggregator",
        )


def _check_names(what: str, names: set[str], problem: str) -> None:
    if names:
        raise MethodError(
            f"the client's {what} {min(names)} is {problem}",
            "the client and the global adapter do not belong together",
        )


def ranks_of(name: str, tensor: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return these ranks of A (r, k) as (r_i, k), of B (d, r) as (d, r_i)."""
    axis = 0 if split_factor(name)[1] == "A" else 1
    if list(ranks) == list(range(len(ranks))):
        return tensor.narrow(axis, 0, len(ranks))  # a view: most clients have the first ranks
    return tensor.index_select(axis, torch.tensor(list(ranks)))


def _fitting(what: str, name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape:
        raise MethodError(
            f"the client's {what} {name} has shape {list(tensor.shape)}, not {list(shape)}",
            "the client and the global adapter do not belong together",
        )
    return tensor
