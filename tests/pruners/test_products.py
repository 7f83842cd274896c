"""Products where MKL leaves vectors half unused, or where half precision has none."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from prufed_plugins import products
from prufed_plugins.products import WideLinears, add_product, linear, pieces, product

wide_only = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512"
    or not torch.backends.mkl.is_available()
    or not torch.backends.mkldnn.is_available(),
    reason="needs AVX-512, and a torch with MKL and oneDNN",
)
SIZES = st.sampled_from([1, 7, 32, 96, 129, 300, 640, 2100])


@pytest.fixture(scope="module", autouse=True)
def amd() -> Iterator[None]:
    """Have this processor taken for one that is not Intel's, whatever it is."""
    with processor("vendor_id : AuthenticAMD"):
        yield


class processor:  # noqa: N801  a context manager
    def __init__(self, said: str) -> None:
        self.said = said

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(products, "_processor", lambda: self.said)
        products.mkl_is_narrow.cache_clear()

    def __exit__(self, *exception: object) -> None:
        self.patch.undo()
        products.mkl_is_narrow.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laid_out(matrix: Tensor, how: str) -> Tensor:
    """Return the same matrix with other strides."""
    if how == "turned":
        return matrix.t().contiguous().t()
    if how == "part of a wider one":
        return torch.cat((matrix, matrix), dim=1)[:, : matrix.shape[1]]
    if how == "part of a wider one, turned":
        return torch.cat((matrix, matrix)).t().contiguous().t()[: matrix.shape[0]]
    return matrix


LAYOUTS = st.sampled_from(
    ["as it is", "turned", "part of a wider one", "part of a wider one, turned"]
)


@wide_only
@given(SIZES, SIZES, SIZES, LAYOUTS, LAYOUTS)
def test_products_of_any_shape_and_layout(m: int, k: int, n: int, left: str, right: str) -> None:
    a, b = laid_out(random(m, k), left), laid_out(random(k, n, seed=1), right)
    exact = a.double() @ b.double()
    bound = 1e-5 * k**0.5 + 1e-6
    assert float((product(a, b) - exact).abs().max()) <= 10 * bound
    to = random(m, n, seed=2)
    for sign in (1, -1):
        sums = to.clone()
        add_product(sums, a, b, sign)
        assert float((sums - (to + sign * exact)).abs().max()) <= 10 * bound


@wide_only
def test_adding_into_a_part_leaves_the_rest() -> None:
    whole = random(700, 700)
    before = whole.clone()
    add_product(whole[100:600, 200:500], random(500, 256), random(256, 300))
    changed = torch.zeros(700, 700, dtype=torch.bool)
    changed[100:600, 200:500] = True
    assert torch.equal(whole[~changed], before[~changed])
    assert not torch.equal(whole[changed], before[changed])


def test_a_product_with_nothing_between_is_zero() -> None:
    assert torch.equal(product(torch.empty(300, 0), torch.empty(0, 200)), torch.zeros(300, 200))
    to = random(300, 200)
    before = to.clone()
    add_product(to, torch.empty(300, 0), torch.empty(0, 200))
    assert torch.equal(to, before)


@given(st.integers(0, 3000), st.integers(0, 5000), st.sampled_from([256, 512, 2048]))
def test_pieces_cover_a_range_in_few_sizes(start: int, length: int, largest: int) -> None:
    found = list(pieces(start, start + length, largest))
    assert [i for one in found for i in range(one.start, one.stop)] == [
        *range(start, start + length)
    ]
    sizes = [one.stop - one.start for one in found]
    assert set(sizes[:-1]) <= {32, 64, 128, 256, 512, 1024, 2048}
    assert all(0 < size <= largest for size in sizes)


def test_intel_processors_keep_torchs_own_products() -> None:
    a, b = random(512, 300), random(300, 512, seed=1)
    with processor("vendor_id : GenuineIntel"):
        assert not products.mkl_is_narrow()
        assert torch.equal(product(a, b), torch.mm(a, b))


@wide_only
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 130, 200), (390, 200), (2, 64, 200), (41, 200), (200,)])
def test_linear_layers_give_what_they_gave(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(200, 9000, bias), random(*shape)
    with torch.no_grad():
        expected = layer(x)
        with WideLinears():
            found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@wide_only
def test_gpt2s_layers_give_what_they_gave() -> None:
    torch.manual_seed(0)
    layer, x = Conv1D(900, 200), random(2, 64, 200)
    with torch.no_grad():
        expected = layer(x)
        with WideLinears():
            found = layer(x)
        assert torch.equal(found, linear(x, layer.weight.t(), layer.bias))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_that_torch_computes_well_are_left_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "lacks_products", lambda asked: False)
    torch.manual_seed(0)
    layer, x = nn.Linear(200, 900).to(dtype), random(100, 200).to(dtype)
    with torch.no_grad():
        expected = layer(x)
        with WideLinears():
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_processor_lacks_is_what_onednn_says(dtype: torch.dtype) -> None:
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    assert products.lacks_products(dtype) is not supported[dtype]()
    assert not products.lacks_products(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 700, 200), (1500, 200), (2, 0, 200), (200,)])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "Conv1D"])
def test_half_precision_is_summed_in_float32_and_rounded_once(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "lacks_products", lambda asked: True)
    torch.manual_seed(0)
    layer = Conv1D(1100, 200) if kind == "Conv1D" else nn.Linear(200, 1100, kind == "linear")
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    layer, x = layer.to(dtype), random(*shape).to(dtype)
    with torch.no_grad():
        with WideLinears():
            found = layer(x)
        exact = layer.double()(x.double()).reshape(found.shape)
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps / 2  # of rounding to nearest
    if x.dim() > 1:
        assert bool(((found.double() - exact).abs() <= exact.abs() * step * 1.01 + 1e-4).all())
    else:  # a single token is left to torch
        torch.testing.assert_close(found.double(), exact, rtol=4 * step, atol=0.05)


def test_widening_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer of (4096, 4096), float32 is held of 1024 tokens and 1024 rows at a time."""
    monkeypatch.setattr(products, "lacks_products", lambda asked: True)
    largest = 0

    def watch(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal largest
        largest = max(largest, inputs.numel(), weight.numel())
        return functional.linear(inputs, weight, bias)

    monkeypatch.setattr(products, "_layer_for", lambda left, right: watch)
    x, weight = random(2500, 512).bfloat16(), random(3000, 512, seed=1).bfloat16()
    with torch.no_grad():
        found = products.widened(x, weight)
    assert found.shape == (2500, 3000)
    assert largest == 1024 * 512


@wide_only
def test_gradients_still_flow() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(200, 900), random(100, 200)
    with WideLinears():
        layer(x).square().sum().backward()
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, expected)


@wide_only
def test_arguments_by_name_are_torchs() -> None:
    x, weight = random(200, 100), random(300, 100, seed=1)
    with torch.no_grad(), WideLinears():
        found = functional.linear(input=x, weight=weight)
    assert torch.equal(found, functional.linear(x, weight))


@wide_only
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux counts it")
def test_any_number_of_tokens_takes_no_more_memory() -> None:
    """As many as a router sends to an expert: a shape of its own would keep half a megabyte."""
    layer = nn.Linear(128, 128)
    with torch.no_grad(), WideLinears():
        layer(random(2048, 128))
        before = psutil.Process().memory_info().rss
        for tokens in range(100, 1100):
            layer(random(tokens, 128))
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
