"""Worked examples, exactly: small matrices whose result was computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prufed_plugins.aggregators.fedavg import FedAvg
from prufed_plugins.aggregators.heteagg import HeteAgg
from prufed_plugins.aggregators.heteagg_layer import HeteAggLayer
from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.factor_masks import nested_mask
from prufed_plugins.params import FedAvgParams, HeteAggLayerParams, HeteAggParams
from prufed_plugins.testing.federation import random_state, random_update
from prufed_plugins.write_back import write_back

A = "model.layers.0.self_attn.q_proj.lora_A.weight"
B = "model.layers.0.self_attn.q_proj.lora_B.weight"

GLOBAL = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
CLIENT_1 = torch.tensor([[2.0, 0, 5], [0, 7, 0]])
CLIENT_2 = torch.tensor([[4.0, 6, 0], [0, 9, 0]])


def state_of(matrix: Tensor) -> GlobalState:
    return GlobalState({A: matrix, B: torch.zeros(1, len(matrix))}, len(matrix), 1.0, 1)


def update_of(
    client: str, matrix: Tensor, *, mask: Tensor | None = None, samples: int = 1
) -> Update:
    tensors = {A: matrix, B: torch.zeros(1, len(matrix))}
    masks = None if mask is None else {A: mask}
    return Update(client, tensors, masks, samples, len(matrix), 1.0, (0,))


def two_clients(samples: tuple[int, int] = (1, 1)) -> list[Update]:
    return [
        update_of("one", CLIENT_1, mask=CLIENT_1 != 0, samples=samples[0]),
        update_of("two", CLIENT_2, mask=CLIENT_2 != 0, samples=samples[1]),
    ]


def merged(settings: dict[str, Any], updates: list[Update], state: GlobalState) -> Tensor:
    return aggregate(HeteAgg(HeteAggParams(**settings)), updates, state).state.tensors[A]


def test_entries_without_a_client_keep_the_global_value() -> None:
    expected = torch.tensor([[3.0, 6, 5], [4, 8, 6]])
    assert torch.equal(merged({}, two_clients(), state_of(GLOBAL)), expected)


def test_the_letter_of_algorithm_2_sets_entries_without_a_client_to_zero() -> None:
    expected = torch.tensor([[3.0, 6, 5], [0, 8, 0]])
    assert torch.equal(merged({"compat": "lego-alg2"}, two_clients(), state_of(GLOBAL)), expected)
    assert torch.equal(merged({"fallback": "zero"}, two_clients(), state_of(GLOBAL)), expected)


def test_the_global_adapter_can_join_the_mean() -> None:
    expected = torch.tensor([[7 / 3, 4, 4], [4, 7, 6]])
    for mask in ("explicit", "nonzero"):
        settings = {"include_global": True, "mask": mask, "fallback": "zero"}
        assert torch.equal(merged(settings, two_clients(), state_of(GLOBAL)), expected)


def test_samples_3_to_1() -> None:
    expected = torch.tensor([[2.5, 6, 5], [4, 7.5, 6]])
    assert torch.equal(merged({"beta": 1}, two_clients((3, 1)), state_of(GLOBAL)), expected)


def test_write_back_gives_a_client_the_mean_on_its_mask() -> None:
    new = state_of(torch.tensor([[3.0, 6, 5], [4, 8, 6]]))
    given = write_back(new, masks={A: CLIENT_1 != 0}, kept_layers=(0,), scaling=1.0, rank=2)
    assert torch.equal(given[A], torch.tensor([[3.0, 0, 5], [0, 8, 0]]))


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_joining_is_a_step_of_n_over_n_plus_1(clients: int) -> None:
    state = random_state(seed=3)
    updates = [random_update(state, f"c{index}", seed=index) for index in range(clients)]
    joined = aggregate(HeteAgg(HeteAggParams(include_global=True)), updates, state).state
    for name, old in state.tensors.items():
        changes = torch.stack([update.tensors[name].double() - old for update in updates])
        expected = old + clients / (clients + 1) * changes.mean(dim=0)
        torch.testing.assert_close(joined.tensors[name], expected.float(), rtol=1e-6, atol=1e-7)


def test_a_single_client_takes_half_a_step_by_default() -> None:
    state = random_state(seed=4)
    update = random_update(state, "only", seed=5)
    result = aggregate(HeteAgg(HeteAggParams()), [update], state).state
    for name, old in state.tensors.items():
        half = (old.double() + update.tensors[name]) / 2
        assert torch.equal(result.tensors[name], half.float())


@pytest.mark.parametrize(
    ("samples", "ratio"), [((1, 1, 1, 1), 0.625), ((1, 3, 4, 2), 0.575), ((2, 2, 3, 3), 0.575)]
)
def test_plain_averaging_shrinks_masked_entries_and_heteagg_does_not(
    samples: tuple[int, ...], ratio: float
) -> None:
    """Identical clients at densities 1, 3/4, 1/2, 1/4."""
    theta = torch.ones(4, 10)
    updates = []
    for index, sparsity in enumerate((0.0, 0.25, 0.5, 0.75)):
        mask = nested_mask(theta.shape, sparsity, seed=0, name=A)
        masked = torch.where(mask, theta, 0.0)
        updates.append(update_of(f"c{index}", masked, mask=mask, samples=samples[index]))
    state = state_of(torch.full((4, 10), 7.0))
    plain = aggregate(FedAvg(FedAvgParams()), updates, state).state.tensors[A]
    assert plain.double().mean().item() == pytest.approx(ratio, abs=1e-7)
    assert torch.equal(merged({}, updates, state), theta)
    assert torch.equal(merged({"beta": 1}, updates, state), theta)


def test_reading_masks_from_zeros_never_delivers_b_to_an_untrained_client() -> None:
    state = random_state(seed=6)
    untrained = {name: torch.zeros_like(t) for name, t in state.tensors.items() if "lora_B" in name}
    from_zeros = {name: tensor != 0 for name, tensor in untrained.items()}
    facts: dict[str, Any] = {"kept_layers": (0, 1), "scaling": 1.0, "rank": 2}
    lost = write_back(state, masks=from_zeros, **facts)
    given = write_back(state, masks={}, **facts)
    for name in untrained:
        assert not lost[name].any()
        assert torch.equal(given[name], state.tensors[name])


def test_reading_masks_from_zeros_says_how_many_entries_of_b_it_lost() -> None:
    state = state_of(GLOBAL)
    literal = HeteAgg(HeteAggParams(compat="lego-alg2"))
    diagnostics = aggregate(literal, two_clients(), state).diagnostics
    assert diagnostics["model.layers.0.self_attn.q_proj"]["zeros_taken_as_absent"] == 4


SIZES = (3742, 2191, 1773, 1188)  # rows of four categories of databricks-dolly-15k


@pytest.mark.parametrize(
    ("beta", "everywhere", "first_and_last"), [(0, 3.25, 5.0), (1, 1.98, 2.41)]
)
def test_each_entry_follows_the_clients_that_have_it(
    beta: float, everywhere: float, first_and_last: float
) -> None:
    """Optima 0, 1, 2, 10: an entry of all clients, and one of the first and the last alone."""
    updates = [
        update_of(
            f"c{index}",
            torch.tensor([[optimum, optimum]]),
            mask=torch.tensor([[True, index in (0, 3)]]),
            samples=SIZES[index],
        )
        for index, optimum in enumerate((0.0, 1.0, 2.0, 10.0))
    ]
    result = merged({"beta": beta}, updates, state_of(torch.zeros(1, 2)))
    assert result[0, 0].item() == pytest.approx(everywhere, abs=5e-3)
    assert result[0, 1].item() == pytest.approx(first_and_last, abs=5e-3)


def constant_layers(client: str, layers: dict[int, float], samples: int = 1) -> Update:
    """Return an update whose tensors are constant, layer by layer."""
    tensors = {}
    for layer, value in layers.items():
        module = f"model.layers.{layer}.self_attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = torch.full((1, 2), value)
        tensors[f"{module}.lora_B.weight"] = torch.full((2, 1), value)
    return Update(client, tensors, None, samples, 1, 1.0, tuple(layers))


def layer_values(params: HeteAggLayerParams, updates: list[Update]) -> list[float]:
    full = constant_layers("g", dict.fromkeys(range(4), -1.0))
    state = GlobalState(full.tensors, 1, 1.0, 4)
    result = aggregate(HeteAggLayer(params), updates, state).state.tensors
    names = [f"model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in range(4)]
    return [result[name][0, 0].item() for name in names]


def test_a_layer_is_the_mean_of_the_clients_that_kept_it() -> None:
    """The second layer of client b is the model's fourth: it must not meet a's second."""
    a = constant_layers("a", {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0})
    b = constant_layers("b", {0: 10.0, 3: 40.0})
    assert layer_values(HeteAggLayerParams(), [a, b]) == [5.5, 2.0, 3.0, 22.0]


def test_a_layer_that_nobody_kept_stays() -> None:
    clients = [constant_layers("a", {0: 1.0, 2: 3.0}), constant_layers("b", {0: 3.0})]
    assert layer_values(HeteAggLayerParams(), clients) == [2.0, -1.0, 3.0, -1.0]


def test_depths_can_count_alike() -> None:
    deep = [constant_layers(f"d{i}", dict.fromkeys(range(4), float(i))) for i in (1, 2, 3)]
    shallow = constant_layers("s", {0: 10.0, 3: 10.0})
    by_client = layer_values(HeteAggLayerParams(), [*deep, shallow])
    by_depth = layer_values(HeteAggLayerParams(group_weighting="group"), [*deep, shallow])
    assert by_client == [4.0, 2.0, 2.0, 4.0]
    assert by_depth == [6.0, 2.0, 2.0, 6.0]


def test_layers_can_be_weighted_by_samples() -> None:
    a = constant_layers("a", dict.fromkeys(range(4), 1.0), samples=3)
    b = constant_layers("b", {1: 5.0}, samples=1)
    assert layer_values(HeteAggLayerParams(beta=1), [a, b]) == [1.0, 2.0, 1.0, 1.0]
