"""What a push leaves on the Hub."""

from __future__ import annotations

import json
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
