"""Patterns choose matrices by name; experts that calibration never reaches are left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prufed_plugins.api import PrunedMatrix, PruneTarget
from prufed_plugins.discover import build
from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.modules import selected
from prufed_plugins.settings import parse_settings
from prufed_plugins.testing.pruner import TinyDecoder, tokens
from prufed_plugins.testing.tiny_decoder import PrunedBefore

METHODS = ["magnitude", "wanda", "sparsegpt"]
HALF = PruneTarget(sparsity=0.5)


def prune(method: str, decoder: Any, target: PruneTarget = HALF, **options: Any) -> Any:
    pruner = build("pruner", method, options)
    return {
        result.name: result for result in pruner.prune(decoder, tokens(), target, lambda *_: None)
    }


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ("down", None, {"0.down", "1.down"}),
        (None, "down", {"0.gate", "0.up", "1.gate", "1.up"}),
        ("model.layers.0.*", None, {"0.gate", "0.up", "0.down"}),
        ("gate, model.layers.1.up", None, {"0.gate", "1.gate", "1.up"}),
        ("*", "*.0.*,gate", {"1.up", "1.down"}),
    ],
)
def test_patterns_match_the_name_in_the_block_and_the_full_name(
    include: str | None, exclude: str | None, names: set[str]
) -> None:
    found = selected(TinyDecoder(2), include, exclude)
    assert found == {f"model.layers.{name}" for name in names}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_out_comes_whole_with_a_full_mask(method: str) -> None:
    decoder = TinyDecoder(2)
    before = decoder.parameters()
    results = prune(method, decoder, exclude="down,*.1.up")
    assert len(results) == 6
    for name, result in results.items():
        if name.endswith("down.weight") or name == "model.layers.1.up.weight":
            assert result.mask.all()
            assert torch.equal(result.weight, before[name])
            assert result.report == {"sparsity": 0.0, "excluded": 1.0}
        else:
            assert int(result.mask.sum()) == result.mask.numel() // 2
            assert "excluded" not in result.report


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_out_keeps_the_mask_of_an_earlier_prune(method: str) -> None:
    decoder = PrunedBefore()
    before = decoder.parameters()
    for name, result in prune(method, decoder, exclude="down,up").items():
        if name.endswith("gate.weight"):
            continue
        mask = decoder.masks.get(name)
        assert result.mask.all() if mask is None else torch.equal(result.mask, mask)
        assert torch.equal(result.weight, before[name])
        assert result.report == {"sparsity": 0.0 if mask is None else 1 / 8, "excluded": 1.0}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_block_without_chosen_matrices_hands_on_its_dense_outputs(method: str) -> None:
    found = prune(method, TinyDecoder(2), include="*.1.*")
    dense = build("pruner", method, {}).prune_nested(
        TinyDecoder(2), tokens(), [HALF], lambda *_: None
    )
    every = prune(method, TinyDecoder(2))
    expected = {result.name: result.mask for (result,) in dense}
    names = [name for name in expected if ".1." in name]
    assert all(torch.equal(found[name].mask, expected[name]) for name in names)
    assert not all(torch.equal(every[name].mask, expected[name]) for name in names)
    assert found["model.layers.0.up.weight"].mask.all()


class CountingDecoder(TinyDecoder):
    """Remembers which blocks were run."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.run: set[int] = set()

    def run_block(self, index: int, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        self.run.add(index)
        return super().run_block(index, hidden, arguments)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_no_block_is_run_after_the_last_that_is_pruned(method: str) -> None:
    decoder = CountingDecoder(5)
    found = prune(method, decoder, include="*.0.*,*.2.*")
    assert decoder.run == {0, 1, 2}
    assert found["model.layers.4.up.weight"].mask.all()
    assert int(found["model.layers.2.up.weight"].mask.sum()) == 16 * 24 // 2


def test_a_global_threshold_counts_only_the_chosen() -> None:
    results = prune("magnitude", TinyDecoder(2), group="global", include="gate")
    kept = [int(one.mask.sum()) for name, one in results.items() if "gate" in name]
    assert sum(kept) == 2 * 16 * 24 // 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"include": "dwon"}, "the include pattern 'dwon' matches no matrix", "down"),
        ({"exclude": "gate,*.uo"}, r"the exclude pattern '\*\.uo' matches no matrix", "up"),
        ({"exclude": "nothing-like-it"}, "matches no matrix", "gate, up, down"),
        ({"exclude": "*"}, "leave no matrix to prune", "exclude less"),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_is_near(
    method: str, options: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(MethodError, match=message) as refusal:
        prune(method, TinyDecoder(2), **options)
    assert refusal.value.hint is not None
    assert hint in refusal.value.hint


def test_a_pattern_that_begins_with_a_star_can_be_typed() -> None:
    assert parse_settings(["exclude=*.down_proj,*.o_proj"]) == {"exclude": "*.down_proj,*.o_proj"}


class ExpertBlock(nn.Module):
    """Routes every token by its first component; the last expert never gets one."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.shared = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        update = self.shared(flat)
        for index, expert in enumerate(self.mlp.experts):
            routed = (flat[:, 0] > 0) if index == 0 else (flat[:, 0] <= 0)
            if index < 2:
                update[routed] += expert(flat[routed])
        return hidden + update.reshape(hidden.shape)


class ExpertDecoder(TinyDecoder):
    """Two blocks of experts."""

    def __init__(self) -> None:
        super().__init__(2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.blocks = [ExpertBlock(16, 24) for _ in range(2)]

    def linears(self, index: int) -> Mapping[str, nn.Linear]:
        return {
            f"{self.prefix}.{index}.{name}": module
            for name, module in self.blocks[index].named_modules()
            if isinstance(module, nn.Linear)
        }


def unrouted(results: Mapping[str, PrunedMatrix]) -> set[str]:
    return {name for name, result in results.items() if "unrouted" in result.report}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize(
    ("target", "layer_ratio"),
    [(HALF, "uniform"), (HALF, "owl"), (PruneTarget(pattern=(2, 4)), "uniform")],
)
def test_experts_never_routed_to_are_kept_and_reported(
    method: str, target: PruneTarget, layer_ratio: str
) -> None:
    decoder = ExpertDecoder()
    before = decoder.parameters()
    results = prune(method, decoder, target, layer_ratio=layer_ratio)
    idle = {f"model.layers.{index}.mlp.experts.2.weight" for index in range(2)}
    assert unrouted(results) == idle
    for name, result in results.items():
        if name in idle:
            assert result.mask.all()
            assert torch.equal(result.weight, before[name])
        else:
            assert not result.mask.all()


def test_magnitude_needs_no_routing() -> None:
    assert not unrouted(prune("magnitude", ExpertDecoder()))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_any_other_matrix_without_input_is_an_error(method: str) -> None:
    decoder = ExpertDecoder()
    decoder.blocks[1].idle = nn.Linear(16, 16)
    with pytest.raises(MethodError, match=r"model\.layers\.1\.idle received no calibration input"):
        prune(method, decoder)


@pytest.mark.parametrize("pattern", [(3, 5), (4, 7), (1, 23)])
@pytest.mark.parametrize("method", METHODS)
def test_the_last_group_of_columns_that_do_not_divide(
    method: str, pattern: tuple[int, int]
) -> None:
    n, m = pattern
    for result in prune(method, TinyDecoder(2), PruneTarget(pattern=pattern)).values():
        columns = result.mask.shape[1]
        for group in result.mask.split(m, dim=1):
            assert ((~group).sum(1) == min(n, group.shape[1])).all()
        if columns % m:
            assert result.report["partial_group"] == columns % m
        else:
            assert "partial_group" not in result.report
