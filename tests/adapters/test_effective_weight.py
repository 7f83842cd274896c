"""The masked product against the same formula written plainly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from prufed_cli.models.masked_lora import EffectiveLinear, MaskedLora

SCALING = 1.7


def _inputs(transposed: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (5, 7) if transposed else (7, 5)
    weight, mask = draw(*shape), (draw(*shape) > 0).view(torch.uint8)
    return draw(2, 3, 5), draw(4, 5), draw(7, 4), draw(5), weight, draw(7), mask


def _plain(
    x: Tensor, A: Tensor, B: Tensor, c: Tensor | None, W: Tensor, bias: Tensor, mask: Tensor
) -> Tensor:
    """(d, k) layout throughout."""
    update = SCALING * (B @ (A if c is None else A * c)) * mask
    return F.linear(x, W + update, bias)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_output_and_gradients_are_plain_autograds(transposed: bool, dropped: bool) -> None:
    x, A, B, c, W, bias, mask = _inputs(transposed)
    columns = c if dropped else None
    ours = [t.clone().requires_grad_() for t in (x, A, B)]
    theirs = [t.clone().requires_grad_() for t in (x, A, B)]
    upstream = torch.randn(2, 3, 7, dtype=torch.float64)
    y = EffectiveLinear.apply(*ours, columns, W, bias, mask, SCALING, transposed)
    oriented = (W.T, mask.T) if transposed else (W, mask)
    expected = _plain(*theirs, columns, oriented[0], bias, oriented[1])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.backward(upstream)
    expected.backward(upstream)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_the_numerical_ones(transposed: bool) -> None:
    x, A, B, c, W, bias, mask = _inputs(transposed)
    learned = tuple(t.requires_grad_() for t in (x, A, B))
    assert torch.autograd.gradcheck(
        lambda *t: EffectiveLinear.apply(*t, c, W, bias, mask, SCALING, transposed), learned
    )


def _layer(layer: nn.Module, *, dropout: float = 0.0, mask: Tensor | None = None) -> MaskedLora:
    rows, columns = layer.weight.shape
    d, k = (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)
    A, B = torch.randn(4, k), torch.randn(d, 4)
    layer.requires_grad_(False)
    return MaskedLora(layer, A, B, scaling=0.5, dropout=dropout, product_mask=mask)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 10), lambda: Conv1D(10, 6)])
def test_a_full_product_mask_is_ordinary_lora(make: object) -> None:
    layer = make()  # type: ignore[operator]
    plain = _layer(layer)
    masked = _layer(layer, mask=torch.ones_like(layer.weight, dtype=torch.bool))
    masked.load_state_dict(plain.state_dict())
    x = torch.randn(3, 6)
    torch.testing.assert_close(masked(x), plain(x))


def test_only_the_factors_get_gradients_and_no_weight_outlives_the_forward() -> None:
    layer = _layer(nn.Linear(6, 10), mask=torch.rand(10, 6) < 0.5)
    y = layer(torch.randn(3, 6))
    saved = [t.shape for t in y.grad_fn.saved_tensors if t is not None]
    assert saved.count(torch.Size([10, 6])) == 2, (
        "only W and its mask, which the layer keeps anyway"
    )
    y.sum().backward()
    assert layer.base_layer.weight.grad is None
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None


def test_dropout_drops_whole_input_features_once_per_forward() -> None:
    base = nn.Linear(64, 10, bias=False)
    nn.init.zeros_(base.weight)
    layer = _layer(base, dropout=0.5, mask=torch.ones(10, 64, dtype=torch.bool))
    effective = layer(torch.eye(64)).T  # (d, k): one row of x per input feature
    dropped = (effective == 0).all(dim=0)
    assert 10 < int(dropped.sum()) < 54
    torch.manual_seed(3)
    mean = torch.stack([layer(torch.eye(64)).T.detach() for _ in range(600)]).mean(0)
    layer.eval()
    exact = layer(torch.eye(64)).T.detach()
    assert float((mean - exact).abs().mean() / exact.abs().mean()) < 0.08


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_a_half_precision_base_keeps_float32_factors(dtype: torch.dtype, masked: bool) -> None:
    mask = torch.rand(10, 6) < 0.5 if masked else None
    layer = _layer(nn.Linear(6, 10).to(dtype), mask=mask)
    y = layer(torch.randn(3, 6, dtype=dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad.dtype == torch.float32
