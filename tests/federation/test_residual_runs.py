"""FedEx-LoRA in real runs: exact in every round, on bases that never change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from prufed_cli.config.documents import validated
from prufed_cli.errors import PrufedError
from prufed_cli.exporting import export_merged
from prufed_cli.federation.artifacts import read_parts
from prufed_cli.federation.federate import FederateResult, federate
from prufed_cli.federation.measured import essentials
from prufed_cli.models.adapters import load_adapter
from prufed_cli.models.base import base_masks
from prufed_registry import Artifact, Registry

Document = dict[str, Any]
CLIENTS = [{"name": "dense"}, {"name": "half", "sparsity": 0.5}, {"name": "other"}]


def run(home: Path, document: Document) -> FederateResult:
    registry = Registry(home / "registry")
    return federate(config=validated(document), registry=registry, runs=home / "runs")


@pytest.fixture
def document(configuration: Document) -> Document:
    adapter = {**configuration["adapter"], "preset": "sparse-peft", "dropout": 0.0}
    return {
        **configuration,
        "adapter": adapter,
        "aggregator": {"name": "fedex"},
        "clients": CLIENTS,
    }


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return B A of every module, d ≠ k in some."""
    return {
        name.removesuffix(".lora_A.weight"): tensors[name.replace(".lora_A.", ".lora_B.")].double()
        @ A.double()
        for name, A in tensors.items()
        if name.endswith(".lora_A.weight")
    }


def whole(artifact: Artifact) -> dict[str, Tensor]:
    """Return what PEFT adds to the base, but for the scaling: all of the adapter's ranks."""
    return products(load_adapter(artifact.path)[0])


def test_every_round_adds_the_mean_of_what_clients_trained(
    tmp_path: Path, document: Document
) -> None:
    run(tmp_path, document)
    registry = Registry(tmp_path / "registry")
    shift: dict[str, Tensor] = {}  # what the bases have become before the round
    for number in (1, 2):
        merged = registry.resolve(f"fed@v{number}")
        trained = []
        for client in ("dense", "half", "other"):
            own, sent = read_parts(registry.resolve(f"fed.{client}@v{number}"))
            assert own["model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 4
            given = products(sent) if sent else {}
            assert given.keys() == shift.keys()
            assert all(torch.equal(given[name], shift[name]) for name in given)
            trained.append(products(own))
        now = whole(merged)
        assert any(product.shape[0] != product.shape[1] for product in now.values())
        for name, product in now.items():
            mean = sum(one[name] for one in trained) / 3
            torch.testing.assert_close(product, mean + shift.get(name, 0.0), rtol=1e-4, atol=1e-8)
        shift = products(read_parts(merged)[1])
        assert any(float(residual.norm()) > 0 for residual in shift.values())
    facts = registry.resolve("fed@v2").manifest.details
    assert facts["residual_rank"] > facts["adapter"]["r"] == 4
    assert registry.verify() == []


def test_adapters_open_with_peft_on_their_unchanged_base_and_merge_within_its_mask(
    tmp_path: Path, document: Document
) -> None:
    result = run(tmp_path, document)
    registry = Registry(tmp_path / "registry")
    base = registry.resolve(result.artifact.manifest.parents[0].ref)
    assert [artifact.ref for artifact in registry.list("tiny")] == [base.ref] == ["tiny@v1"]
    ids = torch.tensor([[3, 9, 12]])
    plain = AutoModelForCausalLM.from_pretrained(base.path)
    peft = PeftModel.from_pretrained(plain, result.artifact.path)
    ours = AutoModelForCausalLM.from_pretrained(
        export_merged(result.artifact.ref, tmp_path / "merged", registry=registry)
    )
    torch.testing.assert_close(peft(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)

    half = registry.list("fed.half")[-1]
    assert half.manifest.details["stage"] == "written-back"
    directory = export_merged(half.ref, tmp_path / "half", registry=registry)
    merged = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    pruned = registry.resolve(half.manifest.parents[0].ref)
    before = AutoModelForCausalLM.from_pretrained(pruned.path).state_dict()
    added, scaling = whole(half), load_adapter(half.path)[1].scaling
    masks = base_masks(pruned)
    assert masks
    for module, product in added.items():
        name = f"{module}.weight"
        assert not merged[name][~masks[name]].any()
        shift = torch.where(masks[name], scaling * product, 0.0)
        torch.testing.assert_close(
            merged[name].double(), before[name] + shift, rtol=1e-5, atol=1e-6
        )


def test_a_client_that_missed_rounds_is_sent_the_whole_residual(
    tmp_path: Path, document: Document
) -> None:
    document |= {"rounds": 3, "sampler": {"name": "sequential", "fraction": 0.67}}
    run(tmp_path, document)
    registry = Registry(tmp_path / "registry")
    last = read_parts(registry.resolve("fed@v3"))[1]
    for client in ("dense", "half", "other"):
        given = read_parts(registry.list(f"fed.{client}")[-1])[1]
        assert given.keys() == last.keys()
        assert all(torch.equal(given[name], last[name]) for name in last)


def test_residual_rank_bounds_what_is_carried(tmp_path: Path, document: Document) -> None:
    document["aggregator"] = {"name": "fedex", "residual_rank": 3}
    result = run(tmp_path, document)
    for event in result.run.select("merged"):
        assert ", residual of 3 ranks" in essentials(event)
        assert all(module["residual_rank"] == 3 for module in event["diagnostics"].values())
    assert any(module["discarded"] > 0 for module in event["diagnostics"].values())
    assert load_adapter(result.artifact.path)[1].r == 7


def test_a_server_optimizer_is_refused_before_training(tmp_path: Path, document: Document) -> None:
    with pytest.raises(PrufedError, match=r"fedex adds to the base .* server_optimizer fedavgm"):
        run(tmp_path, {**document, "server_optimizer": {"name": "fedavgm"}})
    assert Registry(tmp_path / "registry").list("fed") == []
