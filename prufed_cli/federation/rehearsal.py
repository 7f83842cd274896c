"""Go through every round without training, so that what cannot be merged is refused at once.

It is done twice: before the sub-models are made, by what the configuration says of them, and again
before the first client trains, by what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from prufed_cli.federation.clients import make_spec
from prufed_cli.federation.refusals import (
    refuse_beside_own_adapters,
    refuse_fewer_ranks,
    refuse_other_bases,
    refuse_other_starts,
)
from prufed_plugins.aggregators.validation import check_facts
from prufed_plugins.api import Aggregator, GlobalState, Update
from prufed_plugins.discover import build
from prufed_plugins.errors import MethodError, UpdateError
from prufed_plugins.names import in_layers

if TYPE_CHECKING:
    from prufed_cli.federation.clients import Client
    from prufed_cli.federation.plan import ClientPlan, Plan


def rehearse_plan(plan: Plan, state: GlobalState) -> None:
    """Refuse what the methods of a plan cannot do, before anything is made.

    Of a client whose layers are still to be chosen only the number counts: it is taken to have the
    first ones.

    Args:
        plan: the run.
        state: the first global adapter.

    Raises:
        PrufedError: the methods do not go together.
        MethodError: the aggregator cannot merge the ranks, the depths or the number of clients.
    """
    aggregator: Aggregator = build(
        "aggregator", plan.config.aggregator.name, plan.config.aggregator.settings
    )
    refuse_other_starts(plan, aggregator)
    refuse_other_bases(plan, aggregator)
    refuse_fewer_ranks(plan, aggregator)
    refuse_beside_own_adapters(plan, aggregator)
    updates = {client.name: _planned(client, plan, state) for client in plan.clients}
    _rehearse(plan.sampled, updates, aggregator, state)


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
        MethodError: the method cannot merge the ranks or depths of a round's clients.
    """
    updates = {
        name: _update(
            client.plan, state, client.spec.r, client.spec.scaling, tuple(client.kept_layers)
        )
        for name, client in clients.items()
    }
    _rehearse(rounds, updates, aggregator, state)


def _rehearse(
    rounds: Sequence[Sequence[str]],
    updates: Mapping[str, Update],
    aggregator: Aggregator,
    state: GlobalState,
) -> None:
    mixes_ranks = bool(getattr(aggregator, "mixes_ranks", False))
    for index, names in enumerate(rounds):
        sent = [replace(updates[name], base_round=index) for name in sorted(names)]
        try:
            for update in sent:
                check_facts(update, state, mixes_ranks=mixes_ranks)
            aggregator.prepare(sent, state)
        except UpdateError as error:  # no client has sent anything yet: the configuration is wrong
            raise MethodError(error.message, error.hint) from error


def _planned(client: ClientPlan, plan: Plan, state: GlobalState) -> Update:
    layers = client.submodel.layers or state.layers
    spec = make_spec(
        client.adapter,
        plan.config.seed,
        sparsity=client.submodel.sparsity or 0.0,
        depth_pruned=layers < state.layers,
    )
    return _update(client, state, spec.r, spec.scaling, tuple(range(layers)))


def _update(
    client: ClientPlan, state: GlobalState, rank: int, scaling: float, layers: tuple[int, ...]
) -> Update:
    return Update(
        client=client.name,
        tensors={n: tensor for n, tensor in state.tensors.items() if in_layers(n, layers)},
        masks=None,
        samples=len(client.rows),
        rank=rank,
        scaling=scaling,
        kept_layers=layers,
        weight=client.weight,
    )
