"""What a push leaves on the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub.conftest import Machine
from tests.hub.server import Hub


def tree(hub: Hub, name: str, revision: str = "main") -> dict[str, bytes]:
    return {path: file.content for path, file in hub.repositories[name].at(revision).files.items()}


def card(hub: Hub, name: str) -> tuple[dict[str, Any], str]:
    header, _, body = tree(hub, name)["README.md"].decode()[4:].partition("\n---\n")
    return yaml.safe_load(header), body


def test_makes_a_private_repository_with_one_commit_and_its_tag(hub: Hub, sender: Machine) -> None:
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    repository = hub.repositories["me/small"]
    assert repository.private
    assert repository.tags == {"v1": repository.head}
    assert len(repository.commits) == 2  # the Hub's own first commit, and ours
    artifact = sender.registry.resolve("small@v1")
    stored = tree(hub, "me/small", "v1")
    for path in artifact.manifest.files:
        original = stored.get(f"prufed-original/{path}", stored[path])
        assert original == (artifact.path / path).read_bytes()
    assert stored["prufed.json"] == (artifact.path / "prufed.json").read_bytes()
    weights = repository.at("v1").files["model.safetensors"]
    assert weights.sha256 == artifact.manifest.files["model.safetensors"].sha256
    [commit] = hub.sent("POST .*/commit/")
    header = json.loads(commit.body.splitlines()[0])["value"]
    assert header["parentCommit"] == repository.at("main").parent


def test_public_is_asked_for(hub: Hub, sender: Machine) -> None:
    assert sender.prufed("push", "tiny", "me/tiny", "--public", "-q") == 0
    assert not hub.repositories["me/tiny"].private


def test_the_same_push_again_does_nothing_and_says_so(
    hub: Hub, sender: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sender.prufed("push", "tiny", "me/tiny", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    sent = len(hub.sent("POST .*/(commit|tag|preupload)/"))
    assert sender.prufed("push", "tiny", "me/tiny") == 0
    out, err = capsys.readouterr()
    assert "nothing to do" in err
    assert out.strip() == first["url"]
    assert sender.prufed("push", "tiny", "me/tiny", "--json") == 0
    assert json.loads(capsys.readouterr().out) == first | {"already": True}
    assert len(hub.sent("POST .*/(commit|tag|preupload)/")) == sent


def test_a_tag_with_another_content_is_refused(
    hub: Hub, sender: Machine, failure: Callable[[], str]
) -> None:
    assert sender.prufed("push", "tiny@v1", "me/model", "-q") == 0
    before = tree(hub, "me/model")
    assert sender.prufed("push", "small@v1", "me/model", "-q") == 1
    assert "me/model has another v1" in failure()
    assert tree(hub, "me/model") == before


def test_a_tag_that_prufed_did_not_make_is_refused(
    hub: Hub, sender: Machine, failure: Callable[[], str]
) -> None:
    repository = hub.add("me/model", {"a.txt": b"a"})
    repository.tags["v1"] = repository.head
    assert sender.prufed("push", "tiny@v1", "me/model", "-q") == 1
    assert "another v1 (not of prufed)" in failure()


def test_a_later_version_deletes_what_only_the_earlier_one_had(
    hub: Hub, sender: Machine, model_directory: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(model_directory, tmp_path / "model")
    (directory / "notes.txt").write_text("of the first version")
    sender.registry.import_directory(directory, name="model")
    (directory / "notes.txt").unlink()
    sender.registry.import_directory(directory, name="model")
    assert sender.prufed("push", "model@v1", "me/model", "-q") == 0
    hub.add("me/model", {"chart.svg": b"<svg/>"})
    assert sender.prufed("push", "model@v2", "me/model", "-q") == 0
    assert "notes.txt" in tree(hub, "me/model", "v1")
    assert "notes.txt" not in tree(hub, "me/model", "v2")
    assert "chart.svg" in tree(hub, "me/model", "v2"), "what prufed did not put there stays"


def test_an_adapter_without_its_base_on_the_hub_is_refused(
    hub: Hub, sender: Machine, failure: Callable[[], str]
) -> None:
    assert sender.prufed("push", "fed", "me/fed", "-q") == 2
    assert "the base of fed@v1, small@v2, is not on the Hub" in failure()
    assert hub.repositories == {}
    assert sender.prufed("push", "fed", "me/small", "--with-base", "-q") == 2
    assert "cannot hold both" in failure()
    assert hub.repositories == {}


def test_an_adapter_names_its_base_by_repository_and_revision(
    hub: Hub, sender: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sender.prufed("push", "fed", "me/fed", "--with-base", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["base"]["repository"], document["base"]["tag"]) == ("me/small", "v2")
    stored = tree(hub, "me/fed")
    config = json.loads(stored["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/small"
    assert config["revision"] == "v2"
    published = (sender.registry.resolve("fed").path / "adapter_config.json").read_bytes()
    assert stored["prufed-original/adapter_config.json"] == published
    assert sender.prufed("push", "fed", "me/other", "-q") == 0, "its base is there by now"


def test_a_base_that_has_left_the_hub_is_missed(
    hub: Hub, sender: Machine, failure: Callable[[], str]
) -> None:
    assert sender.prufed("push", "small@v2", "me/small", "-q") == 0
    del hub.repositories["me/small"]
    assert sender.prufed("push", "fed", "me/fed", "-q") == 2
    assert "is not on the Hub" in failure()


def test_the_card_says_what_the_model_is_and_where_it_is_from(hub: Hub, sender: Machine) -> None:
    assert sender.prufed("push", "tiny", "me/tiny", "-q") == 0
    assert "base_model" not in card(hub, "me/tiny")[0]
    assert sender.prufed("push", "fed", "me/fed", "--with-base", "-q") == 0
    metadata, body = card(hub, "me/small")
    assert metadata["base_model"] == "me/tiny"
    assert metadata["base_model_relation"] == "finetune"
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == "transformers"
    assert "- method: magnitude" in body
    assert "- sparsity, as counted: 0.5000" in body
    assert "- lineage: `small@v2` ← `tiny@v1`" in body
    metadata, body = card(hub, "me/fed")
    assert metadata["base_model"] == "me/small"
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "peft"
    assert "- loss: 1.25" in body
    assert "- lineage: `fed@v1` ← `small@v2` ← `tiny@v1`" in body


def test_a_damaged_artifact_is_not_pushed(
    hub: Hub, sender: Machine, failure: Callable[[], str]
) -> None:
    weights = sender.registry.resolve("tiny").path / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert sender.prufed("push", "tiny", "me/tiny", "-q") == 5
    assert "tiny@v1 is damaged" in failure()
    assert hub.requests == []


@pytest.mark.parametrize("name", ["model", "me/a/b", "me/", "../x", "me/mo del"])
def test_what_is_no_repository_is_refused(
    sender: Machine, name: str, failure: Callable[[], str]
) -> None:
    assert sender.prufed("push", "tiny", name, "-q") == 2
    assert "is not a repository" in failure()
