"""Methods that merge adapters of unequal rank, against the dense product."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prufed_plugins.aggregators.products import best_first
from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.discover import build
from prufed_plugins.errors import MethodError, UpdateError
from prufed_plugins.write_back import write_back

MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"

few = settings(max_examples=40, deadline=None)


def state_of(rank: int, d: int = 7, k: int = 5, scaling: float = 1.0) -> GlobalState:
    generator = torch.Generator().manual_seed(99)
    tensors = {A: torch.randn(rank, k, generator=generator), B: torch.zeros(d, rank)}
    return GlobalState(tensors, rank, scaling, 1)


def client(
    name: str, left: Tensor, right: Tensor, *, samples: int = 1, scaling: float = 1.0
) -> Update:
    """Return an update of B (d, r_i) and A (r_i, k)."""
    return Update(name, {A: right, B: left}, None, samples, len(right), scaling, (0,))


def random_clients(ranks: Sequence[int], seed: int, d: int = 7, k: int = 5) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [
        client(
            f"c{index}",
            torch.randn(d, rank, generator=generator),
            torch.randn(rank, k, generator=generator),
            samples=index + 1,
            scaling=1.0 + index / 2,
        )
        for index, rank in enumerate(ranks)
    ]


def mean_product(updates: Sequence[Update], scaling: float = 1.0) -> Tensor:
    """Return Σ p_i s_i B_i A_i / s with p_i by samples, in float64."""
    total = sum(update.samples for update in updates)
    products = [
        update.samples * update.scaling * update.tensors[B].double() @ update.tensors[A].double()
        for update in updates
    ]
    return torch.stack(products).sum(dim=0) / (total * scaling)


def product(state: GlobalState) -> Tensor:
    return state.tensors[B].double() @ state.tensors[A].double()


def merged(
    method: str, updates: Sequence[Update], state: GlobalState, **values: Any
) -> GlobalState:
    return aggregate(build("aggregator", method, values), updates, state).state


ranks_of = st.lists(st.integers(1, 4), min_size=1, max_size=4)


# --- flexlora ------------------------------------------------------------------------------------


@few
@given(ranks_of, st.integers(0, 99), st.sampled_from(["left", "balanced"]))
def test_flexlora_is_the_best_approximation_of_the_mean_product(
    ranks: list[int], seed: int, split: str
) -> None:
    """Eckart and Young: what is lost is the tail of the singular values."""
    updates = random_clients(ranks, seed)
    result = product(merged("flexlora", updates, state_of(4), split=split))
    expected = mean_product(updates)
    values = torch.linalg.svdvals(expected)
    torch.testing.assert_close(torch.linalg.svdvals(result)[:4], values[:4], rtol=1e-5, atol=1e-5)
    lost = (result - expected).norm()
    torch.testing.assert_close(lost, values[4:].norm(), rtol=1e-4, atol=1e-4)


@few
@given(ranks_of, st.integers(0, 99))
def test_a_rank_that_holds_the_mean_product_loses_nothing(ranks: list[int], seed: int) -> None:
    updates = random_clients(ranks, seed)
    result = product(merged("flexlora", updates, state_of(5, scaling=2.0)))
    torch.testing.assert_close(result, mean_product(updates, 2.0), rtol=1e-5, atol=1e-5)


def test_a_client_of_lower_rank_gets_the_best_approximation_of_its_rank() -> None:
    updates = random_clients([4, 3, 2], 5)
    state = merged("flexlora", updates, state_of(4))
    for rank in (1, 2, 3):
        given_back = write_back(state, masks=None, kept_layers=(0,), scaling=1.0, rank=rank)
        values = torch.linalg.svdvals(product(state))
        lost = product(state) - given_back[B].double() @ given_back[A].double()
        torch.testing.assert_close(lost.norm(), values[rank:].norm(), rtol=1e-5, atol=1e-5)


def test_flexlora_keeps_ranks_that_the_product_lacks_trainable() -> None:
    """With zeros in A and in B no gradient would reach them."""
    state = state_of(4)
    result = merged("flexlora", random_clients([1], 3), state)
    assert torch.equal(result.tensors[A][1:], state.tensors[A][1:])
    assert not result.tensors[B][:, 1:].any()
    untrained = [
        replace(u, tensors={**u.tensors, B: torch.zeros(7, 1)}) for u in random_clients([1], 3)
    ]
    assert torch.equal(merged("flexlora", untrained, state).tensors[A], state.tensors[A])


def test_flexlora_says_what_the_rank_lost() -> None:
    updates = random_clients([4, 4], 8)
    outcome = aggregate(build("aggregator", "flexlora", {}), updates, state_of(4))
    values = torch.linalg.svdvals(mean_product(updates))
    expected = float(values[4:].norm() / values.norm())
    assert outcome.diagnostics[MODULE]["discarded"] == pytest.approx(expected, abs=1e-6)


# --- flora ---------------------------------------------------------------------------------------


@few
@given(ranks_of, st.integers(0, 99), st.integers(0, 3))
def test_flora_is_the_mean_product_exactly(ranks: list[int], seed: int, spare: int) -> None:
    """Shapes are no guide: ranks may equal d, k or each other."""
    updates = random_clients(ranks, seed)
    state = merged("flora", updates, state_of(sum(ranks) + spare))
    torch.testing.assert_close(product(state), mean_product(updates), rtol=1e-5, atol=1e-5)


def test_every_client_counts_in_the_stack() -> None:
    """A public implementation merged the first client's share alone."""
    updates = [
        client(name, torch.full((3, 1), value), torch.ones(1, 2), samples=samples)
        for name, value, samples in (("a", 2.0, 1), ("b", 10.0, 3))
    ]
    state = GlobalState({A: torch.ones(2, 2), B: torch.zeros(3, 2)}, 2, 1.0, 1)
    assert torch.equal(product(merged("flora", updates, state)), torch.full((3, 2), 8.0).double())


@few
@given(ranks_of, st.integers(0, 99), st.integers(1, 3))
def test_a_stack_in_order_is_the_same_product_with_its_best_ranks_first(
    ranks: list[int], seed: int, rank: int
) -> None:
    state = merged("flora", random_clients(ranks, seed), state_of(sum(ranks) + 1))
    ordered = best_first(state)
    torch.testing.assert_close(product(ordered), product(state), rtol=1e-5, atol=1e-5)
    first = ordered.tensors[B][:, :rank].double() @ ordered.tensors[A][:rank].double()
    tail = torch.linalg.svdvals(product(state))[rank:].norm()
    torch.testing.assert_close((product(state) - first).norm(), tail, rtol=1e-4, atol=1e-4)


def test_flora_refuses_a_stack_that_does_not_fit() -> None:
    with pytest.raises(MethodError, match="add up to 5, more than the global rank 4") as refusal:
        merged("flora", random_clients([2, 3], 0), state_of(4))
    assert "adapter.r to 5" in (refusal.value.hint or "")


def test_flora_refuses_a_second_round() -> None:
    later = [replace(update, base_round=1) for update in random_clients([1, 1], 0)]
    with pytest.raises(UpdateError, match="trains in round 2, and flora stacks once"):
        merged("flora", later, state_of(4))


# --- raflora -------------------------------------------------------------------------------------


def without_training(method: str, rounds: int) -> Tensor:
    """Return the singular values after rounds of aggregating and giving back alone."""
    ranks = (1, 2, 4)
    basis = torch.linalg.qr(torch.randn(7, 4, generator=torch.Generator().manual_seed(1))).Q
    start = {A: torch.eye(4, 5), B: basis * torch.tensor([4.0, 3.0, 2.0, 1.0])}
    state = GlobalState(start, 4, 1.0, 1)
    for _ in range(rounds):
        updates = []
        for index, rank in enumerate(ranks):
            own = write_back(state, masks=None, kept_layers=(0,), scaling=1.0, rank=rank)
            updates.append(client(f"c{index}", own[B], own[A]))
        state = merged(method, updates, state)
    return torch.linalg.svdvals(product(state))[:4]


def test_flexlora_loses_the_ranks_that_few_clients_have() -> None:
    """Each round multiplies rank h by the share of the clients that have it: 1, 2/3, 1/3, 1/3."""
    shares = torch.tensor([1, 2 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    for rounds in (1, 3):
        expected = torch.tensor([4.0, 3, 2, 1], dtype=torch.float64) * shares**rounds
        torch.testing.assert_close(
            without_training("flexlora", rounds), expected, rtol=1e-5, atol=1e-6
        )


def test_raflora_does_not() -> None:
    expected = torch.tensor([4.0, 3, 2, 1], dtype=torch.float64)
    torch.testing.assert_close(without_training("raflora", 5), expected, rtol=1e-5, atol=1e-6)


@few
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_with_equal_ranks_raflora_is_flexlora(rank: int, clients: int, seed: int) -> None:
    updates = random_clients([rank] * clients, seed)
    one, other = (merged(m, updates, state_of(4)) for m in ("raflora", "flexlora"))
    torch.testing.assert_close(product(one), product(other), rtol=1e-5, atol=1e-5)


# --- hetlora -------------------------------------------------------------------------------------


def ones(name: str, rank: int, samples: int = 1) -> Update:
    return client(name, torch.ones(4, rank), torch.ones(rank, 4), samples=samples)


def square(rank: int) -> GlobalState:
    return GlobalState({A: torch.zeros(rank, 4), B: torch.zeros(4, rank)}, rank, 1.0, 1)


def test_hetlora_weighs_by_the_norm_of_the_update() -> None:
    """Ones of rank 1 and 2 have norms 4 and 8, hence weights 1/3 and 2/3."""
    updates = [ones("one", 1), ones("two", 2)]
    result = merged("hetlora", updates, square(2)).tensors[A]
    torch.testing.assert_close(result[0], torch.ones(4))
    torch.testing.assert_close(result[1], torch.full((4,), 2 / 3))


def test_hetlora_by_coverage_does_not_dilute_the_high_ranks() -> None:
    updates = [ones("one", 1), ones("two", 2)]
    result = merged("hetlora", updates, square(3), normalize="coverage").tensors
    torch.testing.assert_close(result[A][:2], torch.ones(2, 4))
    assert not result[A][2].any()  # nobody has it: it stays


def test_hetlora_by_samples() -> None:
    updates = [ones("one", 1, samples=3), ones("two", 2, samples=1)]
    result = merged("hetlora", updates, square(2), weights="samples").tensors[A]
    assert torch.equal(result[:, 0], torch.tensor([1.0, 0.25]))


def test_hetlora_takes_clients_alike_that_have_not_moved() -> None:
    updates = [
        client(f"c{value}", torch.zeros(4, 1), torch.full((1, 4), float(value))) for value in (1, 3)
    ]
    assert torch.equal(merged("hetlora", updates, square(1)).tensors[A], torch.full((1, 4), 2.0))


@few
@given(ranks_of, st.integers(0, 99))
def test_norms_are_those_of_the_dense_products(ranks: list[int], seed: int) -> None:
    from prufed_plugins.aggregators.norms import update_norms

    updates = random_clients(ranks, seed)
    norms = update_norms(updates, state_of(4))
    for update in updates:
        dense = update.scaling * update.tensors[B].double() @ update.tensors[A].double()
        assert norms[update.client] == pytest.approx(float(dense.norm()), rel=1e-5)


@few
@given(st.lists(st.just(2), min_size=1, max_size=4), st.integers(0, 99))
def test_any_method_can_weigh_by_the_norm_as_hetlora_does(ranks: list[int], seed: int) -> None:
    from prufed_plugins.aggregators.norms import weighed_by_norm

    updates, state = random_clients(ranks, seed), state_of(2)
    expected = merged("hetlora", updates, state).tensors
    found = merged("heteagg", weighed_by_norm(updates, state), state, include_global=False)
    for name, tensor in expected.items():
        torch.testing.assert_close(found.tensors[name], tensor)


def test_an_update_that_cannot_be_read_keeps_its_weight() -> None:
    from prufed_plugins.aggregators.norms import weighed_by_norm

    one, two, three = random_clients([2, 2, 2], 1)
    spoiled = replace(two, tensors={A: two.tensors[A] * float("nan"), B: two.tensors[B]})
    empty = replace(three, tensors={A: three.tensors[A]})
    weighed = weighed_by_norm([one, spoiled, empty], state_of(2))
    norm = (one.scaling * one.tensors[B].double() @ one.tensors[A].double()).norm()
    assert [update.weight for update in weighed] == pytest.approx([float(norm), 1.0, 1.0])


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    ["hetlora", "flexlora", "raflora", "flora", "fjord", "median", "trimmed-mean", "ties", "dare"],
)
def test_arrival_order_changes_no_bit_with_unequal_ranks(method: str) -> None:
    updates = random_clients([1, 3, 2], 4)
    first = merged(method, updates, state_of(6)).tensors
    for order in itertools.permutations(updates):
        again = merged(method, list(order), state_of(6)).tensors
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("method", ["fedavg", "fedit", "heteagg", "heteagg-layer"])
def test_a_method_for_one_rank_names_the_client_of_another(method: str) -> None:
    with pytest.raises(UpdateError, match="client c1: rank 3 is not the global rank 2"):
        merged(method, random_clients([2, 3], 0), state_of(2))


@pytest.mark.parametrize("method", ["hetlora", "fjord", "fedrolex", "median", "ties", "fedsa"])
def test_a_rank_above_the_global_one_names_the_client(method: str) -> None:
    with pytest.raises(UpdateError, match="client c1: rank 3 is above the global rank 2"):
        merged(method, random_clients([2, 3], 0), state_of(2))


# --- fjord ---------------------------------------------------------------------------------------


def test_fjord_averages_each_rank_over_the_clients_wide_enough() -> None:
    """Four ranks, clients at half and at full width, three samples to one."""
    narrow = client("a", torch.full((3, 2), 1.0), torch.full((2, 2), 1.0), samples=3)
    wide = client("b", torch.full((3, 4), 5.0), torch.full((4, 2), 5.0), samples=1)
    state = GlobalState({A: torch.full((5, 2), 9.0), B: torch.full((3, 5), 9.0)}, 5, 1.0, 1)
    result = merged("fjord", [narrow, wide], state).tensors
    assert result[A][:, 0].tolist() == [2.0, 2.0, 5.0, 5.0, 9.0]
    assert result[B][0].tolist() == [2.0, 2.0, 5.0, 5.0, 9.0]
    even = merged("fjord", [narrow, wide], state, beta=0).tensors
    assert even[A][:, 0].tolist() == [3.0, 3.0, 5.0, 5.0, 9.0]


# --- fedrolex ------------------------------------------------------------------------------------


def test_fedrolex_merges_each_window_where_it_came_from() -> None:
    """Three ranks; in round 2, the third, a client of rank two has ranks 2 and 0."""
    narrow = client("a", torch.tensor([[1.0, 2.0]] * 3), torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    wide = client("b", torch.full((3, 3), 5.0), torch.full((3, 2), 5.0))
    state = GlobalState({A: torch.full((3, 2), 9.0), B: torch.full((3, 3), 9.0)}, 3, 1.0, 1)
    # the wide one has all ranks, in their order
    wide = replace(
        wide, tensors={A: torch.tensor([[6.0] * 2, [7.0] * 2, [8.0] * 2]), B: wide.tensors[B]}
    )
    updates = [replace(update, base_round=2) for update in (narrow, wide)]
    result = merged("fedrolex", updates, state).tensors
    assert result[A][:, 0].tolist() == [(2 + 6) / 2, 7.0, (1 + 8) / 2]
    assert result[B][0].tolist() == [(2 + 5) / 2, 5.0, (1 + 5) / 2]


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_after_all_rounds_every_rank_has_been_trained_as_often(rank: int) -> None:
    rolling = build("aggregator", "fedrolex", {})
    held = [index for turn in range(5) for index in rolling.window(turn, rank, 5)]
    assert sorted(held) == sorted(list(range(5)) * rank)


@few
@given(st.integers(1, 4), st.integers(0, 9), st.integers(0, 99))
def test_what_a_client_was_given_and_sends_back_goes_where_it_was(
    rank: int, turn: int, seed: int
) -> None:
    (whole,) = random_clients([4], seed)
    state = GlobalState(dict(whole.tensors), 4, 1.0, 1)
    window = build("aggregator", "fedrolex", {}).window(turn, rank, 4)
    own = write_back(state, masks=None, kept_layers=(0,), scaling=1.0, rank=rank, window=window)
    update = replace(client("c", own[B], own[A]), base_round=turn)
    result = merged("fedrolex", [update], state).tensors
    assert all(torch.equal(result[name], state.tensors[name]) for name in state.tensors)
