"""What goes where: a reference alone on stdout, JSON documents, silence, no escapes, help pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from prufed_cli.app import ALL_VERBS
from prufed_cli.main import help_text
from prufed_registry import Registry

Call = Callable[..., Any]

PRUNE = ("--method", "magnitude", "--sparsity", "0.5", "--device", "cpu")
ADAPTER = "fed@v1"


@pytest.fixture(autouse=True)
def at_home(used_home: Path, prufed_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUFED_HOME", str(used_home))


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prufed_cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_creating_prints_the_reference_alone(
    prufed: Call, base_directory: Path, configuration: dict[str, Any], clients_file: Call
) -> None:
    registry = Registry(Path(os.environ["PRUFED_HOME"]) / "registry")
    clients = clients_file({**configuration, "rounds": 1, "name": "loud"})
    for arguments in (
        ["import", base_directory, "--name", "loud-base"],
        ["prune", "--base", "tiny", *PRUNE, "--name", "loud-model"],
        ["federate", "--clients", clients],
        ["alias", "loud-model@v1", "best"],
    ):
        called = prufed(*arguments)
        assert called.code == 0
        assert called.out.count("\n") == 1
        assert registry.resolve(called.out.strip()).name.startswith("loud")


def test_nothing_is_said_when_quiet(
    prufed: Call,
    configuration: dict[str, Any],
    clients_file: Call,
    calibration_file: Path,
    tmp_path: Path,
) -> None:
    clients = clients_file({**configuration, "rounds": 1, "name": "quiet"})
    for arguments in (
        ["prune", "--base", "tiny", *PRUNE, "--name", "quiet-model"],
        ["prune", "--base", "tiny", *PRUNE, "--name", "quiet-model"],  # made before
        ["federate", "--clients", clients],
        ["runs", "resume", "quiet-1"],
        ["eval", "tiny", "--perplexity", calibration_file, "--device", "cpu"],
        ["export", ADAPTER, tmp_path / "merged", "--merge"],
    ):
        called = prufed(*arguments, "--quiet")
        assert called.code == 0
        assert called.err == ""
        assert called.out


def documents(calibration: Path, directory: Path, base: Path, clients: Path) -> list[list[Any]]:
    """Return a command line for every verb that has ``--json``; a removal comes last."""
    return [
        ["prune", "--base", "tiny", *PRUNE, "--name", "json-model"],
        ["federate", "--clients", clients, "--dry-run"],
        ["federate", "--clients", clients],
        ["eval", "tiny", "--perplexity", calibration, "--device", "cpu"],
        ["list"],
        ["list", "tiny"],
        ["show", "tiny"],
        ["path", "tiny"],
        ["lineage", ADAPTER],
        ["diff", "tiny", "json-model"],
        ["export", "tiny", directory / "copy"],
        ["export", ADAPTER, directory / "merged", "--merge"],
        ["import", base, "--name", "json-base"],
        ["alias", "json-base"],
        ["gc", "--dry-run"],
        ["verify"],
        ["runs"],
        ["runs", "list"],
        ["runs", "show", "fed-1"],
        ["plugins"],
        ["plugins", "show", "wanda"],
        ["plugins", "check", "sampler:all"],
        ["doctor", "--offline"],
        ["rm", "json-base"],
    ]


def test_every_json_is_one_document_with_its_schema(
    prufed: Call,
    base_directory: Path,
    calibration_file: Path,
    configuration: dict[str, Any],
    clients_file: Call,
    tmp_path: Path,
) -> None:
    clients = clients_file({**configuration, "rounds": 1, "name": "json"})
    lines = documents(calibration_file, tmp_path, base_directory, clients)
    for arguments in lines:
        called = prufed(*arguments, "--json")
        assert called.code == 0, called.err
        document = json.loads(called.out)
        assert document["schema"] == 1, arguments
        assert called.err == "", arguments
    covered = {str(line[0]) for line in lines}
    # These three are tried against the Hub's protocol, and in the demo's own test.
    assert covered | {"push", "pull", "demo"} == {verb for verb in ALL_VERBS if has_json(verb)}


def has_json(verb: str) -> bool:
    from prufed_cli.app import build

    module = build([verb])
    import typer

    command = typer.main.get_command(module)
    (found,) = [command] if not hasattr(command, "commands") else command.commands.values()
    return any("--json" in parameter.opts for parameter in found.params)


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_help_pages(prufed: Call, verb: str) -> None:
    called = prufed(verb, "--help")
    assert called.code == 0
    assert called.err == ""
    assert called.out.startswith(f"Usage: prufed {verb} ")
    assert r"\[" not in called.out
    assert called.out == prufed(verb, "-h").out


def test_the_first_page_is_cheap_and_lists_every_verb() -> None:
    code = (
        "import sys; from prufed_cli.main import main; main(['--help']);"
        "sys.stderr.write(' '.join(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout == help_text()
    heavy = {"torch", "typer", "click", "rich", "pydantic", "transformers", "prufed_registry"}
    assert not heavy & set(shown.stderr.split())
    assert all(f"  {verb} " in shown.stdout for verb in ALL_VERBS)
    assert max(len(line) for line in shown.stdout.splitlines()) <= 90


def test_no_arguments_is_a_question_for_help(prufed: Call) -> None:
    called = prufed()
    assert (called.code, called.out) == (2, help_text())


def test_no_escapes_off_a_terminal(prufed: Call) -> None:
    for arguments in (["list"], ["show", "tyni"], ["runs", "show", "fed-1"], ["plugins"]):
        called = prufed(*arguments)
        assert "\x1b" not in called.out + called.err


def on_a_terminal(arguments: list[str], environment: Mapping[str, str]) -> str:
    """Return what a command writes to a terminal."""
    import pty

    leader, follower = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "prufed_cli", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm-256color", **environment},
    )
    os.close(follower)
    written = b""
    try:
        while piece := os.read(leader, 4096):
            written += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    child.wait(timeout=60)
    os.close(leader)
    return written.decode()


def test_colour_on_a_terminal_and_none_with_no_color() -> None:
    escape = "\x1b[1;31m"
    assert escape in on_a_terminal(["show", "tyni"], {})
    plain = on_a_terminal(["show", "tyni"], {"NO_COLOR": "1"})
    assert "31m" not in plain
    assert "there is no artifact 'tyni'" in plain


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("prufed show ti", "tiny@v1"),
        ("prufed federate --resume f", "fed-1"),
        ("prufed fed", "federate"),
    ],
)
def test_completion_in_the_shell(words: str, expected: str) -> None:
    completed = run(
        _PRUFED_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split()) - 1),
    )
    assert expected in completed.stdout.split()
    assert completed.stderr == ""


def test_a_prune_that_drops_nothing_says_so(prufed: Call, base_directory: Path) -> None:
    made = prufed("prune", "--base", base_directory, "--method", "bottom", "--sparsity", "0.1")
    assert made.code == 0
    assert "kept all 4 layers, since so little drops none" in made.err
    made = prufed("prune", "--base", base_directory, "--method", "bottom", "--sparsity", "0.25")
    assert "kept layers [1, 2, 3]" in made.err
