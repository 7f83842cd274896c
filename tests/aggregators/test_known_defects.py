"""Mistakes of published code that changed its results: none of them may be ours.

Each test names the repository and what it does there; what the method should do is the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prufed_cli.config.documents import validated
from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import GlobalState, PruneTarget, Update
from prufed_plugins.builtin import prufed_aggregators
from prufed_plugins.discover import build
from prufed_plugins.errors import UpdateError
from prufed_plugins.testing.federation import random_state, random_update
from prufed_plugins.testing.pruner import TinyDecoder
from prufed_plugins.tuners.hetlora import kept_ranks
from prufed_plugins.write_back import write_back

MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"

METHODS = [method.name for method in prufed_aggregators()]
SETTINGS: dict[str, dict[str, Any]] = {
    "krum": {"byzantine": 0},
    "multi-krum": {"byzantine": 0},
    "dare": {"drop": 0.5},  # by default nine of ten entries of so small a tensor would stay
}


def state_of(rank: int, d: int, k: int, value: float = 0.0) -> GlobalState:
    return GlobalState(
        {A: torch.full((rank, k), value), B: torch.full((d, rank), value)}, rank, 1, 1
    )


def client(name: str, left: Tensor, right: Tensor, *, samples: int = 1) -> Update:
    """Return an update of B (d, r_i) and A (r_i, k)."""
    return Update(name, {A: right, B: left}, None, samples, len(right), 1.0, (0,))


def constant(name: str, value: float, rank: int, *, d: int, k: int, samples: int = 1) -> Update:
    return client(name, torch.full((d, rank), value), torch.full((rank, k), value), samples=samples)


def merged(
    method: str, updates: Sequence[Update], state: GlobalState, **values: Any
) -> dict[str, Tensor]:
    aggregator = build("aggregator", method, {**SETTINGS.get(method, {}), **values})
    return dict(aggregate(aggregator, updates, state).state.tensors)


def mean_product(updates: Sequence[Update]) -> Tensor:
    """Return Σ p_i B_i A_i with p_i by samples."""
    total = sum(update.samples for update in updates)
    products = [u.samples / total * u.tensors[B].double() @ u.tensors[A].double() for u in updates]
    return torch.stack(products).sum(dim=0)


def random_clients(ranks: Sequence[int], d: int, k: int, seed: int = 0) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [
        client(
            f"c{index}",
            torch.randn(d, rank, generator=generator),
            torch.randn(rank, k, generator=generator),
            samples=index + 1,
        )
        for index, rank in enumerate(ranks)
    ]


# --- clients that are not counted, or counted twice ----------------------------------------------


@pytest.mark.parametrize("method", ["fedit", "fedavg"])
def test_every_client_is_in_the_mean(method: str) -> None:
    """ATP-1010/FederatedLLM: FLoRA's baseline FedIT assigns the second client's and all later
    shares to a misspelt name, ``weighted_sindgle_weights``, so that FedIT is p₁ θ₁.
    """
    updates = [
        constant(name, value, 1, d=3, k=2, samples=samples)
        for name, value, samples in (("a", 1.0, 1), ("b", 3.0, 2), ("c", 9.0, 5))
    ]
    result = merged(method, updates, state_of(1, 3, 2))
    assert torch.equal(result[A], torch.full((1, 2), (1 + 6 + 45) / 8))
    assert torch.equal(result[B], torch.full((3, 1), (1 + 6 + 45) / 8))


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("heteagg", {"beta": 1, "include_global": False}),
        ("heteagg-layer", {"beta": 1}),
        ("heteagg-layer", {"beta": 1, "group_weighting": "group"}),
        ("heteagg-ls", {"beta": 1}),
        ("hetlora", {"normalize": "coverage"}),
        ("fjord", {}),
        ("fedrolex", {"beta": 1}),
        ("fedsa", {}),
        ("inclusivefl", {"momentum": 0}),
    ],
)
def test_the_weights_of_those_who_have_a_layer_add_up_to_one(
    method: str, values: dict[str, Any]
) -> None:
    """SonyResearch/FedP3: ``weighted_mean`` divides a layer's weighted sum by the number of clients
    that sent it, not by their weights.
    """
    shapes = {"A": (2, 3), "B": (4, 2)}
    names = {
        layer: {f"model.layers.{layer}.q_proj.lora_{f}.weight": s for f, s in shapes.items()}
        for layer in range(3)
    }
    every = {name: shape for layer in names.values() for name, shape in layer.items()}
    state = GlobalState({name: torch.zeros(shape) for name, shape in every.items()}, 2, 1.0, 3)
    updates = [
        Update(
            f"c{depth}",
            {n: torch.full(s, 5.0) for layer in range(depth) for n, s in names[layer].items()},
            None,
            samples,
            2,
            1.0,
            tuple(range(depth)),
        )
        for depth, samples in ((1, 700), (2, 3), (3, 90))
    ]
    for tensor in merged(method, updates, state, **values).values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 5.0))


@pytest.mark.parametrize("clients", [130, 260])
def test_more_clients_than_a_byte_can_count(clients: int) -> None:
    """Pengxin-Guo/FedPrLLM counts votes in int8, which is negative from 128 clients on."""
    mask = {A: torch.tensor([[True, False]]), B: torch.tensor([[True], [True]])}
    updates = [
        replace(constant(f"c{index:03}", float(index % 2), 1, d=2, k=2), masks=mask)
        for index in range(clients)
    ]
    result = merged("heteagg", updates, state_of(1, 2, 2, 7.0), min_count=clients)
    assert result[A].tolist() == [[0.5, 7.0]]
    assert result[B].tolist() == [[0.5], [0.5]]
    too_many = merged("heteagg", updates, state_of(1, 2, 2, 7.0), min_count=clients + 1)
    assert too_many[A].tolist() == [[7.0, 7.0]]


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("hetlora", {"normalize": "coverage", "weights": "samples"}),
        ("fjord", {}),
        ("fedrolex", {}),
        ("fedsa", {}),
        ("median", {}),
        ("trimmed-mean", {}),
        ("ties", {"density": 1}),
        ("dare", {"drop": 0}),
    ],
)
def test_a_rank_that_one_client_has_is_not_diluted_by_the_others(
    method: str, values: dict[str, Any]
) -> None:
    """imkevinkuo/flasc: the baseline of rank tiers divides every rank by all clients."""
    updates = [constant(f"c{rank}", 4.0, rank, d=5, k=3) for rank in (1, 2, 4)]
    result = merged(method, updates, state_of(4, 5, 3), **values)
    torch.testing.assert_close(result[A], torch.full((4, 3), 4.0))
    torch.testing.assert_close(result[B], torch.full((5, 4), 4.0))


def test_a_rank_that_one_client_has_is_not_diluted_in_the_product() -> None:
    """The same where products are averaged: raFLoRA's remedy against FlexLoRA's collapse."""
    left = torch.linalg.qr(torch.randn(5, 4, generator=torch.Generator().manual_seed(0))).Q
    right = torch.eye(4, 6)
    updates = [client(f"c{rank}", left[:, :rank], right[:rank]) for rank in (1, 2, 4)]
    result = merged("raflora", updates, state_of(4, 5, 6))
    torch.testing.assert_close(result[B] @ result[A], left @ right)


# --- what is merged and then lost ----------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_next_round_starts_from_the_aggregate(method: str) -> None:
    """AIoT-MLSys-Lab/FedRolex: the transformer's server averages, and then loads its old
    parameters again; the line that takes the new ones is commented out.
    """
    state = random_state(layers=1, rank=2, seed=9)
    number = 1 if method == "flora" else 3  # its stack must fit the rank
    updates = [random_update(state, f"c{index}", seed=index) for index in range(number)]
    aggregator = build("aggregator", method, SETTINGS.get(method, {}))
    if hasattr(aggregator, "trust"):  # it holds the clients against an update of the server's own
        aggregator.trust(updates[0])
    new = aggregate(aggregator, updates, state).state
    for name, tensor in new.tensors.items():
        assert not torch.equal(tensor, state.tensors[name])
    given = write_back(new, masks=None, kept_layers=(0,), scaling=1.0, rank=2)
    assert all(torch.equal(given[name], new.tensors[name]) for name in given)


def test_the_deeper_clients_teach_in_every_round() -> None:
    """Rachelxuan11/InclusiveFL: the momentum is overwritten, not summed, and used only while it is
    still the integer 0, so that a last layer's change is multiplied by 0.8 and taught nothing.
    """
    aggregator = build("aggregator", "inclusivefl", {})
    names = [f"model.layers.{layer}.q_proj.lora_{f}.weight" for layer in range(3) for f in "AB"]
    state = GlobalState({name: torch.zeros(1, 1) for name in names}, 1, 1.0, 3)

    def moved(client: str, changes: Sequence[float]) -> Update:
        tensors = {
            name: state.tensors[name] + changes[layer]
            for layer in range(len(changes))
            for name in names[2 * layer : 2 * layer + 2]
        }
        return Update(client, tensors, None, 1, 1, 1.0, tuple(range(len(changes))))

    for _ in range(2):
        before = state.tensors[names[0]].item()
        state = aggregate(
            aggregator, [moved("deep", [1, 2, 3]), moved("shallow", [10])], state
        ).state
        # 0.2 of the deeper layers' mean change 2, and 0.8 of its own 10; the deep client's is 1
        assert state.tensors[names[0]].item() - before == pytest.approx((1 + 8.4) / 2, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_names_that_match_nothing_are_refused_and_not_dropped(method: str) -> None:
    """A fork of FederatedScope loads its HetLoRA adapters with ``strict=False``: no name matched,
    every tensor was dropped, and nothing was ever federated.
    """
    state = random_state(layers=1, rank=3)
    number = 1 if method == "flora" else 3
    good = [random_update(state, f"c{index}", seed=index) for index in range(number)]
    last = good[-1]
    for rename in ("base_model.model.{}", "{}.default"):
        wrong: Mapping[str, Tensor] = {rename.format(n): t for n, t in last.tensors.items()}
        with pytest.raises(UpdateError, match=f"client {last.client}: has no tensor"):
            merged(method, [*good[:-1], replace(last, tensors=wrong)], state)
        both = {**last.tensors, **wrong}
        with pytest.raises(UpdateError, match=f"client {last.client}: sent an unknown tensor"):
            merged(method, [*good[:-1], replace(last, tensors=both)], state)


def test_a_client_of_lower_rank_gets_what_the_others_learnt() -> None:
    """The same fork: after a round, every client of HetLoRA still had its own adapter."""
    narrow = constant("narrow", 1.0, 1, d=4, k=3)
    wide = constant("wide", 5.0, 2, d=4, k=3)
    state = state_of(2, 4, 3)
    new = replace(state, tensors=merged("hetlora", [narrow, wide], state, weights="samples"))
    given = write_back(new, masks=None, kept_layers=(0,), scaling=1.0, rank=1)
    assert torch.equal(given[A], torch.full((1, 3), 3.0))
    assert torch.equal(given[B], torch.full((4, 1), 3.0))


@pytest.mark.parametrize("rank", [2, 16, 50])
def test_a_client_of_hetlora_has_a_rank_to_lose(rank: int) -> None:
    """alibaba/FederatedScope, branch FlexLoRA: the ranks to keep are ``round(0.99 r)``, all of them
    up to r = 50, so that the tail is empty and no client ever prunes itself.
    """
    assert kept_ranks(rank, 0.99, 1) == rank - 1


@pytest.mark.parametrize("name", ["fedavgm", "fedadagrad", "fedyogi", "fedadam"])
def test_every_server_optimizer_can_be_named(name: str) -> None:
    """rui-ye/OpenFedLLM: the trainer's list spells it ``fedadgrad``, so FedAdagrad is an error."""
    config = validated(
        {"clients": [{"name": "a"}], "data": {"path": "embedded"}, "server_optimizer": name}
    )
    assert config.server_optimizer is not None
    made = build("optimizer", config.server_optimizer.name, config.server_optimizer.settings)
    moved = made.step("x", torch.zeros(1), torch.ones(1), None)
    assert moved.item() > 0


PAPERS = (
    "fedavg fedit heteagg inclusivefl hetlora flexlora flora raflora lora-fair fjord fedrolex ties"
)


@pytest.mark.parametrize("name", PAPERS.split())
def test_every_method_has_the_name_of_its_paper(name: str) -> None:
    """SonyResearch/FedP3: ``--agg weight`` is what the help says, ``weighted_mean`` what the code
    compares with.
    """
    config = validated(
        {"clients": [{"name": "a"}], "data": {"path": "embedded"}, "aggregator": name}
    )
    assert build("aggregator", config.aggregator.name, config.aggregator.settings) is not None


# --- factors that are mistaken for one another ---------------------------------------------------


@pytest.mark.parametrize("method", ["flora", "flexlora", "raflora"])
@pytest.mark.parametrize("ranks", [[4], [3, 1], [2, 2], [1, 1, 2]])
def test_a_rank_equal_to_the_features_is_no_other_axis(method: str, ranks: list[int]) -> None:
    """ATP-1010/FederatedLLM tells A from B by ``shape[0] == r``, which both have where r equals d
    or k, and clients apart by their shapes, which two may share.
    """
    updates = random_clients(ranks, 4, 4)
    result = merged(method, updates, state_of(4, 4, 4))
    expected = mean_product(updates)
    if method == "raflora":
        shares = [sum(u.samples for u in updates if u.rank > h) for h in range(max(ranks))]
        expected = torch.zeros(4, 4, dtype=torch.float64)
        for u in updates:
            weights = torch.tensor([u.samples / shares[h] for h in range(u.rank)]).double()
            expected += u.tensors[B].double() * weights @ u.tensors[A].double()
    torch.testing.assert_close(
        result[B].double() @ result[A].double(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("method", ["hetlora", "fjord", "fedsa", "median", "ties", "fedrolex"])
def test_a_square_factor_is_padded_along_its_ranks(method: str) -> None:
    """The same, where a client's A (2, 2) has room on either side of the global A (3, 2)."""
    narrow = constant("a", 1.0, 2, d=2, k=2)
    values = {"hetlora": {"normalize": "coverage"}, "ties": {"density": 1}}.get(method, {})
    result = merged(method, [narrow], state_of(3, 2, 2, 9.0), **values)
    assert result[A].tolist() == [[1.0, 1.0], [1.0, 1.0], [9.0, 9.0]]
    assert result[B].tolist() == [[1.0, 1.0, 9.0], [1.0, 1.0, 9.0]]


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("shape", [(4, 4), (5, 3)])
def test_a_correction_of_b_is_not_transposed(ridge: float, shape: tuple[int, int]) -> None:
    """RaghavSinghal10/fedex-lora adds the transposed residual, right for GPT-2's Conv1D and wrong
    for ``nn.Linear``; square projections hide it. Here a correction must lower the error.
    """
    updates = random_clients([2, 2, 2], *shape, seed=3)
    plain = merged("fedit", updates, state_of(2, *shape))
    mended = merged("lora-fair", updates, state_of(2, *shape), ridge=ridge)
    errors = [
        float((t[B].double() @ t[A].double() - mean_product(updates)).norm())
        for t in (plain, mended)
    ]
    assert errors[1] < 0.95 * errors[0]


# --- zeros that are taken for absence ------------------------------------------------------------


def test_a_value_that_float16_rounds_to_zero_still_counts() -> None:
    """LEGO's Algorithm 2 takes ``p ≠ 0`` for the mask: an entry that underflows in transport is no
    longer averaged, so that the others' value comes back whole.
    """
    tiny, large = constant("a", 1e-9, 1, d=2, k=2), constant("b", 4.0, 1, d=2, k=2)
    sent = [
        replace(update, tensors={name: t.half() for name, t in update.tensors.items()})
        for update in (tiny, large)
    ]
    assert torch.equal(merged("heteagg", sent, state_of(1, 2, 2))[A], torch.full((1, 2), 2.0))
    literal = merged("heteagg", sent, state_of(1, 2, 2), mask="nonzero")
    assert torch.equal(literal[A], torch.full((1, 2), 4.0))


def test_in_the_first_round_a_and_b_take_the_same_step() -> None:
    """The same, where the global adapter joins: its A is random and its B zero, so that by
    ``p ≠ 0`` A takes half a step and B a whole one.
    """
    state = replace(state_of(1, 2, 2), tensors={A: torch.ones(1, 2), B: torch.zeros(2, 1)})
    update = constant("a", 3.0, 1, d=2, k=2)
    explicit = merged("heteagg", [update], state)
    assert explicit[A].tolist() == [[2.0, 2.0]]
    assert explicit[B].tolist() == [[1.5], [1.5]]
    literal = merged("heteagg", [update], state, compat="lego-alg2")
    assert literal[A].tolist() == [[2.0, 2.0]]
    assert literal[B].tolist() == [[3.0], [3.0]]


@pytest.mark.parametrize("method", ["median", "trimmed-mean", "krum", "multi-krum", "ties", "dare"])
def test_a_masked_entry_is_no_vote_for_zero(method: str) -> None:
    """Robust and merging methods of dense models take what is missing as a zero: three sparse
    clients then outvote the two that have the entry.
    """
    there, missing = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    updates = [
        replace(
            constant(f"c{index}", 4.0, 1, d=2, k=2),
            masks={A: there if index < 2 else missing},
        )
        for index in range(5)
    ]
    masked = [
        replace(u, tensors={**u.tensors, A: torch.where((u.masks or {})[A], u.tensors[A], 0.0)})
        for u in updates
    ]
    values = {"ties": {"density": 1}, "dare": {"drop": 0}}.get(method, {})
    assert torch.equal(
        merged(method, masked, state_of(1, 2, 2, 4.0), **values)[A], torch.full((1, 2), 4.0)
    )


# --- pruning -------------------------------------------------------------------------------------


def pruned(method: str, sparsity: float, weight: float | None = None) -> list[Tensor]:
    """Return the masks of a small decoder, whose matrices are constant if ``weight`` is given."""
    decoder = TinyDecoder(layers=2)
    if weight is not None:
        for index in range(2):
            for linear in decoder.linears(index).values():
                linear.weight.data.fill_(weight)
    tokens = [torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(0))]
    pruner = build("pruner", method, {})
    results = pruner.prune(decoder, tokens, PruneTarget(sparsity=sparsity), lambda *_: None)
    return [result.mask for result in results]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_sparsity_zero_removes_nothing(method: str) -> None:
    """IST-DASLab/sparsegpt, and magnitude in locuslab/wanda, cut at ``sorted[int(n s)]`` and remove
    what is at most that: one entry more than asked for, also of a model that was to stay dense.
    """
    assert all(mask.all() for mask in pruned(method, 0.0))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_equal_scores_are_not_all_removed(method: str) -> None:
    """The same cut removes every entry whose score ties with it."""
    for mask in pruned(method, 0.5, weight=1.0):
        assert int((~mask).sum()) == mask.numel() // 2
