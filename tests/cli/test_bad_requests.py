"""Requests that cannot be met: one sentence, a hint, the right exit code, and nothing made."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]

SPARSE = ("--sparsity", "0.5")


@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1", "nan", "inf", "-inf"])
def test_sparsity_outside_its_range(prune: Call, nothing_made: Call, sparsity: str) -> None:
    prune("--sparsity", sparsity).refused(2, f"sparsity {sparsity} is outside [0, 1)")
    nothing_made()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--sparsity", "half"], "--sparsity 'half' is no number", id="not-a-number"),
        pytest.param(["--pattern", "4:2"], "pattern '4:2' is not n:m", id="pattern-backwards"),
        pytest.param(["--pattern", "two:four"], "pattern 'two:four'", id="pattern-in-words"),
        pytest.param([], "magnitude needs to know how much", id="no-target"),
        pytest.param(["--layers", "1"], "removes entries, not layers", id="layers-of-entries"),
        pytest.param(["--layers", "1", *SPARSE], "exclude each other", id="two-targets"),
        pytest.param(["--method", "top", "--layers", "0"], "drops nothing", id="no-layers"),
        pytest.param(["--method", "top", "--set", "keep=1"], "keep: must be >= 2", id="keep-one"),
        pytest.param(["--method", "top", "--pattern", "2:4"], "does not apply", id="layer-pattern"),
        pytest.param(["--method", "wnada", *SPARSE], "did you mean wanda?", id="unknown-method"),
        pytest.param([*SPARSE, "--set", "gruop=row"], "gruop: no such setting", id="unknown-key"),
        pytest.param([*SPARSE, "--set", "group"], "'group'", id="set-without-value"),
        pytest.param([*SPARSE, "--name", "No Name"], "'No Name' is not a name", id="bad-name"),
        pytest.param([*SPARSE, "--name", "latest"], "'latest' is not a name", id="reserved-name"),
        pytest.param([*SPARSE, "--device", "abacus"], "no device 'abacus'", id="unknown-device"),
        pytest.param([*SPARSE, "--dtype", "int3"], "no dtype 'int3'", id="unknown-dtype"),
        pytest.param([*SPARSE, "--max-memory", "lots"], "'lots' is no size", id="no-size"),
        pytest.param([*SPARSE, "--max-memory", "0"], "0 bytes is no memory", id="no-memory"),
        pytest.param([*SPARSE, "--nested"], "needs several sparsities", id="nested-in-nothing"),
        pytest.param(
            ["--sparsity", "0.75,0.25,0.5", "--nested"],
            "write --sparsity 0.25,0.5,0.75",
            id="nested-not-ascending",
        ),
        pytest.param([*SPARSE, "--sparsty", "0.5"], "--sparsty", id="no-option"),
        pytest.param(["--base", "", *SPARSE], "'' is not a name", id="empty-base"),
        pytest.param(["--base", "a@b@c", *SPARSE], "'a' is not a name", id="two-at-signs"),
        pytest.param(["--base", "tiny@v0", *SPARSE], "'v0' in 'tiny@v0'", id="version-zero"),
    ],
)
def test_refused_before_anything_is_read(
    prune: Call, nothing_made: Call, arguments: list[str], words: str
) -> None:
    prune(*arguments).refused(2, words)
    nothing_made()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pattern", "32:64"], "pattern 32:64 would remove all 32 columns"),
        (["--method", "top", "--layers", "3"], "dropping 3 of 4 layers leaves fewer than 2"),
        (["--method", "bottom", "--layers", "9"], "dropping 9 of 4 layers leaves fewer than 2"),
        (["--method", "symmetric", "--sparsity", "0.9"], "leaves fewer than 2"),
        (["--method", "top", "--set", "keep=9"], "keep"),
    ],
)
def test_what_does_not_fit_the_model(
    prufed: Call,
    prune: Call,
    nothing_made: Call,
    base_directory: Path,
    arguments: list[str],
    words: str,
) -> None:
    prufed("import", base_directory)
    prune("--base", "tiny", *arguments).refused(2, words)
    nothing_made("tiny@v1")


def test_a_directory_that_fails_leaves_itself_says_so_and_nothing_else(
    prune: Call, nothing_made: Call
) -> None:
    called = prune("--pattern", "32:64")
    called.refused(2, "would remove all 32 columns")
    assert "as tiny@v1, which stays in the registry" in called.err
    assert "stays in the registry" not in prune("--pattern", "32:64").err
    nothing_made("tiny@v1")


@pytest.mark.parametrize(
    ("reference", "code", "words"),
    [
        ("tyni", 3, "did you mean tiny?"),
        ("tiny@v9", 3, "tiny@v9 is missing"),
        ("tiny@best", 3, "no alias 'best'"),
        ("tiny@sha256:zz", 2, "is not a digest"),
        ("tiny@", 2, "'tiny@'"),
        ("Tiny", 2, "'Tiny' is not a name"),
    ],
)
@pytest.mark.parametrize("verb", ["show", "path", "lineage", "verify", "rm", "alias", "eval"])
def test_references_that_name_nothing(
    prufed: Call, base_directory: Path, verb: str, reference: str, code: int, words: str
) -> None:
    prufed("import", base_directory)
    prufed(verb, reference).refused(code, words)


def test_every_verb_that_takes_a_reference_refuses_an_unknown_one(
    prufed: Call, tmp_path: Path
) -> None:
    for arguments in (
        ["push", "ghost", "me/ghost"],
        ["export", "ghost", str(tmp_path / "out")],
        ["export", "ghost", str(tmp_path / "out"), "--merge"],
        ["diff", "ghost", "ghoul"],
        ["list", "ghost"],
        ["prune", "--base", "ghost", *SPARSE],
    ):
        prufed(*arguments).refused(3, "there is no artifact 'ghost'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prun"], "did you mean `prufed prune`?"),
        (["frobnicate"], "no command 'frobnicate'"),
        (["runs", "frobnicate"], "frobnicate"),
        (["--frobnicate"], "--frobnicate"),
        (["rm"], "Missing argument"),
        (["federate"], "no configuration given"),
        (["federate", "--resume", "fed-1", "--clients", "a.yaml"], "keeps its configuration"),
        (["federate", "--resume", "fed-1", "--set", "rounds=2"], "keeps its configuration"),
        (["list", "--kind", "model"], "'model' is not a kind"),
        (["push", "tiny", "nowhere"], "owner/name"),
        (["plugins", "check"], "--all"),
    ],
)
def test_commands_that_make_no_sense(prufed: Call, arguments: list[str], words: str) -> None:
    prufed(*arguments).refused(2, words)


@pytest.mark.parametrize(
    "arguments", [["federate", "--resume"], ["runs", "show"], ["runs", "resume"]]
)
@pytest.mark.parametrize("run", ["fed-9", "../registry", ""])
def test_unknown_runs(prufed: Call, arguments: list[str], run: str) -> None:
    prufed(*arguments, run).refused(3, f"no run {run!r}")


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def test_cuda_where_there_is_none(
    prufed: Call,
    prune: Call,
    nothing_made: Call,
    base_directory: Path,
    calibration_file: Path,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
) -> None:
    if has_cuda():
        pytest.skip("a CUDA device is here")
    prufed("import", base_directory)
    prune(*SPARSE, "--device", "cuda").refused(2, "no CUDA device is available")
    text = ("--perplexity", calibration_file)
    prufed("eval", "tiny", *text, "--device", "cuda").refused(2, "no CUDA device is available")
    clients = clients_file({**configuration, "device": "cuda"})
    prufed("federate", "--clients", clients).refused(2, "no CUDA device is available")
    nothing_made("tiny@v1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clients": [{"name": "a"}, {"name": "a"}]}, "'a' is also the name of clients.0"),
        ({"clients": [{"name": "a", "sparsity": 1.0}]}, "clients.0.sparsity: must be less than 1"),
        ({"clients": [{"name": "a", "sparsity": -1}]}, "clients.0.sparsity: must be at least 0"),
        ({"clients": [{"name": "a", "sparsity": math.nan}]}, "must be a finite number"),
        ({"clients": [{"name": "a", "pattern": "3:2"}]}, "clients.0.pattern"),
        ({"clients": [{"name": "a", "pattern": "32:64"}]}, "would remove all 32 columns"),
        ({"clients": [{"name": "a", "keep_layers": 1}]}, "keep_layers: must be at least 2"),
        ({"clients": [{"name": "a", "keep_layers": 9, "pruner": {"name": "top"}}]}, "has only 4"),
        ({"clients": []}, "clients: needs at least 1"),
        ({"sampler": {"name": "uniform", "fraction": 0.0}}, "sampler.fraction: must be > 0"),
        ({"min_clients": 3}, "3 are needed but there are 2 clients"),
        ({"rounds": 0}, "rounds: must be at least 1"),
        ({"agregator": {"name": "fedavg"}}, "did you mean `aggregator`?"),
        ({"aggregator": {"name": "heteag"}}, "did you mean heteagg"),
        ({"adapter": {"r": 4, "target_modules": ["q_porj"]}}, "'q_porj' matches no linear layer"),
        ({"base": "a@b@c"}, "is not a name"),
    ],
)
def test_federations_that_cannot_be(
    prufed: Call,
    nothing_made: Call,
    base_directory: Path,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
    change: dict[str, Any],
    words: str,
) -> None:
    prufed("import", base_directory)
    document = {**configuration, "base": "tiny", "clients": [{"name": "a"}, {"name": "b"}]}
    path = clients_file({**document, **change})
    prufed("federate", "--clients", path).refused(2, words)
    nothing_made("tiny@v1")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("tuner.lrr=1", "did you mean `lr`?"),
        ("nowhere.lr=1", "nowhere: unknown key"),
        ("rounds=none", "rounds"),
        ("clients.0=1", "clients is a list"),
    ],
)
def test_settings_that_replace_nothing(
    prufed: Call,
    nothing_made: Call,
    configuration: dict[str, Any],
    clients_file: Callable[[dict[str, Any]], Path],
    setting: str,
    words: str,
) -> None:
    path = clients_file(configuration)
    prufed("federate", "--clients", path, "--set", setting).refused(2, words)
    nothing_made()


def test_a_task_that_lm_eval_does_not_know(
    prufed: Call, base_directory: Path, tmp_path: Path, nothing_made: Call
) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\n")
    prufed("import", base_directory)
    called = prufed("eval", "tiny", "--tasks", "mien", "--include-path", tmp_path, "-q")
    called.refused(2, "no lm-eval task 'mien'")
    nothing_made("tiny@v1")
