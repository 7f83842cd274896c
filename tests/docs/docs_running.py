"""Runs a page from top to bottom, as a reader would, in one directory and with one home.

- A block whose fence names a file (```` ```yaml clients.yaml ````) is written to that file. A
  ``pyproject.toml`` is also installed: what ``pip install -e .`` would leave on the path.
- ``bash``: commands of prufed, ``NAME=$(prufed ...)`` and ``export NAME=value``. A command is
  expected to succeed unless it ends in ``# exit N``.
- ``python``: executed, one namespace for the page.
- ``yaml``: a clients.yaml, or a part of one; it must be valid.

Other languages are only read.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from docs_reading import Block

from prufed_cli.config import load
from prufed_cli.main import main
from prufed_plugins import discover

_CAPTURE = re.compile(r"([A-Z_]+)=\$\((prufed .*)\)")
_EXIT = re.compile(r"\s+# exit (\d+)$")


class Reader:
    """Follows one page.

    Args:
        directory: where files are written and commands run; the current one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.commands: list[str] = []
        self._variables: dict[str, str] = {}
        self._namespace: dict[str, Any] = {"__name__": "__page__"}

    def follow(self, block: Block) -> None:
        if block.file:
            self._write(block)
        if block.language == "bash":
            for line in _lines(block):
                self._command(line, block.place)
        elif block.language == "python" and not block.file:
            code = compile(block.text, block.place, "exec")
            with redirect_stdout(io.StringIO()):
                exec(code, self._namespace)
        elif block.language == "yaml":
            self._validate(block)

    # --- files -----------------------------------------------------------------------------------

    def _write(self, block: Block) -> None:
        path = self.directory / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        if path.name == "pyproject.toml":
            self._install(path.parent, tomllib.loads(block.text)["project"])

    def _install(self, directory: Path, project: dict[str, Any]) -> None:
        """Leave the metadata on the path that an editable install would."""
        metadata = directory / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        lines = [
            line
            for group, points in project["entry-points"].items()
            for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
        ]
        (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
        sys.path.insert(0, str(directory))
        importlib.invalidate_caches()
        discover._installed.cache_clear()

    def _validate(self, block: Block) -> None:
        document = yaml.safe_load(block.text)
        if "clients" not in document:
            document["clients"] = [{"name": "one"}, {"name": "two", "sparsity": 0.5}]
        document.setdefault("data", {"path": "embedded"})
        path = self.directory / "validated.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        load(path)
        path.unlink()

    # --- commands --------------------------------------------------------------------------------

    def _command(self, line: str, place: str) -> None:
        expected = 0
        if found := _EXIT.search(line):
            expected, line = int(found[1]), line[: found.start()]
        if captured := _CAPTURE.fullmatch(line):
            self._variables[captured[1]] = self._prufed(captured[2], expected, place).strip()
        elif line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            os.environ[name] = self._expanded(value)[0]
        else:
            self._prufed(line, expected, place)

    def _prufed(self, line: str, expected: int, place: str) -> str:
        program, *arguments = self._expanded(line)
        assert program == "prufed", f"{place}: {line!r} is not a command of prufed"
        self.commands.append(line)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(arguments)
        assert code == expected, f"{place}: `{line}` ended with {code}\n{err.getvalue()}"
        return out.getvalue()

    def _expanded(self, line: str) -> list[str]:
        return [
            re.sub(r"\$([A-Z_]+)", lambda match: self._variable(match[1]), word)
            for word in shlex.split(line, comments=True)
        ]

    def _variable(self, name: str) -> str:
        return self._variables.get(name) or os.environ[name]


def _lines(block: Block) -> Iterator[str]:
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield re.sub(r" +", " ", line.strip()) if " # exit " not in line else line.strip()
