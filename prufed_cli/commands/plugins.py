"""``prufed plugins``: what methods there are, what they accept, whether they keep their word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from prufed_cli.commands.options import Json, Quiet, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prufed_cli.plugin_checks import CheckedMethod
    from prufed_plugins.discover import Catalog, Entry
    from prufed_plugins.testing.checks import Check

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
    every: Annotated[
        bool, typer.Option("--all", help="Check every method, those of other packages included.")
    ] = False,
    settings: Settings = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the conformance kit of a method's kind; exit 1 if a check fails.

    One method is shown check by check, several as a table of methods and contracts. A contract that
    a method gives up by design is shown with the reason, and is no failure.
    """
    from prufed_cli.errors import FAILED, USAGE, PrufedError
    from prufed_cli.output import emit_json, reporter
    from prufed_cli.plugin_checks import check_methods
    from prufed_cli.plugins_report import find_methods, warn_failures
    from prufed_plugins.discover import catalog, parse_settings

    if bool(names) == every:
        raise PrufedError("give methods to check, or --all", "prufed plugins check --all", USAGE)
    if every and settings:
        raise PrufedError(
            "--set is for one kind of method, not for --all",
            "name the methods: prufed plugins check NAME --set key=value",
            USAGE,
        )
    found = catalog()
    entries = (
        list(found.entries.values())
        if every
        else list(dict.fromkeys(entry for name in names or () for entry in find_methods(name)))
    )
    telling = reporter(quiet=quiet or as_json)
    warn_failures(telling, found)
    checked = check_methods(entries, parse_settings(settings or []), telling)
    left_out = [str(failure) for failure in found.failures if failure.skipped and every]
    passed = all(method.passed for method in checked) and not left_out
    if as_json:
        methods = [_outcome(method) for method in checked]
        emit_json({"passed": passed, "methods": methods, "left_out": left_out})
    else:
        _print_outcomes(checked, left_out)
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
    if entry.method.needs_server_data:
        print_line("  needs rows of the server's own: server_data in clients.yaml")
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


_SHOWN: Final = {"passed": "pass", "broken by design": "design", "failed": "FAIL"}

_MARKS: Final = {"passed": "ok", "broken by design": "d", "failed": "X"}


def _print_outcomes(checked: Sequence[CheckedMethod], left_out: Sequence[str]) -> None:
    """Print one method check by check, several as a table per kind with the reasons below."""
    from prufed_cli.output import print_line

    if len(checked) == 1:
        _print_checks(checked[0])
    for kind in dict.fromkeys(m.entry.kind for m in checked if len(checked) > 1 and m.checks):
        _print_matrix(kind, [m for m in checked if m.entry.kind == kind and m.checks])
    for method in checked:
        if method.skipped is not None:
            print_line(f"{method.label} is not checked: {method.skipped}")
    for failure in left_out:
        print_line(f"FAIL  {failure}")
    verdicts = [check.verdict for method in checked for check in method.checks]
    summary = f"{verdicts.count('passed')} of {len(verdicts)} checks passed"
    for verdict in ("broken by design", "failed"):
        if verdicts.count(verdict):
            summary += f", {verdicts.count(verdict)} {verdict}"
    print_line(summary)


def _print_checks(method: CheckedMethod) -> None:
    from prufed_cli.output import table

    rows = [
        [method.label, check.name, _SHOWN[check.verdict], _reason(check) or check.statement]
        for check in method.checks
    ]
    if rows:
        table(["method", "check", "result", "what must hold, or why it does not"], rows)


def _print_matrix(kind: str, methods: Sequence[CheckedMethod]) -> None:
    """Print methods by contracts, what the contracts say, and every reason."""
    from prufed_cli.output import print_line

    statements = {c.contract: c.statement for method in methods for c in method.checks}
    headings = {
        contract: contract if contract.startswith("C") else str(number)
        for number, contract in enumerate(statements, start=1)
    }
    width = max(len(name) for name in (kind, *(method.entry.name for method in methods)))
    # a table of its own: folded at the edge of a terminal, it could not be read
    print_line("".join([kind.ljust(width), *(f"{text:>4}" for text in headings.values())]))
    for method in methods:
        marks = {check.contract: _MARKS[check.verdict] for check in method.checks}
        cells = (f"{marks.get(name, ''):>4}" for name in statements)
        print_line("".join([method.entry.name.ljust(width), *cells]).rstrip())
    print_line("ok: kept, d: given up by design, X: broken; what each says:")
    for contract, statement in statements.items():
        print_line(f"{headings[contract]:>4}  {statement}")
    for verdict in ("broken by design", "failed"):
        for method in methods:
            for check in method.checks:
                if check.verdict == verdict:
                    where = f"{method.label}, {headings[check.contract]}"
                    print_line(f"{_SHOWN[verdict]}  {where}: {_reason(check)}")
    print_line("")


def _reason(check: Check) -> str | None:
    return check.failure or check.excuse


def _outcome(method: CheckedMethod) -> dict[str, Any]:
    return {
        "kind": method.entry.kind,
        "name": method.entry.name,
        "distribution": method.entry.distribution,
        "settings": dict(method.settings),
        "passed": method.passed,
        "skipped": method.skipped,
        "checks": [
            {
                "name": check.name,
                "contract": check.contract,
                "statement": check.statement,
                "verdict": check.verdict,
                "passed": check.passed,
                "failure": check.failure,
                "by_design": check.excuse,
            }
            for check in method.checks
        ],
    }
