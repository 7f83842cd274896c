"""Go through every round without training, so that what cannot be merged is refused at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from prufed_cli.errors import USAGE, PrufedError
from prufed_plugins.aggregators.validation import check_facts
from prufed_plugins.api import Aggregator, GlobalState, Update

if TYPE_CHECKING:
    from prufed_cli.federation.clients import Client


def rehearse(
    rounds: Sequence[Sequence[str]],
    clients: Mapping[str, Client],
    aggregator: Aggregator,
    state: GlobalState,
) -> None:
    """Let the aggregator look at the adapters that the clients of each round would begin with.

    Args:
        rounds: the names of the clients of every round.
        clients: every client by name.
        aggregator: what merges them.
        state: the first global adapter.

    Raises:
        PrufedError: a round has no clients.
        UpdateError: the method cannot merge the ranks or depths of a round's clients.
    """
    starting = {name: _update(clients[name], state) for names in rounds for name in names}
    for number, names in enumerate(rounds, start=1):
        if not names:
            raise PrufedError(
                f"the sampler chose no client in round {number}",
                "raise the sampler's fraction",
                USAGE,
            )
        updates = [replace(starting[name], base_round=number - 1) for name in sorted(names)]
        for update in updates:
            check_facts(update, state, mixes_ranks=getattr(aggregator, "mixes_ranks", False))
        aggregator.prepare(updates, state)


def _update(client: Client, state: GlobalState) -> Update:
    tensors = {name: tensor for name, tensor in state.tensors.items() if client.has(name)}
    return Update(
        client=client.name,
        tensors=tensors,
        masks=None,
        samples=len(client.plan.rows),
        rank=client.spec.r,
        scaling=client.spec.scaling,
        kept_layers=client.kept_layers,
        weight=client.plan.weight,
    )
