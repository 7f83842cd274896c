"""Federations whose tuner trains one factor at a time: the other stays, and averaging is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prufed_cli.config.documents import validated
from prufed_cli.exporting import export_merged
from prufed_cli.federation.artifacts import read_tensors
from prufed_cli.federation.federate import federate
from prufed_cli.models.base import base_of
from prufed_plugins.api import MASKS_FILE
from prufed_registry import Registry


def global_adapters(home: Path, configuration: dict[str, Any]) -> list[dict[str, Tensor]]:
    registry = Registry(home / "registry")
    federate(config=validated(configuration), registry=registry, runs=home / "runs")
    return [read_tensors(artifact) for artifact in registry.list("fed")]


def factor(tensors: dict[str, Tensor], which: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if f".lora_{which}." in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor], which: str) -> bool:
    a, b = factor(one, which), factor(other, which)
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["none", "fedavgm", "fedadam"])
def test_ffa_never_moves_a(tmp_path: Path, configuration: dict[str, Any], optimizer: str) -> None:
    configuration["tuner"]["name"] = "ffa"
    configuration["server_optimizer"] = optimizer
    first, second = global_adapters(tmp_path, configuration)
    assert same(first, second, "A")
    assert not same(first, second, "B")
    # all clients, of whatever sparsity and scaling, started from one A: the run's
    start = global_adapters(
        tmp_path / "other", {**configuration, "rounds": 1, "tuner": {**configuration["tuner"]}}
    )
    assert same(start[0], second, "A")


@pytest.mark.parametrize("optimizer", ["none", "fedavgm"])
def test_rolora_moves_one_factor_a_round(
    tmp_path: Path, configuration: dict[str, Any], optimizer: str
) -> None:
    configuration["tuner"]["name"] = "rolora"
    configuration["rounds"] = 3
    configuration["server_optimizer"] = optimizer
    first, second, third = global_adapters(tmp_path, configuration)
    assert same(first, second, "B")
    assert not same(first, second, "A")
    assert same(second, third, "A")
    assert not same(second, third, "B")


def test_averaging_factors_is_averaging_products_under_ffa(
    tmp_path: Path, configuration: dict[str, Any]
) -> None:
    configuration["tuner"]["name"] = "ffa"
    configuration["rounds"] = 1
    configuration["adapter"]["preset"] = "dense"
    configuration["aggregator"] = {"name": "fedavg", "beta": 0}
    configuration["clients"] = configuration["clients"][:2]
    (merged,) = global_adapters(tmp_path, configuration)
    registry = Registry(tmp_path / "registry")
    clients = [read_tensors(registry.resolve(f"fed.{name}@v1")) for name in ("dense", "half")]
    for name, A in factor(merged, "A").items():
        other = name.replace(".lora_A.", ".lora_B.")
        products = [client[other].double() @ client[name].double() for client in clients]
        torch.testing.assert_close(
            merged[other].double() @ A.double(), sum(products) / 2, rtol=1e-5, atol=1e-9
        )
    # what fills the zeros of its base is not given out as if it had the masks of that base
    half = registry.resolve("fed.half@v1")
    assert (base_of(half, registry).path / MASKS_FILE).is_file()
    directory = export_merged(half.ref, tmp_path / "half", registry=registry)
    assert not (directory / MASKS_FILE).exists()
    assert (directory / "model.safetensors").is_file()


def test_a_factor_that_one_client_trains_does_not_rest(
    tmp_path: Path, configuration: dict[str, Any]
) -> None:
    configuration["tuner"]["name"] = "ffa"
    configuration["clients"][1]["tuner"] = {"name": "lora"}
    first, second = global_adapters(tmp_path, configuration)
    assert not same(first, second, "A")
