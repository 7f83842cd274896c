"""How the updates of a round lie to one another: coverage, sizes, directions, and the cross term.

Everything is in the common scale, and an update is its change Δ_i = θ_i − g on the entries that the
client has; an entry it lacks counts as no change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from prufed_plugins.aggregators.validation import check_facts, in_order, load_part
from prufed_plugins.api import GlobalState, Part, Update
from prufed_plugins.errors import UpdateError
from prufed_plugins.names import by_module, in_layers

_KEYS: Final = ("lora_A.weight", "lora_B.weight")

LARGEST_CROSS_TERM: Final = 512
"""Ranks of all clients together above which the cross term is not computed: its cost is their
square."""


LARGEST_TABLE: Final = 1 << 29
"""Bytes that one module of all clients may take side by side. Above, clients are measured one by
one, and not against their mean: memory must not grow with their number."""


@dataclass
class Measurement:
    """What one round's updates are like.

    Attributes:
        modules: by module. ``coverage_histogram``: how many entries exactly 0, 1, 2, ... clients
            have. ``norm_min``, ``norm_mean``, ``norm_max``: of ‖Δ_i‖ over both factors.
            ``cosine_min``, ``cosine_mean``: of the angle between Δ_i and the plain mean of all.
            ``cross_term``: ‖Σ p (B_i − B̄)(A_i − Ā)‖ / ‖B̄ Ā‖ with p = 1/n, what averaging the
            factors loses of the mean product where nothing is masked; means and deviations are
            over the entries that clients have. Absent where there are too many ranks. Cosines and
            the cross term are absent where a module of all clients is too large.
        norms: ‖Δ_i‖ of the whole adapter, by client.
        cosines: with the mean, over the modules that the client has and that have one.
    """

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sending:
    """Which part of the global adapter the clients of a round began with.

    Attributes:
        windows: the global ranks of each client, in its order; the first ones where it has none.
        personal: factors, of A and B, that every client keeps for itself: no change of theirs is
            anybody else's, so it is neither measured nor clipped.
    """

    windows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    personal: frozenset[str] = frozenset()

    def ranks(self, client: str, rank: int) -> Tensor:
        """Return a client's global ranks (r_i,)."""
        return torch.tensor(self.windows.get(client, range(rank)), dtype=torch.int64)


WHOLE: Final = Sending()
"""Every client has the first ranks of both factors."""


def measure(updates: Sequence[Update], state: GlobalState, sending: Sending = WHOLE) -> Measurement:
    """Measure a round's updates; each is read once, one module of all clients at a time.

    An update that cannot be read or does not fit is left out: the merge says what is wrong with it.

    Raises:
        UpdateError: two updates have one name.
    """
    ordered = in_order(updates)
    while True:
        try:
            return _measure(ordered, state, sending)
        except UpdateError as error:
            ordered = [update for update in ordered if update.client != error.client]


def _measure(updates: Sequence[Update], state: GlobalState, sending: Sending) -> Measurement:
    for update in updates:
        check_facts(update, state, mixes_ranks=True)
    found = Measurement()
    squares = dict.fromkeys((update.client for update in updates), 0.0)  # ‖Δ_i‖²
    # Δ_i · Δ̄, ‖Δ̄‖² and ‖Δ_i‖² over the client's modules that are measured against their mean
    dots, means, seen = dict(squares), dict(squares), dict(squares)
    for module, names in by_module(state.tensors).items():
        holders = [update for update in updates if in_layers(module, update.kept_layers)]
        if not holders:
            continue
        current = {key: state.tensors[name] for key, name in names.items()}
        if 8 * len(holders) * sum(tensor.numel() for tensor in current.values()) > LARGEST_TABLE:
            alone = (load_part(update, names, state) for update in holders)
            found.modules[module] = _one_by_one(alone, current, sending, squares)
            continue
        parts = [load_part(update, names, state) for update in holders]
        table = _table(parts, current, sending)
        mean = table.changes.mean(dim=0)
        size = float(mean @ mean)
        norms = torch.linalg.vector_norm(table.changes, dim=1).tolist()
        products = (table.changes @ mean).tolist()
        cosines = []
        for part, norm, dot in zip(parts, norms, products, strict=True):
            squares[part.client] += norm**2
            seen[part.client] += norm**2
            dots[part.client] += dot
            means[part.client] += size
            cosines.append(_cosine(dot, norm**2, size))
        found.modules[module] = {
            "coverage_histogram": _histogram(table),
            **_summary("norm", norms),
            **_summary("cosine", cosines),
            **_cross_term(table),
        }
    for client, square in squares.items():
        found.norms[client] = math.sqrt(square)
        if seen[client]:
            found.cosines[client] = _cosine(dots[client], seen[client], means[client])
    return found


def _one_by_one(
    parts: Iterable[Part],
    current: Mapping[str, Tensor],
    sending: Sending,
    squares: dict[str, float],
) -> dict[str, Any]:
    """Return what is known of a module without its clients side by side; add to the squares."""
    norms: list[float] = []
    counts: Tensor | int = 0
    for part in parts:
        table = _table([part], current, sending)
        counts = counts + (1 if table.present is None else table.present[0].int())
        norms.append(float(torch.linalg.vector_norm(table.changes)))
        squares[part.client] += norms[-1] ** 2
    histogram = torch.bincount(torch.as_tensor(counts).expand(table.before.numel()))
    return {
        "coverage_histogram": [*histogram.tolist(), *[0] * (len(norms) + 1 - len(histogram))],
        **_summary("norm", norms),
    }


@dataclass(frozen=True)
class _Table:
    """One module of all clients: A, then B, as one row of entries each.

    Attributes:
        before: g (entries,), float64; ranks that only clients have are zero.
        changes: Δ_i (n, entries), float64.
        present: which entries each client has, bool; None where all have all.
        split: the number of entries of A, which come first.
        rank: the largest rank.
    """

    before: Tensor
    changes: Tensor
    present: Tensor | None
    split: int
    rank: int


def _table(parts: Sequence[Part], current: Mapping[str, Tensor], sending: Sending) -> _Table:
    old = [current[key] for key in _KEYS]
    rank = max(old[0].shape[0], *(part.rank for part in parts))
    before = [_padded(tensor.double(), rank, index == 0) for index, tensor in enumerate(old)]
    split = before[0].numel()
    entries = split + before[1].numel()
    changes = torch.zeros(len(parts), entries, dtype=torch.float64)
    whole = all(
        part.rank == rank and all(part.masks[key] is None for key in _KEYS) for part in parts
    )
    present = None if whole else torch.zeros(len(parts), entries, dtype=torch.bool)
    for row, part in enumerate(parts):
        ranks = sending.ranks(part.client, part.rank)
        for index, key in enumerate(_KEYS):
            place = slice(0, split) if index == 0 else slice(split, entries)
            shape, mask = before[index].shape, part.masks[key]
            if present is not None:
                held = present[row, place].view(shape)
                if mask is None:
                    held.index_fill_(index, ranks, True)
                else:
                    held.index_copy_(index, ranks, mask)
            if "AB"[index] not in sending.personal:
                change = part.tensors[key].double() - before[index].index_select(index, ranks)
                if mask is not None:
                    change.masked_fill_(~mask, 0)
                changes[row, place].view(shape).index_copy_(index, ranks, change)
    return _Table(torch.cat([tensor.flatten() for tensor in before]), changes, present, split, rank)


def _padded(tensor: Tensor, rank: int, rows: bool) -> Tensor:
    """Return A (r, k) as (rank, k), or B (d, r) as (d, rank), with zeros."""
    missing = rank - tensor.shape[0 if rows else 1]
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing) if rows else (0, missing))


def _histogram(table: _Table) -> list[int]:
    """Return how many entries 0, 1, ..., n clients have."""
    clients, entries = table.changes.shape
    if table.present is None:
        return [*[0] * clients, entries]
    counts = table.present.sum(dim=0)
    return [int(count) for count in torch.bincount(counts, minlength=clients + 1)]


def _summary(what: str, values: Sequence[float]) -> dict[str, float]:
    summary = {f"{what}_min": min(values), f"{what}_mean": sum(values) / len(values)}
    return summary | ({f"{what}_max": max(values)} if what == "norm" else {})


def _cosine(dot: float, one: float, other: float) -> float:
    """Return the cosine from the product and the squared norms; 0 where a vector is 0."""
    size = math.sqrt(one * other)
    return max(-1.0, min(1.0, dot / size)) if size else 0.0


def _cross_term(table: _Table) -> dict[str, float]:
    """Return ‖Σ p (B_i − B̄)(A_i − Ā)‖ relative to ‖B̄ Ā‖, without forming a d × k matrix.

    Where a client lacks an entry it deviates by nothing: parts of one adapter agree. With
    U = [p (B_1 − B̄), ...] (d, n r) and V = [A_1 − Ā; ...] (n r, k), ‖U V‖² is the sum of the
    products of the entries of UᵀU and V Vᵀ.
    """
    clients, rank = len(table.changes), table.rank
    if clients * rank > LARGEST_CROSS_TERM:
        return {}
    if table.present is None:
        change = table.changes.mean(dim=0)
        mean, deviations = table.before + change, table.changes - change
    else:
        count = table.present.sum(dim=0)
        change = table.changes.sum(dim=0) / count.clamp(min=1)
        mean = torch.where(count > 0, table.before + change, 0.0)
        deviations = torch.where(table.present, table.changes - change, 0.0)
    V = deviations[:, : table.split].reshape(clients * rank, -1)  # (n r, k)
    B = deviations[:, table.split :].view(clients, -1, rank)  # (n, d, r)
    U = (B / clients).transpose(0, 1).flatten(1)  # (d, n r)
    A_mean, B_mean = mean[: table.split].view(rank, -1), mean[table.split :].view(-1, rank)
    size, lost = _product_norm(B_mean, A_mean), _product_norm(U, V)
    return {"cross_term": lost / size} if size and math.isfinite(lost / size) else {}


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Return ‖left · right‖ in the Frobenius norm, to float32's precision and at its speed."""
    left, right = left.float(), right.float()
    square = float(((left.T @ left) * (right @ right.T)).sum(dtype=torch.float64))
    return math.sqrt(max(0.0, square))
