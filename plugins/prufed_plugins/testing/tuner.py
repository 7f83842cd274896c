"""What every tuner must do.

The model is a two-layer Llama with random weights and low-rank updates on ``q_proj``, half of whose
entries are masked out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prufed_plugins.api import TrainingData, Tuner, TuneResult, TuneStep
from prufed_plugins.errors import MethodError
from prufed_plugins.factor_masks import nested_mask
from prufed_plugins.names import split_factor
from prufed_plugins.testing.checks import Outcome, run_checks

RANK = 4
VOCABULARY = 32


def check_tuner(make: Callable[[], Tuner]) -> Outcome:
    """Run every check on a tuner.

    Args:
        make: constructs it; called once per check.
    """
    return run_checks(
        make,
        (
            returns_the_adapter,
            changes_the_adapter,
            leaves_resting_factors_alone,
            says_how_many_ranks_stay,
            holds_masks_at_every_step,
            leaves_the_base_alone,
            counts_its_steps,
            is_decided_by_its_seed,
            leaves_global_generators_alone,
            refuses_a_loss_that_is_not_finite,
        ),
    )


def returns_the_adapter(tuner: Tuner) -> None:
    """It returns finite float32 CPU tensors of the adapter's names and shapes."""
    model = LowRankModel()
    before = model.state()
    result = _tune(tuner, model)
    assert result.tensors.keys() == before.keys(), f"it returned {sorted(result.tensors)}"
    for name, tensor in result.tensors.items():
        assert tensor.shape == before[name].shape, f"{name} became {list(tensor.shape)}"
        assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
        assert tensor.device.type == "cpu", f"{name} is on {tensor.device}"
        assert bool(torch.isfinite(tensor).all()), f"{name} is not finite"


def changes_the_adapter(tuner: Tuner) -> None:
    """Training changes at least one tensor."""
    model = LowRankModel()
    before = model.state()
    after = _tune(tuner, model).tensors
    assert any(not torch.equal(after[name], before[name]) for name in before), "nothing changed"


def leaves_resting_factors_alone(tuner: Tuner) -> None:
    """A factor that its ``trains`` does not name for a round comes back bit for bit."""
    trains = getattr(tuner, "trains", None)
    for round_index in (0, 1):
        model = LowRankModel()
        before = model.state()
        result = _tune(tuner, model, round_index=round_index)
        for name, tensor in result.tensors.items():
            if trains is not None and split_factor(name)[1] not in trains(round_index):
                assert torch.equal(tensor, before[name]), f"{name} changed in round {round_index}"


def says_how_many_ranks_stay(tuner: Tuner) -> None:
    """Where ranks go, 1 to r of them stay, and its ``prunes_ranks`` says that they may go."""
    rank = _tune(tuner, LowRankModel()).rank
    assert rank is None or 1 <= rank <= RANK, f"it keeps {rank} of {RANK} ranks"
    pruned = rank is not None and rank < RANK
    assert not pruned or getattr(tuner, "prunes_ranks", False), "it prunes ranks unsaid"


def holds_masks_at_every_step(tuner: Tuner) -> None:
    """Masked-out entries are exactly zero after every step and in the result."""
    model = LowRankModel()

    def look(step: TuneStep) -> None:
        _assert_masked(model.state(), model.masks, f"after step {step.step}")

    result = _tune(tuner, model, on_step=look)
    _assert_masked(result.tensors, model.masks, "in the result")


def leaves_the_base_alone(tuner: Tuner) -> None:
    """The base's weights, gradients and train modes are as before."""
    model = LowRankModel()
    model.module.eval()
    frozen = {n: p for n, p in model.module.named_parameters() if not p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    _tune(tuner, model)
    for name, parameter in frozen.items():
        assert torch.equal(parameter, before[name]), f"{name} changed"
        assert parameter.grad is None, f"{name} has a gradient left"
    assert not any(part.training for part in model.module.modules()), "it left train mode on"


def counts_its_steps(tuner: Tuner) -> None:
    """It reports steps 1, 2, … of a fixed total, with finite losses and growing token counts."""
    steps: list[TuneStep] = []
    result = _tune(tuner, LowRankModel(), on_step=steps.append)
    assert steps, "it reported no step"
    assert [step.step for step in steps] == list(range(1, len(steps) + 1)), "steps are not 1, 2, …"
    assert {step.total for step in steps} == {len(steps)}, "the total is not the number of steps"
    counts = [step.tokens for step in steps]
    assert counts == sorted(counts), "the number of tokens goes down"
    assert counts[0] > 0, "the first step has no tokens"
    assert result.tokens == counts[-1], "the result counts other tokens than the last step"
    assert [step.loss for step in steps] == list(result.losses), "the result has other losses"


def is_decided_by_its_seed(tuner: Tuner) -> None:
    """The same model, data and seed give the same bytes."""
    first = _tune(tuner, LowRankModel(), seed=3).tensors
    torch.rand(7)  # another state of the global generator must not matter
    second = _tune(tuner, LowRankModel(), seed=3).tensors
    assert all(torch.equal(first[name], second[name]) for name in first), "two runs differ"


def leaves_global_generators_alone(tuner: Tuner) -> None:
    """The state of torch's global generator is as before."""
    before = torch.get_rng_state()
    _tune(tuner, LowRankModel())
    assert torch.equal(torch.get_rng_state(), before), "torch's generator moved on"


def refuses_a_loss_that_is_not_finite(tuner: Tuner) -> None:
    """A loss of NaN raises MethodError."""
    model = LowRankModel()
    with torch.no_grad():
        for layer in model.layers.values():
            layer.base.weight.fill_(float("nan"))
    try:
        _tune(tuner, model)
    except MethodError:
        return
    raise AssertionError("it trained on a loss of NaN")


# --- the model -----------------------------------------------------------------------------------


class LowRankLinear(nn.Module):
    """``x Wᵀ + (drop(x) Aᵀ) Bᵀ`` with W frozen."""

    def __init__(self, base: nn.Linear, name: str) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        generator = torch.Generator().manual_seed(len(name))
        self.lora_A = nn.Parameter(torch.randn(RANK, base.in_features, generator=generator) / 4)
        self.lora_B = nn.Parameter(torch.randn(base.out_features, RANK, generator=generator) / 4)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted output (..., d) for ``x`` (..., k)."""
        inner = F.linear(self.dropout(x), self.lora_A)
        return cast(Tensor, self.base(x)) + F.linear(inner, self.lora_B)


class LowRankModel:
    """The smallest :class:`~prufed_plugins.api.AdaptedModel` that a real tuner can train."""

    def __init__(self) -> None:
        self.module = _tiny_llama().requires_grad_(False)
        self.layers: dict[str, LowRankLinear] = {}
        for name, module in list(self.module.named_modules()):
            if name.endswith("q_proj") and isinstance(module, nn.Linear):
                self.layers[name] = LowRankLinear(module, name)
                self.module.set_submodule(name, self.layers[name])
        self.parameters: Mapping[str, nn.Parameter] = {
            f"{name}.{factor}.weight": getattr(layer, factor)
            for name, layer in self.layers.items()
            for factor in ("lora_A", "lora_B")
        }
        self.masks: Mapping[str, Tensor] = {
            name: nested_mask(parameter.shape, 0.5, seed=0, name=name)
            for name, parameter in self.parameters.items()
        }
        self.project()

    def project(self) -> None:
        """Set every masked-out entry to zero."""
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.parameters[name].masked_fill_(~mask, 0)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the adapter tensors."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}


def _tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cast(nn.Module, LlamaForCausalLM(config))


def _data() -> TrainingData:
    rows = [[(start + step) % VOCABULARY for step in range(6 + start % 5)] for start in range(24)]
    return TrainingData(input_ids=rows, labels=[[-100, *row[1:]] for row in rows])


def _tune(
    tuner: Tuner,
    model: LowRankModel,
    *,
    seed: int = 0,
    on_step: Callable[[TuneStep], None] = lambda step: None,
    round_index: int = 0,
) -> TuneResult:
    return tuner.tune(model, _data(), seed, on_step, round_index=round_index, pad_token_id=0)


def _assert_masked(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], when: str) -> None:
    for name, mask in masks.items():
        stray = int((tensors[name][~mask] != 0).sum())
        assert stray == 0, f"{name} has {stray} masked-out entries that are not zero {when}"
