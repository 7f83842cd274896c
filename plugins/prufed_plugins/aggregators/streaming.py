"""Merges the clients' adapters, module by module, without ever holding them all.

Each module is read from one client after the other, so peak memory is one global adapter plus one
module of one client, whatever their number. Clients are visited in the order of their names and
sums are taken in float64: the same updates give the same bytes in whatever order they arrive.

A tensor is read once and checked as it is merged. At the first fault every update is checked
completely, the faulty ones are left out, and the merge starts again from the first module: the
common case pays one read, and a fault never leaves half a client in the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from prufed_plugins.aggregators.pieces import Reader
from prufed_plugins.aggregators.residuals import of_one_rank
from prufed_plugins.aggregators.validation import (
    check_facts,
    in_order,
    load_part,
    open_share,
    read_mask,
)
from prufed_plugins.api import Aggregator, GlobalState, Merged, Part, ServerOptimizer, Update
from prufed_plugins.entries import is_finite
from prufed_plugins.errors import MethodError, UpdateError
from prufed_plugins.names import by_module, in_layers

OnInvalid = Literal["raise", "exclude"]
"""What becomes of a client whose update is invalid."""


_ALIGNED: Final = 64  # bytes


@dataclass(frozen=True)
class Aggregated:
    """What a round's merge gives.

    Attributes:
        state: the new global adapter.
        diagnostics: numbers by module: ``clients`` that have it, ``update_norm`` (Frobenius norm
            of the change of both factors), and what the method adds, such as ``coverage``.
        excluded: why, by the name of each client that was left out.
    """

    state: GlobalState
    diagnostics: dict[str, dict[str, float]]
    excluded: dict[str, str]


def aggregate(
    aggregator: Aggregator,
    updates: Sequence[Update],
    state: GlobalState,
    *,
    optimizer: ServerOptimizer | None = None,
    on_invalid: OnInvalid = "raise",
) -> Aggregated:
    """Merge the updates of one round into the global adapter.

    Modules are merged in the order of ``state.tensors``; one that no client has stays as it is.
    Without updates, the state stays as it is. The optimizer steps once all modules are merged.

    Args:
        aggregator: the method.
        updates: at most one per client; their tensors may be read from disk on access.
        state: the global adapter before the round.
        optimizer: turns the merged tensors into a step of the global ones.
        on_invalid: whether an invalid update is an error, or is left out and reported.

    Raises:
        UpdateError: two updates have one name; or an update is invalid: a tensor is missing,
            unknown, of a wrong shape, NaN or infinite where it exists.
        MethodError: the method cannot merge these updates, or its result does not fit.
    """
    ordered = in_order(updates)
    mixes_ranks = bool(getattr(aggregator, "mixes_ranks", False))
    excluded: dict[str, str] = {}
    while True:
        try:
            for update in ordered:
                check_facts(update, state, mixes_ranks=mixes_ranks)
            merged = _merge(aggregator, ordered, state, keep_coverage=optimizer is not None)
            break
        except UpdateError as error:
            if on_invalid == "raise" or error.client not in {u.client for u in ordered}:
                raise
            faults = {error.client: _reason(error)} | _faults(ordered, state, mixes_ranks)
        excluded |= faults
        ordered = [update for update in ordered if update.client not in faults]
    tensors = merged.tensors if optimizer is None else _step(optimizer, merged, state)
    residual = of_one_rank({**state.residual, **merged.residual})
    return Aggregated(
        replace(state, tensors=tensors, residual=residual),
        merged.diagnostics,
        dict(sorted(excluded.items())),
    )


@dataclass(frozen=True)
class _Round:
    """The merged tensors, coverage and new residuals by name, the diagnostics by module."""

    tensors: dict[str, Tensor]
    covered: dict[str, Tensor | None]
    residual: dict[str, Tensor]
    diagnostics: dict[str, dict[str, float]]


def _merge(
    aggregator: Aggregator, updates: Sequence[Update], state: GlobalState, *, keep_coverage: bool
) -> _Round:
    """Merge module by module, without the optimizer."""
    tensors = _allocate(state.tensors)
    merged = _Round(tensors, {}, {}, {})
    if updates:
        aggregator.prepare(updates, state)
    for module, names in by_module(state.tensors).items():
        holders = [update for update in updates if in_layers(module, update.kept_layers)]
        if not holders:
            for name in names.values():
                tensors[name].copy_(state.tensors[name])
            continue
        current = {key: state.tensors[name] for key, name in names.items()}
        result = aggregator.merge(module, _Parts(holders, names, state), current)
        change = _check_result(aggregator, module, result, current)
        for key, name in names.items():
            tensors[name].copy_(result.tensors[key])
            if keep_coverage:
                given = key in result.covered
                merged.covered[name] = result.covered[key] if given else _union(holders, name)
        merged.residual.update({names[key]: given for key, given in result.residual.items()})
        merged.diagnostics[module] = {
            "clients": float(len(holders)),
            "update_norm": change,
            **result.diagnostics,
        }
    return merged


def _allocate(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the same names, shapes and dtypes, of any content, in one piece of memory.

    Results are copied into it: kept tensors between freed ones would leave the heap in pieces,
    several adapters large. And numpy asks for large pages, which come a hundred times faster.
    """
    places, end = {}, 0
    for name, tensor in like.items():
        places[name] = end
        end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    memory = torch.from_numpy(np.empty(end, dtype=np.uint8))
    return {
        name: memory[places[name] :][: tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)
        if tensor.nbytes
        else torch.empty_like(tensor)
        for name, tensor in like.items()
    }


def _step(optimizer: ServerOptimizer, merged: _Round, state: GlobalState) -> dict[str, Tensor]:
    """Return the global tensors after the optimizer's step; what no client has stays."""
    return {
        name: optimizer.step(name, old, merged.tensors[name], merged.covered[name])
        if name in merged.covered
        else old
        for name, old in state.tensors.items()
    }


def _distance(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> float:
    """Return the Frobenius norm of the change of all tensors together."""
    changes = (new[key].float() - old[key].float() for key in old)
    return math.hypot(*(float(torch.linalg.vector_norm(change)) for change in changes))


def _union(updates: Sequence[Update], name: str) -> Tensor | None:
    """Return where any of the clients has an entry; None where that is every entry."""
    union: Tensor | None = None
    for update in updates:
        mask = read_mask(update, name)
        if mask is None:
            return None
        union = mask if union is None else union | mask
    return union


@dataclass(frozen=True)
class _Parts:
    """The clients' shares of one module; each iteration reads them again, one at a time.

    A method that goes by single entries may read them piece by piece instead.
    """

    updates: Sequence[Update]
    names: Mapping[str, str]
    state: GlobalState

    def __iter__(self) -> Iterator[Part]:
        return (load_part(update, self.names, self.state) for update in self.updates)

    def readers(self, key: str) -> Sequence[Reader] | None:
        """Return what reads one tensor from each client; None where one can only be had whole."""
        readers = []
        for update in self.updates:
            reader = open_share(update, self.names[key], self.state)
            if reader is None:
                return None
            readers.append(reader)
        return readers


def _faults(updates: Sequence[Update], state: GlobalState, mixes_ranks: bool) -> dict[str, str]:
    """Read every update to its end and return what is wrong, by client."""
    modules = by_module(state.tensors)
    faults = {}
    for update in updates:
        try:
            check_facts(update, state, mixes_ranks=mixes_ranks)
            for module, names in modules.items():
                if in_layers(module, update.kept_layers):
                    load_part(update, names, state)
        except UpdateError as error:
            faults[update.client] = _reason(error)
    return faults


def _reason(error: UpdateError) -> str:
    return error.message.removeprefix(f"client {error.client}: ")


def _check_result(
    aggregator: Aggregator, module: str, result: Merged, current: Mapping[str, Tensor]
) -> float:
    """Refuse a result that does not fit the global adapter; return the norm of its change."""
    method = type(aggregator).__name__
    hint = "report it to the author of the method; another one is set with --aggregator"
    if result.tensors.keys() != current.keys():
        odd = sorted(result.tensors.keys() ^ current.keys())
        raise MethodError(f"{method} returned other tensors of {module}: {', '.join(odd)}", hint)
    for key, old in current.items():
        new = result.tensors[key]
        if new.shape != old.shape or new.dtype != old.dtype:
            raise MethodError(
                f"{method} returned {module}.{key} as {new.dtype} of shape {list(new.shape)}, "
                f"not {old.dtype} of shape {list(old.shape)}",
                hint,
            )
    change = _distance(result.tensors, current)
    odd = (
        [] if math.isfinite(change) else [k for k, t in result.tensors.items() if not is_finite(t)]
    )
    if odd:
        raise MethodError(f"{method} returned NaN or infinity in {module}.{odd[0]}", hint)
    return change
