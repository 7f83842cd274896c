"""How long work tells somebody how far it is, without knowing whether anybody looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final


class Task:
    """One piece of work in progress. The base class says nothing."""

    def advance(self, steps: float = 1) -> None:
        """Report that ``steps`` more are done."""

    def reach(self, steps: float) -> None:
        """Report that ``steps`` of all are done."""

    def update(self, description: str | None = None, total: float | None = None) -> None:
        """Change what is being done, or how much of it there is."""


class Reporter:
    """Receives progress, notes and warnings. The base class is silent."""

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Open a task of ``total`` steps (None: unknown)."""
        yield Task()

    def note(self, message: str) -> None:
        """Tell something worth knowing."""

    def warn(self, message: str) -> None:
        """Tell something that may need attention."""


SILENT: Final = Reporter()
