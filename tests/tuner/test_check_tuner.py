"""The kit must catch a tuner that breaks the contract, each break by its own check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from prufed_plugins.api import AdaptedModel, TrainingData, TuneResult, TuneStep
from prufed_plugins.params import LoraParams
from prufed_plugins.testing import check_tuner
from prufed_plugins.tuners.ffa import FfaTuner
from prufed_plugins.tuners.lora import LoraTuner


class Faulty(LoraTuner):
    """Trains properly, but for the one thing ``spoil`` does to model and result."""

    def __init__(
        self,
        before: Callable[[AdaptedModel], Any] = lambda model: None,
        after: Callable[[AdaptedModel, TuneResult], TuneResult] = lambda model, result: result,
        seeded: bool = True,
        rename: Callable[[TuneStep], TuneStep] = lambda step: step,
    ) -> None:
        super().__init__(LoraParams(batch_size=8))
        self.before, self.after, self.seeded, self.rename = before, after, seeded, rename

    def tune(
        self,
        model: AdaptedModel,
        data: TrainingData,
        seed: int,
        on_step: Callable[[TuneStep], None],
        **rest: Any,
    ) -> TuneResult:
        self.before(model)
        seed = seed if self.seeded else torch.seed() % 2**31
        result = super().tune(model, data, seed, lambda step: on_step(self.rename(step)), **rest)
        return self.after(model, result)


def _fill(model: AdaptedModel) -> None:
    model.project = lambda: [p.data.add_(1e-3) for p in model.parameters.values()]  # type: ignore


def _dense(model: AdaptedModel, result: TuneResult) -> TuneResult:
    return replace(result, tensors={n: t + 1e-6 for n, t in result.tensors.items()})


def _half(model: AdaptedModel, result: TuneResult) -> TuneResult:
    return replace(result, tensors={n: t.half() for n, t in result.tensors.items()})


def _touch_base(model: AdaptedModel) -> None:
    for parameter in model.module.parameters():
        if not parameter.requires_grad:
            parameter.data.mul_(1.01)


def _forget(model: AdaptedModel, result: TuneResult) -> TuneResult:
    return replace(result, losses=result.losses[:-1])


def _train_mode(model: AdaptedModel, result: TuneResult) -> TuneResult:
    model.module.train()
    return result


def _swallow(model: AdaptedModel) -> None:
    for parameter in model.module.parameters():
        parameter.data.nan_to_num_()


def _prune(model: AdaptedModel, result: TuneResult) -> TuneResult:
    return replace(result, rank=2)


def _prune_all(model: AdaptedModel, result: TuneResult) -> TuneResult:
    return replace(result, rank=0)


class Restless(FfaTuner):
    """Says that it leaves A alone, and trains it."""

    def __init__(self) -> None:
        super().__init__(LoraParams(batch_size=8))

    def tune(self, model: AdaptedModel, *args: Any, **rest: Any) -> TuneResult:
        return LoraTuner(LoraParams(batch_size=8)).tune(model, *args, **rest)


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (lambda: Faulty(after=_half), "returns_the_adapter"),
        (lambda: Faulty(after=_dense), "holds_masks_at_every_step"),
        (Restless, "leaves_resting_factors_alone"),
        (lambda: Faulty(after=_prune), "says_how_many_ranks_stay"),
        (lambda: Faulty(after=_prune_all), "says_how_many_ranks_stay"),
        (lambda: Faulty(before=_fill), "holds_masks_at_every_step"),
        (lambda: Faulty(before=_touch_base), "leaves_the_base_alone"),
        (lambda: Faulty(after=_train_mode), "leaves_the_base_alone"),
        (lambda: Faulty(after=_forget), "counts_its_steps"),
        (lambda: Faulty(rename=lambda s: replace(s, step=s.step - 1)), "counts_its_steps"),
        (lambda: Faulty(seeded=False), "is_decided_by_its_seed"),
        (lambda: Faulty(before=lambda model: torch.rand(1)), "leaves_global_generators_alone"),
        (lambda: Faulty(before=_swallow), "refuses_a_loss_that_is_not_finite"),
    ],
)
def test_the_kit_catches(make: Callable[[], LoraTuner], check: str) -> None:
    failed = {found.name: found.failure for found in check_tuner(make).checks if not found.passed}
    assert check in failed


def test_the_kit_catches_a_tuner_that_does_nothing() -> None:
    class Idle(LoraTuner):
        def tune(self, model: AdaptedModel, *args: Any, **kwargs: Any) -> TuneResult:
            return TuneResult(tensors=model.state(), losses=[], tokens=0)

    outcome = check_tuner(lambda: Idle(LoraParams()))
    failed = {check.name for check in outcome.checks if not check.passed}
    assert {"changes_the_adapter", "counts_its_steps"} <= failed
    with pytest.raises(AssertionError, match="changes_the_adapter"):
        outcome.require()
