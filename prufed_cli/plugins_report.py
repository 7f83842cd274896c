"""What plugins there are, and what their methods accept."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prufed_cli.errors import NOT_FOUND, PrufedError
from prufed_cli.progress import Reporter
from prufed_plugins.discover import Catalog, Entry, catalog, missing_requirements
from prufed_plugins.settings import Parameter, parameters


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


def _summary(entry: Entry) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "alias_of": entry.method.alias_of,
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
