"""Whether the methods of plugins keep the contracts of their kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prufed_cli.progress import Reporter
from prufed_plugins.discover import Entry, check_settings, construct, missing_requirements
from prufed_plugins.errors import MethodError
from prufed_plugins.loading import reason
from prufed_plugins.settings import example

if TYPE_CHECKING:
    from prufed_plugins.testing.checks import Check


@dataclass(frozen=True)
class CheckedMethod:
    """The outcome of one method's conformance kit.

    Attributes:
        entry: the method.
        checks: one outcome per check; empty where ``skipped`` says why none ran.
        skipped: why the kit did not run; None where it did.
        settings: what the method was constructed with.
    """

    entry: Entry
    checks: tuple[Check, ...]
    skipped: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed for check in self.checks)

    @property
    def label(self) -> str:
        """Kind and name."""
        return f"{self.entry.kind} {self.entry.name}"


def check_methods(
    entries: Sequence[Entry], settings: Mapping[str, Any], reporter: Reporter
) -> list[CheckedMethod]:
    """Run the conformance kit of each method's kind.

    A method that cannot do without settings, and is given none, is checked with the first of the
    ``examples`` in its parameters' schema.

    Args:
        entries: the methods.
        settings: what every one of them is constructed with.
        reporter: told about finished methods.
    """
    checked = []
    with reporter.task("checking methods", total=len(entries)) as task:
        for entry in entries:
            task.update(f"checking the {entry.kind} {entry.name}")
            checked.append(_check(entry, settings))
            task.advance()
        task.update(f"checked {len(entries)} methods")
    return checked


def _check(entry: Entry, settings: Mapping[str, Any]) -> CheckedMethod:
    from prufed_plugins import testing

    if entry.kind not in testing.KITS:
        return CheckedMethod(entry, (), f"there is no kit for a {entry.kind}")
    missing = missing_requirements(entry)
    if missing:
        return CheckedMethod(entry, (), f"needs {', '.join(missing)}, not installed")
    problems = check_settings(entry.method.params, {})
    if problems and not settings:
        settings = example(entry.method.params)
        if not settings:
            return CheckedMethod(entry, (), f"needs --set: {problems[0]}")
    return CheckedMethod(entry, _run_kit(entry, settings), settings=settings)


def _run_kit(entry: Entry, settings: Mapping[str, Any]) -> tuple[Check, ...]:
    """Return the outcomes; one that failed where the method is too broken for its kit."""
    from prufed_plugins import testing

    name, statement = "is_constructed", "It can be constructed"
    try:
        construct(entry, settings)
        name, statement = "fits_its_kit", f"It is what a {entry.kind} is"
        kit = getattr(testing, testing.KITS[entry.kind])
        checks: tuple[Check, ...] = kit(lambda: construct(entry, settings)).checks
    except Exception as error:  # a stranger's method may raise anything; its row says what
        said = error.message if isinstance(error, MethodError) else reason(error)
        return (testing.Check(name, statement, said),)
    return checks
