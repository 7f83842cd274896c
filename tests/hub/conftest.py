"""A Hub in this process, two machines that use it, and the artifacts that travel."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prufed_cli.main import main
from prufed_registry import Parent, Registry
from tests.hub.server import Hub, serving

TOKEN = "hf_secretsecretsecretsecretsecret"
WORDS = ["[UNK]", "</s>", "the", "cat", "sees", "a", "red", "dog", "and", "two", "birds", "sing"]


@dataclass
class Machine:
    """One user's home, and whose turn it is."""

    home: Path
    take_turn: Callable[[Path], None]

    @property
    def registry(self) -> Registry:
        return Registry(self.home / "registry")

    def prufed(self, *arguments: str) -> int:
        """Run a command line on this machine and return its exit code."""
        self.take_turn(self.home)
        return main(list(arguments))

    @property
    def leftovers(self) -> list[Path]:
        """What pushes and pulls should have cleaned away."""
        return sorted((self.home / "registry" / "tmp").glob("*"))


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with a licence and a tokenizer of words."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>"
    ).save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A tiny model\n")
    return directory


@pytest.fixture(scope="session")
def stocked(tmp_path_factory: pytest.TempPathFactory, model_directory: Path) -> Path:
    """A home with a base, a sub-model of it in two versions, and an adapter of the second."""
    from prufed_cli.pruning import PruneRequest, prune

    home = tmp_path_factory.mktemp("stocked")
    registry = Registry(home / "registry")
    registry.import_directory(model_directory, name="tiny")
    for sparsity in (0.25, 0.5):
        prune(
            PruneRequest(base="tiny", method="magnitude", sparsity=sparsity, name="small"),
            registry=registry,
        )
    _publish_adapter(registry)
    return home


def _publish_adapter(registry: Registry) -> None:
    from peft import LoraConfig, get_peft_model

    base = registry.resolve("small@v2")
    torch.manual_seed(1)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base.path),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.peft_config["default"].base_model_name_or_path = base.ref
    with registry.stage() as staging:
        model.save_pretrained(staging.path)
        staging.publish(
            "fed",
            "global-adapter",
            parents=[Parent(base.ref, base.digest)],
            recipe={"command": "federate", "plugin": "heteagg"},
            metrics={"loss": 1.25},
        )


@pytest.fixture
def take_turn(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make the commands that follow those of a home; the client's constants are set at import."""

    def take(home: Path) -> None:
        monkeypatch.setenv("PRUFED_HOME", str(home))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hf-cache"))

    return take


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of one's own, and this process set up to use it."""
    state = Hub(TOKEN)
    with serving(state) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield state


@pytest.fixture
def sender(stocked: Path, tmp_path: Path, take_turn: Callable[[Path], None]) -> Machine:
    """A machine with the artifacts."""
    return Machine(shutil.copytree(stocked, tmp_path / "sender"), take_turn)


@pytest.fixture
def receiver(tmp_path: Path, take_turn: Callable[[Path], None]) -> Machine:
    """A machine with nothing."""
    return Machine(tmp_path / "receiver", take_turn)


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Return the one sentence a command ended with; its hint must follow, and nothing else."""

    def read() -> str:
        out, err = capsys.readouterr()
        sentence, hint = err.splitlines()[-2:]
        assert sentence.startswith("error: ")
        assert hint.startswith("hint: ")
        assert TOKEN not in out + err
        return sentence.removeprefix("error: ")

    return read
