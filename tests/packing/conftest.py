"""A base, sub-models of it with and without masks, and the command line on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prufed_cli.main import main
from prufed_cli.pruning import PruneRequest, prune
from prufed_registry import Registry


@pytest.fixture(scope="session")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a bfloat16 base in several shards, and two sub-models of it."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(directory, max_shard_size="100KB")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    ).save_pretrained(directory)
    home = tmp_path_factory.mktemp("stocked")
    registry = Registry(home / "registry")
    registry.import_directory(directory, name="tiny")
    for request in (
        PruneRequest(base="tiny", method="magnitude", sparsity=0.75, name="sparse"),
        PruneRequest(base="tiny", method="top", layers=2, name="short"),
    ):
        prune(request, registry=registry)
    return home


@pytest.fixture
def registry(stocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry of this machine's user, with those models."""
    home = shutil.copytree(stocked, tmp_path / "home")
    monkeypatch.setenv("PRUFED_HOME", str(home))
    return Registry(home / "registry")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command line that must fail; return its one sentence."""

    def run(*arguments: object, code: int) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        out, err = capsys.readouterr()
        sentence, hint = err.splitlines()[-2:]
        assert out == ""
        assert sentence.startswith("error: ")
        assert hint.startswith("hint: ")
        return sentence

    return run
