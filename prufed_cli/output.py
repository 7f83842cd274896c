"""What reaches the terminal: results on stdout, everything else on stderr.

stdout carries only what a script may want: a reference as the last line, a table, or with
``--json`` one document. Progress, notes and errors go to stderr. Off a terminal there is no ANSI.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TextIO

from prufed_cli.errors import PrufedError
from prufed_cli.progress import Reporter, Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

SCHEMA: Final = 1
"""The version of every JSON document the commands print."""


def emit_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document with its schema version."""
    print_line(json.dumps({"schema": SCHEMA, **document}, indent=2, default=str))


def print_line(text: str) -> None:
    """Print one line of result."""
    write_out(text + "\n")


def write_out(text: str) -> None:
    """Write on stdout.

    Raises:
        PrufedError: what stdout leads to takes no more, such as a full disk.
    """
    with _writing():
        sys.stdout.write(text)


def send_nowhere(stream: TextIO) -> None:
    """Let a stream lead nowhere; what it still holds would be complained about at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        send_nowhere(sys.stdout)
        reason = (error.strerror or str(error)).lower()
        raise PrufedError(f"cannot write to standard output: {reason}") from error


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str | None = None,
    numeric: Sequence[int] = (),
) -> None:
    """Print a table on stdout; the columns listed in ``numeric`` are aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console(stderr=False)
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        # Off a terminal nothing is folded: a script reads one row per line.
        drawn.add_column(
            Text(column),
            justify="right" if index in numeric else "left",
            no_wrap=not console.is_terminal,
        )
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    with _writing():
        if title:
            console.print(Text(title), soft_wrap=True)
        console.print(drawn)


def print_error(message: str, hint: str | None = None) -> None:
    """Print an error and what to do about it on stderr."""
    from rich.text import Text

    console = _console(stderr=True)
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint: ", "bold"), hint), soft_wrap=True)


def reporter(*, quiet: bool = False) -> Reporter:
    """Return what long work should report to: bars on a terminal, lines elsewhere.

    Where it is to be quiet, only warnings are told.
    """
    if quiet:
        return WarningReporter()
    console = _console(stderr=True)
    return BarReporter(console) if console.is_terminal else LineReporter()


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        # A reader that is no terminal wants whole rows, however long.
        console = Console(stderr=stderr, highlight=False, width=10_000)
    return console


class WarningReporter(Reporter):
    """Warnings alone, on stderr."""

    def warn(self, message: str) -> None:
        """Print a warning line."""
        sys.stderr.write(f"warning: {message}\n")


class LineReporter(WarningReporter):
    """Progress as plain lines, one when a task ends; for logs and pipes."""

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Open a task that prints one line with its duration when it closes."""
        started = time.monotonic()
        task = _LineTask(description)
        yield task
        self.note(f"{task.description} ({time.monotonic() - started:.1f} s)")

    def note(self, message: str) -> None:
        """Print a line on stderr."""
        sys.stderr.write(message + "\n")


class _LineTask(Task):
    def __init__(self, description: str) -> None:
        self.description = description

    def update(self, description: str | None = None, total: float | None = None) -> None:
        """Keep the newest description for the closing line."""
        self.description = description or self.description


class BarReporter(Reporter):
    """Nested progress bars with the time left, drawn by rich."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        """Open a bar below those already open."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        outermost = self._progress is None
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        progress = self._progress
        identifier = progress.add_task(description, total=total)
        try:
            yield _BarTask(progress, identifier)
        finally:
            progress.remove_task(identifier)
            if outermost:
                progress.stop()
                self._progress = None

    def note(self, message: str) -> None:
        """Print a line above the bars."""
        self._console.print(message, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning above the bars."""
        self._console.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)


class _BarTask(Task):
    def __init__(self, progress: Progress, identifier: TaskID) -> None:
        self._progress = progress
        self._identifier = identifier

    def advance(self, steps: float = 1) -> None:
        """Move the bar."""
        self._progress.advance(self._identifier, steps)

    def reach(self, steps: float) -> None:
        """Move the bar to a place."""
        self._progress.update(self._identifier, completed=steps)

    def update(self, description: str | None = None, total: float | None = None) -> None:
        """Change the text or the length of the bar."""
        self._progress.update(self._identifier, description=description, total=total)
