"""Who trains in a round."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from prufed_plugins.api import ClientInfo, Sampler
from prufed_plugins.discover import build, catalog
from prufed_plugins.testing import check_sampler

some = budget(max_examples=60, deadline=None)
fractions = st.floats(min_value=0.01, max_value=1)
seeds = st.integers(min_value=0, max_value=2**64 - 1)


@st.composite
def federations(draw: st.DrawFn) -> list[ClientInfo]:
    size = draw(st.integers(1, 40))
    return [
        ClientInfo(
            name=f"c{index}",
            samples=draw(st.integers(1, 1000)),
            sparsity=draw(st.sampled_from([0.0, 0.2502, 0.4996, 0.5, 0.5003, 0.75])),
            layers=draw(st.sampled_from([4, 6, 8])),
        )
        for index in range(size)
    ]


def clients(size: int) -> list[ClientInfo]:
    return [ClientInfo(f"c{index}", 10, 0.0, 8) for index in range(size)]


def sampler(name: str, **settings: Any) -> Sampler:
    made: Sampler = build("sampler", name, settings)
    return made


@pytest.mark.parametrize("name", [entry.name for entry in catalog().methods("sampler")])
@pytest.mark.parametrize("settings", [{}, {"fraction": 0.3}, {"stratified": True, "fraction": 0.5}])
def test_conforms(name: str, settings: dict[str, Any]) -> None:
    accepted = catalog().get("sampler", name).method.params.model_fields
    if settings.keys() <= accepted.keys():
        check_sampler(lambda: sampler(name, **settings)).require()


@some
@given(federations(), seeds, st.integers(0, 50))
def test_all_takes_everybody_in_order(
    federation: list[ClientInfo], seed: int, round_index: int
) -> None:
    names = [client.name for client in federation]
    assert sampler("all").sample(round_index, federation, seed) == names


@some
@given(st.integers(1, 60), fractions, seeds)
def test_uniform_takes_a_share_of_different_clients(size: int, fraction: float, seed: int) -> None:
    federation = clients(size)
    chosen = sampler("uniform", fraction=fraction).sample(3, federation, seed)
    assert len(chosen) == len(set(chosen)) == max(int(fraction * size + 1e-9), 1)
    assert set(chosen) <= {client.name for client in federation}


def test_uniform_takes_every_client_equally_often() -> None:
    federation, method = clients(10), sampler("uniform", fraction=0.3)
    counts = dict.fromkeys((client.name for client in federation), 0)
    for seed in range(3000):
        for name in method.sample(0, federation, seed):
            counts[name] += 1
    # 900 expected each, with a standard deviation of 25.
    assert all(775 < count < 1025 for count in counts.values()), counts


@pytest.mark.parametrize(
    ("fraction", "size", "count"),
    [(0.1, 4, 1), (0.1, 8, 1), (0.29, 100, 29), (0.5, 5, 2), (1, 7, 7)],
)
def test_a_fraction_is_rounded_down_and_never_to_nobody(
    fraction: float, size: int, count: int
) -> None:
    for name in ("uniform", "sequential"):
        assert len(sampler(name, fraction=fraction).sample(0, clients(size), 1)) == count


@some
@given(st.integers(1, 40), fractions, seeds)
def test_sequential_goes_round_and_leaves_nobody_out(size: int, fraction: float, seed: int) -> None:
    federation, method = clients(size), sampler("sequential", fraction=fraction)
    turns: list[str] = []
    while len(turns) < 2 * size:
        turns += method.sample(len(turns) // max(int(fraction * size + 1e-9), 1), federation, seed)
    names = [client.name for client in federation]
    assert turns[: 2 * size] == names + names


def test_by_sparsity_cycles_through_tiers_the_densest_first() -> None:
    counted = [("a", 0.7499), ("b", 0.0), ("c", 0.5001), ("d", 0.4998), ("e", 0.75)]
    federation = [ClientInfo(name, 1, sparsity, 8) for name, sparsity in counted]
    method = sampler("by-sparsity")
    rounds = [set(method.sample(index, federation, index)) for index in range(4)]
    assert rounds == [{"b"}, {"c", "d"}, {"a", "e"}, {"b"}]


def test_by_depth_cycles_through_depths_the_deepest_first() -> None:
    federation = [ClientInfo(f"c{index}", 1, 0.0, layers) for index, layers in enumerate([4, 8, 4])]
    method = sampler("by_depth")
    rounds = [method.sample(index, federation, index) for index in range(3)]
    assert rounds == [["c1"], ["c0", "c2"], ["c1"]]


@some
@given(federations(), fractions, seeds, st.sampled_from(["by-sparsity", "by-depth"]))
def test_stratified_takes_a_share_of_every_tier(
    federation: list[ClientInfo], fraction: float, seed: int, name: str
) -> None:
    chosen = sampler(name, fraction=fraction, stratified=True).sample(5, federation, seed)
    tier = {
        client.name: round(client.sparsity, 1) if name == "by-sparsity" else client.layers
        for client in federation
    }
    assert len(chosen) == len(set(chosen))
    for value in set(tier.values()):
        members = [one for one in tier if tier[one] == value]
        taken = [one for one in chosen if tier[one] == value]
        assert len(taken) == max(int(fraction * len(members) + 1e-9), 1)


@some
@given(federations(), fractions, seeds, st.integers(0, 20))
def test_unstratified_takes_a_share_of_one_tier(
    federation: list[ClientInfo], fraction: float, seed: int, round_index: int
) -> None:
    chosen = sampler("by-depth", fraction=fraction).sample(round_index, federation, seed)
    depth = {client.name: client.layers for client in federation}
    depths = sorted(set(depth.values()), reverse=True)
    turn = depths[round_index % len(depths)]
    members = [name for name in depth if depth[name] == turn]
    assert {depth[name] for name in chosen} == {turn}
    assert len(chosen) == max(int(fraction * len(members) + 1e-9), 1)


def test_samples_do_not_depend_on_the_order_of_hashes() -> None:
    code = (
        "from prufed_plugins.api import ClientInfo\n"
        "from prufed_plugins.discover import build, catalog\n"
        "clients = [ClientInfo(f'c{i}', i + 1, (i % 4) / 4, 8 - i % 3) for i in range(20)]\n"
        "for entry in catalog().methods('sampler'):\n"
        "    print([build('sampler', entry.name).sample(t, clients, t) for t in range(5)])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1
