"""RoLoRA: the factors take turns (Chen et al. 2024, https://arxiv.org/abs/2409.02346)."""

from __future__ import annotations

from prufed_plugins.api import Factors
from prufed_plugins.tuners.lora import LoraTuner


class RoloraTuner(LoraTuner):
    """LoRA that trains, and sends, B in the first, third, ... round of the run, A in the others.

    The factor that rests is the same for all clients, so averaging factors is exact in every round,
    as with a frozen A, but A learns too. The turn is the run's, not the client's.
    """

    def trains(self, round_index: int) -> Factors:
        """Return the factor whose turn it is; ``round_index`` is 0 in the first round."""
        return "B" if round_index % 2 == 0 else "A"
