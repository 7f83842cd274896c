"""Tokens, networks, servers and other people: one sentence each, and a second run ends well."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from prufed_cli.hub import pull
from tests.hub.conftest import TOKEN, Machine
from tests.hub.server import Fault, Hub

STEPS = {
    "create": "POST /api/repos/create",
    "refs": "GET /api/models/me/small/refs",
    "head": "GET /api/models/me/small$",
    "card": "POST /api/validate-yaml",
    "upload refused": "PUT /lfs/",
    "commit": "POST /api/models/me/small/commit/",
    "compare": "GET /api/models/me/small/revision/",
    "tag": "POST /api/models/me/small/tag/",
}


def pushed_whole(hub: Hub, sender: Machine) -> bool:
    """Say whether the first version is on the Hub: one commit beyond the Hub's own, one tag."""
    repository = hub.repositories["me/small"]
    weights = sender.registry.resolve("small@v1").manifest.files["model.safetensors"]
    return (
        len(repository.commits) == 2
        and repository.tags == {"v1": repository.head}
        and repository.at("v1").files["model.safetensors"].sha256 == weights.sha256
    )


@pytest.mark.parametrize("step", STEPS)
def test_a_push_that_fails_at_any_step_is_finished_by_the_next(
    hub: Hub, sender: Machine, failure: Callable[[], str], step: str
) -> None:
    status = 501 if step == "upload refused" else 500  # the client itself repeats uploads on 500
    hub.faults = [Fault(STEPS[step], status=status)]
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 1
    assert failure() == f"cannot push small@v1 to me/small: the Hub answered {status}"
    assert all(not each.tags for each in hub.repositories.values())
    hub.faults = []
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    assert pushed_whole(hub, sender)
    assert sender.leftovers == []


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    hub: Hub, sender: Machine, failure: Callable[[], str]
) -> None:
    hub.faults = [Fault("POST .*/commit/", status=None, times=1)]
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 1
    assert "the Hub cannot be reached" in failure()
    assert len(hub.repositories["me/small"].commits) == 2
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    assert pushed_whole(hub, sender)


def test_an_upload_that_fails_once_is_repeated(hub: Hub, sender: Machine) -> None:
    hub.faults = [Fault("PUT /lfs/", times=1)]
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    assert pushed_whole(hub, sender)


def test_bytes_that_change_on_the_way_are_not_tagged(
    hub: Hub, sender: Machine, failure: Callable[[], str]
) -> None:
    other = sender.registry.resolve("small@v2").path / "model.safetensors"
    oid = sender.registry.resolve("small@v1").manifest.files["model.safetensors"].sha256
    hub.before_commit = lambda: hub.objects.update({oid: other.read_bytes()})
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 5
    assert "model.safetensors did not arrive whole" in failure()
    assert hub.repositories["me/small"].tags == {}


def test_somebody_elses_commit_in_between_is_not_overwritten(
    hub: Hub, sender: Machine, failure: Callable[[], str]
) -> None:
    hub.before_commit = lambda: hub.add("me/small", {"theirs.txt": b"theirs"}) and None
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 1
    assert "somebody else changed the repository meanwhile" in failure()
    assert "model.safetensors" not in hub.repositories["me/small"].at("main").files
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    assert {"theirs.txt", "model.safetensors"} <= set(hub.repositories["me/small"].at("v1").files)


def test_somebody_elses_tag_in_between_is_not_moved(
    hub: Hub, sender: Machine, failure: Callable[[], str]
) -> None:
    def tag() -> None:
        repository = hub.repositories["me/small"]
        repository.tags["v1"] = repository.head

    hub.before_commit = tag
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 1
    assert "somebody else changed the repository meanwhile" in failure()
    theirs = hub.repositories["me/small"].tags["v1"]
    assert theirs != hub.repositories["me/small"].head


@pytest.mark.parametrize(
    "pattern", ["GET /api/models/me/small$", "GET .*/tree/", "GET .*/prufed.json", "GET /store/"]
)
def test_a_pull_that_fails_at_any_step_leaves_nothing(
    hub: Hub, sender: Machine, receiver: Machine, failure: Callable[[], str], pattern: str
) -> None:
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    hub.faults = [Fault(pattern, status=501)]  # the client itself repeats some requests on 500
    assert receiver.prufed("pull", "me/small", "-q") == 1
    assert failure() == "cannot pull me/small: the Hub answered 501"
    assert receiver.registry.list() == []
    assert receiver.leftovers == []
    hub.faults = [Fault("HEAD .*/config.json", times=1)]  # this one the client repeats
    assert receiver.prufed("pull", "me/small", "-q") == 0


def test_a_wrong_token_is_refused(
    hub: Hub,
    sender: Machine,
    receiver: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    for arguments in (("push", "tiny", "me/tiny"), ("pull", "me/tiny")):
        assert sender.prufed(*arguments) == 4
        out, err = capsys.readouterr()
        assert "the Hub refuses the token" in err
        assert "hint: run `hf auth login`, or set HF_TOKEN" in err
        assert "hf_wrong" not in out + err
    assert hub.repositories == {}


def test_without_a_token_private_and_missing_look_the_same(
    hub: Hub,
    sender: Machine,
    receiver: Machine,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[[], str],
) -> None:
    assert sender.prufed("push", "tiny", "me/tiny", "-q") == 0
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")
    for name in ("me/tiny", "me/missing"):
        assert receiver.prufed("pull", name, "-q") == 4
        assert "does not exist, or you may not see it" in failure()
    assert sender.prufed("push", "tiny", "me/other", "-q") == 4
    assert "you are not signed in" in failure()


def test_what_is_not_there_and_what_is_not_yours(
    hub: Hub, sender: Machine, failure: Callable[[], str]
) -> None:
    assert sender.prufed("pull", "me/missing", "-q") == 3
    assert "there is no such repository" in failure()
    assert sender.prufed("push", "tiny", "them/tiny", "-q") == 4
    assert "the token may not do this" in failure()
    assert sender.prufed("push", "absent", "me/tiny", "-q") == 3
    assert "absent" in failure()


def test_no_network_is_one_sentence(
    hub: Hub, sender: Machine, monkeypatch: pytest.MonkeyPatch, failure: Callable[[], str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        for arguments in (("push", "tiny", "me/tiny"), ("pull", "me/tiny")):
            assert sender.prufed(*arguments, "-q") == 1
            assert "the Hub cannot be reached" in failure()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert sender.prufed("pull", "me/tiny", "-q") == 1
    assert "HF_HUB_OFFLINE is set" in failure()


def test_an_endpoint_that_is_no_address_is_refused(
    sender: Machine, monkeypatch: pytest.MonkeyPatch, failure: Callable[[], str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    assert sender.prufed("pull", "me/tiny", "-q") == 2
    assert failure() == "HF_ENDPOINT 'huggingface.co' is not an address"


def test_a_login_page_instead_of_a_hub_is_one_sentence(
    hub: Hub, sender: Machine, failure: Callable[[], str]
) -> None:
    hub.faults = [Fault(".*", page=b"<html>Sign in to the Wi-Fi</html>")]
    for arguments in (("push", "tiny", "me/tiny"), ("pull", "me/tiny")):
        assert sender.prufed(*arguments, "-q") == 1
        assert "what answers is not a Hub" in failure()


def test_an_interrupted_pull_leaves_nothing(
    hub: Hub, sender: Machine, receiver: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sender.prufed("push", "small@v1", "me/small", "-q") == 0
    hub.faults = [Fault("GET /store/", status=None, after=1000)]  # the client waits to resume

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pull("me/small", registry=receiver.registry)
    monkeypatch.undo()
    assert receiver.registry.list() == []
    assert receiver.leftovers == []


def test_the_token_is_nowhere(
    hub: Hub, sender: Machine, receiver: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sender.prufed("push", "fed", "me/fed", "--with-base") == 0
    assert receiver.prufed("pull", "me/fed", "--with-base") == 0
    out, err = capfd.readouterr()
    assert TOKEN not in out + err
    for machine in (sender, receiver):
        files = [path for path in machine.home.rglob("*") if path.is_file()]
        assert len(files) > 10
        assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    stored = [
        file
        for repository in hub.repositories.values()
        for file in repository.at("main").files.values()
    ]
    assert not [file for file in stored if TOKEN.encode() in file.content]
    assert not [each for each in hub.sent("/store/") if "authorization" in each.headers]
