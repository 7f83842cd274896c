"""The second half of a round: screen the clients' adapters, merge, step, publish and journal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from prufed_cli.errors import PrufedError
from prufed_cli.federation.artifacts import publish_global, read_update
from prufed_cli.federation.local import make_tuner
from prufed_cli.federation.measured import diagnostics, summaries
from prufed_cli.federation.own_adapters import merge_own_adapters
from prufed_cli.federation.resting import RestingOptimizer, rested, resting_factors
from prufed_cli.federation.server_state import forget_older, save_state
from prufed_cli.federation.standing import masks_of
from prufed_cli.models.adapter_files import WEIGHTS_FILE
from prufed_plugins.aggregators.norms import weighed_by_norm
from prufed_plugins.aggregators.streaming import Aggregated, aggregate
from prufed_plugins.diagnostics import Sending
from prufed_plugins.screening import Screened, screen
from prufed_registry import Parent, fingerprint

if TYPE_CHECKING:
    from prufed_cli.federation.clients import Client
    from prufed_cli.federation.journal import Event
    from prufed_cli.federation.state import Federation
    from prufed_plugins.api import TrustingAggregator, Update
    from prufed_registry import Artifact


def merge_round(
    federation: Federation, index: int, done: Mapping[str, Artifact], root: Artifact | None
) -> None:
    """Merge the round's adapters, publish the global one and journal it.

    Args:
        federation: the run; its state and newest global adapter are the merged ones afterwards.
        index: the round, 0 for the first.
        done: the adapter of every client that trained.
        root: the server's own, where the aggregator holds the clients against it.

    Raises:
        PrufedError: fewer updates than ``min_clients`` could be merged.
    """
    started = time.monotonic()
    copied = copies(federation.clients, done)
    updates = [
        _read(federation, index, name, artifact)
        for name, artifact in done.items()
        if name not in copied
    ]
    if federation.root is not None and root is not None:
        own = _read(federation, index, federation.root.name, root)
        cast("TrustingAggregator", federation.aggregator).trust(own)
    with federation.reporter.task(f"round {index + 1}: merge {len(updates)} adapters"):
        screened = _screen(federation, index, updates)
        if federation.plan.config.tier_weight == "update-norm":
            weighed = weighed_by_norm(screened.updates, federation.state)
            screened = replace(screened, updates=weighed)
        merged = _aggregate(federation, index, screened.updates)
    excluded = {**copied, **screened.excluded, **merged.excluded}
    _report_excluded(federation, index, excluded, len(done))
    usable = [update for update in screened.updates if update.client not in excluded]
    merge_own_adapters(federation, index, usable, done)
    federation.state = merged.state
    artifact = _publish(federation, index, done, root)
    federation.newest = artifact
    extra: dict[str, Any] = {}
    trained = [e for e in federation.run.select("client", round=index) if e["client"] in done]
    if federation.optimizer is not None:
        extra["optimizer"] = save_state(federation.run.directory, index, federation.optimizer)
    federation.run.record(
        "merged",
        round=index,
        ref=artifact.ref,
        digest=artifact.digest,
        clients=sorted(set(done) - set(excluded)),
        excluded=excluded,
        updates=summaries(screened),
        diagnostics=diagnostics(merged, screened.measured),
        payload_bytes=sum(event.get("payload_bytes", 0) for event in trained),
        seconds=round(time.monotonic() - started, 3),
        **extra,
    )
    if federation.optimizer is not None:
        forget_older(federation.run.directory, extra["optimizer"])
    federation.reporter.note(
        f"round {index + 1}: {artifact.ref} from {', '.join(sorted(done))} ({_losses(trained)})"
    )


def _read(federation: Federation, index: int, name: str, artifact: Artifact) -> Update:
    """Return what somebody trained in the round, at the ranks that are left."""
    client = federation.client_at(index + 1, name)
    return read_update(client, artifact, index, transposed=federation.transposed)


def _screen(federation: Federation, index: int, updates: Sequence[Update]) -> Screened:
    """Leave out and scale down what is not to be merged as it came."""
    config = federation.plan.config.screen
    masks = {
        update.client: masks_of(federation, federation.client_at(index + 1, update.client))
        for update in updates
    }
    windows = {
        update.client: federation.window(index, update.rank, federation.state.rank)
        for update in updates
        if federation.window is not None
    }
    screened = screen(
        updates,
        federation.state,
        clip=config.clip,
        outlier=config.outlier,
        given_masks=masks,
        sending=Sending(windows, federation.personal, federation.gives_own),
    )
    for name, factor in screened.clipped.items():
        federation.reporter.note(f"client {name}: its change is scaled by {factor:.3g}")
    return screened


def _aggregate(federation: Federation, index: int, updates: Sequence[Update]) -> Aggregated:
    """Merge, step, and leave alone what nobody trained."""
    tuners = [make_tuner(federation.clients[update.client].plan.tuner) for update in updates]
    resting = resting_factors(tuners, index)
    optimizer = federation.optimizer and RestingOptimizer(federation.optimizer, resting)
    merged = aggregate(
        federation.aggregator,
        updates,
        federation.state,
        optimizer=optimizer,
        on_invalid="exclude",
    )
    return replace(merged, state=rested(merged.state, federation.state, resting))


def copies(clients: Mapping[str, Client], done: Mapping[str, Artifact]) -> dict[str, str]:
    """Return the clients that sent the very file of another one, and whose.

    Training on other rows never ends with the same bytes. Whoever did the work, it counts once:
    the first by name stays. Clients that have the same rows may well send the same.
    """
    first: dict[str, str] = {}
    found = {}
    for name in sorted(done):
        content = done[name].manifest.files[WEIGHTS_FILE].sha256
        other = first.setdefault(content, name)
        if clients[name].plan.data_digest != clients[other].plan.data_digest:
            found[name] = f"its adapter is the file that client {other} sent, trained on other rows"
    return found


def _report_excluded(
    federation: Federation, index: int, excluded: Mapping[str, str], trained: int
) -> None:
    """Say whose update was left out; refuse the round where too few are left."""
    for name, reason in excluded.items():
        federation.reporter.warn(f"client {name} is excluded from the merge: {reason}")
    left, needed = trained - len(excluded), federation.plan.config.min_clients
    if left >= needed:
        return
    federation.run.record("refused", round=index, excluded=dict(excluded))
    raise PrufedError(
        f"round {index + 1} has {left or 'no'} usable update{'s' * (left != 1)} of {trained}, and "
        f"{needed} {'is' if needed == 1 else 'are'} needed",
        f"`prufed runs show {federation.run.id}` says why each was excluded",
    )


def _publish(
    federation: Federation, index: int, done: Mapping[str, Artifact], root: Artifact | None
) -> Artifact:
    """Publish the merged adapter, or return what was published just before the process died."""
    config, full = federation.plan.config, federation.full
    parents = [Parent(ref=full.ref, digest=full.digest)]
    if federation.newest is not None:
        parents.append(Parent(ref=federation.newest.ref, digest=federation.newest.digest))
    parents += [Parent(ref=a.ref, digest=a.digest) for _, a in sorted(done.items())]
    parents += [] if root is None else [Parent(ref=root.ref, digest=root.digest)]
    recipe = {
        "command": "federate",
        "run": federation.run.id,
        "run_created": federation.run.document["created"],
        "round": index,
        "plugin": config.aggregator.name,
        "params": config.aggregator.settings,
        "seed": config.seed,
    }
    if config.server_optimizer is not None:
        recipe["server_optimizer"] = config.server_optimizer.model_dump(mode="json")
    key = fingerprint("global-adapter", parents, recipe)
    return federation.registry.find(key, kind="global-adapter") or publish_global(
        federation.registry,
        federation.state.tensors,
        federation.state.residual,
        federation.spec,
        full,
        name=config.name,
        parents=parents,
        recipe=recipe,
        facts={"round": index, "clients": sorted(done)},
        transposed=federation.transposed,
    )


def _losses(events: Sequence[Event]) -> str:
    if not events:
        return "no client trained"
    first = sum(event["loss_first"] for event in events) / len(events)
    last = sum(event["loss_last"] for event in events) / len(events)
    return f"mean loss {first:.3f} to {last:.3f}"
