"""The conformance kit finds methods that break their contract, each at the check meant for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from prufed_plugins import testing
from prufed_plugins.api import ClientInfo
from prufed_plugins.errors import MethodError
from prufed_plugins.testing import check_partitioner, check_sampler


class Sampler:
    """A correct one; what follows breaks one clause each."""

    def sample(self, round_index: int, clients: Sequence[ClientInfo], seed: int) -> Any:
        return [clients[seed % len(clients)].name]


class Stranger(Sampler):
    def sample(self, *arguments: Any) -> Any:
        return ["client-99"]


class Pair(Sampler):
    def sample(self, *arguments: Any) -> Any:
        return tuple(super().sample(*arguments))


class Twice(Sampler):
    def sample(self, *arguments: Any) -> Any:
        return super().sample(*arguments) * 2


class Nobody(Sampler):
    def sample(self, *arguments: Any) -> Any:
        return []


class Greedy(Sampler):
    def sample(self, round_index: int, clients: Sequence[ClientInfo], seed: int) -> Any:
        return random.Random(seed).sample([client.name for client in clients], 2)


class Global(Sampler):
    def sample(self, round_index: int, clients: Sequence[ClientInfo], seed: int) -> Any:
        return random.sample([client.name for client in clients], len(clients))


class Counting(Sampler):
    calls = 0

    def sample(self, round_index: int, clients: Sequence[ClientInfo], seed: int) -> Any:
        self.calls += 1
        return [clients[self.calls % len(clients)].name]


class Shuffling(Sampler):
    def sample(self, round_index: int, clients: Any, seed: int) -> Any:
        if isinstance(clients, list):
            clients.reverse()
        return super().sample(round_index, clients, seed)


SAMPLERS = {
    Stranger: {"samples_known_clients", "handles_one_client"},
    Pair: {"samples_known_clients", "handles_one_client"},
    Twice: {"samples_each_client_once", "handles_one_client"},
    Nobody: {"samples_somebody"},
    Greedy: {"handles_one_client"},
    Global: {"is_decided_by_its_arguments", "has_no_history", "leaves_global_generators_alone"},
    Counting: {"is_decided_by_its_arguments", "has_no_history"},
    Shuffling: {"leaves_its_arguments_alone"},
}


class Partitioner:
    """A correct one; what follows breaks one clause each."""

    def split(self, categories: Sequence[Any], clients: Sequence[str], seed: int) -> Any:
        if len(categories) < len(clients):
            raise MethodError("too few rows", "use more")
        return {
            name: list(range(first, len(categories), len(clients)))
            for first, name in enumerate(clients)
        }


class Losing(Partitioner):
    def split(self, *arguments: Any) -> Any:
        return {name: rows[1:] for name, rows in super().split(*arguments).items()}


class Starving(Partitioner):
    def split(self, *arguments: Any) -> Any:
        parts = super().split(*arguments)
        names = list(parts)
        if len(names) > 1:
            parts[names[0]] += parts[names[1]]
            parts[names[1]] = []
        return parts


class Renaming(Partitioner):
    def split(self, *arguments: Any) -> Any:
        return {name.upper(): rows for name, rows in super().split(*arguments).items()}


class Arrays(Partitioner):
    def split(self, *arguments: Any) -> Any:
        return {
            name: [np.int64(row) for row in rows]
            for name, rows in super().split(*arguments).items()
        }


class Drawing(Partitioner):
    def split(self, categories: Sequence[Any], clients: Sequence[str], seed: int) -> Any:
        parts = super().split(categories, clients, seed)
        order = np.random.permutation(len(categories)).tolist()
        return {name: [order[row] for row in rows] for name, rows in parts.items()}


class Careless(Partitioner):
    def split(self, categories: Sequence[Any], clients: Sequence[str], seed: int) -> Any:
        parts: Any = {name: [] for name in clients}
        for row in range(len(categories)):
            parts[clients[row % len(clients)]].append(row)
        return parts


class Crashing(Partitioner):
    def split(self, categories: Sequence[Any], clients: Sequence[str], seed: int) -> Any:
        sorted(category.lower() for category in categories)
        return super().split(categories, clients, seed)


class Sorting(Partitioner):
    def split(self, categories: Any, clients: Sequence[str], seed: int) -> Any:
        if isinstance(categories, list):
            categories.sort(key=str)
        return super().split(categories, clients, seed)


PARTITIONERS = {
    Losing: {"assigns_every_row_once", "splits_or_refuses_rows_without_category"},
    Starving: {"gives_every_client_rows"},
    Renaming: {"names_every_client"},
    Arrays: {"names_every_client"},
    Drawing: {"is_decided_by_its_arguments", "leaves_global_generators_alone"},
    Careless: {"refuses_more_clients_than_rows"},
    Crashing: {"splits_or_refuses_rows_without_category"},
    Sorting: {"leaves_its_arguments_alone"},
}


def failures(outcome: testing.Outcome) -> set[str]:
    return {check.name for check in outcome.checks if not check.passed}


def test_correct_methods_pass() -> None:
    check_sampler(Sampler).require()
    check_partitioner(Partitioner).require()


@pytest.mark.parametrize(("broken", "expected"), SAMPLERS.items())
def test_a_broken_sampler_is_found(broken: Callable[[], Any], expected: set[str]) -> None:
    assert failures(check_sampler(broken)) == expected


@pytest.mark.parametrize(("broken", "expected"), PARTITIONERS.items())
def test_a_broken_partitioner_is_found(broken: Callable[[], Any], expected: set[str]) -> None:
    assert failures(check_partitioner(broken)) == expected


def test_every_check_can_fail() -> None:
    for check, broken in ((check_sampler, SAMPLERS), (check_partitioner, PARTITIONERS)):
        correct = Sampler if check is check_sampler else Partitioner
        names = {one.name for one in check(correct).checks}
        assert names == set().union(*broken.values())


def test_what_a_method_gives_up_is_named_with_its_reason_and_nothing_else_is_excused() -> None:
    class Open(Nobody):
        breaks = {"samples_somebody": "it is a sampler of nobody"}  # noqa: RUF012

    [given_up] = [check for check in check_sampler(Open).checks if check.verdict != "passed"]
    assert (given_up.contract, given_up.verdict) == ("samples_somebody", "broken by design")
    assert given_up.excuse == "it is a sampler of nobody"
    assert check_sampler(Open).passed

    class Misspelt(Nobody):
        breaks = {"samples_anybody": "it is a sampler of nobody"}  # noqa: RUF012

    assert failures(check_sampler(Misspelt)) == {"samples_somebody", "declares_known_contracts"}


def test_a_crash_is_never_by_design() -> None:
    class Crash(Sampler):
        breaks = {"samples_known_clients": "it has its own view"}  # noqa: RUF012

        def sample(self, *arguments: Any) -> Any:
            raise TypeError("a bug")

    [check] = [c for c in check_sampler(Crash).checks if c.contract == "samples_known_clients"]
    assert (check.verdict, check.failure) == ("failed", "TypeError: a bug")


def test_require_names_every_broken_clause() -> None:
    with pytest.raises(AssertionError, match="samples_somebody: Somebody trains"):
        check_sampler(Nobody).require()


@pytest.mark.slow
def test_there_is_a_kit_for_every_kind_that_a_run_calls() -> None:
    for kind, name in testing.KITS.items():
        assert callable(getattr(testing, name)), kind
    with pytest.raises(AttributeError, match="no attribute 'check_nothing'"):
        testing.check_nothing  # noqa: B018
