"""OWL gives blocks with more outliers less sparsity, and the whole model what was asked for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prufed_plugins.api import PruneTarget
from prufed_plugins.discover import build
from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.owl import outlier_ratio, outlier_ratios, owl_sparsities
from prufed_plugins.testing.pruner import TinyDecoder, tokens

METHODS = ["magnitude", "wanda", "sparsegpt"]
BLOCKS = st.lists(
    st.tuples(st.integers(0, 200).map(lambda n: n / 1000), st.integers(1, 10**7)),
    min_size=1,
    max_size=8,
)


def silent(what: str, done: int, total: int) -> None:
    """Hear of progress and say nothing."""


def test_the_published_mapping_on_equal_blocks() -> None:
    ratios = [0.01, 0.03, 0.02]
    found = owl_sparsities(ratios, [7, 7, 7], 0.7, 0.08)
    kept = [(ratio - 0.01) / 0.02 * 0.16 for ratio in ratios]
    assert found == pytest.approx([1 - (one - 0.08 + 0.3) for one in kept])
    assert found == pytest.approx([0.78, 0.62, 0.70])


@settings(max_examples=200, deadline=None)
@given(BLOCKS, st.floats(0, 0.9999), st.floats(0, 0.5))
def test_the_weighted_mean_is_the_target_and_more_outliers_mean_less_sparsity(
    blocks: Sequence[tuple[float, int]], sparsity: float, spread: float
) -> None:
    ratios, entries = zip(*blocks, strict=True)
    found = owl_sparsities(ratios, entries, sparsity, spread)
    mean = sum(n * one for n, one in zip(entries, found, strict=True)) / sum(entries)
    assert mean == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= one < 1 for one in found)
    assert max(found) - min(found) <= 2 * spread + 1e-9
    ordered = [one for _, one in sorted(zip(ratios, found, strict=True), key=lambda two: two[0])]
    assert all(a >= b - 1e-12 for a, b in pairwise(ordered))


@settings(max_examples=200, deadline=None)
@given(BLOCKS, st.floats(0, 0.99), st.floats(0, 0.99), st.floats(0, 0.5))
def test_every_block_rises_with_the_target(
    blocks: Sequence[tuple[float, int]], one: float, other: float, spread: float
) -> None:
    ratios, entries = zip(*blocks, strict=True)
    low, high = sorted((one, other))
    for a, b in zip(
        owl_sparsities(ratios, entries, low, spread),
        owl_sparsities(ratios, entries, high, spread),
        strict=True,
    ):
        assert a <= b + 1e-9


def test_the_outlier_ratio_is_taken_over_the_whole_block() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 6), (8, 3))
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    norms = [torch.rand(shape[1], generator=generator) for shape in shapes]
    pairs = list(zip(weights, norms, strict=True))
    scores = torch.cat([(weight.abs() * norm).flatten() for weight, norm in pairs])
    expected = float((scores > 2 * scores.mean()).float().mean())
    assert 0 < expected < 1
    assert outlier_ratio(pairs, 2.0) == pytest.approx(expected)


class Converting(TorchDispatchMode):
    """Counts float32 copies of matrices of a shape, and how many of them there were at a time."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.made = self.most = self._alive = 0
        self._shape = shape

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and made.shape == self._shape:
            assert made.dtype == torch.float32
            weakref.finalize(made, self._gone)
            self.made, self._alive = self.made + 1, self._alive + 1
            self.most = max(self.most, self._alive)
        return made

    def _gone(self) -> None:
        self._alive -= 1


def test_a_survey_holds_one_float32_matrix_at_a_time() -> None:
    decoder = TinyDecoder()
    wide = outlier_ratios(decoder, tokens(), names_of(decoder), 5.0, silent)
    for module in (decoder.embedding, *decoder.blocks):
        module.bfloat16()
    with Converting((24, 16)) as converting:
        ratios = outlier_ratios(decoder, tokens(), names_of(decoder), 5.0, silent)
    assert converting.made == 2 * 2 * len(decoder.blocks)  # gate and up, in either pass
    assert converting.most == 1
    assert ratios == pytest.approx(wide, abs=0.01)


def names_of(decoder: TinyDecoder) -> list[str]:
    return [name for index in range(len(decoder.blocks)) for name in decoder.linears(index)]


def test_a_survey_gives_what_all_matrices_together_give() -> None:
    decoder = TinyDecoder()
    seen: dict[str, list[Tensor]] = {}
    for name in names_of(decoder):
        module = decoder.linears(int(name.split(".")[2]))[name]
        module.weight.data[::4, ::4] *= 8.0
        module.register_forward_pre_hook(
            lambda module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    found = outlier_ratios(decoder, tokens(), names_of(decoder), 3.0, silent)
    assert len(set(found)) > 1
    for index, ratio in enumerate(found):
        scores = torch.cat(
            [
                (module.weight.abs() * torch.cat(seen[name][:2]).norm(dim=0)).flatten()
                for name, module in decoder.linears(index).items()
            ]
        )
        assert ratio == pytest.approx(float((scores > 3 * scores.mean()).float().mean()), abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_block_with_outliers_keeps_more_and_the_total_is_met(method: str) -> None:
    decoder = TinyDecoder()
    for module in decoder.linears(5).values():
        module.weight.data[::4, ::4] *= 30.0
    pruner = build("pruner", method, {"layer_ratio": "owl"})
    assert pruner.needs_calibration
    lost: dict[str, list[int]] = {}
    for result in pruner.prune(decoder, tokens(), PruneTarget(sparsity=0.6), silent):
        counts = lost.setdefault(result.name.split(".")[2], [0, 0])
        counts[0] += int((~result.mask).sum())
        counts[1] += result.mask.numel()
    shares = {block: gone / entries for block, (gone, entries) in lost.items()}
    assert min(shares, key=lambda block: shares[block]) == "5"
    assert max(shares.values()) - shares["5"] == pytest.approx(0.16, abs=0.03)
    total = sum(gone for gone, _ in lost.values()) / sum(entries for _, entries in lost.values())
    assert total == pytest.approx(0.6, abs=0.02)


def test_magnitude_needs_calibration_only_for_layer_ratios() -> None:
    assert not build("pruner", "magnitude", {}).needs_calibration
    with pytest.raises(MethodError, match="needs calibration text"):
        list(
            build("pruner", "magnitude", {"layer_ratio": "owl"}).prune(
                TinyDecoder(), None, PruneTarget(sparsity=0.5), silent
            )
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_leaves_no_room_for_layer_ratios(method: str) -> None:
    pruner = build("pruner", method, {"layer_ratio": "owl"})
    with pytest.raises(MethodError, match="a pattern gives all the same"):
        list(pruner.prune(TinyDecoder(), tokens(), PruneTarget(pattern=(2, 4)), silent))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "global", "layer_ratio": "owl"}, "exclude each other"),
        ({"group": "row", "threshold": "reference"}, "knows group layer only, not row"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        build("pruner", "magnitude", settings)


@pytest.mark.parametrize("method", METHODS)
def test_each_matrix_is_pruned_to_its_own_sparsity(method: str) -> None:
    names = ["model.layers.1.gate", "model.layers.4.down"]
    target = PruneTarget(sparsity=0.5, per_matrix={names[0]: 0.25, names[1]: 1.0})
    pruner = build("pruner", method, {})
    found = {
        result.name.removesuffix(".weight"): 1 - float(result.mask.float().mean())
        for result in pruner.prune(TinyDecoder(), tokens(), target, silent)
    }
    assert found.pop(names[0]) == 0.25
    assert found.pop(names[1]) == 1.0
    assert set(found.values()) == {0.5}


def test_a_global_threshold_may_take_a_matrix_whole_or_leave_it_whole() -> None:
    decoder = TinyDecoder()
    linears = decoder.linears(0)
    linears["model.layers.0.gate"].weight.data.mul_(1e-4)
    linears["model.layers.0.up"].weight.data.mul_(1e4)
    before = decoder.parameters()
    pruner = build("pruner", "magnitude", {"group": "global"})
    results = list(pruner.prune(decoder, None, PruneTarget(sparsity=0.5), silent))
    magnitudes = torch.cat([before[result.name].abs().flatten() for result in results])
    threshold = magnitudes.sort().values[magnitudes.numel() // 2]
    for result in results:
        assert torch.equal(result.mask, before[result.name].abs() >= threshold)
    masks = {result.name: result.mask for result in results}
    assert not masks["model.layers.0.gate.weight"].any()
    assert masks["model.layers.0.up.weight"].all()
