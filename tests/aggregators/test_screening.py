"""What is kept from the aggregator, what is made smaller, and what is told about the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.diagnostics import EXACT_CROSS_TERM, Sending, measure
from prufed_plugins.discover import build
from prufed_plugins.screening import screen
from prufed_plugins.testing.federation import random_state, random_update

MODULES = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
RANK, D, K = 3, 7, 5
SHAPES = {
    f"{module}.lora_{factor}.weight": (RANK, K) if factor == "A" else (D, RANK)
    for module in MODULES
    for factor in "AB"
}


def draw(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


STATE = GlobalState(draw(0), RANK, 2.0, 2)


def client(name: str, change: dict[str, Tensor], masks: dict[str, Tensor] | None = None) -> Update:
    """Return an update that is the global adapter and a change."""
    tensors = {n: STATE.tensors[n] + delta for n, delta in change.items()}
    if masks is not None:
        tensors = {n: torch.where(masks[n], t, 0.0) for n, t in tensors.items()}
    return Update(name, tensors, masks, 10, RANK, STATE.scaling, kept_layers=(0, 1))


def norm(change: dict[str, Tensor], masks: dict[str, Tensor] | None = None) -> float:
    kept = [d if masks is None else d[masks[n]] for n, d in change.items()]
    return math.sqrt(sum(float(delta.double().square().sum()) for delta in kept))


def half(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items()}


# --- outliers ------------------------------------------------------------------------------------


def test_an_update_a_thousand_times_the_usual_is_excluded_and_said_why() -> None:
    updates = [client(name, draw(seed)) for seed, name in enumerate("abc", start=1)]
    found = screen([*updates, client("mad", draw(4, 3000.0))], STATE)
    assert [update.client for update in found.updates] == ["a", "b", "c"]
    assert found.excluded.keys() == {"mad"}
    assert "times the median of the others" in found.excluded["mad"]
    assert found.measured.norms.keys() == {"a", "b", "c"}, "it spoils no diagnostics either"
    assert screen([*updates, client("mad", draw(4, 3000.0))], STATE, outlier=0).excluded == {}


@pytest.mark.parametrize("others", [0, 1])
def test_without_two_others_nobody_is_an_outlier(others: int) -> None:
    updates = [client("mad", draw(1, 1e6)), *[client("a", draw(2))][:others]]
    assert screen(updates, STATE).excluded == {}


def test_clients_that_did_not_move_make_nobody_an_outlier() -> None:
    still = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    updates = [client("a", still), client("b", still), client("c", draw(1))]
    assert screen(updates, STATE).excluded == {}


def test_an_invalid_update_is_left_to_the_merge() -> None:
    broken = client("broken", draw(1))
    tensors = dict(broken.tensors)
    tensors[next(iter(tensors))] = torch.full((RANK, K), math.nan)
    updates = [client("a", draw(2)), client("b", draw(3)), replace(broken, tensors=tensors)]
    found = screen(updates, STATE, clip=0.1)
    assert found.excluded == {}
    assert found.measured.norms.keys() == {"a", "b"}
    merged = aggregate(build("aggregator", "fedavg"), found.updates, STATE, on_invalid="exclude")
    assert merged.excluded.keys() == {"broken"}
    assert "NaN" in merged.excluded["broken"]


# --- clipping ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    limit=st.floats(0.01, 20),
    size=st.floats(0.01, 10),
    masked=st.booleans(),
    scaling=st.sampled_from([0.5, 2.0, 8.0]),
    seed=st.integers(1, 1000),
)
def test_a_clipped_change_has_the_norm_and_the_direction(
    limit: float, size: float, masked: bool, scaling: float, seed: int
) -> None:
    change = draw(seed, size)
    masks = half(seed) if masked else None
    update = client("a", change, masks)
    factor = math.sqrt(STATE.scaling / scaling)  # what it sends is in its own scale
    own = replace(
        update, tensors={n: t * factor for n, t in update.tensors.items()}, scaling=scaling
    )
    found = screen([own], STATE, clip=limit)
    before = norm(change, masks)
    expected = min(1.0, limit / before)
    assert found.clipped.get("a", 1.0) == pytest.approx(expected, rel=1e-4)
    assert found.measured.norms["a"] == pytest.approx(min(before, limit), rel=1e-4)
    for name, tensor in found.updates[0].tensors.items():
        wanted = (STATE.tensors[name] + expected * change[name]) * factor
        if masks is not None:
            wanted = torch.where(masks[name], wanted, 0.0)
        torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-5)


def test_the_median_clips_the_larger_half_to_it() -> None:
    sizes = {"a": 1.0, "b": 2.0, "c": 8.0}
    updates = [client(name, draw(1, size)) for name, size in sizes.items()]
    found = screen(updates, STATE, clip="median")
    assert found.clipped == {"c": pytest.approx(0.25, rel=1e-5)}
    assert found.measured.norms["c"] == pytest.approx(found.measured.norms["b"], rel=1e-5)


def test_a_clipped_client_of_lower_rank_and_fewer_layers() -> None:
    change = {
        name: torch.ones(2, K) if "lora_A" in name else torch.ones(D, 2)
        for name in SHAPES
        if ".1." in name
    }
    tensors = {
        n: STATE.tensors[n][(slice(2) if "lora_A" in n else (slice(None), slice(2)))] + delta
        for n, delta in change.items()
    }
    update = Update("a", tensors, None, 10, 2, STATE.scaling, kept_layers=(1,))
    found = screen([update], STATE, clip=1.0)
    assert found.clipped["a"] == pytest.approx(1 / math.sqrt(2 * (K + D)), rel=1e-5)
    assert found.measured.modules.keys() == {MODULES[1]}
    assert found.measured.norms["a"] == pytest.approx(1.0, rel=1e-5)


def test_a_client_with_a_window_of_ranks_is_held_against_those() -> None:
    window, ranks = {"a": [2, 0]}, torch.tensor([2, 0])
    still = {n: t.index_select(0 if "lora_A" in n else 1, ranks) for n, t in STATE.tensors.items()}
    update = Update("a", still, None, 10, 2, STATE.scaling, kept_layers=(0, 1))
    assert measure([update], STATE, Sending(window)).norms == {"a": 0.0}
    assert measure([update], STATE).norms["a"] > 1
    moved = replace(update, tensors={n: t + 1 for n, t in still.items()})
    found = screen([moved], STATE, clip=1.0, sending=Sending(window))
    step = 1 / math.sqrt(2 * 2 * (K + D))
    assert found.clipped["a"] == pytest.approx(step, rel=1e-5)
    for name, tensor in found.updates[0].tensors.items():
        torch.testing.assert_close(tensor, still[name] + step)


def test_a_factor_that_clients_keep_is_neither_measured_nor_clipped() -> None:
    change = draw(1)
    shared = {n: d if "lora_A" in n else torch.zeros_like(d) for n, d in change.items()}
    found = screen(
        [client("a", change)], STATE, clip=0.5, sending=Sending(personal=frozenset({"B"}))
    )
    assert found.clipped["a"] == pytest.approx(0.5 / norm(shared), rel=1e-5)
    for name, tensor in found.updates[0].tensors.items():
        if "lora_B" in name:
            assert torch.equal(tensor, STATE.tensors[name] + change[name])


def test_without_clipping_the_tensors_are_the_ones_that_came() -> None:
    update = client("a", draw(1))
    assert screen([update], STATE, clip=1e9).updates == [update]


# --- masks ---------------------------------------------------------------------------------------


# --- where A began -------------------------------------------------------------------------------

LARGE = random_state(layers=2, rank=8, k=40, d=16, seed=5)


def with_a(name: str, change: Callable[[Tensor, torch.Generator], Tensor], seed: int) -> Update:
    """Return an update that is the global adapter but for A, half of whose entries it lacks."""
    generator = torch.Generator().manual_seed(seed)
    sent = random_update(LARGE, name, seed=seed, density=0.5)
    masks = sent.masks or {}
    tensors = {}
    for tensor_name, tensor in LARGE.tensors.items():
        values = change(tensor, generator) if "lora_A" in tensor_name else tensor
        tensors[tensor_name] = torch.where(masks[tensor_name], values, 0.0)
    return replace(sent, tensors=tensors, scaling=4 * LARGE.scaling)


@given(seed=st.integers(0, 1000), size=st.floats(0.4, 1.2))
def test_an_a_drawn_anew_is_excluded(seed: int, size: float) -> None:
    def anew(tensor: Tensor, generator: torch.Generator) -> Tensor:
        return size * torch.randn(tensor.shape, generator=generator)

    honest = with_a("honest", lambda tensor, generator: tensor / 2, seed)
    found = screen([honest, with_a("other", anew, seed + 1)], LARGE)
    assert list(found.excluded) == ["other"]
    assert found.excluded["other"].startswith("its A is another than the one it was given (cosine ")


@given(seed=st.integers(0, 1000), size=st.floats(0, 100))
def test_however_far_training_went_no_a_is_taken_for_another(seed: int, size: float) -> None:
    def trained(tensor: Tensor, generator: torch.Generator) -> Tensor:
        return tensor / 2 + size * torch.randn(tensor.shape, generator=generator)

    assert screen([with_a("far", trained, seed)], LARGE).excluded == {}


def test_an_a_is_not_judged_where_clients_keep_it_or_where_it_is_small() -> None:
    def anew(tensor: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) / 2

    for kept in (Sending(personal=frozenset("A")), Sending(own=True)):
        assert screen([with_a("other", anew, 1)], LARGE, sending=kept).excluded == {}
    small = replace(client("other", draw(1)), tensors=draw(9))
    assert screen([small], STATE).excluded == {}


def test_masks_other_than_those_given_cost_the_client_its_round() -> None:
    masks = half(1)
    name = sorted(masks)[0]
    whole = {n: torch.ones_like(m) for n, m in masks.items()}
    updates = [client(n, draw(i), masks) for i, n in enumerate("abc")]
    given = {"a": masks, "b": half(2), "c": {n: m for n, m in masks.items() if n != name}}
    found = screen(updates, STATE, given_masks=given)
    assert [update.client for update in found.updates] == ["a"]
    assert found.excluded.keys() == {"b", "c"}
    assert found.excluded["c"] == f"its mask of {name} is not the one it was given"
    unmasked = client("a", draw(1))
    assert screen([unmasked], STATE, given_masks={"a": whole}).excluded == {}
    assert screen([unmasked], STATE, given_masks={"a": masks}).excluded.keys() == {"a"}


# --- diagnostics ---------------------------------------------------------------------------------


def test_identical_clients_agree_wholly() -> None:
    change = draw(1)
    found = measure([client(name, change) for name in "abc"], STATE)
    for module in MODULES:
        said = found.modules[module]
        assert said["norm_min"] == said["norm_max"] == pytest.approx(said["norm_mean"])
        assert said["cosine_min"] == pytest.approx(1.0)
        assert said["cross_term"] == pytest.approx(0.0, abs=1e-7)
        assert said["coverage_histogram"] == [0, 0, 0, RANK * (K + D)]
    assert found.cosines == {name: pytest.approx(1.0) for name in "abc"}
    assert found.norms["a"] == pytest.approx(norm(change), rel=1e-6)


def test_opposite_clients_have_no_direction_in_common() -> None:
    change = draw(1)
    away = {name: -delta for name, delta in change.items()}
    found = measure([client("a", change), client("b", change), client("c", away)], STATE)
    assert found.cosines["a"] == pytest.approx(1.0)
    assert found.cosines["c"] == pytest.approx(-1.0)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 1000))
def test_the_cross_term_is_what_averaging_factors_loses(count: int, seed: int) -> None:
    updates = [client(f"c{i}", draw(seed + i)) for i in range(count)]
    found = measure(updates, STATE)
    for module in MODULES:
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        A = torch.stack([update.tensors[a].double() for update in updates])
        B = torch.stack([update.tensors[b].double() for update in updates])
        of_means = B.mean(0) @ A.mean(0)
        lost = torch.bmm(B, A).mean(0) - of_means
        expected = float(lost.norm() / of_means.norm())
        assert found.modules[module]["cross_term"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_two_clients_lose_a_quarter_of_the_product_of_their_differences() -> None:
    """Σ p B_i A_i − B̄ Ā = ¼ (B_1 − B_2)(A_1 − A_2), of rank r at most."""
    one, other = client("a", draw(1)), client("b", draw(2))
    found = measure([one, other], STATE)
    for module in MODULES:
        a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        lost = (one.tensors[b] - other.tensors[b]) @ (one.tensors[a] - other.tensors[a]) / 4
        means = (one.tensors[b] + other.tensors[b]) @ (one.tensors[a] + other.tensors[a]) / 4
        expected = float(lost.norm() / means.norm())
        assert found.modules[module]["cross_term"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("resting", ["A", "B"])
def test_there_is_no_cross_term_where_a_factor_rests_however_clients_are_masked(
    resting: str,
) -> None:
    updates = []
    for seed, name in enumerate("abc"):
        change = {
            n: torch.zeros_like(delta) if f"lora_{resting}" in n else delta
            for n, delta in draw(seed).items()
        }
        updates.append(client(name, change, half(seed)))
    found = measure(updates, STATE)
    for module in MODULES:
        assert found.modules[module]["cross_term"] == pytest.approx(0.0, abs=1e-6)
        assert found.modules[module]["norm_min"] > 0


def test_coverage_is_counted_entry_by_entry() -> None:
    masks = [half(1), half(2)]
    updates = [client("a", draw(1), masks[0]), client("b", draw(2), masks[1])]
    updates.append(client("c", draw(3)))
    found = measure(updates, STATE)
    for module in MODULES:
        counts = [0, 0, 0, 0]
        for factor in "AB":
            name = f"{module}.lora_{factor}.weight"
            held = masks[0][name].long() + masks[1][name].long() + 1
            for number in held.flatten().tolist():
                counts[number] += 1
        assert found.modules[module]["coverage_histogram"] == counts


def test_ranks_are_mixed_as_zeros() -> None:
    small = {n: t[:1] if "lora_A" in n else t[:, :1] for n, t in STATE.tensors.items()}
    updates = [
        Update("a", small, None, 1, 1, STATE.scaling, kept_layers=(0, 1)),
        client("b", {name: torch.zeros(shape) for name, shape in SHAPES.items()}),
    ]
    found = measure(updates, STATE)
    assert found.norms == {"a": 0.0, "b": 0.0}
    histogram = found.modules[MODULES[0]]["coverage_histogram"]
    assert histogram == [0, (RANK - 1) * (K + D), K + D]


@pytest.mark.parametrize("masked", [False, True])
def test_the_cross_term_of_very_many_ranks_is_estimated(
    monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    updates = [
        client(f"c{i:04}", draw(i), half(i) if masked else None)
        for i in range(EXACT_CROSS_TERM // RANK + 1)
    ]
    estimated = measure(updates, STATE)
    monkeypatch.setattr("prufed_plugins.diagnostics.EXACT_CROSS_TERM", 10**9)
    exact = measure(updates, STATE)
    for module in MODULES:
        expected = exact.modules[module].pop("cross_term")
        assert estimated.modules[module].pop("cross_term") == pytest.approx(expected, rel=0.2)
        assert expected > 0.01
    assert estimated == exact


@pytest.mark.parametrize("entries", [1, 12, 40])
def test_what_is_too_large_to_lie_side_by_side_is_measured_in_runs(
    monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    small = {n: t[:2] if "lora_A" in n else t[:, :2] for n, t in draw(4).items()}
    updates = [
        client("a", draw(1), half(1)),
        client("b", draw(2), half(2)),
        client("c", draw(3)),
        Update("d", small, None, 1, 2, STATE.scaling, kept_layers=(0, 1)),
    ]
    together = measure(updates, STATE)
    monkeypatch.setattr("prufed_plugins.diagnostics.LARGEST_RUN", entries)
    apart = measure(updates, STATE)
    assert apart.norms == pytest.approx(together.norms)
    assert apart.cosines == pytest.approx(together.cosines)
    for module in MODULES:
        expected = {k: v for k, v in together.modules[module].items() if k != "cross_term"}
        assert apart.modules[module].keys() == expected.keys()
        for key, value in expected.items():
            assert apart.modules[module][key] == pytest.approx(value), key


def test_changes_whose_squares_overflow_float32_have_a_norm() -> None:
    large = draw(1, 1e25)
    found = measure([client("a", large), client("b", draw(2))], STATE)
    assert found.norms["a"] == pytest.approx(norm(large), rel=1e-5)
    assert found.norms["b"] == pytest.approx(norm(draw(2)), rel=1e-5)
    assert found.cosines["a"] == pytest.approx(1.0)
    assert all(math.isfinite(found.modules[m]["cross_term"]) for m in MODULES)


def test_norms_of_many_entries_keep_their_digits() -> None:
    """Ten million squares summed in float32 are off in the fourth digit."""
    module = "model.layers.0.q_proj"
    shapes = {f"{module}.lora_A.weight": (1, 10_000_000), f"{module}.lora_B.weight": (1, 1)}
    state = GlobalState({n: torch.zeros(s) for n, s in shapes.items()}, 1, 1.0, 1)
    tensors = {n: torch.full(s, 0.1) for n, s in shapes.items()}
    update = Update("a", tensors, None, 1, 1, 1.0, (0,))
    assert measure([update], state).norms["a"] == pytest.approx(0.1 * 10_000_001**0.5, rel=1e-5)


def test_the_order_of_updates_changes_nothing() -> None:
    updates = [client(name, draw(seed)) for seed, name in enumerate("abcd")]
    assert measure(updates, STATE) == measure(updates[::-1], STATE)
