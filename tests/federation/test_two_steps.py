"""A server optimizer beside an aggregator that already shortens the step is said, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prufed_cli.config.documents import validated
from prufed_cli.federation.federate import federate
from prufed_cli.progress import Reporter
from prufed_registry import Registry


class Warned(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.parametrize(
    ("clients", "joins", "optimizer", "expected"),
    [
        (1, "auto", "fedavgm", True),
        (1, "auto", "none", False),
        (1, False, "fedavgm", False),
        (2, "auto", "fedavgm", False),
        (2, True, "fedavgm", True),
    ],
)
def test_two_steps_are_told(
    tmp_path: Path,
    configuration: dict[str, Any],
    clients: int,
    joins: bool | str,
    optimizer: str,
    expected: bool,
) -> None:
    configuration |= {
        "rounds": 1,
        "aggregator": {"name": "heteagg", "include_global": joins},
        "server_optimizer": optimizer,
        "clients": [{"name": name} for name in ("one", "two")[:clients]],
    }
    configuration["tuner"]["max_steps"] = 1
    warned = Warned()
    federate(
        config=validated(configuration),
        registry=Registry(tmp_path / "registry"),
        runs=tmp_path / "runs",
        reporter=warned,
    )
    assert any("shortens the step" in line for line in warned.lines) == expected
