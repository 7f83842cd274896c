"""The command line, called in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prufed_cli.main import main


@pytest.fixture
def prufed(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a call of the command line that gives exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        written = capfd.readouterr()
        return code, written.out, written.err

    return call
