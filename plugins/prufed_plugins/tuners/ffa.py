"""FFA-LoRA: A stays what it was at the start (Sun et al. 2024, https://arxiv.org/abs/2403.12313)."""

from __future__ import annotations

from prufed_plugins.api import Factors
from prufed_plugins.tuners.lora import LoraTuner


class FfaTuner(LoraTuner):
    """LoRA that trains B alone, and sends B alone.

    With one A for all clients the mean of the products is the product of the mean,
    ``Σ p_i B_i A = (Σ p_i B_i) A``: averaging factors loses nothing.
    """

    def trains(self, round_index: int) -> Factors:
        """Return ``B``, in every round."""
        return "B"
