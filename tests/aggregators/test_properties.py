"""Properties of the coverage-normalised mean on federations that hypothesis makes up."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prufed_plugins.aggregators.coverage_sum import CoverageSum, select
from prufed_plugins.aggregators.fedavg import FedAvg
from prufed_plugins.aggregators.heteagg import HeteAgg
from prufed_plugins.aggregators.heteagg_layer import HeteAggLayer
from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.params import FedAvgParams, HeteAggLayerParams, HeteAggParams
from prufed_plugins.testing.federation import random_state, random_update

few = settings(max_examples=40, deadline=None)


@st.composite
def federations(draw: st.DrawFn, *, masked: bool = True) -> tuple[GlobalState, list[Update]]:
    layers = draw(st.integers(1, 3))
    state = random_state(
        layers=layers,
        rank=draw(st.integers(1, 3)),
        k=draw(st.integers(1, 5)),
        d=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 99)),
    )
    densities = st.sampled_from([None, 1.0, 0.7, 0.3, 0.0]) if masked else st.none()
    kept = st.sets(st.integers(0, layers - 1)).map(sorted)
    updates = [
        random_update(
            state,
            f"c{index}",
            seed=draw(st.integers(0, 99)),
            density=draw(densities),
            kept_layers=draw(kept) if masked else None,
            samples=draw(st.integers(1, 4000)),
        )
        for index in range(draw(st.integers(2, 5)))
    ]
    return state, updates


def heteagg(**values: Any) -> HeteAgg:
    return HeteAgg(HeteAggParams(**{"include_global": False, **values}))


def tensors_of(aggregator: Any, updates: list[Update], state: GlobalState) -> dict[str, Tensor]:
    return dict(aggregate(aggregator, updates, state).state.tensors)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@few
@given(federations(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 3))
def test_every_entry_is_the_mean_over_the_clients_that_have_it(
    federation: tuple[GlobalState, list[Update]], beta: float, min_count: int
) -> None:
    """Against the formula, entry by entry, in Python's exact fractions of floats."""
    state, updates = federation
    result = tensors_of(heteagg(beta=beta, min_count=min_count), updates, state)
    for name, old in state.tensors.items():
        holders = [update for update in updates if name in update.tensors]
        for place in itertools.product(*map(range, old.shape)):
            there = [u for u in holders if u.masks is None or bool(u.masks[name][place])]
            if len(there) < min_count:
                assert result[name][place] == old[place]
                continue
            weights = [u.samples**beta for u in there]
            values = [float(u.tensors[name][place]) for u in there]
            mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
            assert abs(float(result[name][place]) - mean) <= 1e-6 * max(1.0, abs(mean))


@few
@given(federations(), st.randoms(use_true_random=False), st.booleans())
def test_arrival_order_changes_no_bit(
    federation: tuple[GlobalState, list[Update]], random: Any, by_depth: bool
) -> None:
    state, updates = federation
    shuffled = list(updates)
    random.shuffle(shuffled)
    grouping = HeteAggLayerParams(group_weighting="group" if by_depth else "client", beta=1)
    for method in (heteagg(beta=0.3), HeteAggLayer(grouping)):
        assert same(tensors_of(method, updates, state), tensors_of(method, shuffled, state))


@few
@given(federations(masked=False))
def test_full_masks_and_sample_weights_are_fedavg_to_the_bit(
    federation: tuple[GlobalState, list[Update]],
) -> None:
    state, updates = federation
    plain = tensors_of(FedAvg(FedAvgParams()), updates, state)
    assert same(tensors_of(heteagg(beta=1), updates, state), plain)
    assert same(tensors_of(HeteAggLayer(HeteAggLayerParams(beta=1)), updates, state), plain)
    ones = {name: torch.ones_like(t, dtype=torch.bool) for name, t in state.tensors.items()}
    full = [replace(update, masks=ones) for update in updates]
    assert same(tensors_of(heteagg(beta=1), full, state), plain)


@few
@given(federations(masked=False), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_copies_of_the_global_adapter_change_no_bit(
    federation: tuple[GlobalState, list[Update]], dtype: torch.dtype
) -> None:
    state, updates = federation
    state = replace(state, tensors={n: t.to(dtype) for n, t in state.tensors.items()})
    copies = [replace(update, tensors=dict(state.tensors)) for update in updates]
    for method in (
        heteagg(),
        heteagg(beta=1),
        heteagg(include_global=True),
        FedAvg(FedAvgParams()),
    ):
        assert same(tensors_of(method, copies, state), dict(state.tensors))


@few
@given(federations())
def test_what_stands_in_a_masked_entry_is_never_seen(
    federation: tuple[GlobalState, list[Update]],
) -> None:
    state, updates = federation
    dirty = [
        replace(
            update,
            tensors={
                name: tensor
                if update.masks is None
                else torch.where(update.masks[name], tensor, float("nan"))
                for name, tensor in update.tensors.items()
            },
        )
        for update in updates
    ]
    for method in (heteagg(), heteagg(mask="nonzero"), HeteAggLayer(HeteAggLayerParams())):
        assert same(tensors_of(method, dirty, state), tensors_of(method, updates, state))


@few
@given(federations(), st.floats(0.001, 1000))
def test_the_scale_of_weights_is_nothing(
    federation: tuple[GlobalState, list[Update]], factor: float
) -> None:
    state, updates = federation
    scaled = [replace(update, weight=update.weight * factor) for update in updates]
    for method in (heteagg(beta=1), heteagg(include_global=True, beta=0.5)):
        one, other = tensors_of(method, updates, state), tensors_of(method, scaled, state)
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-7)


@few
@given(st.integers(0, 999), st.integers(1, 40), st.booleans())
def test_select_is_where(seed: int, size: int, double: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(
        size, generator=generator, dtype=torch.float64 if double else torch.float32
    )
    tensor[torch.rand(size, generator=generator) < 0.2] = float("nan")
    mask = torch.rand(size, generator=generator) < 0.5
    expected = torch.where(mask, tensor, 0.0)
    assert torch.equal(select(tensor, mask).nan_to_num(7.0), expected.nan_to_num(7.0))


@few
@given(st.lists(st.tuples(st.booleans(), st.floats(0.1, 9), st.booleans()), min_size=1, max_size=6))
def test_masks_and_weights_may_come_in_any_mixture(
    parties: list[tuple[bool, float, bool]],
) -> None:
    """Masked or not, weight 1 or another, client or global adapter: S/C and N hold throughout."""
    generator = torch.Generator().manual_seed(len(parties))
    total = CoverageSum((8,))
    sums, weights, counts = (torch.zeros(8, dtype=torch.float64) for _ in range(3))
    for masked, weight, client in parties:
        weight = 1.0 if weight < 4 else weight
        tensor = torch.randn(8, generator=generator)
        mask = torch.rand(8, generator=generator) < 0.5
        total.add(tensor, mask if masked else None, weight, client=client)
        present = mask.double() if masked else torch.ones(8, dtype=torch.float64)
        sums += weight * present * tensor
        weights += weight * present
        counts += present * client
    mean, covered = total.mean(torch.full((8,), -1.0))
    expected = counts >= 1
    assert torch.equal(torch.ones(8, dtype=torch.bool) if covered is None else covered, expected)
    torch.testing.assert_close(mean, torch.where(expected, sums / weights, -1.0))
