"""Clients that prune their ranks as they train: what is stored, merged, resumed and sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from prufed_cli.config.documents import validated
from prufed_cli.errors import PrufedError
from prufed_cli.federation.artifacts import read_masks, read_tensors
from prufed_cli.federation.federate import FederateResult, federate
from prufed_cli.main import main
from prufed_cli.models.adapter_files import WEIGHTS_FILE
from prufed_plugins.names import split_factor
from prufed_registry import Registry

Document = dict[str, Any]


def run(home: Path, document: Document) -> FederateResult:
    registry = Registry(home / "registry")
    return federate(config=validated(document), registry=registry, runs=home / "runs")


@pytest.fixture
def pruning(configuration: Document) -> Document:
    """Return three rounds in which the tails of all clients are made to shrink from the second."""
    clients = [{"name": "dense"}, {"name": "half", "sparsity": 0.5}]
    tuner = {**configuration["tuner"], "name": "hetlora", "gamma": 0.99, "lam": 3.0, "epochs": 2}
    return {
        **configuration,
        "rounds": 3,
        "tuner": tuner,
        "aggregator": {"name": "hetlora", "normalize": "coverage"},
        "clients": clients,
    }


def ranks(result: FederateResult, client: str) -> list[int]:
    return [event["rank"] for event in result.run.select("client", client=client)]


@pytest.mark.parametrize("factor_mask", ["nested", "magnitude", "rank", "none"])
def test_ranks_fall_by_one_and_stay_fallen(
    tmp_path: Path, pruning: Document, factor_mask: str
) -> None:
    pruning["adapter"] |= {"factor_mask": factor_mask}
    result = run(tmp_path, pruning)
    first, second, third = ranks(result, "dense")
    assert first == 4, "B begins at zero, so no tail shrinks in the first round"
    assert third < first
    assert {first - second, second - third} <= {0, 1}, "0.99 of four ranks is three"
    registry = Registry(tmp_path / "registry")
    scalings = set()
    for name in ("dense", "half"):
        left = ranks(result, name)
        assert left == sorted(left, reverse=True)
        versions = registry.list(f"fed.{name}")
        assert [a.manifest.details["adapter"]["r"] for a in versions] == [*left, left[-1]]
        for artifact in versions:
            rank = artifact.manifest.details["adapter"]["r"]
            scalings.add((name, round(artifact.manifest.details["adapter"]["scaling"], 9)))
            masks = read_masks(artifact)
            for tensor_name, tensor in read_tensors(artifact).items():
                assert tensor.shape["AB".index(split_factor(tensor_name)[1])] == rank
                if tensor_name in masks:
                    assert masks[tensor_name].shape == tensor.shape
                    assert not tensor[~masks[tensor_name]].any()
    assert len(scalings) == 2, "dropping ranks must not scale those that stay"
    for tensor in read_tensors(result.artifact).values():
        assert 4 in tensor.shape  # the global adapter keeps its rank


def test_peft_opens_an_adapter_with_fewer_ranks(tmp_path: Path, pruning: Document) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    left = ranks(run(tmp_path, pruning), "dense")[-1]
    assert left < 4
    registry = Registry(tmp_path / "registry")
    artifact = registry.list("fed.dense")[-1]
    base = registry.resolve(artifact.manifest.parents[0].ref)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    opened = PeftModel.from_pretrained(model, artifact.path)
    config = opened.peft_config["default"]
    assert config.r == left
    assert config.lora_alpha / config.r == pytest.approx(8 / 4)


def test_a_resumed_run_goes_on_with_the_ranks_it_had(tmp_path: Path, pruning: Document) -> None:
    whole = run(tmp_path / "whole", pruning)
    run(tmp_path / "cut", pruning)
    # cut back to the middle of the second round, as a crash would leave the journal
    home = tmp_path / "cut"
    [journal] = (home / "runs").glob("*/events.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    kinds = [json.loads(line) for line in lines]
    stop = next(i for i, e in enumerate(kinds) if e["event"] == "client" and e["round"] == 1)
    journal.write_text("".join(lines[: stop + 1]))
    resumed = federate(resume="fed-1", registry=Registry(home / "registry"), runs=home / "runs")
    assert [ranks(resumed, name) for name in ("dense", "half")] == [
        ranks(whole, name) for name in ("dense", "half")
    ]
    one, other = read_tensors(whole.artifact), read_tensors(resumed.artifact)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("aggregator", "why"),
    [("heteagg", "merges equal ranks only"), ("fedrolex", "rolls the ranks")],
)
def test_falling_ranks_are_refused_where_they_cannot_be_merged(
    tmp_path: Path, pruning: Document, aggregator: str, why: str
) -> None:
    pruning["aggregator"] = {"name": aggregator}
    with pytest.raises(PrufedError, match=f"prunes ranks, and {aggregator} {why}"):
        run(tmp_path, pruning)
    assert Registry(tmp_path / "registry").list("fed") == []


# --- what is sent --------------------------------------------------------------------------------


def bytes_of(artifact: Any, factors: str) -> int:
    with safe_open(artifact.path / WEIGHTS_FILE, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return sum(
        tensor.nbytes
        for name, tensor in found.items()
        if any(f".lora_{factor}." in name for factor in factors)
    )


@pytest.mark.parametrize(
    ("tuner", "aggregator", "sent"),
    [
        ("lora", "heteagg", ("AB", "AB")),
        ("ffa", "heteagg", ("B", "B")),
        ("rolora", "heteagg", ("B", "A")),
        ("lora", "fedsa", ("A", "A")),
    ],
)
def test_only_what_the_server_does_not_have_counts_as_sent(
    tmp_path: Path,
    prufed_home: Path,
    configuration: Document,
    capsys: pytest.CaptureFixture[str],
    tuner: str,
    aggregator: str,
    sent: tuple[str, str],
) -> None:
    configuration["tuner"]["name"] = tuner
    configuration["aggregator"] = {"name": aggregator}
    configuration["clients"] = [{"name": "a"}, {"name": "b", "sparsity": 0.5}]
    result = run(prufed_home, configuration)
    registry = Registry(prufed_home / "registry")
    for index, factors in enumerate(sent):
        expected = 0
        for event in result.run.select("client", round=index):
            assert event["payload_bytes"] == bytes_of(registry.resolve(event["ref"]), factors)
            expected += event["payload_bytes"]
        [merged] = result.run.select("merged", round=index)
        assert merged["payload_bytes"] == expected
    capsys.readouterr()
    assert main(["runs", "show", "fed-1"]) == 0
    shown = capsys.readouterr().out
    assert "sent" in shown
    assert f"{expected / 1000:.1f} kB from clients" in shown
