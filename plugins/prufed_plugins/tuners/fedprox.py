"""FedProx: clients are held near the global adapter (Li et al. 2018, arXiv 1812.06127)."""

from __future__ import annotations

from collections.abc import Callable

from prufed_plugins.api import AdaptedModel, TrainingData, TuneResult, TuneStep
from prufed_plugins.params import FedProxParams
from prufed_plugins.tuners.training import train


class FedProxTuner:
    """LoRA on ``loss + μ/2 ‖θ − θ_g‖²``, θ_g being the adapter that the client was sent.

    The losses it reports are those of the text alone.
    """

    def __init__(self, params: FedProxParams) -> None:
        self.params = params

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
        """Return the trained adapter tensors; ``round_index`` changes nothing."""
        return train(
            model,
            data,
            self.params,
            seed=seed,
            on_step=on_step,
            pad_token_id=pad_token_id,
            mu=self.params.mu,
        )
