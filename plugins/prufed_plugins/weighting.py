"""How an aggregator weighs the clients, as far as that is known before they train.

The parameters of an aggregator say it by a property ``weighting``; those that have a ``beta`` and
say nothing mean ``w_i = weight_i · n_i^β``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True)
class Weighting:
    """What a client counts beside the others.

    Attributes:
        words: the rule, for people.
        beta: β of ``w_i = weight_i · n_i^β``; None where the weights are something else.
        extra: whether weight_i, which a user gives, changes anything.
    """

    words: str
    beta: float | None = None
    extra: bool = True

    def shares(self, weights: list[float], samples: list[int]) -> list[float] | None:
        """Return each client's share of the sum of all w_i; None where they are not known yet.

        Args:
            weights: weight_i, positive.
            samples: n_i ≥ 1, in the same order.
        """
        if self.beta is None:
            return None
        found = [w * n**self.beta for w, n in zip(weights, samples, strict=True)]
        return [one / sum(found) for one in found]


def by_samples(beta: float) -> Weighting:
    """Return ``w_i = weight_i · n_i^β``: 0 counts clients, 1 counts rows."""
    words = {0.0: "all clients alike", 1.0: "by rows"}.get(float(beta), f"by rows^{beta:g}")
    return Weighting(f"{words}, w = weight · n^{beta:g}", beta)


def weighting_of(params: BaseModel) -> Weighting:
    """Return how the aggregator with these parameters weighs the clients."""
    own = getattr(params, "weighting", None)
    if isinstance(own, Weighting):
        return own
    beta = getattr(params, "beta", None)
    if isinstance(beta, int | float):
        return by_samples(beta)
    return Weighting("found by the method in each round")
