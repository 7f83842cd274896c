"""A tiny random model with words of its own, and the command line called as a user calls it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prufed_cli.config.documents import validated
from prufed_cli.federation.federate import federate
from prufed_cli.main import main
from prufed_registry import Registry

TEXT = "the cat sees a red dog and then two small birds sing near an old stone bridge"
WORDS = TEXT.split()

Document = dict[str, Any]


@dataclass(frozen=True)
class Called:
    """What one command line came to."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *words: str) -> None:
        """Hold one clear sentence, a hint, the exit code, and no traceback."""
        assert self.code == code, self.err
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        assert any(line.startswith("hint: ") for line in lines), self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        for word in words:
            assert word in self.err


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers and 64 positions in Hugging Face layout."""
    directory = tmp_path_factory.mktemp("bases") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=None,
        )
    ).save_pretrained(directory)
    special = ["[UNK]", "</s>", "Below", "###", "Instruction:", "Input:", "Response:", "."]
    vocabulary = {word: index for index, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>", model_max_length=64
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows in two categories."""
    draw = random.Random(1)
    rows = [
        {
            "instruction": " ".join(draw.choices(WORDS, k=5)),
            "response": " ".join(draw.choices(WORDS, k=6)),
            "category": ("open_qa", "summarization")[index % 2],
        }
        for index in range(40)
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(2)
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=40)) for _ in range(50)))
    return path


def make_configuration(base: Path, data: Path) -> Document:
    """Return a dense client and a pruned one over two rounds."""
    return {
        "base": str(base),
        "name": "fed",
        "rounds": 2,
        "device": "cpu",
        "sampler": {"name": "all"},
        "pruner": {"name": "magnitude"},
        "adapter": {"r": 4, "alpha": 8, "target_modules": ["q_proj"]},
        "tuner": {"name": "lora", "batch_size": 10, "micro_batch_size": 10, "cutoff": 48},
        "data": {"path": str(data), "partition": {"name": "iid"}},
        "clients": [{"name": "dense"}, {"name": "half", "sparsity": 0.5}],
    }


@pytest.fixture
def configuration(base_directory: Path, data_file: Path) -> Document:
    return make_configuration(base_directory, data_file)


@pytest.fixture(scope="session")
def used_home(
    tmp_path_factory: pytest.TempPathFactory, base_directory: Path, data_file: Path
) -> Path:
    """A home with a base and a run of one round, and what that published."""
    home = tmp_path_factory.mktemp("used")
    document = {**make_configuration(base_directory, data_file), "rounds": 1}
    federate(config=validated(document), registry=Registry(home / "registry"), runs=home / "runs")
    return home


@pytest.fixture
def clients_file(tmp_path: Path) -> Callable[[Document], Path]:
    def write(document: Document) -> Path:
        path = tmp_path / "clients.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    return write


@pytest.fixture
def prufed(capfd: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """Return the command line, in this process; stdout and stderr are those of the descriptors."""

    def call(*arguments: object) -> Called:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        written = capfd.readouterr()
        return Called(code, written.out, written.err)

    return call


@pytest.fixture
def prune(prufed: Callable[..., Called], base_directory: Path) -> Callable[..., Called]:
    """Return ``prufed prune`` on the tiny model; the method is magnitude unless named."""

    def call(*arguments: object) -> Called:
        method = () if "--method" in arguments else ("--method", "magnitude")
        return prufed("prune", "--base", base_directory, "--device", "cpu", *method, *arguments)

    return call


@pytest.fixture
def registry(prufed_home: Path) -> Registry:
    return Registry(prufed_home / "registry")


@pytest.fixture
def nothing_made(prufed_home: Path, registry: Registry) -> Callable[..., None]:
    """Return a check that only these artifacts exist, all sound, and no run is left."""

    def check(*artifacts: str) -> None:
        assert [artifact.ref for artifact in registry.list()] == list(artifacts)
        assert registry.verify() == []
        assert registry.gc(dry_run=True).items == ()
        runs = prufed_home / "runs"
        assert not runs.exists() or list(runs.iterdir()) == []

    return check


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a starter of ``prufed`` as a process of its own, its output piped."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-m", "prufed_cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A test run in the background of a shell ignores Ctrl-C, and its children with it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()


class Fork:
    """``prufed`` in a fork of this process: all is imported already. Has what Popen has."""

    def __init__(self, arguments: Sequence[object], directory: Path) -> None:
        self._files = directory / "stdout", directory / "stderr"
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run([str(argument) for argument in arguments]))

    def _run(self, arguments: list[str]) -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 70  # what is left of a process that ended in a traceback
        try:
            sys.stdout, sys.stderr = (file.open("w") for file in self._files)
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Wait for the end and return stdout and stderr."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        out, err = (file.read_text() for file in self._files)
        return out, err


@pytest.fixture
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Fork]]:
    started: list[Fork] = []

    def start(*arguments: object) -> Fork:
        started.append(Fork(arguments, tmp_path_factory.mktemp("fork")))
        return started[-1]

    yield start
    for child in started:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            child.communicate()
