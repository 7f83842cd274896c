"""Masks of LoRA factors: what they remove, and that everybody derives the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prufed_plugins.errors import MethodError
from prufed_plugins.factor_masks import factor_masks, magnitude_mask, nested_mask
from prufed_plugins.mask_files import pack
from prufed_plugins.pruners.selection import removed_count

shapes = st.lists(st.integers(1, 12), min_size=1, max_size=3)
sparsities = st.floats(0, 0.99)
quick = settings(max_examples=40, deadline=None)

A, B = "model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight"
FACTORS = {A: torch.ones(4, 8), B: torch.ones(6, 4)}


@quick
@given(shapes, sparsities, sparsities, st.integers(0, 2**70))
def test_a_sparser_nested_mask_lies_inside_a_denser_one(
    shape: list[int], one: float, other: float, seed: int
) -> None:
    sparse = nested_mask(shape, max(one, other), seed=seed, name="x")
    dense = nested_mask(shape, min(one, other), seed=seed, name="x")
    assert not (sparse & ~dense).any()


@quick
@given(shapes, sparsities)
def test_masks_remove_the_exact_count(shape: list[int], sparsity: float) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    removed = removed_count(sparsity, values.numel())
    assert values.numel() * sparsity - 1 < removed <= values.numel() * sparsity + 1e-9
    assert int((~nested_mask(shape, sparsity, seed=0, name="x")).sum()) == removed
    assert int((~magnitude_mask(values, sparsity)).sum()) == removed


def test_a_sparsity_is_the_decimal_that_was_typed() -> None:
    assert removed_count(0.29, 100) == 29
    assert removed_count(0.57, 100) == 57
    assert removed_count(1 / 3, 3) == 0  # 0.3333333333333333 lies below a third


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan"), float("inf")])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(MethodError, match="outside"):
        nested_mask((2, 2), sparsity, seed=0, name="x")


def test_nested_masks_are_the_same_everywhere() -> None:
    # a fixed answer: every party of a federation must derive these very bits, in every version
    mask = nested_mask((2, 8), 0.5, seed=7, name=A)
    assert pack(mask).tolist() == [111, 5]


def test_nested_masks_differ_by_seed_name_and_shape() -> None:
    first = nested_mask((8, 16), 0.5, seed=0, name=A)
    assert not torch.equal(first, nested_mask((8, 16), 0.5, seed=1, name=A))
    assert not torch.equal(first, nested_mask((8, 16), 0.5, seed=0, name=B))
    assert not torch.equal(first.flatten(), nested_mask((16, 8), 0.5, seed=0, name=A).flatten())


def test_equal_magnitudes_go_by_index() -> None:
    mask = magnitude_mask(torch.tensor([[1.0, -1.0], [1.0, 2.0]]), 0.5)
    assert mask.tolist() == [[False, False], [True, True]]


def test_magnitude_leaves_a_zero_factor_whole() -> None:
    masks = factor_masks("magnitude", {A: torch.randn(4, 8), B: torch.zeros(6, 4)}, 0.5, seed=0)
    assert masks.keys() == {A}


def test_rank_masks_keep_the_first_ranks() -> None:
    masks = factor_masks("rank", FACTORS, 0.6, seed=0)  # 4 ranks: two removed, two kept
    assert masks[A][:2].all()
    assert not masks[A][2:].any()
    assert masks[B][:, :2].all()
    assert not masks[B][:, 2:].any()


def test_masks_inside_the_factors_do_not_make_the_product_sparse() -> None:
    """A sum over 16 ranks is zero only where all of them are: 1 − (1 − 1/4²)¹⁶ = 64 % is not."""
    factors = {A: torch.ones(16, 200), B: torch.ones(200, 16)}
    masks = factor_masks("nested", factors, 0.75, seed=0)
    product = masks[B].float() @ masks[A].float()
    assert (product > 0).float().mean().item() == pytest.approx(0.644, abs=0.02)


def test_structured_masks_follow_the_base() -> None:
    base = torch.zeros(6, 8, dtype=torch.bool)
    base[:3, :4] = True  # input features 0-3 and output features 0-2 survive
    name = "model.layers.0.q_proj.weight"
    masks = factor_masks("structured", FACTORS, 0.5, seed=0, base_masks={name: base})
    assert masks[A].all(dim=0).tolist() == [True] * 4 + [False] * 4
    assert masks[B].all(dim=1).tolist() == [True] * 3 + [False] * 3


def test_structured_rows_go_by_the_weights_where_every_row_is_equally_dense() -> None:
    name = "model.layers.0.q_proj.weight"
    weight = torch.arange(6.0)[:, None].expand(6, 8)
    masks = factor_masks(
        "structured",
        FACTORS,
        0.5,
        seed=0,
        base_masks={name: torch.ones(6, 8, dtype=torch.bool)},
        base_weights={name: weight},
    )
    assert masks[B].all(dim=1).tolist() == [False] * 3 + [True] * 3


def test_structured_masks_need_a_base_mask_that_fits() -> None:
    with pytest.raises(MethodError, match=r"q_proj\.weight"):
        factor_masks("structured", FACTORS, 0.5, seed=0)
    wrong = {"model.layers.0.q_proj.weight": torch.ones(8, 6, dtype=torch.bool)}
    with pytest.raises(MethodError, match="8 features"):
        factor_masks("structured", FACTORS, 0.5, seed=0, base_masks=wrong)


@pytest.mark.parametrize("kind", ["none", "nested", "magnitude", "rank", "structured"])
def test_sparsity_zero_masks_nothing_even_where_a_value_is_zero(kind: str) -> None:
    assert factor_masks(kind, {A: torch.zeros(4, 8)}, 0.0, seed=0) == {}  # type: ignore[arg-type]


def test_factor_masks_refuse_what_is_no_factor() -> None:
    with pytest.raises(MethodError, match="not the name of an adapter tensor"):
        factor_masks("nested", {"model.norm.weight": torch.ones(3)}, 0.5, seed=0)
