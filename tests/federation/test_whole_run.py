"""One federation of four unequal clients, looked at from every side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prufed_cli.config.documents import validated
from prufed_cli.exporting import export_merged
from prufed_cli.federation.artifacts import read_masks, read_tensors
from prufed_cli.federation.federate import FederateResult, federate
from prufed_cli.models.base import base_masks
from prufed_plugins.api import MASKS_FILE
from prufed_registry import Registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("whole") / "registry")


@pytest.fixture(scope="module")
def result(
    registry: Registry,
    base_directory: Path,
    data_file: Path,
    calibration_file: Path,
    shared_configuration: Any,
) -> FederateResult:
    document = shared_configuration(base_directory, data_file, calibration_file)
    return federate(
        config=validated(document), registry=registry, runs=registry.root.parent / "runs"
    )


def newest(registry: Registry, name: str, stage: str) -> Any:
    found = [a for a in registry.list(name) if a.manifest.details["stage"] == stage]
    return found[-1]


def test_publishes_every_adapter_with_its_lineage(
    result: FederateResult, registry: Registry
) -> None:
    assert [a.ref for a in registry.list("fed")] == ["fed@v1", "fed@v2"]
    for name in ("dense", "half", "pattern", "shallow"):
        stages = [a.manifest.details["stage"] for a in registry.list(f"fed.{name}")]
        assert stages == ["tuned", "tuned", "written-back"]
    assert result.artifact.ref == "fed@v2"
    parents = {parent.ref for parent in result.artifact.manifest.parents}
    assert {"tiny@v1", "fed@v1", "fed.half@v2"} <= parents
    half = registry.resolve("fed.half@v1")
    assert half.manifest.parents[0].ref == "tiny-sparsegpt-50@v1"
    assert half.manifest.details["data_digest"].startswith("sha256:")
    assert registry.verify() == []


def test_every_adapter_opens_with_peft(result: FederateResult, registry: Registry) -> None:
    for artifact in (result.artifact, registry.resolve("fed.shallow@v1")):
        base = registry.resolve(artifact.manifest.parents[0].ref)
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base.path), artifact.path
        )
        logits = model(torch.tensor([[3, 9, 12]])).logits
        assert logits.isfinite().all()


def test_masks_hold_and_training_changed_what_they_leave(
    result: FederateResult, registry: Registry
) -> None:
    artifact = newest(registry, "fed.half", "tuned")
    masks, tensors = read_masks(artifact), read_tensors(artifact)
    assert masks.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert not tensor[~masks[name]].any()
        assert masks[name].float().mean() == pytest.approx(0.5, abs=0.01)
    moved = [t for n, t in tensors.items() if n.endswith("lora_B.weight")]
    assert all(tensor.any() for tensor in moved)


def test_write_back_is_the_global_adapter_on_each_clients_entries(
    result: FederateResult, registry: Registry
) -> None:
    merged = read_tensors(result.artifact)
    dense = read_tensors(newest(registry, "fed.dense", "written-back"))
    assert all(torch.equal(dense[name], merged[name]) for name in merged)
    artifact = newest(registry, "fed.half", "written-back")
    masks, half = read_masks(artifact), read_tensors(artifact)
    common = artifact.manifest.details["adapter"]["scaling"] / 2.0  # s is alpha / r = 2
    for name, tensor in half.items():
        expected = torch.where(masks[name], merged[name], 0.0) / common**0.5
        torch.testing.assert_close(tensor, expected)


def test_a_shallow_client_shares_the_layers_it_has(
    result: FederateResult, registry: Registry
) -> None:
    artifact = newest(registry, "fed.shallow", "written-back")
    assert artifact.manifest.details["kept_layers"] == [2, 3]
    merged, shallow = read_tensors(result.artifact), read_tensors(artifact)
    for local, layer in enumerate((2, 3)):
        here = f"model.layers.{local}.self_attn.q_proj.lora_B.weight"
        there = f"model.layers.{layer}.self_attn.q_proj.lora_B.weight"
        assert torch.equal(shallow[here], merged[there])


def test_merging_keeps_the_sparsity_of_the_base_exactly(
    result: FederateResult, registry: Registry, tmp_path: Path
) -> None:
    artifact = newest(registry, "fed.half", "tuned")
    directory = export_merged(artifact.ref, tmp_path / "merged", registry=registry)
    merged = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    base = registry.resolve(artifact.manifest.parents[0].ref)
    before = AutoModelForCausalLM.from_pretrained(base.path).state_dict()
    masks = base_masks(base)
    assert masks
    for name, mask in masks.items():
        assert not merged[name][~mask].any()
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[changed], before[changed])
    assert (directory / MASKS_FILE).is_file()


def test_journal_tells_the_whole_story(result: FederateResult) -> None:
    kinds = [event["event"] for event in result.run.events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert kinds.count("client") == 8
    assert kinds.count("merged") == 2
    assert kinds.count("written_back") == 4
    assert all(event["loss_last"] > 0 for event in result.run.select("client"))
