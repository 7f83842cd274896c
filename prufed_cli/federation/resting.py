"""Factors that nobody trains in a round: they stay what they are, bit for bit.

The mean of equal tensors is that tensor only up to rounding, where clients differ in scaling; and a
server optimizer would move a resting factor on by its old momentum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prufed_plugins.names import split_factor

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import GlobalState, ServerOptimizer, Tuner


def resting_factors(tuners: Iterable[Tuner], round_index: int) -> frozenset[str]:
    """Return the factors, of A and B, that none of the tuners trains in this round."""
    trained: set[str] = set()
    for tuner in tuners:
        says = getattr(tuner, "trains", None)
        trained |= set("AB" if says is None else says(round_index))
    return frozenset("AB") - trained


def rested(new: GlobalState, old: GlobalState, factors: frozenset[str]) -> GlobalState:
    """Return ``new`` with the tensors of ``factors`` as they were."""
    tensors = {
        name: old.tensors[name] if split_factor(name)[1] in factors else tensor
        for name, tensor in new.tensors.items()
    }
    return replace(new, tensors=tensors)


@dataclass(frozen=True)
class RestingOptimizer:
    """A server optimizer that neither moves ``factors`` nor remembers anything of them.

    Attributes:
        inner: steps the others.
        factors: of A and B.
    """

    inner: ServerOptimizer
    factors: frozenset[str]

    def step(self, name: str, old: Tensor, aggregate: Tensor, covered: Tensor | None) -> Tensor:
        """Return the new global tensor."""
        if split_factor(name)[1] in self.factors:
            return old
        return self.inner.step(name, old, aggregate, covered)

    def state(self) -> Mapping[str, Tensor]:
        """Return the state of the optimizer inside."""
        return self.inner.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Give the optimizer inside its state back."""
        self.inner.load_state(state)
