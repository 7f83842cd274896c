"""Merges the clients' adapters, module by module, without ever holding them all.

Each module is read from one client after the other, so peak memory is one global adapter plus one
module of one client, whatever their number. Clients are visited in the order of their names and
sums are taken in float64: the same updates give the same bytes in whatever order they arrive.

A tensor is read once and checked as it is merged. At the first fault every update is checked
completely, the faulty ones are left out, and the merge starts again from the first module: the
common case pays one read, and a fault never leaves half a client in the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from prufed_plugins.aggregators.validation import check_facts, in_order, load_part
from prufed_plugins.api import Aggregator, GlobalState, Merged, Part, ServerOptimizer, Update
from prufed_plugins.errors import MethodError, UpdateError
from prufed_plugins.names import by_module, in_layers

OnInvalid = Literal["raise", "exclude"]
"""What becomes of a client whose update is invalid."""


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
            merged = _merge(aggregator, ordered, state)
            break
        except UpdateError as error:
            if on_invalid == "raise" or error.client not in {u.client for u in ordered}:
                raise
            faults = {error.client: error.message} | _faults(ordered, state, mixes_ranks)
        excluded |= faults
        ordered = [update for update in ordered if update.client not in faults]
    return _finish(merged, ordered, state, optimizer, excluded)


def _merge(
    aggregator: Aggregator, updates: Sequence[Update], state: GlobalState
) -> dict[str, Merged]:
    """Return the results by module, for the modules that any client has."""
    if not updates:
        return {}
    aggregator.prepare(updates, state)
    results = {}
    for module, names in by_module(state.tensors).items():
        holders = [update for update in updates if in_layers(module, update.kept_layers)]
        if not holders:
            continue
        current = {key: state.tensors[name] for key, name in names.items()}
        result = aggregator.merge(module, _Parts(holders, names, state), current)
        _check_result(aggregator, module, result, current)
        results[module] = result
    return results


@dataclass(frozen=True)
class _Parts:
    """The clients' shares of one module; each iteration reads them again, one at a time."""

    updates: Sequence[Update]
    names: Mapping[str, str]
    state: GlobalState

    def __iter__(self) -> Iterator[Part]:
        return (load_part(update, self.names, self.state) for update in self.updates)


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
            faults[update.client] = error.message
    return faults


def _check_result(
    aggregator: Aggregator, module: str, result: Merged, current: Mapping[str, Tensor]
) -> None:
    """Refuse a result that does not fit the global adapter."""
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
        if not bool(new.isfinite().all()):
            raise MethodError(f"{method} returned NaN or infinity in {module}.{key}", hint)


def _finish(
    merged: Mapping[str, Merged],
    updates: Sequence[Update],
    state: GlobalState,
    optimizer: ServerOptimizer | None,
    excluded: dict[str, str],
) -> Aggregated:
    """Take the optimizer's steps and put the new state together."""
    tensors = dict(state.tensors)
    diagnostics: dict[str, dict[str, float]] = {}
    for module, names in by_module(state.tensors).items():
        if module not in merged:
            continue
        result = merged[module]
        squares = 0.0
        for key, name in names.items():
            old, new = state.tensors[name], result.tensors[key]
            if optimizer is not None:
                covered = result.covered[key] if key in result.covered else _union(updates, name)
                new = optimizer.step(name, old, new, covered)
            tensors[name] = new
            squares += float(torch.linalg.vector_norm(new.double() - old.double())) ** 2
        clients = sum(in_layers(module, update.kept_layers) for update in updates)
        diagnostics[module] = {
            "clients": float(clients),
            "update_norm": squares**0.5,
            **result.diagnostics,
        }
    return Aggregated(replace(state, tensors=tensors), diagnostics, excluded)


def _union(updates: Sequence[Update], name: str) -> Tensor | None:
    """Return where any client has an entry; None where that is every entry."""
    union: Tensor | None = None
    for update in updates:
        if not in_layers(name, update.kept_layers):
            continue
        if update.masks is None or name not in update.masks:
            return None
        union = update.masks[name] if union is None else union | update.masks[name]
    return union
