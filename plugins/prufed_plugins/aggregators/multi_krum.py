"""Multi-Krum: the mean of the several updates that lie closest to the others.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
https://arxiv.org/abs/1703.02757.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from prufed_plugins.aggregators.krum import Krum
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.errors import MethodError
from prufed_plugins.params import MultiKrumParams


class MultiKrum(Krum):
    """g' = the coverage-normalised mean of the m clients of least Krum score; m = n - f if not set.

    Clients weigh by their extra weight alone: what they say of their samples cannot be trusted.
    """

    name: ClassVar[str] = "multi-krum"

    def __init__(self, params: MultiKrumParams) -> None:
        super().__init__(params)
        self._select = params.select
        self.breaks = {
            "C1": "entries that only clients left out have stay as they were",
            "C4": "the clients furthest from the others are left out of the mean",
            "C7": "it takes 2 f + 3 clients",
            "C12": "distances are those of the whole update",
        }

    def prepare(self, updates: Sequence[Update], state: GlobalState) -> None:
        """Note the updates; the choice is made at the first merge.

        Raises:
            MethodError: there are fewer than 2 f + 3 clients, or than are to be selected.
        """
        super().prepare(updates, state)
        if self._select is not None and self._select > len(updates):
            raise MethodError(
                f"multi-krum is to select {self._select} of {len(updates)} clients",
                f"set select to at most {len(updates)}",
            )

    def _number(self) -> int:
        return len(self._updates) - self._byzantine if self._select is None else self._select
