"""The Typer application: one module per verb, imported when the verb is used."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable, Sequence

import typer

from prufed_cli import errors
from prufed_cli.main import VERBS

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
    app = build([verb] if verb in ALL_VERBS else ALL_VERBS)
    try:
        result = typer.main.get_command(app).main(
            args=list(arguments), prog_name="prufed", standalone_mode=False
        )
    except typer.Abort:
        sys.stderr.write("interrupted\n")
        return errors.INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`prufed list | head`): the usual silence.
        sys.stderr.close()
        return errors.FAILED
    except Exception as error:
        return _report(error)
    return result if isinstance(result, int) else errors.OK


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
    import errno

    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        print_error(
            f"no space left on the device while writing {error.filename or 'a file'}",
            "free some space (`prufed gc` may help) and run the command again",
        )
        return errors.FAILED
    raise error
