"""FedEx-LoRA: factors and residual together are the mean of the products, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prufed_plugins.aggregators.residuals import compressed, of_one_rank
from prufed_plugins.aggregators.streaming import Aggregated, aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.discover import build
from prufed_plugins.errors import UpdateError
from prufed_plugins.testing.federation import random_state, random_update

MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"

few = settings(max_examples=40, deadline=None)


def merge(updates: Sequence[Update], state: GlobalState, **values: Any) -> Aggregated:
    return aggregate(build("aggregator", "fedex", values), updates, state)


def start(d: int, k: int, rank: int = 2, scaling: float = 1.0) -> GlobalState:
    return GlobalState({A: torch.zeros(rank, k), B: torch.zeros(d, rank)}, rank, scaling, 1)


def clients(
    state: GlobalState, number: int, seed: int, scalings: Sequence[float] = (1.0,)
) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Update(
            f"c{index}",
            {n: torch.randn(t.shape, generator=generator) for n, t in state.tensors.items()},
            None,
            samples=index + 1,
            rank=state.rank,
            scaling=scalings[index % len(scalings)],
            kept_layers=(0,),
        )
        for index in range(number)
    ]


def product(tensors: Any) -> Tensor:
    return tensors[B].double() @ tensors[A].double()


def shift(state: GlobalState) -> Tensor | float:
    """Return what a base of this federation has become, less what it was, without its factor s."""
    return product(state.residual) if state.residual else 0.0


@few
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 99),
    st.sampled_from([0.0, 1.0]),
)
def test_base_and_adapter_are_the_mean_of_the_products_round_after_round(
    number: int, d: int, k: int, seed: int, beta: float
) -> None:
    """W' + s B̄ Ā = W + s Σ p_i B_i A_i, where W' is the base with the residual in it."""
    state = start(d, k, scaling=2.0)
    for round_index in range(3):
        updates = clients(state, number, 10 * seed + round_index, scalings=(1.0, 3.0))
        weights = torch.tensor([float(update.samples) ** beta for update in updates])
        products = [u.scaling / 2.0 * product(u.tensors) for u in updates]
        mean = sum(p * w for p, w in zip(products, weights / weights.sum(), strict=True))
        before = shift(state)
        state = merge(updates, state, beta=beta).state
        torch.testing.assert_close(
            shift(state) + product(state.tensors), before + mean, rtol=1e-5, atol=1e-5
        )


def test_the_factors_are_the_means() -> None:
    state = start(5, 4)
    updates = clients(state, 3, 1)
    merged = merge(updates, state).state
    for name in (A, B):
        mean = torch.stack([update.tensors[name] for update in updates]).mean(dim=0)
        torch.testing.assert_close(merged.tensors[name], mean)


def test_two_clients_differ_by_one_product_of_rank_r() -> None:
    """R = ¼ (B_1 - B_2)(A_1 - A_2), the worked example of two uniform clients."""
    state = start(6, 5)
    one, other = clients(state, 2, 3)
    residual = merge([one, other], state).state.residual
    expected = (one.tensors[B] - other.tensors[B]) @ (one.tensors[A] - other.tensors[A]) / 4
    torch.testing.assert_close((residual[B] @ residual[A]), expected, rtol=1e-5, atol=1e-5)
    assert residual[A].shape == (2, 5)


def test_by_hand() -> None:
    """A = (1 0), (0 1) and B = (2 0 0)ᵀ, (0 2 0)ᵀ: the mean product has rank 2, B̄ Ā rank 1."""
    state = start(3, 2, rank=1)
    sides = [([[1.0, 0.0]], [[2.0], [0.0], [0.0]]), ([[0.0, 1.0]], [[0.0], [2.0], [0.0]])]
    updates = [
        replace(update, tensors={A: torch.tensor(a), B: torch.tensor(b)})
        for update, (a, b) in zip(clients(state, 2, 0), sides, strict=True)
    ]
    merged = merge(updates, state)
    wanted = torch.tensor([[0.5, -0.5], [-0.5, 0.5], [0.0, 0.0]]).double()
    torch.testing.assert_close(product(merged.state.residual), wanted)
    assert merged.diagnostics[MODULE]["residual_rank"] == 1
    assert merged.diagnostics[MODULE]["discarded"] == 0


@few
@given(st.integers(1, 5), st.integers(0, 99))
def test_what_is_cut_off_is_the_tail_of_the_singular_values(rank: int, seed: int) -> None:
    state = start(7, 6)
    updates = clients(state, 4, seed)
    whole = product(merge(updates, state).state.residual)
    cut = merge(updates, state, residual_rank=rank)
    values = torch.linalg.svdvals(whole)
    assert cut.state.residual[A].shape[0] == min(rank, 6)
    lost = (product(cut.state.residual) - whole).norm()
    torch.testing.assert_close(lost, values[rank:].norm(), rtol=1e-4, atol=1e-5)
    share = float(values[rank:].norm() / values.norm())
    assert cut.diagnostics[MODULE]["discarded"] == pytest.approx(share, rel=1e-4, abs=1e-6)


def test_a_client_alone_leaves_nothing_over() -> None:
    state = start(5, 4)
    assert merge(clients(state, 1, 2), state).state.residual == {}


def test_parts_of_one_adapter_leave_nothing_over() -> None:
    """An entry that a client lacks is the mean's: clients that agree have no cross term."""
    state, theta = random_state(seed=1), random_state(seed=2).tensors
    updates = []
    for index, density in enumerate((1.0, 0.75, 0.5)):
        update = random_update(state, f"c{index}", seed=index, density=density)
        masks = update.masks or {}
        held = {name: torch.where(masks[name], theta[name], 0.0) for name in theta}
        updates.append(replace(update, tensors=held))
    merged = merge(updates, state).state
    assert merged.residual == {}
    for name, tensor in theta.items():
        torch.testing.assert_close(merged.tensors[name], tensor)


def test_one_a_for_all_leaves_nothing_over_whatever_the_scalings() -> None:
    """As under the tuner ffa; bringing A into the common scale rounds it."""
    state = start(5, 4)
    updates = clients(state, 3, 4, scalings=(1.0, 1.7, 2.9))
    shared = updates[0].tensors[A]
    same = [replace(u, tensors={**u.tensors, A: shared / u.scaling**0.5}) for u in updates]
    assert merge(same, state).state.residual == {}


def test_a_layer_that_nobody_has_keeps_its_residual() -> None:
    state = random_state(layers=2, seed=5)
    updates = [random_update(state, f"c{index}", seed=index) for index in range(2)]
    first = merge(updates, state).state
    shallow = [random_update(state, f"c{i}", seed=9 + i, kept_layers=(0,)) for i in range(2)]
    second = merge(shallow, first).state
    deep = "model.layers.1.self_attn.q_proj"
    names = [f"{deep}.lora_{factor}.weight" for factor in "BA"]
    before, after = (s.residual[names[0]] @ s.residual[names[1]] for s in (first, second))
    assert torch.equal(before, after)
    # all modules have one rank: a PEFT adapter knows no other
    assert {t.shape[0] for n, t in second.residual.items() if "lora_A" in n} == {4}


def test_other_aggregators_leave_a_residual_alone() -> None:
    state = random_state(seed=6)
    updates = [random_update(state, f"c{index}", seed=index) for index in range(2)]
    residual = merge(updates, state).state.residual
    kept = aggregate(
        build("aggregator", "fedavg", {}), updates, replace(state, residual=residual)
    ).state.residual
    assert kept.keys() == residual.keys()
    assert all(torch.equal(kept[name], residual[name]) for name in residual)


def test_unequal_ranks_are_refused() -> None:
    state = start(5, 4)
    narrow = clients(start(5, 4, rank=1), 1, 1)
    with pytest.raises(UpdateError, match="rank 1 is not the global rank 2"):
        merge(narrow, state)


def test_nothing_of_rank_zero_is_kept() -> None:
    empty = compressed(torch.zeros(4, 3).double(), torch.zeros(3, 5).double(), rank=None, floor=0.0)
    assert (empty.left.shape, empty.right.shape, empty.discarded) == ((4, 0), (0, 5), 0.0)
    assert of_one_rank({A: empty.right, B: empty.left}) == {}
