"""How much each client counts: w_i = weight_i · n_i^β."""

from __future__ import annotations

from collections.abc import Sequence

from prufed_plugins.api import Update


def client_weights(updates: Sequence[Update], beta: float) -> dict[str, float]:
    """Return w_i by client: β = 0 counts clients, β = 1 counts samples as FedAvg does.

    Only ratios matter. Equal weights come back as 1, which spares a product per entry.
    """
    weights = {update.client: update.weight * update.samples**beta for update in updates}
    if len(set(weights.values())) == 1:
        return dict.fromkeys(weights, 1.0)
    return weights
