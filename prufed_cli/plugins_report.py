"""What plugins there are, what their methods accept, and whether they keep their contracts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from prufed_cli.errors import NOT_FOUND, PrufedError
from prufed_cli.progress import Reporter
from prufed_plugins.discover import (
    Catalog,
    Entry,
    catalog,
    check_settings,
    construct,
    missing_requirements,
)
from prufed_plugins.errors import MethodError
from prufed_plugins.settings import Parameter, parameters

if TYPE_CHECKING:
    from prufed_plugins.testing.checks import Check


@dataclass(frozen=True)
class CheckedMethod:
    """The outcome of one method's conformance kit.

    Attributes:
        entry: the method.
        checks: one outcome per check; empty where ``skipped`` says why none ran.
        skipped: why the kit did not run; None where it did.
    """

    entry: Entry
    checks: tuple[Check, ...]
    skipped: str | None = None

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed for check in self.checks)


def warn_failures(reporter: Reporter, found: Catalog | None = None) -> None:
    """Say in one line each which plugins are broken."""
    for failure in (found or catalog()).failures:
        reporter.warn(str(failure))


def status(entry: Entry) -> str:
    """Return ``ok``, or what the method needs and does not have."""
    missing = missing_requirements(entry)
    return f"needs {', '.join(missing)}" if missing else "ok"


def listing(found: Catalog) -> dict[str, Any]:
    """Return everything that was found, as a document."""
    return {
        "methods": [
            {**_summary(entry), "status": status(entry)} for entry in found.entries.values()
        ],
        "failures": [asdict(failure) for failure in found.failures],
        "disabled": [
            {"plugin": plugin, "distribution": source} for plugin, source in found.disabled
        ],
    }


def description(entry: Entry) -> dict[str, Any]:
    """Return one method as a document; ``parameters`` is the JSON schema of what can be set."""
    return {
        **_summary(entry),
        "status": status(entry),
        "target": entry.method.target,
        "parameters": entry.method.params.model_json_schema(),
    }


def settable(entry: Entry) -> list[Parameter]:
    """Return the parameters of a method."""
    return parameters(entry.method.params)


def find_methods(name: str, found: Catalog | None = None) -> list[Entry]:
    """Return the methods that ``name``, ``kind:name`` or ``distribution:name`` may mean.

    Raises:
        PrufedError: there is none; the hint has near names.
    """
    found = found or catalog()
    entries = found.named(name)
    if not entries:
        raise PrufedError(f"no method is called {name!r}", _near(name, found), NOT_FOUND)
    return entries


def check_methods(
    entries: Sequence[Entry], settings: Mapping[str, Any], reporter: Reporter
) -> list[CheckedMethod]:
    """Run the conformance kit of each method's kind.

    Args:
        entries: the methods.
        settings: what every one of them is constructed with.
        reporter: told about finished methods.
    """
    checked = []
    with reporter.task("checking methods", total=len(entries)) as task:
        for entry in entries:
            checked.append(_check(entry, settings))
            task.advance()
    return checked


def _check(entry: Entry, settings: Mapping[str, Any]) -> CheckedMethod:
    from prufed_plugins import testing

    if entry.kind not in testing.KITS:
        return CheckedMethod(entry, (), f"there is no kit for a {entry.kind}")
    problems = check_settings(entry.method.params, {})
    if problems and not settings:
        return CheckedMethod(entry, (), f"needs --set: {problems[0]}")
    try:
        construct(entry, settings)
    except MethodError as error:
        constructed = testing.Check("is_constructed", "It can be constructed", error.message)
        return CheckedMethod(entry, (constructed,))
    kit = getattr(testing, testing.KITS[entry.kind])
    return CheckedMethod(entry, kit(lambda: construct(entry, settings)).checks)


def _summary(entry: Entry) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "summary": entry.method.summary,
        "paper": entry.method.paper,
        "requires": list(entry.method.requires),
        "distribution": entry.distribution,
        "version": entry.version,
        "builtin": entry.builtin,
    }


def _near(name: str, found: Catalog) -> str:
    from difflib import get_close_matches

    known = sorted({entry.name for entry in found.entries.values()})
    near = get_close_matches(name.rpartition(":")[2].replace("_", "-"), known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "`prufed plugins` lists the methods"
