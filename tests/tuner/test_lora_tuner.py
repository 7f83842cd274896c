from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prufed_cli.models.adapters import AttachedAdapter, adapter_spec, attach
from prufed_plugins.api import TrainingData, TuneResult, TuneStep
from prufed_plugins.errors import MethodError
from prufed_plugins.params import LoraParams
from prufed_plugins.testing import check_tuner
from prufed_plugins.tuners.lora import LoraTuner
from prufed_plugins.tuners.training import collate, length_batches


def _tune(
    model: AttachedAdapter,
    data: TrainingData,
    seed: int = 0,
    on_step: Callable[[TuneStep], None] = lambda step: None,
    **settings: Any,
) -> TuneResult:
    tuner = LoraTuner(LoraParams(**{"batch_size": 10, "micro_batch_size": 5, **settings}))
    return tuner.tune(model, data, seed, on_step, round_index=0, pad_token_id=0)


def _random_adapter(base: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        f"model.layers.{layer}.self_attn.q_proj.lora_{factor}.weight": torch.randn(
            shape, generator=generator
        )
        / 4
        for layer in range(2)
        for factor, shape in (("A", (4, 32)), ("B", (32, 4)))
    }


def test_it_keeps_the_contract() -> None:
    check_tuner(lambda: LoraTuner(LoraParams(batch_size=8, weight_decay=0.1))).require()


def test_the_loss_goes_down(adapted: AttachedAdapter, data: TrainingData) -> None:
    result = _tune(adapted, data, epochs=6, lr=5e-2)
    assert sum(result.losses[-5:]) < 0.6 * sum(result.losses[:5])


def test_masks_hold_in_values_moments_and_decay(
    adapted: AttachedAdapter, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizers: list[torch.optim.AdamW] = []
    gradients: list[dict[str, Tensor]] = []

    class Watched(torch.optim.AdamW):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            optimizers.append(self)

        def step(self, closure: Any = None) -> Any:
            gradients.append({n: p.grad.clone() for n, p in adapted.parameters.items()})
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)

    def look(step: TuneStep) -> None:
        for name, mask in adapted.masks.items():
            moments = optimizers[0].state[adapted.parameters[name]]
            assert not adapted.parameters[name][~mask].any()
            assert not gradients[-1][name][~mask].any()
            assert not moments["exp_avg"][~mask].any()
            assert not moments["exp_avg_sq"][~mask].any()

    result = _tune(adapted, data, epochs=2, lr=1e-2, weight_decay=0.5, on_step=look)
    assert len(gradients) == len(result.losses) == 10
    for name, mask in adapted.masks.items():
        assert int((result.tensors[name] != 0).sum()) == int(mask.sum()), "the rest has trained"


def test_accumulation_is_one_big_batch(base: nn.Module, data: TrainingData) -> None:
    # no dropout: its draws depend on how a batch is cut
    spec = adapter_spec("dense", r=4, dropout=0.0)
    start = _random_adapter(base)
    results = []
    for micro in (1, 3, 10):
        with attach(base, spec, start) as model:
            results.append(_tune(model, data, micro_batch_size=micro, lr=1e-3))
    for other in results[1:]:
        assert other.losses == pytest.approx(results[0].losses, rel=1e-5)
        for name, tensor in results[0].tensors.items():
            torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-4, atol=1e-6)


def test_loss_and_gradient_are_means_over_loss_tokens(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 4]]
    data = TrainingData(input_ids=rows, labels=[[-100] * 2 + rows[0][2:], rows[1]])
    gradients: dict[str, Tensor] = {}
    with attach(base, adapter_spec("dense", r=4, dropout=0.0), _random_adapter(base)) as model:
        summed = torch.zeros(())
        for row, labels in zip(data.input_ids, data.labels, strict=True):
            logits = base(input_ids=torch.tensor([row])).logits[0, :-1]
            target = torch.tensor(labels[1:])
            summed = summed + nn.functional.cross_entropy(logits, target, reduction="sum")
        mean = summed / (7 + 1)
        expected = torch.autograd.grad(mean, list(model.parameters.values()))

        def step(self: torch.optim.AdamW, closure: Any = None) -> None:
            gradients.update({n: p.grad.clone() for n, p in model.parameters.items()})

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        result = _tune(model, data, micro_batch_size=1, max_grad_norm=1e6)
    assert result.losses[0] == pytest.approx(mean.item(), rel=1e-5)
    assert result.tokens == 11
    for found, wanted in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_bytes(base: nn.Module, data: TrainingData) -> None:
    spec, start = adapter_spec("dense", r=4, dropout=0.2), _random_adapter(base)

    def run(seed: int) -> bytes:
        with attach(base, spec, start) as model:
            tensors = _tune(model, data, seed=seed, lr=1e-2).tensors
        return b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_the_learning_rate_rises_and_then_falls_to_zero(
    adapted: AttachedAdapter, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, closure: Any = None) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    _tune(adapted, data, lr=1.0e-3, warmup_steps=2, epochs=2)
    expected = [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert rates == pytest.approx([1e-3 * factor for factor in expected])


def test_steps_are_limited(adapted: AttachedAdapter, data: TrainingData) -> None:
    steps: list[TuneStep] = []
    _tune(adapted, data, epochs=3, max_steps=7, on_step=steps.append)
    assert [(step.step, step.total) for step in steps] == [(n, 7) for n in range(1, 8)]


def test_gradients_are_clipped(
    adapted: AttachedAdapter, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, closure: Any = None) -> Any:
        norms.append(float(nn.utils.get_total_norm([p.grad for p in adapted.parameters.values()])))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    _tune(adapted, data, max_grad_norm=1e-3)
    assert norms == pytest.approx([1e-3] * 5, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_learn_too(
    base: nn.Module, data: TrainingData, dtype: torch.dtype
) -> None:
    base.to(dtype)
    products = {
        f"model.layers.{layer}.self_attn.q_proj.weight": torch.rand(32, 32) < 0.5
        for layer in range(2)
    }
    spec = adapter_spec("sparse-peft", r=4)
    with attach(base, spec, _random_adapter(base), None, products) as model:
        result = _tune(model, data, epochs=4, lr=3e-2)
    assert all(tensor.dtype == torch.float32 for tensor in result.tensors.values())
    assert sum(result.losses[-5:]) < 0.95 * sum(result.losses[:5])


def test_rows_without_a_loss_token_are_passed_over(
    adapted: AttachedAdapter, data: TrainingData
) -> None:
    silent = TrainingData(input_ids=[[1, 2, 3], [4]], labels=[[-100] * 3, [4]])
    with pytest.raises(MethodError, match="none of 2 rows"):
        _tune(adapted, silent)
    mixed = TrainingData(
        input_ids=[*silent.input_ids, *data.input_ids[:3]],
        labels=[*silent.labels, *data.labels[:3]],
    )
    assert _tune(adapted, mixed, batch_size=1).tokens == sum(map(len, data.input_ids[:3]))


def test_a_gradient_that_is_not_finite_is_refused(
    adapted: AttachedAdapter, data: TrainingData
) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_B.weight"
    adapted.parameters[name].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(MethodError, match="gradient's norm"):
        _tune(adapted, data)


def test_a_failure_leaves_the_model_in_its_old_mode(
    adapted: AttachedAdapter, data: TrainingData
) -> None:
    def stop(step: TuneStep) -> None:
        raise KeyboardInterrupt

    adapted.module.eval()
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        _tune(adapted, data, on_step=stop)
    assert not any(module.training for module in adapted.module.modules())
    assert torch.equal(torch.get_rng_state(), before)


# --- batches -------------------------------------------------------------------------------------


def test_batches_cover_every_row_once_with_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (1000,), generator=generator).tolist()
    batches = length_batches(lengths, 8, generator)
    assert sorted(row for batch in batches for row in batch) == list(range(1000))
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts != sorted(firsts), "the batches themselves are in random order"


def test_padding_is_on_the_right_masked_and_without_loss() -> None:
    data = TrainingData(input_ids=[[5, 6, 7], [8]], labels=[[-100, 6, 7], [8]])
    ids, attention, labels = collate(data, [1, 0], pad_token_id=9)
    assert ids.tolist() == [[8, 9, 9], [5, 6, 7]]
    assert attention.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert labels.tolist() == [[8, -100, -100], [-100, 6, 7]]


@pytest.mark.cuda
def test_it_trains_on_a_gpu(base: nn.Module, data: TrainingData) -> None:
    base.to("cuda", torch.bfloat16)
    products = {"model.layers.0.self_attn.q_proj.weight": torch.rand(32, 32) < 0.5}
    spec = adapter_spec("sparse-peft", r=4)
    with attach(base, spec, _random_adapter(base), None, products) as model:
        result = _tune(model, data, epochs=4, lr=3e-2)
    assert all(tensor.device.type == "cpu" for tensor in result.tensors.values())
    assert sum(result.losses[-5:]) < 0.95 * sum(result.losses[:5])
