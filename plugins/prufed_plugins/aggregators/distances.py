"""How far the clients' updates lie apart, each taken as one vector over all modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prufed_plugins.aggregators.stacking import deltas, stack
from prufed_plugins.aggregators.whole import module_parts
from prufed_plugins.api import GlobalState, Update

LEAST_OVERLAP = 0.05
"""Share of all entries that two clients must both have to be compared."""


def pairwise_distances(updates: Sequence[Update], state: GlobalState) -> Tensor:
    """Return the squared distances (n, n) of the clients' changes Δ_i, in float64.

    Of two clients, the entries that both have are compared, and the sum is scaled to all D entries
    of the global adapter: ‖(Δ_i - Δ_j) m_i m_j‖² · D / |m_i m_j|. It is infinite where they share
    less than 5 % of the entries, and on the diagonal.

    Memory is n times one module in float64.
    """
    place = {update.client: index for index, update in enumerate(updates)}
    count = len(updates)
    squares = torch.zeros(count, count, dtype=torch.float64)
    shared = torch.zeros(count, count, dtype=torch.float64)
    for _, current, parts in module_parts(updates, state):
        clients, stacks = stack(parts, current)
        rows = torch.tensor([place[client] for client in clients])
        for key, one in stacks.items():
            changes = deltas(one, current[key]).flatten(1)
            present = one.present.flatten(1)
            for index, row in enumerate(rows.tolist()):
                both = present & present[index]
                apart = torch.where(both, changes - changes[index], 0.0)
                squares[row, rows] += apart.square().sum(dim=1)
                shared[row, rows] += both.sum(dim=1)
    entries = sum(tensor.numel() for tensor in state.tensors.values())
    comparable = shared >= LEAST_OVERLAP * entries
    distances = torch.where(comparable, squares * entries / shared.clamp(min=1), torch.inf)
    return distances.fill_diagonal_(torch.inf)
