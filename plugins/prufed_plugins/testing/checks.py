"""How a conformance kit runs its checks and says which failed.

A check is a function that takes a fresh instance and raises ``AssertionError`` where the contract
is broken; its docstring's first line is what a person reads. ::

    def check_sampler(make: Callable[[], Sampler]) -> Outcome:
        return run_checks(make, (names_are_known, same_seed_same_clients))

    check_sampler(lambda: MySampler(MyParams())).require()

A method that gives up a contract by design says so in an attribute, and the kit reports it instead
of failing::

    breaks = {"C1": "absent entries are averaged as zeros"}
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from prufed_plugins.errors import MethodError

T = TypeVar("T")

Verdict = Literal["passed", "broken by design", "failed"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: the check's function name.
        statement: what must hold, in one line.
        failure: why it does not hold; None where it does, or need not.
        excuse: why the method gives it up by design; None where it holds, or should.
    """

    name: str
    statement: str
    failure: str | None
    excuse: str | None = None

    @property
    def contract(self) -> str:
        """What a method's ``breaks`` calls it: ``C1`` of ``c1_identical_clients``, else its name.

        Contracts of aggregators have numbers; other checks go by their names.
        """
        return contract_of(self.name)

    @property
    def verdict(self) -> Verdict:
        """Whether the contract holds, is given up by design, or is broken."""
        if self.failure is not None:
            return "failed"
        return "passed" if self.excuse is None else "broken by design"

    @property
    def passed(self) -> bool:
        """Whether the contract is kept, as far as the method says it keeps it."""
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


def contract_of(name: str) -> str:
    """Return the contract that the check of this name is for."""
    number = re.match(r"c[0-9]+(?=_)", name)
    return number[0].upper() if number else name


def run_checks(make: Callable[[], T], checks: Iterable[Callable[[T], None]]) -> Outcome:
    """Run each check on its own fresh instance.

    A contract that the method's ``breaks`` declares may be broken; one that is not among the checks
    fails as a check of its own, so that a misspelt declaration is seen.

    Args:
        make: constructs the method under test.
        checks: functions that raise where the contract is broken.
    """
    declared: Mapping[str, str] = getattr(make(), "breaks", {})
    ran = [_run(make, check, declared) for check in checks]
    return Outcome((*ran, *_unknown(declared, ran)))


def _run(make: Callable[[], T], check: Callable[[T], None], declared: Mapping[str, str]) -> Check:
    name = getattr(check, "__name__", repr(check)).strip("_")
    done = Check(name, statement_of(check), None)
    try:
        check(make())
    except Exception as error:  # a stranger's method may raise anything; the kit reports it
        excuse = declared.get(done.contract)
        if excuse is not None and isinstance(error, AssertionError | MethodError):
            return replace(done, excuse=excuse)  # a crash is no design
        reason = str(error) if isinstance(error, AssertionError) else ""
        return replace(done, failure=reason or f"{type(error).__name__}: {error}")
    return done


def statement_of(check: Callable[..., None]) -> str:
    """Return what must hold, the first line of the check's docstring."""
    name = getattr(check, "__name__", repr(check)).strip("_")
    return (inspect.getdoc(check) or name).splitlines()[0].rstrip(".")


def _unknown(declared: Mapping[str, str], ran: Sequence[Check]) -> list[Check]:
    """Return a failed check for every declared contract that there is no check of."""
    known = {check.contract for check in ran}
    return [
        Check("declares_known_contracts", "It gives up contracts that exist", f"there is no {name}")
        for name in declared
        if name not in known
    ]
