"""The default tuner: AdamW on the adapter's tensors, linear decay, masks held exactly."""

from __future__ import annotations

from collections.abc import Callable

from prufed_plugins.api import AdaptedModel, TrainingData, TuneResult, TuneStep
from prufed_plugins.params import LoraParams
from prufed_plugins.tuners.training import train


class LoraTuner:
    """LoRA fine-tuning (2106.09685) with the recipe of the LEGO paper's runs (2410.18287, A.4)."""

    def __init__(self, params: LoraParams) -> None:
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
        """Return the trained adapter tensors; see :func:`prufed_plugins.tuners.training.train`.

        The optimizer and its decay start anew with each call, so ``round_index`` changes nothing.
        """
        return train(
            model, data, self.params, seed=seed, on_step=on_step, pad_token_id=pad_token_id
        )
