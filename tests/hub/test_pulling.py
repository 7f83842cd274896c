"""What a pull brings, byte for byte."""

from __future__ import annotations

import pytest

from tests.hub.conftest import Machine
from tests.hub.server import Hub


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
    assert list((receiver.home / "tmp").iterdir()) == []
