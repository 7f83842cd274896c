"""RoLoRA: the factors take turns (Chen et al. 2024, https://arxiv.org/abs/2409.02346)."""

from __future__ import annotations

from collections.abc import Callable

from prufed_plugins.api import AdaptedModel, Factors, TrainingData, TuneResult, TuneStep
from prufed_plugins.params import RoloraParams
from prufed_plugins.tuners.training import train


class RoloraTuner:
    """LoRA that trains B in the first, third, ... round of the run and A in the others.

    The factor that rests is the same for all clients, so averaging factors is exact in every round,
    as with a frozen A, but A learns too. The turn is the run's, not the client's.
    """

    def __init__(self, params: RoloraParams) -> None:
        self.params = params

    def trains(self, round_index: int) -> Factors:
        """Return the factor whose turn it is; ``round_index`` is 0 in the first round."""
        return "B" if round_index % 2 == 0 else "A"

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
        """Return the adapter with one factor trained and the other untouched, bit for bit."""
        return train(
            model,
            data,
            self.params,
            seed=seed,
            on_step=on_step,
            pad_token_id=pad_token_id,
            factors=self.trains(round_index),
        )
