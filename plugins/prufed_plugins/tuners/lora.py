"""The default tuner: AdamW on the adapter's tensors, linear decay, masks held exactly."""

from __future__ import annotations

from collections.abc import Callable

from prufed_plugins.api import AdaptedModel, Factors, TrainingData, TuneResult, TuneStep
from prufed_plugins.params import LoraParams
from prufed_plugins.tuners.training import Penalty, train


class LoraTuner:
    """LoRA fine-tuning (2106.09685) with the recipe of the LEGO paper's runs (2410.18287, A.4).

    The tuners that train alike but for one thing override that: which factors of a round are
    trained, or what is added to the loss.
    """

    def __init__(self, params: LoraParams) -> None:
        self._settings = params

    def trains(self, round_index: int) -> Factors:
        """Return the factors that are trained; ``round_index`` is 0 in the first round."""
        return "AB"

    def penalty(self, model: AdaptedModel) -> Penalty | None:
        """Return what adds to the gradients of every step; asked for once, before the first."""
        return None

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

        The optimizer and its decay start anew with each call. The losses are those of the text
        alone; a factor that is not trained stays as it was, bit for bit.
        """
        return train(
            model,
            data,
            self._settings,
            seed=seed,
            on_step=on_step,
            pad_token_id=pad_token_id,
            factors=self.trains(round_index),
            penalty=self.penalty(model),
        )
