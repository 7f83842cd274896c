"""``prufed plugins``: what methods there are, what they accept, whether they keep their word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from prufed_cli.commands.options import Json, Quiet, Settings

if TYPE_CHECKING:
    from prufed_cli.plugins_report import CheckedMethod
    from prufed_plugins.discover import Catalog, Entry

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def list_methods(context: typer.Context, as_json: Json = False) -> None:
    """List pruners, aggregators and their kin, where they come from, and what is broken."""
    if context.invoked_subcommand is not None:
        return
    from prufed_cli.output import emit_json, reporter
    from prufed_cli.plugins_report import listing, warn_failures
    from prufed_plugins.discover import catalog

    found = catalog()
    if as_json:
        warn_failures(reporter(), found)
        emit_json(listing(found))
    else:
        _print_listing(found)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A method: uniform, or sampler:uniform.")],
    as_json: Json = False,
) -> None:
    """Show what can be set on a method: name, type, default, range, description."""
    from prufed_cli.output import emit_json
    from prufed_cli.plugins_report import description, find_methods

    entries = find_methods(name)
    if as_json:
        emit_json({"methods": [description(entry) for entry in entries]})
        return
    for entry in entries:
        _print_method(entry)


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Methods to check.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every method.")] = False,
    settings: Settings = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the conformance kit of a method's kind; exit 1 if a check fails."""
    from prufed_cli.errors import FAILED, USAGE, PrufedError
    from prufed_cli.output import emit_json, reporter
    from prufed_cli.plugins_report import check_methods, find_methods
    from prufed_plugins.discover import catalog, parse_settings

    if bool(names) == every:
        raise PrufedError("give methods to check, or --all", "prufed plugins check --all", USAGE)
    if every and settings:
        raise PrufedError("--set is for one kind of method, not for --all", exit_code=USAGE)
    entries = (
        list(catalog().entries.values())
        if every
        else [entry for name in names or () for entry in find_methods(name)]
    )
    telling = reporter(quiet=quiet or as_json)
    checked = check_methods(entries, parse_settings(settings or []), telling)
    passed = all(method.passed for method in checked)
    if as_json:
        emit_json({"passed": passed, "methods": [_outcome(method) for method in checked]})
    else:
        _print_outcomes(checked)
    if not passed:
        raise typer.Exit(FAILED)


def _print_listing(found: Catalog) -> None:
    from prufed_cli.output import print_line, table
    from prufed_cli.plugins_report import status

    table(
        ["kind", "name", "summary", "distribution", "status"],
        [
            [
                entry.kind,
                entry.name,
                entry.method.summary,
                f"{entry.distribution} {entry.version}",
                status(entry),
            ]
            for entry in found.entries.values()
        ],
    )
    for failure in found.failures:
        print_line(str(failure))
    for plugin, source in found.disabled:
        print_line(f"{plugin} of {source} is disabled by PRUFED_DISABLE_PLUGINS")


def _print_method(entry: Entry) -> None:
    from prufed_cli.output import print_line, table
    from prufed_cli.plugins_report import settable, status

    print_line(f"{entry.kind} {entry.name}: {entry.method.summary}")
    print_line(f"  from {entry.distribution} {entry.version}, {status(entry)}")
    if entry.method.paper:
        print_line(f"  paper: {entry.method.paper}")
    parameters = settable(entry)
    if not parameters:
        print_line("  nothing to set")
        return
    table(
        ["name", "type", "default", "range", "description"],
        [
            [p.name, p.type, "required" if p.required else p.default, p.accepts, p.description]
            for p in parameters
        ],
    )


def _print_outcomes(checked: list[CheckedMethod]) -> None:
    from prufed_cli.output import print_line, table

    rows: list[list[str]] = []
    for method in checked:
        title = f"{method.entry.kind} {method.entry.name}"
        if method.skipped is not None:
            rows.append([title, "", "skipped", method.skipped])
        for check in method.checks:
            verdict = "pass" if check.failure is None else "FAIL"
            rows.append([title, check.name, verdict, check.failure or check.statement])
    table(["method", "check", "result", "what must hold, or why it does not"], rows)
    failed = sum(not check.passed for method in checked for check in method.checks)
    total = sum(len(method.checks) for method in checked)
    print_line(f"{total - failed} of {total} checks passed")


def _outcome(method: CheckedMethod) -> dict[str, Any]:
    return {
        "kind": method.entry.kind,
        "name": method.entry.name,
        "passed": method.passed,
        "skipped": method.skipped,
        "checks": [
            {
                "name": check.name,
                "statement": check.statement,
                "passed": check.passed,
                "failure": check.failure,
            }
            for check in method.checks
        ],
    }
