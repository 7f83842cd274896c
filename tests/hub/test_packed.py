"""The packed form on the Hub: smaller, refused by whoever cannot read it, restored by a pull."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.hub.conftest import Machine
from tests.hub.server import Hub

WEIGHTS = "prufed-packed/model.safetensors"


def stored(hub: Hub, name: str, revision: str = "main") -> dict[str, bytes]:
    return {path: file.content for path, file in hub.repositories[name].at(revision).files.items()}


def test_a_packed_push_is_pulled_as_the_artifact_it_was(
    hub: Hub, sender: Machine, receiver: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sender.prufed("push", "small@v2", "me/small", "--packed", "-q") == 0
    sent = sender.registry.resolve("small@v2")
    there = stored(hub, "me/small", "v2")
    packed = {f"prufed-packed/{path}" for path in sent.manifest.files if "safetensors" in path}
    assert {path for path in there if path.endswith(".safetensors")} == packed
    assert b"library_name: prufed" in there["README.md"]
    assert b"`prufed pull` restores it" in there["README.md"]
    assert sender.leftovers == []
    capsys.readouterr()
    assert receiver.prufed("pull", "me/small", "-q") == 0
    [pulled] = receiver.registry.list()
    assert capsys.readouterr().out.strip() == pulled.ref
    assert (pulled.digest, pulled.fingerprint) == (sent.digest, sent.fingerprint)
    for path in sent.manifest.files:
        assert (pulled.path / path).read_bytes() == (sent.path / path).read_bytes()
    assert receiver.registry.verify() == []
    assert receiver.leftovers == []
    assert receiver.prufed("pull", "me/small", "--json") == 0
    assert json.loads(capsys.readouterr().out)["already"]


def test_a_base_in_the_packed_form_serves_an_adapter(
    hub: Hub, sender: Machine, receiver: Machine
) -> None:
    assert sender.prufed("push", "small@v2", "me/small", "--packed", "-q") == 0
    assert sender.prufed("push", "fed", "me/fed", "-q") == 0
    assert receiver.prufed("pull", "me/fed", "--with-base", "-q") == 0
    digests = {each.digest for each in receiver.registry.list()}
    assert digests == {sender.registry.resolve(name).digest for name in ("small@v2", "fed")}


def test_an_adapter_and_its_base_travel_packed_together(
    hub: Hub, sender: Machine, receiver: Machine
) -> None:
    assert sender.prufed("push", "fed", "me/fed", "--packed", "--with-base", "-q") == 0
    for repository in ("me/fed", "me/small"):
        weights = [path for path in stored(hub, repository) if path.endswith(".safetensors")]
        assert all(path.startswith("prufed-packed/") for path in weights)
    assert receiver.prufed("pull", "me/fed", "--with-base", "-q") == 0
    assert receiver.registry.resolve("fed").digest == sender.registry.resolve("fed").digest


def test_one_form_replaces_the_other_on_the_main_branch(
    hub: Hub, sender: Machine, receiver: Machine
) -> None:
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    assert sender.prufed("push", "small@v2", "me/small", "--packed", "-q") == 0
    assert "model.safetensors" in stored(hub, "me/small", "v1")
    assert "model.safetensors" not in stored(hub, "me/small")
    assert sender.prufed("push", "small@v1", "me/other", "--packed", "-q") == 0
    assert sender.prufed("push", "small@v2", "me/other", "-q") == 0
    assert not [path for path in stored(hub, "me/other") if path.startswith("prufed-packed/")]
    for revision in ("v1", "v2"):
        for repository in ("me/small", "me/other"):
            assert receiver.prufed("pull", repository, "--revision", revision, "-q") == 0
    assert len(receiver.registry.list()) == 2


def test_the_same_content_in_the_other_form_is_there_already(
    hub: Hub, sender: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    capsys.readouterr()
    assert sender.prufed("push", "small@v1", "me/small", "--packed") == 0
    assert "has this v1 already; nothing to do" in capsys.readouterr().err
    assert WEIGHTS not in stored(hub, "me/small")


def test_transformers_does_not_open_it(hub: Hub, sender: Machine, tmp_path: Path) -> None:
    assert sender.prufed("push", "small@v2", "me/small", "--packed", "-q") == 0
    for path, content in stored(hub, "me/small").items():
        (tmp_path / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / path).write_bytes(content)
    with pytest.raises(OSError, match="no file named model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "copy")


def test_a_flipped_byte_on_the_way_is_found(
    hub: Hub, sender: Machine, receiver: Machine, failure: Callable[[], str]
) -> None:
    assert sender.prufed("push", "small@v2", "me/small", "--packed", "-q") == 0
    hub.flip("me/small", WEIGHTS)
    assert receiver.prufed("pull", "me/small", "-q") == 5
    assert WEIGHTS in failure()
    assert receiver.registry.list() == []
    assert receiver.leftovers == []


def test_packed_files_that_become_something_else_are_refused(
    hub: Hub, sender: Machine, receiver: Machine, failure: Callable[[], str]
) -> None:
    """The repository holds together; its packed weights are those of another version."""
    assert sender.prufed("push", "small@v1", "me/small", "--packed", "-q") == 0
    other = stored(hub, "me/small")[WEIGHTS]
    assert sender.prufed("push", "small@v2", "me/small", "--packed", "-q") == 0
    hub.add("me/small", {WEIGHTS: other})
    assert receiver.prufed("pull", "me/small", "-q") == 5
    assert "is not the model.safetensors that its manifest names" in failure()
    assert receiver.registry.list() == []
    assert receiver.leftovers == []
