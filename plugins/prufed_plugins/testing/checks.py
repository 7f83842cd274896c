"""How a conformance kit runs its checks and says which failed.

A check is a function that takes a fresh instance and raises ``AssertionError`` where the contract
is broken; its docstring's first line is what a person reads. ::

    def check_sampler(make: Callable[[], Sampler]) -> Outcome:
        return run_checks(make, (names_are_known, same_seed_same_clients))

    check_sampler(lambda: MySampler(MyParams())).require()
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: the check's function name.
        statement: what must hold, in one line.
        failure: why it does not hold; None where it does.
    """

    name: str
    statement: str
    failure: str | None

    @property
    def passed(self) -> bool:
        """Whether the contract holds."""
        return self.failure is None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a conformance kit."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def require(self) -> None:
        """Raise ``AssertionError`` naming every check that failed."""
        failed = [check for check in self.checks if not check.passed]
        if failed:
            lines = (f"{check.name}: {check.statement}: {check.failure}" for check in failed)
            raise AssertionError("contract broken:\n" + "\n".join(lines))


def run_checks(make: Callable[[], T], checks: Iterable[Callable[[T], None]]) -> Outcome:
    """Run each check on its own fresh instance.

    Args:
        make: constructs the method under test.
        checks: functions that raise where the contract is broken.
    """
    return Outcome(tuple(_run(make, check) for check in checks))


def _run(make: Callable[[], T], check: Callable[[T], None]) -> Check:
    name = getattr(check, "__name__", repr(check)).strip("_")
    statement = (inspect.getdoc(check) or name).splitlines()[0].rstrip(".")
    try:
        check(make())
    except Exception as error:  # a stranger's method may raise anything; the kit reports it
        reason = str(error) if isinstance(error, AssertionError) else ""
        return Check(name, statement, reason or f"{type(error).__name__}: {error}")
    return Check(name, statement, None)
