"""FFA-LoRA: A stays what it was at the start (Sun et al. 2024, https://arxiv.org/abs/2403.12313)."""

from __future__ import annotations

from collections.abc import Callable

from prufed_plugins.api import AdaptedModel, Factors, TrainingData, TuneResult, TuneStep
from prufed_plugins.params import FfaParams
from prufed_plugins.tuners.training import train


class FfaTuner:
    """LoRA that trains B alone.

    With one A for all clients the mean of the products is the product of the mean,
    ``Σ p_i B_i A = (Σ p_i B_i) A``: averaging factors loses nothing.
    """

    def __init__(self, params: FfaParams) -> None:
        self.params = params

    def trains(self, round_index: int) -> Factors:
        """Return ``B``, in every round."""
        return "B"

    def tune(
        self,
        model: AdaptedModel,
        data: TrainingData,
        seed: int,
        on_step: Callable[[TuneStep], None],
        *,
        round_index: int,
        pad_token_id: int,
    ) -> TuneResult:
        """Return the adapter with B trained and A untouched, bit for bit."""
        return train(
            model,
            data,
            self.params,
            seed=seed,
            on_step=on_step,
            pad_token_id=pad_token_id,
            factors=self.trains(round_index),
        )
