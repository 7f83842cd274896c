"""User-centric aggregation in real runs: every client has an adapter of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from prufed_cli.config.documents import validated
from prufed_cli.errors import PrufedError
from prufed_cli.federation.artifacts import read_masks, read_tensors
from prufed_cli.federation.federate import FederateResult, federate
from prufed_cli.main import main
from prufed_registry import Registry

Document = dict[str, Any]


def run(home: Path, document: Document) -> FederateResult:
    registry = Registry(home / "registry")
    return federate(config=validated(document), registry=registry, runs=home / "runs")


@pytest.fixture
def document(configuration: Document) -> Document:
    return {
        **configuration,
        "adapter": {**configuration["adapter"], "preset": "dense"},
        "aggregator": {"name": "user-centric", "batch_size": 2},
        "clients": [{"name": "a"}, {"name": "b"}, {"name": "c"}],
    }


def test_every_client_gets_the_mean_by_its_own_row(tmp_path: Path, document: Document) -> None:
    result = run(tmp_path, document)
    registry = Registry(tmp_path / "registry")
    (event,) = result.run.select("similarities")
    weights = event["weights"]
    assert all(sum(row.values()) == pytest.approx(1.0) for row in weights.values())
    for number in (1, 2):
        own = {e["client"]: e["ref"] for e in result.run.select("own", round=number - 1)}
        trained = {
            e["client"]: read_tensors(registry.resolve(e["ref"]))
            for e in result.run.select("client", round=number - 1)
        }
        for client, ref in own.items():
            found = read_tensors(registry.resolve(ref))
            for name, tensor in found.items():
                mean = sum(weights[client][j] * trained[j][name].double() for j in trained)
                torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-8)
        # the global adapter is the plain mean
        for name, tensor in read_tensors(registry.resolve(f"fed@v{number}")).items():
            plain = sum(trained[j][name].double() for j in trained) / 3
            torch.testing.assert_close(tensor.double(), plain, rtol=1e-5, atol=1e-8)
    differ = [read_tensors(registry.resolve(own[j])) for j in "ab"]
    assert any(not torch.equal(differ[0][name], differ[1][name]) for name in differ[0])
    assert registry.verify() == []


def test_clients_go_on_from_their_own_and_keep_it(tmp_path: Path, document: Document) -> None:
    document["sampler"] = {"name": "sequential", "fraction": 0.67}  # a and b, then c and a
    result = run(tmp_path, document)
    registry = Registry(tmp_path / "registry")
    own = {(e["client"], e["round"]): e["ref"] for e in result.run.select("own")}
    assert len(own) == 6  # clients that did not train in a round have one too
    again = result.run.find("client", round=1, client="a")
    assert again is not None
    parents = [parent.ref for parent in registry.resolve(again["ref"]).manifest.parents]
    assert parents == ["tiny@v1", own["a", 0]]
    for client in "abc":
        last = result.run.find("written_back", client=client)
        assert last is not None
        given = read_tensors(registry.resolve(last["ref"]))
        kept = read_tensors(registry.resolve(own[client, 1]))
        assert all(torch.equal(given[name], kept[name]) for name in kept)


def test_clients_of_the_same_rows_share_and_others_do_not(
    tmp_path: Path, document: Document, data_file: Path
) -> None:
    """Two clients of one file, and one whose text is nothing like it."""
    strange = tmp_path / "strange.jsonl"
    row = '{"instruction": "stone stone", "response": "bridge bridge bridge bridge"}\n'
    strange.write_text(row * 39 + row.replace("stone stone", "stone old"))
    document["clients"] = [
        {"name": "one", "data": str(data_file)},
        {"name": "other", "data": str(data_file)},
        {"name": "strange", "data": str(strange)},
    ]
    document |= {"rounds": 1, "aggregator": {"name": "user-centric", "batch_size": 20}}
    (event,) = run(tmp_path, document).run.select("similarities")
    weights = event["weights"]
    assert weights["one"]["other"] == pytest.approx(weights["one"]["one"], rel=0.2)
    assert weights["one"]["strange"] < 0.01
    assert weights["strange"]["strange"] > 0.98


def test_sparse_shallow_and_narrow_clients_keep_their_zeros_layers_and_ranks(
    tmp_path: Path, configuration: Document
) -> None:
    configuration["aggregator"] = {"name": "user-centric", "batch_size": 4}
    configuration["clients"] = [
        *configuration["clients"][1:],
        {"name": "narrow", "adapter": {"r": 2}},
    ]
    result = run(tmp_path, configuration)
    registry = Registry(tmp_path / "registry")
    for event in result.run.select("own"):
        artifact = registry.resolve(event["ref"])
        tensors, masks = read_tensors(artifact), read_masks(artifact)
        assert all(not tensors[name][~mask].any() for name, mask in masks.items())
        ranks = {t.shape[0] for name, t in tensors.items() if "lora_A" in name}
        assert ranks == {2 if event["client"] == "narrow" else 4}
        layers = {int(name.split(".")[2]) for name in tensors}
        assert layers == set(range(2 if event["client"] == "shallow" else 4))
        base = registry.resolve(artifact.manifest.parents[0].ref)
        model = AutoModelForCausalLM.from_pretrained(base.path)
        logits = PeftModel.from_pretrained(model, artifact.path)(torch.tensor([[3, 9]])).logits
        assert logits.isfinite().all()


def test_ranks_that_a_client_prunes_stay_pruned_in_its_own_adapter(
    tmp_path: Path, document: Document
) -> None:
    document["clients"][0]["tuner"] = {"name": "hetlora", "gamma": 0.5, "lam": 10.0}
    document["rounds"] = 3
    result = run(tmp_path, document)
    registry = Registry(tmp_path / "registry")
    left = [event["rank"] for event in result.run.select("client", client="a")]
    assert left[-1] < 4
    for event, rank in zip(result.run.select("own", client="a"), left, strict=True):
        tensors = read_tensors(registry.resolve(event["ref"]))
        assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {rank}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("server_optimizer", {"name": "fedadam"}),
        ("write_back.share", 0.5),
        ("screen.clip", 1.0),
    ],
)
def test_what_goes_by_the_global_adapter_is_refused(
    tmp_path: Path, document: Document, key: str, value: Any
) -> None:
    section, _, leaf = key.partition(".")
    changed = {**document, section: {leaf: value} if leaf else value}
    with pytest.raises(PrufedError, match=f"user-centric gives every client .* and {key} goes by"):
        run(tmp_path, changed)
    assert not list((tmp_path / "runs").glob("*"))


def test_a_client_of_one_mini_batch_is_refused_before_anybody_trains(
    tmp_path: Path, document: Document
) -> None:
    document["aggregator"]["batch_size"] = 1000
    with pytest.raises(PrufedError, match=r"client a: .* rows are one mini-batch of 1000"):
        run(tmp_path, document)
    assert Registry(tmp_path / "registry").list("fed.a") == []


def test_runs_show_says_which_adapters_are_the_clients_own(
    prufed_home: Path,
    document: Document,
    write_configuration: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document["rounds"] = 1
    assert main(["federate", "--clients", str(write_configuration(document))]) == 0
    capsys.readouterr()
    assert main(["runs", "show", "fed-1"]) == 0
    assert "fed.a@v2 (its own)" in capsys.readouterr().out
