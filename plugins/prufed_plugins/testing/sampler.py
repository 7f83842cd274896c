"""What every sampler must do."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from prufed_plugins.api import ClientInfo, Sampler
from prufed_plugins.testing.checks import Outcome, run_checks

ROUNDS = 24
SPARSITIES = (0.0, 0.2501, 0.4998, 0.75)
DEPTHS = (12, 8, 6)


def federation(size: int) -> tuple[ClientInfo, ...]:
    """Return clients of every mixture of sparsity, depth and amount of data."""
    return tuple(
        ClientInfo(
            name=f"client-{index}",
            samples=10 + 7 * index,
            sparsity=SPARSITIES[index % len(SPARSITIES)],
            layers=DEPTHS[index % len(DEPTHS)],
        )
        for index in range(size)
    )


def check_sampler(make: Callable[[], Sampler]) -> Outcome:
    """Run every check on a sampler.

    Args:
        make: constructs it; called once per check.
    """
    return run_checks(
        make,
        (
            samples_known_clients,
            samples_each_client_once,
            samples_somebody,
            handles_one_client,
            is_decided_by_its_arguments,
            has_no_history,
            leaves_its_arguments_alone,
            leaves_global_generators_alone,
        ),
    )


def samples_known_clients(sampler: Sampler) -> None:
    """It returns a list of names of clients it was given."""
    clients = federation(10)
    known = {client.name for client in clients}
    for chosen in _rounds(sampler, clients):
        assert isinstance(chosen, list), f"it returned a {type(chosen).__name__}"
        strangers = [name for name in chosen if name not in known]
        assert not strangers, f"it returned {strangers[0]!r}, which is no client"


def samples_each_client_once(sampler: Sampler) -> None:
    """No client is named twice in one round."""
    for chosen in _rounds(sampler, federation(10)):
        assert len(set(chosen)) == len(chosen), f"it returned {chosen}"


def samples_somebody(sampler: Sampler) -> None:
    """Somebody trains in at least one of many rounds."""
    assert any(_rounds(sampler, federation(10))), f"nobody in {ROUNDS} rounds"


def handles_one_client(sampler: Sampler) -> None:
    """A federation of one client is sampled without an error."""
    for chosen in _rounds(sampler, federation(1)):
        assert chosen in ([], ["client-0"]), f"it returned {chosen}"


def is_decided_by_its_arguments(sampler: Sampler) -> None:
    """The same round, clients and seed give the same names."""
    clients = federation(10)
    first = _rounds(sampler, clients)
    random.random()
    np.random.random()
    assert _rounds(sampler, clients) == first, "two calls differ"


def has_no_history(sampler: Sampler) -> None:
    """A round is sampled the same whether or not others were before it, so a run can resume."""
    clients = federation(10)
    alone = sampler.sample(7, clients, 7_000)
    for index in range(7):
        sampler.sample(index, clients, index)
    assert sampler.sample(7, clients, 7_000) == alone, "round 7 depends on the rounds before it"


def leaves_its_arguments_alone(sampler: Sampler) -> None:
    """The sequence of clients is not changed."""
    clients = list(federation(10))
    for index in range(ROUNDS):
        sampler.sample(index, clients, 1_000 + index)
        assert tuple(clients) == federation(10), "it changed the list of clients"


def leaves_global_generators_alone(sampler: Sampler) -> None:
    """The process's random generators are not touched: others depend on them."""
    before = random.getstate(), str(np.random.get_state())
    _rounds(sampler, federation(10))
    assert (random.getstate(), str(np.random.get_state())) == before, "it drew from them"


def _rounds(sampler: Sampler, clients: Sequence[ClientInfo]) -> list[list[str]]:
    return [sampler.sample(index, clients, 1_000 + index) for index in range(ROUNDS)]
