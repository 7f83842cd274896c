"""The entry point: what to import for the command line given, and how errors become exit codes.

``prufed --help`` prints the table below and imports nothing else; a verb imports its own module.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TextIO, cast

from prufed_cli import __version__, interrupts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VERBS: Final[dict[str, dict[str, str]]] = {
    "Work": {
        "prune": "Make a smaller model out of a larger one.",
        "federate": "Fine-tune every client's sub-model and merge the adapters.",
        "eval": "Score models and adapters with lm-eval tasks and perplexity.",
        "push": "Publish an artifact on the Hugging Face Hub.",
        "pull": "Fetch a repository from the Hub into the registry.",
    },
    "Registry": {
        "list": "List artifacts and their versions.",
        "show": "Show one artifact: recipe, parents, metrics, files.",
        "path": "Print the directory of an artifact.",
        "lineage": "Show what an artifact was made from.",
        "diff": "Compare two artifacts.",
        "export": "Copy an artifact out of the registry, or merge it into a stand-alone model.",
        "import": "Take a model or adapter directory into the registry.",
        "alias": "Name a version, or list and remove such names.",
        "rm": "Remove a version; its number is never used again.",
        "gc": "Free the disk space nothing refers to.",
        "verify": "Check every stored byte against its manifest.",
    },
    "Runs": {
        "runs": "List runs, show one, or go on with one.",
    },
    "Data": {
        "data": "Look into a data file, or split one into a file per client.",
    },
    "More": {
        "init": "Write a commented clients.yaml to start from.",
        "schema": "Print the JSON schema of clients.yaml.",
        "plugins": "List, describe and check pruners, aggregators and their kin.",
        "doctor": "Check versions, devices, registry, plugins, disk and the Hub.",
        "demo": "Run the whole job on the embedded model in a few minutes.",
    },
}


_YOUNGER: Final = 100
"""Collections of younger objects before one of all objects; Python's own number is 10."""


def help_text() -> str:
    """Return the root help page."""
    lines = [
        "Usage: prufed [OPTIONS] COMMAND [ARGS]...",
        "",
        "  Prune one language model into sub-models, fine-tune them on private data,",
        "  merge the adapters into one.",
        "",
        "Options:",
        "  --version             Print the version and exit.",
        "  --install-completion  Install completion for the current shell.",
        "  --show-completion     Print completion for the current shell.",
        "  -h, --help            Show this page and exit.",
    ]
    for group, verbs in VERBS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {verb:<10}{summary}" for verb, summary in verbs.items()]
    lines += ["", "Run `prufed COMMAND --help` for the options of a command.", ""]
    return "\n".join(lines)


def process() -> int:
    """Be the process ``prufed``: run its command line and return its exit code.

    What torch and transformers leave when they are imported, 400,000 objects, stays to the end.
    Without this, the collector goes through all of them while they come, and again when Python
    takes them apart: together two fifths of what a short command takes.
    """
    gc.set_threshold(*gc.get_threshold()[:2], _YOUNGER)
    code = main()
    gc.freeze()
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _open_what_is_closed()
    interrupts.watch()
    with _forgiving():
        try:
            return _run(arguments)
        except KeyboardInterrupt as interrupt:
            return _interrupted(getattr(interrupt, "hint", None))
        except BrokenPipeError:
            # The reader went away (`prufed list | head`): what is left to say goes nowhere.
            _send_nowhere(sys.stdout)
            return 1
        except Exception as error:
            # Compiled code may turn the interrupt into an error of its own; it was Ctrl-C all the
            # same.
            if not interrupts.pressed():
                raise
            return _interrupted(next(iter(getattr(error, "__notes__", [])), None))


def _send_nowhere(stream: TextIO) -> None:
    from prufed_cli.output import send_nowhere

    send_nowhere(stream)


def _open_what_is_closed() -> None:
    """Send nowhere what the caller closed (`prufed list >&-`).

    Else the next file that is opened takes the stream's number, and what is said goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


@contextmanager
def _forgiving() -> Iterator[None]:
    stderr = sys.stderr
    sys.stderr = cast("TextIO", Unheard(stderr))
    try:
        yield
    finally:
        sys.stderr = stderr


class Unheard:
    """stderr, where what cannot be said is not: work goes on when nobody reads of it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if that can be done."""
        try:
            self._stream.write(text)
        except OSError:
            _send_nowhere(self._stream)
        return len(text)

    def flush(self) -> None:
        """Flush, if that can be done."""
        try:
            self._stream.flush()
        except OSError:
            _send_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _interrupted(hint: str | None) -> int:
    sys.stderr.write(f"interrupted; {hint}\n" if hint else "interrupted\n")
    return 130


def _say(text: str, code: int = 0) -> int:
    from prufed_cli.errors import PrufedError
    from prufed_cli.output import write_out

    try:
        write_out(text)
    except PrufedError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return error.exit_code
    return code


def _run(arguments: list[str]) -> int:
    if "_PRUFED_COMPLETE" not in os.environ:
        if not arguments or arguments[0] in {"-h", "--help"}:
            return _say(help_text(), 0 if arguments else 2)
        if arguments[0] == "--version":
            return _say(f"prufed {__version__}\n")
    from prufed_cli.app import run

    return run(arguments)
