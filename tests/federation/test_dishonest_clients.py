"""What clients may send that nobody should merge, on the real command line, by tuners of a plugin.

The plugin is announced as any stranger's is, by the metadata of a distribution on the path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Document = dict[str, Any]

PLUGIN = dedent(
    """
    from pathlib import Path

    import torch
    from pydantic import Field

    from prufed_plugins.api import Method, hookimpl
    from prufed_plugins.params import LoraParams

    PRUFED_API = (1, 0)

    class StrayParams(LoraParams):
        does: str = Field(description="what is wrong with it")
        place: str = Field(description="where a file is handed on")

    @hookimpl
    def prufed_tuners():
        yield Method("stray", "strays:Stray", StrayParams, "a tuner that misbehaves")

    class Stray:
        def __init__(self, params):
            self.params = params

        def trains(self, round_index):
            return "B" if self.params.does == "moves-a" else "AB"

        def tune(self, model, data, seed, on_step, **more):
            from dataclasses import replace

            from prufed_plugins.tuners.training import train

            more.pop("round_index")
            result = train(model, data, self.params, seed=seed, on_step=on_step, **more)
            tensors = dict(result.tensors)
            generator = torch.Generator().manual_seed(seed)
            for name, tensor in tensors.items():
                if self.params.does in {"other-a", "moves-a"} and "lora_A" in name:
                    size = tensor.square().mean().sqrt()
                    tensors[name] = torch.randn(tensor.shape, generator=generator) * size
                if self.params.does == "thousandfold":
                    tensors[name] = tensor * 1e5
                if self.params.does == "nan":
                    tensors[name] = tensor * float("nan")
                if self.params.does == "narrow":
                    tensors[name] = tensor[:, :-1].contiguous()
                if self.params.does == "fills-holes":
                    tensors[name] = tensor + 1e-3 * (tensor == 0)
            if self.params.does == "unknown-name":
                tensors["model.nothing.lora_A.weight"] = torch.ones(2, 2)
            file = Path(self.params.place)
            if self.params.does == "hands-on":
                torch.save(tensors, file)
            if self.params.does == "takes":
                tensors = torch.load(file, weights_only=True)
            return replace(result, tensors=tensors)
    """
)


@pytest.fixture
def strays(tmp_path: Path) -> Path:
    """Return a directory with the plugin and the metadata that announces it."""
    directory = tmp_path / "strays"
    metadata = directory / "strays-1.0.dist-info"
    metadata.mkdir(parents=True)
    (directory / "strays.py").write_text(PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: strays\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[prufed]\nstrays = strays\n")
    return directory


@pytest.fixture
def prufed(strays: Path, prufed_home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        paths = [str(strays), str(ROOT), str(ROOT / "plugins"), str(ROOT / "registry")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment["PRUFED_HOME"] = str(prufed_home)
        return subprocess.run(
            [sys.executable, "-m", "prufed_cli", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )

    return run


def federation(configuration: Document, tmp_path: Path, *does: str | None) -> Document:
    """Return one dense client per entry; None trains as it should."""
    place = str(tmp_path / "handed-on.pt")
    configuration["rounds"] = 1
    configuration["adapter"] |= {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    configuration["tuner"] |= {"max_steps": 2, "lr": 1e-3}
    configuration["clients"] = [
        {"name": f"c{index}"}
        if one is None
        else {
            "name": f"c{index}",
            "tuner": {
                **configuration["tuner"],
                **{"name": "stray", "does": one, "place": place},
            },
        }
        for index, one in enumerate(does)
    ]
    return configuration


def events(home: Path, kind: str) -> list[Document]:
    [file] = (home / "runs").glob("*/events.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


SENT = {
    "other-a": ("merged", "its A is another than the one it was given (cosine "),
    "thousandfold": ("merged", "times the median of the others"),
    "moves-a": ("client_failed", "its A must rest in this round, and "),
    "nan": ("client_failed", "its adapter has NaN or infinity in "),
    "narrow": ("client_failed", " came back as "),
    "unknown-name": ("client_failed", "its adapter has the unknown tensor model.nothing"),
}
"""What is wrong with a client's adapter, the event that says so, and what it says."""


def test_clients_that_send_what_they_should_not_are_excluded_and_said(
    tmp_path: Path,
    configuration: Document,
    write_configuration: Callable[[Document], Path],
    prufed: Callable[..., subprocess.CompletedProcess[str]],
    prufed_home: Path,
) -> None:
    document = federation(configuration, tmp_path, *[None] * 5, *SENT)
    result = prufed("federate", "--clients", str(write_configuration(document)))
    assert result.returncode == 0, result.stderr
    [merged] = events(prufed_home, "merged")
    assert merged["clients"] == ["c0", "c1", "c2", "c3", "c4"]
    reasons = {"merged": merged["excluded"]}
    failed = events(prufed_home, "client_failed")
    reasons["client_failed"] = {event["client"]: event["reason"] for event in failed}
    assert sum(map(len, reasons.values())) == len(SENT)
    for index, (kind, reason) in enumerate(SENT.values(), start=5):
        assert reason in reasons[kind][f"c{index}"]
        [said] = [line for line in result.stderr.splitlines() if f"c{index} is excluded" in line]
        assert said.startswith(f"warning: client c{index} is excluded from the ")
        assert reason in said


def test_entries_that_a_clients_mask_lacks_are_no_update(
    tmp_path: Path,
    configuration: Document,
    write_configuration: Callable[[Document], Path],
    prufed: Callable[..., subprocess.CompletedProcess[str]],
    prufed_home: Path,
) -> None:
    """The merge relies on it: it leaves masks unread that have not changed."""
    document = federation(configuration, tmp_path, None, "fills-holes", None)
    document["adapter"] |= {"preset": "lego-literal"}
    for client in document["clients"]:
        client["sparsity"] = 0.5
    result = prufed("federate", "--clients", str(write_configuration(document)))
    assert result.returncode == 0, result.stderr
    [merged] = events(prufed_home, "merged")
    assert merged["clients"] == ["c0", "c2"]
    [failed] = events(prufed_home, "client_failed")
    assert failed["client"] == "c1"
    assert failed["reason"].startswith("its adapter has entries of model.layers.0.")
    assert failed["reason"].endswith(" that its mask lacks")


def test_a_client_that_returns_the_file_of_another_counts_once(
    tmp_path: Path,
    configuration: Document,
    write_configuration: Callable[[Document], Path],
    prufed: Callable[..., subprocess.CompletedProcess[str]],
    prufed_home: Path,
) -> None:
    path = write_configuration(federation(configuration, tmp_path, None, "hands-on", "takes"))
    result = prufed("federate", "--clients", str(path))
    assert result.returncode == 0, result.stderr
    [merged] = events(prufed_home, "merged")
    assert merged["clients"] == ["c0", "c1"]
    expected = "its adapter is the file that client c1 sent, trained on other rows"
    assert merged["excluded"] == {"c2": expected}


def test_a_round_whose_clients_are_all_excluded_ends_the_run_and_says_why(
    tmp_path: Path,
    configuration: Document,
    write_configuration: Callable[[Document], Path],
    prufed: Callable[..., subprocess.CompletedProcess[str]],
    prufed_home: Path,
) -> None:
    path = write_configuration(federation(configuration, tmp_path, "other-a", "other-a"))
    result = prufed("federate", "--clients", str(path), "--quiet")
    assert result.returncode == 1
    assert result.stdout == ""
    *warnings, error, hint = result.stderr.splitlines()
    assert [line.partition(" is ")[0] for line in warnings] == [
        "warning: client c0",
        "warning: client c1",
    ]
    assert [error, hint] == [
        "error: round 1 has no usable updates of 2, and 1 is needed",
        "hint: `prufed runs show fed-1` says why each was excluded",
    ]
    [refused] = events(prufed_home, "refused")
    assert set(refused["excluded"]) == {"c0", "c1"}
    shown = prufed("runs", "show", "fed-1").stdout
    assert shown.count("excluded: its A is another than the one it was given") == 2
    path = write_configuration(federation(configuration, tmp_path, "nan", "nan"))
    failed = prufed("federate", "--clients", str(path), "--quiet")
    assert failed.returncode == 1
    assert "\nerror: round 1 has no adapters of 2 clients, and 1 is needed\n" in failed.stderr


@pytest.mark.parametrize(
    ("change", "said", "hint"),
    [
        (
            {"aggregator": {"name": "krum"}},
            "krum against 1 bad clients needs 5 clients, and the round has 4",
            "sample more clients, or set byzantine lower",
        ),
        (
            {"clients": [{"name": "a"}, {"name": "b", "adapter": {"r": 2}}]},
            "client b: rank 2 is not the global rank 4",
            "or choose an aggregator that mixes ranks",
        ),
        (
            {"aggregator": {"name": "fedit"}, "clients": [{"name": "a"}, {"name": "b"}]},
            "client b: has other layers than client a, which fedit cannot average",
            "choose the aggregator heteagg-layer",
        ),
        (
            {"clients": [{"name": "a", "weight": -1}]},
            "clients.0.weight: must be more than 0, not -1",
            "`prufed schema` lists every key",
        ),
        (
            {"clients": [{"name": "a", "weight": 0}]},
            "clients.0.weight: must be more than 0, not 0",
            "`prufed schema` lists every key",
        ),
        (
            {"aggregator": {"name": "heteagg", "global_weight": -2}},
            "aggregator.global_weight: must be > 0, not -2",
            "`prufed schema` lists every key",
        ),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_what_cannot_be_merged_is_refused_before_anything_is_made(
    configuration: Document,
    write_configuration: Callable[[Document], Path],
    prufed_home: Path,
    capsys: pytest.CaptureFixture[str],
    change: Document,
    said: str,
    hint: str,
    dry: bool,
) -> None:
    from prufed_cli.main import main

    document = {**configuration, **change}
    if document["aggregator"]["name"] == "fedit":
        document["clients"] = [{"name": "a"}, {"name": "b", "keep_layers": 2}]
    path = write_configuration(document)
    arguments = ["federate", "--clients", str(path), *(["--dry-run"] if dry else [])]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert hint in captured.err
    made = prufed_home / "registry" / "artifacts"
    assert [a.name for a in made.iterdir()] in ([], ["tiny"]) if made.is_dir() else True
    assert not list((prufed_home / "runs").glob("*")) if (prufed_home / "runs").is_dir() else True
