"""User-centric aggregation: every client gets the mean of those whose data pull as its own do.

Mestoukirdi et al., "User-Centric Federated Learning: Trading off Wireless Resources for
Personalization", https://arxiv.org/abs/2304.12930.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prufed_plugins.aggregators.coverage import coverage_mean
from prufed_plugins.aggregators.coverage_sum import Array
from prufed_plugins.aggregators.distances import pairwise_distances
from prufed_plugins.aggregators.ranks import padded
from prufed_plugins.aggregators.validation import read_mask
from prufed_plugins.aggregators.weights import client_weights
from prufed_plugins.api import FirstGradient, GlobalState, Merged, Part, Update
from prufed_plugins.params import UserCentricParams


class UserCentric:
    """Client i gets Σ_j w_ij θ_j over the clients j of the round that have the entry, Σ_j w_ij = 1.

    Before the first round, every client says what its data want of the first adapter: its gradient
    ∇_i and the variance σ_i² of its mini-batches. Then, once for all rounds::

        Δ_ij = ‖∇_i - ∇_j‖²      w_ij = exp(-Δ_ij / 2 σ_i σ_j) / Σ_j' exp(-Δ_ij' / 2 σ_i σ_j')

    Clients alike up to the noise of a mini-batch share alike; one unlike all others keeps its own.
    Two clients are compared on the entries that both have, Δ scaled to all entries as σ² is; with
    less than 5 % in common they share nothing.

    To spare the downlink, clients whose rows of w are near one another share a mean: ``streams``
    groups, found by k-means on the rows, each with the mean of its rows.

    There is no global model in the paper: the global adapter is the plain mean over the clients
    that have each entry, for evaluation, and no client is given it. Ranks, layers and masks may
    differ.
    """

    mixes_ranks = True

    def __init__(self, params: UserCentricParams) -> None:
        self._params = params
        self._weights: dict[str, float] = {}
        self.batch_size = params.batch_size
        self.batches = params.batches

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights."""
        self._weights = client_weights(updates, self._params.beta)

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the mean of all clients."""
        return coverage_mean(padded(parts, current), current, self._weights)

    def similarities(
        self, gradients: Sequence[FirstGradient], state: GlobalState
    ) -> dict[str, dict[str, float]]:
        """Return w_ij by i and j, in the order of the names; every row sums to 1."""
        ordered = sorted(gradients, key=lambda gradient: gradient.update.client)
        zero = {name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()}
        distances = pairwise_distances([g.update for g in ordered], replace(state, tensors=zero))
        distances.fill_diagonal_(0.0)
        entries = sum(tensor.numel() for tensor in state.tensors.values())
        deviations = [
            math.sqrt(gradient.variance * entries / present(gradient.update))
            for gradient in ordered
        ]
        weights = _weights(distances, torch.tensor(deviations, dtype=torch.float64))
        if self._params.streams is not None:
            weights = in_streams(weights, self._params.streams)
        names = [gradient.update.client for gradient in ordered]
        return {
            name: dict(zip(names, row, strict=True))
            for name, row in zip(names, weights.tolist(), strict=True)
        }

    def for_client(self, weights: Mapping[str, float]) -> SimilarMean:
        """Return what merges the adapter of the client with these w_ij by j."""
        return SimilarMean(weights, self._params.beta)


class SimilarMean:
    """One client's own mean: Σ_j w_ij θ_j / Σ_j w_ij over the clients j that have the entry.

    With ``beta``, w_ij n_j^β takes the place of w_ij. What no similar client has stays.
    """

    mixes_ranks = True

    def __init__(self, similarities: Mapping[str, float], beta: float) -> None:
        self._similarities = similarities
        self._beta = beta
        self._weights: dict[str, float] = {}

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Take the weights."""
        sizes = client_weights(updates, self._beta)
        self._weights = {name: self._similarities[name] * size for name, size in sizes.items()}

    def merge(self, module: str, parts: Iterable[Part], current: Mapping[str, Tensor]) -> Merged:
        """Return the mean."""
        alike = (part for part in padded(parts, current) if self._weights[part.client] > 0)
        return coverage_mean(alike, current, self._weights)


def present(update: Update) -> int:
    """Return how many entries a client has."""
    masks = {name: read_mask(update, name) for name in update.tensors}
    return sum(
        update.tensors[name].numel() if mask is None else int(mask.sum())
        for name, mask in masks.items()
    )


def in_streams(weights: Tensor, streams: int | Literal["auto"]) -> Tensor:
    """Return w with every row replaced by the mean row of its group.

    Args:
        weights: w (n, n).
        streams: how many groups to make at most; ``auto`` takes the number, from 2 to n - 1, at
            which the mean silhouette is largest, and leaves rows alone where none is above 0.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    rows = weights.numpy()
    different = len(np.unique(rows, axis=0))

    def groups(number: int) -> Array:
        found: Array = KMeans(number, n_init=10, random_state=0).fit_predict(rows)
        return found

    if streams != "auto":
        labels = groups(min(streams, different))
    else:
        tried = [groups(number) for number in range(2, min(different, len(rows) - 1) + 1)]
        scores = [float(silhouette_score(rows, labels)) for labels in tried]
        if max(scores, default=0.0) <= 0:
            return weights
        labels = tried[scores.index(max(scores))]
    means = np.stack([rows[labels == label].mean(axis=0) for label in labels])
    return torch.from_numpy(means)


def _weights(distances: Tensor, deviations: Tensor) -> Tensor:
    """Return w (n, n) from Δ (n, n), infinite where two are not comparable, and σ (n,)."""
    scale = 2 * deviations[:, None] * deviations[None, :]
    # without any noise, only those alike to the last bit are alike
    exponents = torch.where(distances == 0, 0.0, distances / scale)
    return torch.softmax(-exponents, dim=1)
