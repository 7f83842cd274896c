"""How the updates of a round lie to one another: coverage, sizes, directions, and the cross term.

Everything is in the common scale, and an update is its change Δ_i = θ_i − g on the entries that the
client has; an entry it lacks counts as no change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from prufed_plugins.aggregators.validation import check_facts, in_order, load_part
from prufed_plugins.api import GlobalState, Part, Update
from prufed_plugins.errors import UpdateError
from prufed_plugins.names import by_module, in_layers

LARGEST_CROSS_TERM: Final = 1024
"""Ranks of all clients together above which the cross term is not computed: its cost is their
square."""


@dataclass
class Measurement:
    """What one round's updates are like.

    Attributes:
        modules: by module. ``coverage_histogram``: how many entries exactly 0, 1, 2, ... clients
            have. ``norm_min``, ``norm_mean``, ``norm_max``: of ‖Δ_i‖ over both factors.
            ``cosine_min``, ``cosine_mean``: of the angle between Δ_i and the plain mean of all.
            ``cross_term``: ‖Σ p (B_i − B̄)(A_i − Ā)‖ / ‖B̄ Ā‖ with p = 1/n, what averaging the
            factors loses of the mean product where nothing is masked; means and deviations are
            over the entries that clients have. Absent where there are too many ranks.
        norms: ‖Δ_i‖ of the whole adapter, by client.
        cosines: with the mean, over the modules that the client has.
    """

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)


def measure(updates: Sequence[Update], state: GlobalState) -> Measurement:
    """Measure a round's updates; each is read once, one module of all clients at a time.

    An update that cannot be read or does not fit is left out: the merge says what is wrong with it.

    Raises:
        UpdateError: two updates have one name.
    """
    ordered = in_order(updates)
    while True:
        try:
            return _measure(ordered, state)
        except UpdateError as error:
            ordered = [update for update in ordered if update.client != error.client]


def _measure(updates: Sequence[Update], state: GlobalState) -> Measurement:
    for update in updates:
        check_facts(update, state, mixes_ranks=True)
    found = Measurement()
    squares = dict.fromkeys((update.client for update in updates), 0.0)  # ‖Δ_i‖²
    dots, means = dict(squares), dict(squares)  # Δ_i · Δ̄ and ‖Δ̄‖² over the client's modules
    for module, names in by_module(state.tensors).items():
        holders = [update for update in updates if in_layers(module, update.kept_layers)]
        if not holders:
            continue
        parts = [load_part(update, names, state) for update in holders]
        current = {key: state.tensors[name].float() for key, name in names.items()}
        rank = max(state.rank, *(part.rank for part in parts))
        deltas = [_delta(part, current, rank) for part in parts]
        mean = torch.stack(deltas).mean(dim=0, dtype=torch.float64)
        size = float(mean.square().sum())
        norms, cosines = [], []
        for part, delta in zip(parts, deltas, strict=True):
            square, dot = float(delta.double().square().sum()), float(delta.double() @ mean)
            squares[part.client] += square
            dots[part.client] += dot
            means[part.client] += size
            norms.append(math.sqrt(square))
            cosines.append(_cosine(dot, square, size))
        found.modules[module] = {
            "coverage_histogram": _histogram(parts, current),
            **_summary("norm", norms),
            **_summary("cosine", cosines),
            **_cross_term(parts, rank),
        }
    for client, square in squares.items():
        found.norms[client] = math.sqrt(square)
        found.cosines[client] = _cosine(dots[client], square, means[client])
    return found


def _delta(part: Part, current: Mapping[str, Tensor], rank: int) -> Tensor:
    """Return Δ_i of both factors as one vector, float32; ranks the client lacks are no change."""
    pieces = []
    for key, old in current.items():
        rows = key == "lora_A.weight"
        tensor, mask = part.tensors[key], part.masks[key]
        before = _first(_padded(old, rank, rows), part.rank, rows)
        change = tensor.float() - before
        if mask is not None:
            change = torch.where(mask, change, 0.0)
        pieces.append(_padded(change, rank, rows).flatten())
    return torch.cat(pieces)


def _first(tensor: Tensor, rank: int, rows: bool) -> Tensor:
    return tensor[:rank] if rows else tensor[:, :rank]


def _padded(tensor: Tensor, rank: int, rows: bool) -> Tensor:
    """Return A (r_i, k) as (rank, k), or B (d, r_i) as (d, rank), with zeros."""
    missing = rank - tensor.shape[0 if rows else 1]
    if not missing:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing) if rows else (0, missing))


def _histogram(parts: Sequence[Part], current: Mapping[str, Tensor]) -> list[int]:
    """Return how many entries of the global factors 0, 1, ..., n clients have."""
    total = torch.zeros(len(parts) + 1, dtype=torch.int64)
    for key, old in current.items():
        rows = key == "lora_A.weight"
        rank = old.shape[0 if rows else 1]
        counts = torch.zeros(old.shape, dtype=torch.int64)
        for part in parts:
            counts += _padded(_first(_mask(part, key), rank, rows).long(), rank, rows)
        total += torch.bincount(counts.flatten(), minlength=len(parts) + 1)
    return [int(count) for count in total]


def _summary(what: str, values: Sequence[float]) -> dict[str, float]:
    summary = {f"{what}_min": min(values), f"{what}_mean": sum(values) / len(values)}
    return summary | ({f"{what}_max": max(values)} if what == "norm" else {})


def _cosine(dot: float, one: float, other: float) -> float:
    """Return the cosine from the product and the squared norms; 0 where a vector is 0."""
    size = math.sqrt(one * other)
    return max(-1.0, min(1.0, dot / size)) if size else 0.0


def _cross_term(parts: Sequence[Part], rank: int) -> dict[str, float]:
    """Return ‖Σ p (B_i − B̄)(A_i − Ā)‖ relative to ‖B̄ Ā‖, without forming a d × k matrix.

    With U = [p (B_1 − B̄), ...] (d, n r) and V = [A_1 − Ā; ...] (n r, k), ‖U V‖² is the sum of the
    products of the entries of UᵀU and V Vᵀ.
    """
    if len(parts) * rank > LARGEST_CROSS_TERM:
        return {}
    A, A_mean = _deviations(parts, "lora_A.weight", rank)
    B, B_mean = _deviations(parts, "lora_B.weight", rank)
    V = A.flatten(0, 1)  # (n r, k)
    U = (B / len(parts)).transpose(0, 1).flatten(1)  # (d, n r)
    size = _product_norm(B_mean, A_mean)
    return {"cross_term": _product_norm(U, V) / size} if size else {}


def _deviations(parts: Sequence[Part], key: str, rank: int) -> tuple[Tensor, Tensor]:
    """Return θ_i − θ̄ (n, ...) and θ̄, the mean over the clients that have each entry, in float64.

    Where a client lacks an entry it deviates by nothing: parts of one adapter agree.
    """
    rows = key == "lora_A.weight"
    values = torch.stack([_padded(part.tensors[key].double(), rank, rows) for part in parts])
    present = torch.stack([_padded(_mask(part, key), rank, rows) for part in parts])
    mean = torch.where(present, values, 0.0).sum(dim=0) / present.sum(dim=0).clamp(min=1)
    return torch.where(present, values - mean, 0.0), mean


def _mask(part: Part, key: str) -> Tensor:
    mask = part.masks[key]
    return torch.ones(part.tensors[key].shape, dtype=torch.bool) if mask is None else mask


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Return ‖left · right‖ in the Frobenius norm."""
    square = float(((left.T @ left) * (right @ right.T)).sum())
    return math.sqrt(max(0.0, square))
