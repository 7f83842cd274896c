"""Imports go down only: the CLI may import both other floors, they import nothing above."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "registry/prufed_registry": {"prufed_plugins", "prufed_cli", "torch", "transformers", "peft"},
    "plugins/prufed_plugins": {"prufed_cli", "prufed_registry"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_only(floor: str) -> None:
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & FLOORS[floor], path


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("prufed_cli.main", {"torch", "typer", "pydantic", "transformers", "rich"}),
        ("prufed_cli", {"torch", "typer", "pydantic", "transformers", "rich"}),
        ("prufed_plugins.api", {"torch", "pydantic"}),
        ("prufed_plugins.params", {"torch"}),
        ("prufed_plugins.builtin", {"torch"}),
        ("prufed_registry", {"torch"}),
        ("prufed_cli.config", {"torch"}),
    ],
)
def test_light_imports(module: str, forbidden: set[str]) -> None:
    code = f"import {module}, sys; print(' '.join(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not forbidden & set(loaded)
