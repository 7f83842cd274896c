"""FLTrust: clients count by how far they agree with an update of the server's own.

Cao et al., "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping",
https://arxiv.org/abs/2012.13995, Algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.ranks import padded
from prufed_plugins.aggregators.whole import module_parts
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.errors import MethodError
from prufed_plugins.params import FLTrustParams


@dataclass(frozen=True)
class Standing:
    """What becomes of one client.

    Attributes:
        trust: TS_i in [0, 1].
        scale: factor on its change.
    """

    trust: float
    scale: float


class FLTrust:
    """g' = g + Σ TS_i c_i Δ_i / Σ TS_i, with TS_i = ReLU(cos(Δ_i, Δ_0)) and c_i = ‖Δ_0‖ / ‖Δ_i‖.

    Δ_0 is the change of the server's own update, trained on its root data from the same global
    adapter. A and B of all modules count as one vector; where a client has masks, layers or ranks
    of its own, it is held against Δ_0 on what it has, and every entry is the mean over the clients
    that have it. Where nobody is trusted, nothing changes. Clients weigh by their trust and their
    extra weight: what they say of their samples cannot be trusted.

    The diagnostic ``trust.<client>`` is TS_i.
    """

    mixes_ranks = True
    breaks: ClassVar[Mapping[str, str]] = {
        "C1": "changes get the length of the server's own",
        "C4": "clients weigh by their agreement with the server",
        "C7": "a change gets the length of the server's own",
        "C12": "agreement is that of the whole update",
    }

    def __init__(self, params: FLTrustParams) -> None:
        self._params = params
        self._root: Update | None = None
        self._updates: Sequence[Update] = ()
        self._standings: Callable[[], Mapping[str, Standing]] = dict

    def trust(self, root: Update) -> None:
        """Take the server's own update of the round."""
        self._root = root

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Note the updates; they are held against the server's at the first merge."""
        self._updates = updates
        self._standings = cache(partial(self._compare, updates, state))

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the trusted mean; whole updates are read once before the first."""
        standings = self._standings()
        weights = {u.client: standings[u.client].trust * u.weight for u in self._updates}
        trusted = (part for part in padded(parts, current) if weights[part.client] > 0)
        merged = coverage_mean(_rescaled(trusted, current, standings), current, weights)
        shown = {f"trust.{client}": standing.trust for client, standing in standings.items()}
        return replace(merged, diagnostics={**merged.diagnostics, **shown})

    def _compare(self, updates: Sequence[Update], state: GlobalState) -> Mapping[str, Standing]:
        if self._root is None:
            raise MethodError(
                "fltrust has no update of the server's own to hold the clients against",
                "give server_data in clients.yaml: rows that the server trusts",
            )
        return standings_of(updates, self._root, state)


def standings_of(
    updates: Sequence[Update], root: Update, state: GlobalState
) -> dict[str, Standing]:
    """Return each client's trust, and the factor that gives its change the root's length.

    Args:
        updates: of the clients.
        root: the server's own; entries and ranks that it lacks it does not change.
        state: the global adapter before the round, from which all of them started.

    Raises:
        UpdateError: a tensor is not what it should be.
    """
    dots, own, roots = (dict.fromkeys((u.client for u in updates), 0.0) for _ in range(3))
    both = zip(module_parts(updates, state), module_parts([root], state), strict=True)
    for (_, current, parts), (_, _, servers) in both:
        server = next(iter(padded(servers, current)))
        theirs = {k: _change(server.tensors[k], old, server.masks[k]) for k, old in current.items()}
        for part in padded(parts, current):
            for key, old in current.items():
                change, mask = _change(part.tensors[key], old, part.masks[key]), part.masks[key]
                wanted = theirs[key] if mask is None else torch.where(mask, theirs[key], 0.0)
                dots[part.client] += float((change * wanted).sum())
                own[part.client] += float(change.square().sum())
                roots[part.client] += float(wanted.square().sum())
    found = {}
    for client, dot in dots.items():
        sizes = math.sqrt(own[client] * roots[client])
        trust = max(0.0, dot / sizes) if sizes else 0.0
        scale = math.sqrt(roots[client] / own[client]) if own[client] else 0.0
        found[client] = Standing(trust, scale)
    return found


def _change(tensor: Tensor, old: Tensor, mask: Tensor | None) -> Tensor:
    """Return Δ in float64, 0 where masked out."""
    change = tensor.double() - old.double()
    return change if mask is None else torch.where(mask, change, 0.0)


def _rescaled(
    parts: Iterable[Part], current: Mapping[str, Tensor], standings: Mapping[str, Standing]
) -> Iterator[Part]:
    """Yield the parts with g + c_i Δ_i for their tensors."""
    for part in parts:
        scale = standings[part.client].scale
        tensors = {
            key: old.double() + scale * _change(part.tensors[key], old, part.masks[key])
            for key, old in current.items()
        }
        yield replace(part, tensors=tensors)
