"""Every built-in aggregator in a real run: two rounds of unequal sparsity, and unequal rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prufed_cli.config.documents import validated
from prufed_cli.errors import PrufedError
from prufed_cli.federation.artifacts import ProductMasks, read_tensors
from prufed_cli.federation.federate import FederateResult, federate
from prufed_cli.models.base import base_masks
from prufed_plugins.builtin import prufed_aggregators
from prufed_plugins.errors import MethodError
from prufed_plugins.names import split_factor
from prufed_registry import Registry

Document = dict[str, Any]

SETTINGS: dict[str, Document] = {"krum": {"byzantine": 0}, "multi-krum": {"byzantine": 0}}

CLIENTS = [
    {"name": "dense"},
    {"name": "half", "sparsity": 0.5},
    {"name": "sparse", "sparsity": 0.75},
]


def run(home: Path, document: Document) -> FederateResult:
    registry = Registry(home / "registry")
    return federate(config=validated(document), registry=registry, runs=home / "runs")


@pytest.mark.parametrize("name", [method.name for method in prufed_aggregators()])
def test_two_rounds_of_unequal_sparsity(tmp_path: Path, configuration: Document, name: str) -> None:
    document = {
        **configuration,
        "rounds": 1 if name == "flora" else 2,
        "adapter": {**configuration["adapter"], "r": 6},
        "aggregator": {"name": name, **SETTINGS.get(name, {})},
        "server_data": configuration["data"]["path"],
        "clients": [{**client, "adapter": {"r": 2}} for client in CLIENTS]
        if name == "flora"
        else CLIENTS,
    }
    result = run(tmp_path, document)
    merged = result.run.select("merged")
    assert len(merged) == document["rounds"]
    assert all(event["clients"] == ["dense", "half", "sparse"] for event in merged)


@pytest.mark.parametrize("factor_mask", ["nested", "magnitude", "rank"])
def test_clients_of_unequal_rank_have_masks_of_their_own_rank(
    tmp_path: Path, configuration: Document, factor_mask: str
) -> None:
    document = {
        **configuration,
        "rounds": 2,
        "adapter": {**configuration["adapter"], "factor_mask": factor_mask},
        "aggregator": {"name": "hetlora", "normalize": "coverage"},
        "clients": [{"name": "wide"}, {"name": "narrow", "sparsity": 0.5, "adapter": {"r": 2}}],
    }
    assert len(run(tmp_path, document).run.select("merged")) == 2


def test_flora_is_refused_before_training_where_it_cannot_stack(
    tmp_path: Path, configuration: Document
) -> None:
    small = [{**client, "adapter": {"r": 1}} for client in CLIENTS]
    twice = {**configuration, "rounds": 2, "aggregator": {"name": "flora"}, "clients": small}
    with pytest.raises(MethodError, match="trains in round 2, and flora stacks once"):
        run(tmp_path, twice)
    with pytest.raises(MethodError, match="more than the global rank"):
        run(tmp_path, {**twice, "rounds": 1, "clients": CLIENTS})
    assert Registry(tmp_path / "registry").list("fed") == []


def test_after_flora_every_client_has_the_best_of_the_stack_at_its_rank(
    tmp_path: Path, configuration: Document
) -> None:
    """The first ranks of the stack as it stands are the first client's alone."""
    document = {
        **configuration,
        "rounds": 1,
        "aggregator": {"name": "flora"},
        "adapter": {**configuration["adapter"], "preset": "dense", "alpha": 8, "r": 6},
        "clients": [{**client, "adapter": {"r": 2}} for client in CLIENTS],
    }
    stack = read_tensors(run(tmp_path, document).artifact)
    registry = Registry(tmp_path / "registry")
    for client in CLIENTS:
        given = read_tensors(registry.list(f"fed.{client['name']}")[-1])
        for A in (name for name in given if "lora_A" in name):
            B = A.replace("lora_A", "lora_B")
            whole = 8 / 6 * stack[B].double() @ stack[A].double()
            values = torch.linalg.svdvals(whole)
            lost = whole - 8 / 2 * given[B].double() @ given[A].double()
            torch.testing.assert_close(lost.norm(), values[2:].norm(), rtol=1e-4, atol=1e-8)
            assert values[2] > 1e-3 * values[0]


def test_krum_is_refused_before_training_with_too_few_clients(
    tmp_path: Path, configuration: Document
) -> None:
    with pytest.raises(MethodError, match="needs 5 clients, and the round has 3"):
        run(tmp_path, {**configuration, "aggregator": {"name": "krum"}, "clients": CLIENTS})


def test_with_fedsa_every_client_keeps_its_b_through_rounds_it_does_not_train_in(
    tmp_path: Path, configuration: Document
) -> None:
    """Two rounds of one client each; the third client never trains."""
    document = {
        **configuration,
        "rounds": 2,
        "sampler": {"name": "sequential", "fraction": 0.34},
        "aggregator": {"name": "fedsa"},
        "adapter": {**configuration["adapter"], "preset": "dense"},
        "clients": CLIENTS,
    }
    result = run(tmp_path, document)
    assert [e["clients"] for e in result.run.select("merged")] == [["dense"], ["half"]]
    registry = Registry(tmp_path / "registry")
    last = read_tensors(result.artifact)
    for name in ("dense", "half", "sparse"):
        given = read_tensors(registry.list(f"fed.{name}")[-1])
        for tensor in (t for t in given if "lora_A" in t):
            assert torch.equal(given[tensor], last[tensor])
        for tensor in (t for t in given if "lora_B" in t):
            if name == "sparse":
                assert not given[tensor].any()
            else:
                tuned = read_tensors(registry.list(f"fed.{name}")[0])
                assert tuned[tensor].any()
                assert torch.equal(given[tensor], tuned[tensor])


def test_with_fedrolex_the_ranks_of_narrow_clients_roll(
    tmp_path: Path, configuration: Document
) -> None:
    """Of four ranks, a client of one trains rank 0 in the first round and rank 1 in the second."""
    document = {
        **configuration,
        "rounds": 2,
        "aggregator": {"name": "fedrolex"},
        "adapter": {**configuration["adapter"], "preset": "dense", "r": 4},
        "clients": [{"name": "narrow", "adapter": {"r": 1}}],
    }
    run(tmp_path, document)
    first, second = (read_tensors(a) for a in Registry(tmp_path / "registry").list("fed"))
    for name in (name for name in first if "lora_B" in name):
        assert first[name].any(dim=0).tolist() == [True, False, False, False]
        assert second[name].any(dim=0).tolist() == [True, True, False, False]
        assert torch.equal(first[name][:, 0], second[name][:, 0])
    with pytest.raises(PrufedError, match="fedrolex gives clients other ranks each round"):
        run(tmp_path / "again", {**document, "write_back": {"share": 0.5}})


@pytest.mark.parametrize("tuner", ["ffa", "rolora"])
def test_new_factors_are_refused_where_one_must_stay(
    tmp_path: Path, configuration: Document, tuner: str
) -> None:
    document = {**configuration, "aggregator": {"name": "flexlora"}, "clients": CLIENTS}
    resting = {**document, "tuner": {**configuration["tuner"], "name": tuner}}
    with pytest.raises(PrufedError, match=f"flexlora makes new factors .* tuner {tuner} of client"):
        run(tmp_path, resting)
    stepping = {**document, "server_optimizer": {"name": "fedadam"}}
    with pytest.raises(PrufedError, match="server_optimizer fedadam cannot step"):
        run(tmp_path, stepping)
    with pytest.raises(PrufedError, match=r"which write_back.share 0.5 cannot mix"):
        run(tmp_path, {**document, "write_back": {"share": 0.5}})
    assert Registry(tmp_path / "registry").list("fed") == []


def test_the_server_finds_the_base_s_mask_of_every_module_it_merges(
    tmp_path: Path, configuration: Document
) -> None:
    """heteagg-ls would otherwise take every product as whole, and nobody would notice."""
    result = run(tmp_path, {**configuration, "rounds": 1, "clients": CLIENTS})
    registry = Registry(tmp_path / "registry")
    half = registry.resolve("fed.half@v1")
    masks = base_masks(registry.resolve(half.manifest.parents[0].ref))
    assert masks is not None
    products = ProductMasks(masks, (0, 1, 2, 3), transposed=False)
    for name, tensor in read_tensors(result.artifact).items():
        module, factor = split_factor(name)
        mask = products[f"{module}.weight"]
        assert mask.dtype == torch.bool
        assert 0.4 < float(mask.double().mean()) < 0.6
        assert mask.shape[1 if factor == "A" else 0] == tensor.shape[1 if factor == "A" else 0]
    turned = ProductMasks(masks, (0, 1, 2, 3), transposed=True)
    assert torch.equal(turned[f"{module}.weight"], products[f"{module}.weight"].T)


@pytest.mark.parametrize("aggregator", ["fedsa", "fedrolex"])
def test_clipping_is_refused_where_clients_start_elsewhere(
    tmp_path: Path, configuration: Document, aggregator: str
) -> None:
    document = {**configuration, "aggregator": {"name": aggregator}, "screen": {"clip": 1.0}}
    with pytest.raises(PrufedError, match=f"screen.clip measures changes .* {aggregator} lets"):
        run(tmp_path, document)
