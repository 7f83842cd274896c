"""DARE: drop most of every client's changes at random and scale up the rest, then merge.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
Lunch", https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from prufed_plugins.aggregators.stacking import Stack, assemble, deltas, stack
from prufed_plugins.aggregators.ties import elected_mean
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import GlobalState, Merged, Part, Update
from prufed_plugins.params import DareParams


class Dare:
    """g' = g + merge of z_i Δ_i / (1 - p) with z_i[e] = 0 with probability p, else 1.

    In expectation every Δ_i is what it was. ``then`` says how they are merged: their mean over the
    clients that have the entry, dropped ones included, or the mean of those that agree with the
    elected sign, as ``ties`` does without trimming. The draw depends on the seed, the round, the
    client and the tensor's name alone. Ranks, layers and masks may differ.
    """

    mixes_ranks = True
    breaks: ClassVar[Mapping[str, str]] = {
        "C1": "changes are dropped at random",
        "C4": "changes are dropped at random",
        "C7": "changes are dropped at random",
        "C9": "changes scaled up tenfold have ten times the rounding error",
        "C12": "what is dropped is drawn for the whole tensor",
        "C13": "what is dropped is drawn by the tensor's name",
    }

    def __init__(self, params: DareParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}
        self._rounds: dict[str, int] = {}

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights and the round."""
        self._weights = client_weights(updates, 0.0)
        self._rounds = {update.client: update.base_round for update in updates}

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the old tensors plus what is left of the changes, merged."""
        clients, stacks = stack(parts, current)
        weights = torch.tensor([self._weights[c] for c in clients], dtype=torch.float64)
        values = {}
        for key, one in stacks.items():
            kept = torch.stack([self._draw(c, f"{module}.{key}", one) for c in clients])
            changes = torch.where(kept, deltas(one, current[key]) / (1 - self._params.drop), 0.0)
            if self._params.then == "ties":
                step = elected_mean(changes, one.present & kept, weights)
            else:
                scale = weights.reshape(-1, 1, 1)
                share = (one.present * scale).sum(dim=0)
                total = (changes * scale).sum(dim=0)
                step = torch.where(share > 0, total / torch.where(share > 0, share, 1.0), 0.0)
            values[key] = current[key].double() + step
        return assemble(values, stacks, current)

    def _draw(self, client: str, name: str, one: Stack) -> Tensor:
        """Return which entries of one client's tensor are kept."""
        shape = one.values.shape[1:]
        text = json.dumps(["dare", self._params.seed, self._rounds[client], client, name])
        entropy = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
        # raw output: numpy promises that stream for ever, Generator's it does not
        draws = np.random.PCG64(entropy).random_raw(shape.numel())
        return torch.from_numpy(draws >= np.uint64(self._params.drop * 2.0**64)).reshape(shape)
