"""What stands between the clients and every aggregator: agreement of masks, outliers, clipping.

Names, shapes and finiteness are the merge's own to check (:mod:`.aggregators.validation`); here an
update is compared with what the client was given, and with the other updates of the round.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch import Tensor

from prufed_plugins.aggregators.validation import in_order, read_mask
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.diagnostics import WHOLE, Measurement, Sending, measure
from prufed_plugins.errors import UpdateError
from prufed_plugins.names import split_factor

_FEWEST = 3
"""Clients a round needs for one to be an outlier: it is held against two others at least."""

_ORTHOGONAL: Final = 0.2
"""Cosine below which two tensors have nothing in common."""

_AS_LONG: Final = 3.0
"""An A that training has turned by as much is longer than this: 1 / 0.2 = 5 times."""

_FEW: Final = 256
"""Entries of A below which a small cosine may be chance."""

_ENOUGH: Final = 4096
"""Entries of A to look at: the cosine of unrelated ones is then 0.016 in the mean square."""

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class Screened:
    """What may be merged, and what became of the rest.

    Attributes:
        updates: by client name, the clipped ones changed.
        excluded: why, by the name of each client that was left out.
        clipped: the factor on its change, by the name of each client that was clipped.
        measured: of ``updates``, as they are merged.
    """

    updates: list[Update]
    excluded: dict[str, str]
    clipped: dict[str, float]
    measured: Measurement


def screen(
    updates: Sequence[Update],
    state: GlobalState,
    *,
    clip: float | Literal["median"] | None = None,
    outlier: float = 1000.0,
    given_masks: Mapping[str, Masks] | None = None,
    sending: Sending = WHOLE,
) -> Screened:
    """Look at a round's updates before they are merged.

    Args:
        updates: at most one per client.
        state: the global adapter before the round.
        clip: C: a change of norm above C is scaled down to C, Δ_i ← Δ_i · min(1, C / ‖Δ_i‖), over
            the whole adapter in the common scale; ``median`` is the median norm of the round.
        outlier: a change more than this many times the median of the others' is excluded, where
            there are two others or more; 0 lets all pass.
        given_masks: by client, the masks it was given; an update with others is excluded.
        sending: which part of the global adapter the clients began with.

    Raises:
        UpdateError: two updates have one name.
    """
    ordered = in_order(updates)
    excluded = _strange_masks(ordered, given_masks or {})
    excluded |= _strange_starts([u for u in ordered if u.client not in excluded], state, sending)
    ordered = [update for update in ordered if update.client not in excluded]
    measured = measure(ordered, state, sending)
    strange = _outliers(measured.norms, outlier)
    ordered = [update for update in ordered if update.client not in strange]
    norms = {client: norm for client, norm in measured.norms.items() if client not in strange}
    clipped = _factors(norms, clip)
    ordered = [
        replace(update, tensors=_Clipped(update, state, clipped[update.client], sending))
        if update.client in clipped
        else update
        for update in ordered
    ]
    if strange or clipped:
        measured = measure(ordered, state, sending)
    return Screened(ordered, excluded | strange, clipped, measured)


def _strange_masks(updates: Sequence[Update], given: Mapping[str, Masks]) -> dict[str, str]:
    """Return the clients that sent other masks than they were given, and where."""
    found = {}
    for update in updates:
        if update.client in given:
            name = _first_difference(update, given[update.client])
            if name is not None:
                found[update.client] = f"its mask of {name} is not the one it was given"
    return found


def _first_difference(update: Update, given: Masks) -> str | None:
    masked: set[str] = {*given, *(update.masks or {})}
    for name in sorted(masked & set(update.tensors)):
        try:
            sent = read_mask(update, name)
        except UpdateError:
            return name
        # a mask of ones is no mask
        one, other = (m is None or bool(m.all()) for m in (sent, given.get(name)))
        if one and other:
            continue
        if one != other or not torch.equal(sent, given[name].cpu()):  # type: ignore[arg-type]
            return name
    return None


def _strange_starts(
    updates: Sequence[Update], state: GlobalState, sending: Sending
) -> dict[str, str]:
    """Return the clients whose A did not begin as the global one.

    Training adds a change that hardly points against A, so an A that is nearly orthogonal to the
    one it began as is many times longer. One that is as long, and orthogonal, was drawn anew:
    averaging it with the others' is averaging noise.
    """
    found = {}
    known = not sending.own and "A" not in sending.personal
    for update in updates if known else ():
        try:
            cosine, growth = _direction_of_a(
                update, state, sending.ranks(update.client, update.rank)
            )
        except (UpdateError, RuntimeError, KeyError, IndexError):
            continue  # a tensor that cannot be read or does not fit: the merge says which
        if cosine < _ORTHOGONAL and 1 / _AS_LONG < growth < _AS_LONG:
            found[update.client] = (
                f"its A is another than the one it was given (cosine {cosine:.2f}): all clients "
                "must begin with the global adapter's"
            )
    return found


def _direction_of_a(update: Update, state: GlobalState, ranks: Tensor) -> tuple[float, float]:
    """Return the cosine between A_i and g, and ‖A_i‖ / ‖g‖, over the first modules it has.

    Both are over the entries that the client has, in the common scale; 1 where there are too few.
    """
    known = (ranks < state.rank).nonzero().flatten()
    scale = math.sqrt(update.scaling / state.scaling)
    dot = own = given = 0.0
    entries = 0
    for name in state.tensors:
        if entries >= _ENOUGH or split_factor(name)[1] != "A" or name not in update.tensors:
            continue
        sent = update.tensors[name].double().index_select(0, known) * scale
        before = state.tensors[name].double().index_select(0, ranks[known])
        mask = read_mask(update, name)
        if mask is not None:
            present = mask.index_select(0, known)
            sent, before = sent[present], before[present]
        dot += float((sent * before).sum())
        own += float(sent.square().sum())
        given += float(before.square().sum())
        entries += before.numel()
    if entries < _FEW or not (own and given and math.isfinite(own)):
        return 1.0, 1.0
    return dot / math.sqrt(own * given), math.sqrt(own / given)


def _outliers(norms: Mapping[str, float], limit: float) -> dict[str, str]:
    if not limit or len(norms) < _FEWEST:
        return {}
    found = {}
    for client, norm in norms.items():
        usual = statistics.median(other for name, other in norms.items() if name != client)
        if usual and norm > limit * usual:
            found[client] = (
                f"its update has norm {norm:.3g}, {norm / usual:.3g} times the median of the others"
            )
    return found


def _factors(
    norms: Mapping[str, float], clip: float | Literal["median"] | None
) -> dict[str, float]:
    if clip is None or not norms:
        return {}
    limit = statistics.median(norms.values()) if clip == "median" else clip
    return {client: limit / norm for client, norm in norms.items() if norm > limit}


class _Clipped(Mapping[str, Tensor]):
    """A client's tensors with their change from the global adapter scaled down, read on access."""

    def __init__(self, update: Update, state: GlobalState, factor: float, sending: Sending) -> None:
        self._update, self._state, self._factor = update, state, factor
        self._personal = sending.personal
        self._ranks = sending.ranks(update.client, update.rank)
        self._scale = math.sqrt(state.scaling / update.scaling)  # from the common to its own

    def __getitem__(self, name: str) -> Tensor:
        _, factor = split_factor(name)
        if factor in self._personal:
            return self._update.tensors[name]
        tensor = self._update.tensors[name].double()
        before = torch.zeros_like(tensor)  # a rank that the global adapter lacks starts from zero
        dim = 0 if factor == "A" else 1
        known = (self._ranks < self._state.rank).nonzero().flatten()
        sent = self._state.tensors[name].double().index_select(dim, self._ranks[known])
        before.index_copy_(dim, known, sent * self._scale)
        changed = before + self._factor * (tensor - before)
        mask = read_mask(self._update, name)
        return (changed if mask is None else torch.where(mask, changed, 0.0)).float()

    def __contains__(self, name: object) -> bool:
        return name in self._update.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._update.tensors)

    def __len__(self) -> int:
        return len(self._update.tensors)
