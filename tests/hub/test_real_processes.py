"""The demonstration as a user types it: a server, two machines, each command its own process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.conftest import TOKEN, Machine

OPEN = """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("me/fed", revision="v1")
print(model.peft_config["default"].base_model_name_or_path, model.peft_config["default"].revision)
"""


@pytest.fixture
def address() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("server.py"))]
    process = subprocess.Popen([*command, "--port", str(port), "--token", TOKEN])
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.slow
def test_push_here_pull_there_and_open_with_peft(
    address: str, sender: Machine, receiver: Machine, tmp_path: Path
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}

    def run(machine: Machine, *command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *command],
            env=environment | {"PRUFED_HOME": str(machine.home)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done

    pushed = run(sender, "-m", "prufed_cli", "push", "fed", "me/fed", "--with-base")
    assert pushed.stdout.splitlines()[-1] == f"{address}/me/fed/tree/v1"
    pulled = run(receiver, "-m", "prufed_cli", "pull", "me/fed", "--with-base", "--json")
    document = json.loads(pulled.stdout)
    assert document["digest"] == sender.registry.resolve("fed").digest
    assert receiver.registry.verify() == []
    assert run(receiver, "-c", OPEN).stdout.split() == ["me/small", "v2"]
