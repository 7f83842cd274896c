"""What a pull brings, byte for byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from prufed_cli.models.base import base_of, load_reference
from tests.hub.conftest import Machine
from tests.hub.server import Fault, Hub


@pytest.mark.parametrize("reference", ["tiny@v1", "small@v2"])
def test_brings_the_artifact_that_was_pushed(
    hub: Hub, sender: Machine, receiver: Machine, reference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sender.prufed("push", reference, "me/model", "-q") == 0
    capsys.readouterr()
    assert receiver.prufed("pull", "me/model", "-q") == 0
    sent = sender.registry.resolve(reference)
    [pulled] = receiver.registry.list()
    assert capsys.readouterr().out.strip() == pulled.ref
    assert pulled.digest == sent.digest
    assert pulled.fingerprint == sent.fingerprint
    assert (pulled.name, pulled.kind) == (sent.name, sent.kind)
    assert receiver.registry.verify() == []
    assert receiver.leftovers == []


def test_the_same_pull_again_says_so(
    hub: Hub, sender: Machine, receiver: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    assert receiver.prufed("pull", "me/small", "--name", "mine", "-q") == 0
    capsys.readouterr()
    assert receiver.prufed("pull", "me/small", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["reference"], document["already"]) == ("mine@v1", True)
    assert document["commit"] == hub.repositories["me/small"].head
    assert receiver.prufed("pull", "me/small") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert [each.ref for each in receiver.registry.list()] == ["mine@v1"]


def test_an_earlier_version_comes_by_its_tag(
    hub: Hub, sender: Machine, receiver: Machine, failure: Callable[[], str]
) -> None:
    for version in ("small@v1", "small@v2"):
        assert sender.prufed("push", version, "me/small", "-q") == 0
    assert receiver.prufed("pull", "me/small", "--revision", "v7", "-q") == 3
    assert "there is no such revision" in failure()
    assert receiver.prufed("pull", "me/small", "--revision", "v1", "-q") == 0
    first = sender.registry.resolve("small@v1")
    assert receiver.registry.resolve("small").digest == first.digest


def test_an_adapter_comes_with_its_base_if_asked(
    hub: Hub, sender: Machine, receiver: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sender.prufed("push", "fed", "me/fed", "--with-base", "-q") == 0
    assert receiver.prufed("pull", "me/fed") == 0
    assert "prufed pull me/fed --with-base" in capsys.readouterr().err
    assert receiver.prufed("pull", "me/fed", "--with-base", "-q") == 0
    adapter = receiver.registry.resolve("fed")
    assert adapter.digest == sender.registry.resolve("fed").digest
    base = base_of(adapter, receiver.registry)
    assert base.ref == "small@v1"  # the sender's second version is the first one here
    assert base.digest == sender.registry.resolve("small@v2").digest
    assert receiver.registry.verify() == []
    merged = load_reference("fed", receiver.registry, device="cpu").model
    there = load_reference("fed", sender.registry, device="cpu").model.state_dict()
    assert all(torch.equal(value, there[key]) for key, value in merged.state_dict().items())


def test_another_base_than_the_adapters_own_is_refused(
    hub: Hub, sender: Machine, receiver: Machine, failure: Callable[[], str]
) -> None:
    assert sender.prufed("push", "fed", "me/fed", "--with-base", "-q") == 0
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    repository = hub.repositories["me/small"]
    repository.tags["v2"] = repository.tags["v1"]
    assert receiver.prufed("pull", "me/fed", "--with-base", "-q") == 5
    assert "but the adapter was trained on" in failure()
    assert receiver.registry.list(kind="global-adapter") == []


def test_transformers_and_peft_open_what_is_on_the_hub(
    hub: Hub, sender: Machine, tmp_path: Path
) -> None:
    assert sender.prufed("push", "fed", "me/fed", "--with-base", "-q") == 0
    api = HfApi(endpoint=os.environ["HF_ENDPOINT"])
    adapter = api.snapshot_download("me/fed", revision="v1", local_dir=tmp_path / "fed")
    config = PeftConfig.from_pretrained(adapter)
    base = api.snapshot_download(
        config.base_model_name_or_path, revision=config.revision, local_dir=tmp_path / "base"
    )
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    here = sender.registry.resolve("fed").path
    own = AutoModelForCausalLM.from_pretrained(sender.registry.resolve("small@v2").path)
    own = PeftModel.from_pretrained(own, here)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(opened(ids).logits, own(ids).logits)


@pytest.mark.parametrize(
    "path", ["model.safetensors", "config.json", "prufed-original/README.md", "tokenizer.json"]
)
def test_a_flipped_byte_is_found_and_nothing_published(
    hub: Hub, sender: Machine, receiver: Machine, path: str, failure: Callable[[], str]
) -> None:
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    hub.flip("me/small", path)
    assert receiver.prufed("pull", "me/small", "-q") == 5
    assert path.removeprefix("prufed-original/") in failure()
    assert receiver.registry.list() == []
    assert receiver.leftovers == []


def test_a_flipped_byte_of_the_manifest_is_found(
    hub: Hub, sender: Machine, receiver: Machine, failure: Callable[[], str]
) -> None:
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    size = len(hub.repositories["me/small"].at("v1").files["prufed.json"].content)
    for at in (0, 40, size // 3, size // 2, size - 12):
        hub.flip("me/small", "prufed.json", at=at)
        assert receiver.prufed("pull", "me/small", "-q") == 5, at
        assert "manifest" in failure()
        assert receiver.registry.list() == []
        assert receiver.leftovers == []
        hub.flip("me/small", "prufed.json", at=at)
    assert receiver.prufed("pull", "me/small", "-q") == 0


def test_a_file_that_is_gone_is_missed(
    hub: Hub, sender: Machine, receiver: Machine, failure: Callable[[], str]
) -> None:
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    del hub.repositories["me/small"].at("v1").files["tokenizer.json"]
    assert receiver.prufed("pull", "me/small", "-q") == 5
    assert "tokenizer.json" in failure()
    assert receiver.registry.list() == []


def test_a_download_that_breaks_off_is_resumed(
    hub: Hub, sender: Machine, receiver: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    hub.faults = [Fault("GET /store/.*/model.safetensors", status=None, times=1, after=1000)]
    assert receiver.prufed("pull", "me/small", "-q") == 0
    ranges = [each.headers.get("range") for each in hub.sent("GET /store/.*/model.safetensors")]
    assert ranges == [None, "bytes=1000-"]
    assert receiver.registry.resolve("small").digest == sender.registry.resolve("small@v1").digest
