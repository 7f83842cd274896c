"""The Typer application: one module per verb, imported when the verb is used."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import typer
import typer.core

from prufed_cli import errors
from prufed_cli.main import VERBS

if TYPE_CHECKING:
    from prufed_registry.errors import RegistryError

typer.core.HAS_RICH = False
# typer 0.20 writes `\[required]` into plain help pages where it knows of rich, which is not used.

ALL_VERBS = [verb for verbs in VERBS.values() for verb in verbs]


def build(verbs: Iterable[str]) -> typer.Typer:
    """Return an application with these verbs; each module has a ``command`` or an ``app``."""
    app = typer.Typer(
        name="prufed",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for verb in verbs:
        module = importlib.import_module(f"prufed_cli.commands.{_module_name(verb)}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=verb)
        else:
            app.command(verb)(module.command)
    return app


def run(arguments: Sequence[str]) -> int:
    """Run a command line; every expected error becomes one sentence and an exit code."""
    verb = arguments[0] if arguments else ""
    if verb and not verb.startswith("-") and verb not in ALL_VERBS:
        return _unknown(verb)
    command = typer.main.get_command(build([verb] if verb in ALL_VERBS else ALL_VERBS))
    if "_PRUFED_COMPLETE" in os.environ:
        command.main(args=list(arguments), prog_name="prufed")  # answers the shell and exits
    try:
        # Not main(): it makes an exit code of Ctrl-C and forgets what could be said about it.
        with command.make_context("prufed", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        return _report(error)
    return errors.OK


def _root() -> None:
    """Prune, federate, merge."""


def _module_name(verb: str) -> str:
    return {"list": "list_artifacts", "import": "import_artifact"}.get(verb, verb)


def _unknown(verb: str) -> int:
    from prufed_cli.output import print_error

    near = difflib.get_close_matches(verb, ALL_VERBS, n=1)
    hint = f"did you mean `prufed {near[0]}`?" if near else "`prufed --help` lists the commands"
    print_error(f"no command {verb!r}", hint)
    return errors.USAGE


def _report(error: Exception) -> int:
    """Print an expected error and return its exit code; anything else is a bug and propagates."""
    from prufed_cli.output import print_error
    from prufed_plugins.errors import MethodError
    from prufed_registry.errors import RegistryError

    if isinstance(error, errors.PrufedError | RegistryError | MethodError):
        print_error(error.message, error.hint)
        return error.exit_code
    format_message = getattr(error, "format_message", None)
    if format_message is not None:  # a usage error of click, which typer may vendor
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "prufed"
        print_error(format_message(), f"`{path} --help` lists the options")
        return errors.USAGE
    return _report_system(error)


_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


def _report_system(error: Exception) -> int:
    """Print that the system has no memory, no room or no permission; anything else is a bug."""
    from prufed_cli.home import home
    from prufed_cli.out_of_memory import is_out_of_memory, out_of_memory_error
    from prufed_cli.output import print_error
    from prufed_registry.durable import full_disk_error, is_full_disk

    told: errors.PrufedError | RegistryError
    if is_out_of_memory(error):
        told = out_of_memory_error()
    elif is_full_disk(error):
        told = full_disk_error(f"write {getattr(error, 'filename', None) or home()}", error)
    elif isinstance(error, OSError) and error.errno in _REFUSED:
        told = errors.PrufedError(
            f"cannot use {error.filename or home()}: {(error.strerror or str(error)).lower()}",
            "check the path and its permissions; PRUFED_HOME says where prufed keeps its files",
        )
    else:
        raise error
    notes = getattr(error, "__notes__", ())  # how what was cut off goes on
    print_error(told.message, "; ".join([told.hint, *notes] if told.hint else notes))
    return errors.FAILED
