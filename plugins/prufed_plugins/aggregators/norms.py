"""Weights by the norm of what a client's adapter adds to its base, ‖B_i A_i‖_F.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
https://arxiv.org/abs/2401.06432.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from prufed_plugins.aggregators.products import factors
from prufed_plugins.aggregators.validation import check_facts
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.aggregators.whole import module_parts
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.errors import UpdateError


def norm_weights(updates: Sequence[Update], state: GlobalState) -> dict[str, float]:
    """Return weight_i · ‖B_i A_i‖_F by client; the weights alone where every norm is zero."""
    return _times(client_weights(updates, 0.0), update_norms(updates, state))


def weighed_by_norm(updates: Sequence[Update], state: GlobalState) -> list[Update]:
    """Return the updates with the weights of :func:`norm_weights`, for any aggregator.

    An update that cannot be read keeps its weight: the merge says what is wrong with it.
    """
    norms: dict[str, float] = {}
    for update in updates:
        with suppress(UpdateError):
            check_facts(update, state, mixes_ranks=True)
            norms |= update_norms([update], state)
    weights = _times({u.client: u.weight for u in updates if u.client in norms}, norms)
    return [replace(update, weight=weights.get(update.client, update.weight)) for update in updates]


def _times(weights: dict[str, float], norms: Mapping[str, float]) -> dict[str, float]:
    if not any(norms.values()):
        return weights
    # a weight of zero is no weight: a client that has not moved counts, but moves nothing
    least = max(norms.values()) * 1e-12
    return {client: weight * max(norms[client], least) for client, weight in weights.items()}


def update_norms(updates: Sequence[Update], state: GlobalState) -> dict[str, float]:
    """Return ‖B_i A_i‖_F over all modules by client, in the common scale.

    ‖B A‖² = Σ (BᵀB) ∘ (A Aᵀ), so that no d x k matrix is formed.
    """
    squares: dict[str, float] = defaultdict(float)
    for _, _, parts in module_parts(updates, state):
        for part in parts:
            one = factors(part)
            gram = (one.left.mT @ one.left) * (one.right @ one.right.mT)
            squares[part.client] += float(gram.sum())
    return {client: max(square, 0.0) ** 0.5 for client, square in squares.items()}
