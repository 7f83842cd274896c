"""Adapters of the clients' own, where the aggregator gives no client the global one.

Before the first round every client's gradient is taken, and how much clients count for one another
is journalled. In every round each client's adapter is merged, published and journalled before the
global one is: a round whose ``merged`` event is on the disk has them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from prufed_cli.errors import PrufedError
from prufed_cli.federation.artifacts import publish_client
from prufed_cli.federation.local import Job, make_tuner
from prufed_cli.federation.resting import resting_factors
from prufed_cli.federation.seeds import derive
from prufed_cli.federation.standing import masks_of, start_of
from prufed_cli.federation.tuning import client_parents, client_recipe
from prufed_cli.out_of_memory import is_out_of_memory
from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import FirstGradient, Update
from prufed_plugins.errors import MethodError
from prufed_plugins.names import split_factor
from prufed_plugins.write_back import with_own
from prufed_registry import Parent, fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_cli.federation.clients import Client
    from prufed_cli.federation.state import Federation
    from prufed_plugins.api import PersonalAggregator
    from prufed_registry import Artifact


def compare_clients(federation: Federation) -> None:
    """Find how much clients count for one another, unless the journal says it already.

    Raises:
        PrufedError: a client's gradient cannot be taken.
    """
    if not federation.gives_own:
        return
    aggregator = cast("PersonalAggregator", federation.aggregator)
    event = federation.run.find("similarities")
    if event is None:
        gradients = []
        with federation.reporter.task("first gradients", total=len(federation.clients)) as task:
            for client in federation.clients.values():
                gradients.append(_first_gradient(federation, client, aggregator))
                task.advance()
        found = aggregator.similarities(gradients, federation.first)
        event = federation.run.record("similarities", weights=found)
    federation.similarities = event["weights"]


def merge_own_adapters(
    federation: Federation, index: int, updates: Sequence[Update], done: Mapping[str, Artifact]
) -> None:
    """Merge, publish and journal the adapter of every client that has none of this round yet.

    Args:
        federation: the run; its state is still the global adapter before the round.
        index: the round.
        updates: those that are merged.
        done: what each of their clients trained.
    """
    for name in federation.clients if federation.gives_own else ():
        if federation.run.find("own", round=index, client=name) is None:
            client = federation.client_at(index + 1, name)
            artifact = _merge(federation, index, client, updates, done)
            federation.run.record(
                "own", round=index, client=name, ref=artifact.ref, digest=artifact.digest
            )


def _first_gradient(
    federation: Federation, client: Client, aggregator: PersonalAggregator
) -> FirstGradient:
    """Return a client's gradient at the first adapter, in the common scale.

    There a factor is sqrt(s_i / s) times the client's own, and its gradient so much smaller.
    """
    masks = masks_of(federation, client)
    job = Job(
        client=client,
        tensors=client.start(federation.first, masks, None, 0.0),
        masks=masks,
        residual={},
        seed=derive(federation.plan.config.seed, client.name, "gradient"),
        round_index=0,
    )
    try:
        tensors, variance = federation.engine.gradient(
            job, batch_size=aggregator.batch_size, batches=aggregator.batches
        )
    except MethodError as error:
        raise PrufedError(f"client {client.name}: {error.message}", error.hint) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise PrufedError(
            f"client {client.name}: out of memory while its first gradient was taken",
            "lower aggregator.batch_size or tuner.cutoff",
        ) from error
    ratio = federation.first.scaling / client.spec.scaling
    update = Update(
        client=client.name,
        tensors={n: t * math.sqrt(ratio) for n, t in client.globally(tensors).items()},
        masks=masks,
        samples=len(client.plan.rows),
        rank=client.spec.r,
        scaling=federation.first.scaling,
        kept_layers=client.kept_layers,
        weight=client.plan.weight,
    )
    return FirstGradient(update, variance * ratio)


def _merge(
    federation: Federation,
    index: int,
    client: Client,
    updates: Sequence[Update],
    done: Mapping[str, Artifact],
) -> Artifact:
    """Return a client's adapter after the round, published unless it is already."""
    weights = federation.similarities[client.name]
    masks = masks_of(federation, client)
    own = start_of(federation, index, client, masks)
    parents = client_parents(federation, index, client) + [
        Parent(ref=done[update.client].ref, digest=done[update.client].digest)
        for update in updates
        if weights[update.client] > 0
    ]
    aggregator = federation.plan.config.aggregator
    recipe = {
        **client_recipe(federation, index, client),
        "stage": "own",
        "plugin": aggregator.name,
        "params": aggregator.settings,
        "weights": {update.client: weights[update.client] for update in updates},
    }
    found = federation.registry.find(
        fingerprint("client-adapter", parents, recipe), kind="client-adapter"
    )
    return found or publish_client(
        federation.registry,
        client,
        client.local(_merged(federation, index, client, updates, own)),
        client.local(masks),
        {},
        name=f"{federation.plan.config.name}.{client.name}",
        parents=parents,
        recipe=recipe,
        facts={"round": index, "stage": "own"},
        metrics={},
        transposed=federation.transposed,
    )


def _merged(
    federation: Federation,
    index: int,
    client: Client,
    updates: Sequence[Update],
    own: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return a client's adapter after the round, by global name and in its own scale.

    Args:
        federation: the run.
        index: the round.
        client: whose.
        updates: those that are merged.
        own: its adapter before the round.
    """
    weights = federation.similarities[client.name]
    if not any(weights[update.client] > 0 for update in updates):
        return dict(own)
    method = cast("PersonalAggregator", federation.aggregator).for_client(weights)
    before = with_own(federation.state, own, scaling=client.spec.scaling, rank=client.spec.r)
    after = aggregate(method, updates, before).state
    tuners = [make_tuner(federation.clients[update.client].plan.tuner) for update in updates]
    resting = resting_factors(tuners, index)
    return {
        name: own[name] if split_factor(name)[1] in resting else tensor
        for name, tensor in client.start(after, masks_of(federation, client), None, 0.0).items()
    }
