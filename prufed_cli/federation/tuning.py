"""The first half of a round: train its clients, publish and journal what came of each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from prufed_cli.federation.artifacts import publish_client
from prufed_cli.federation.local import Job, Outcome, make_tuner
from prufed_cli.federation.resting import resting_factors
from prufed_cli.federation.seeds import derive
from prufed_cli.federation.standing import first_ranks, masks_of, own_adapter, start_of
from prufed_plugins.factor_masks import magnitude_mask
from prufed_plugins.names import split_factor
from prufed_registry import Parent, fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_cli.federation.clients import Client
    from prufed_cli.federation.state import Federation
    from prufed_plugins.api import TuneResult, TuneStep
    from prufed_registry import Artifact


class Speed:
    """Tokens per second of the client that trains now, between its steps."""

    def __init__(self) -> None:
        self._last = (time.monotonic(), 0)

    def of(self, step: TuneStep) -> float:
        """Return the speed of the last step."""
        now, tokens = time.monotonic(), step.tokens
        then, before = self._last if step.step > 1 else (self._last[0], 0)
        self._last = (now, tokens)
        return (tokens - before) / max(now - then, 1e-9)


def tune_clients(federation: Federation, index: int, names: Sequence[str]) -> dict[str, Artifact]:
    """Return the adapter of every client of the round, and of the server, that did not fail."""
    done: dict[str, Artifact] = {}
    jobs = []
    everybody = [*names] if federation.root is None else [*names, federation.root.name]
    for name in everybody:
        client = federation.client_at(index, name)
        event = federation.run.find("client", round=index, client=name)
        if event is not None:
            done[name] = federation.stored(event)
        elif federation.run.find("client_failed", round=index, client=name) is None:
            adopted = _unjournalled(federation, index, client)
            if adopted is None:
                jobs.append(_job(federation, index, client))
            else:
                done[name] = adopted
    with federation.reporter.task(f"round {index + 1}: tune", total=len(jobs)) as task:
        speed = Speed()

        def on_step(job: Job, step: TuneStep) -> None:
            task.advance(1 / step.total)
            task.update(
                f"round {index + 1}: {job.client.name} step {step.step}/{step.total} "
                f"loss {step.loss:.3f} {speed.of(step):.0f} tokens/s"
            )

        for outcome in federation.engine.tune(jobs, on_step):
            artifact = _receive(federation, index, outcome)
            if artifact is not None:
                done[outcome.job.client.name] = artifact
    return {name: done[name] for name in everybody if name in done}


def client_recipe(federation: Federation, index: int, client: Client) -> dict[str, Any]:
    """Return what makes a client's adapter in round ``index``."""
    tuner = client.plan.tuner
    return {
        "command": "federate",
        "run": federation.run.id,
        "run_created": federation.run.document["created"],
        "round": index,
        "client": client.name,
        "plugin": tuner.name,
        "params": tuner.model_dump(mode="json"),
        "adapter": client.spec.to_dict(),
        "data_digest": client.plan.data_digest,
        "seed": federation.plan.config.seed,
        "stage": "tuned",
    }


def client_parents(federation: Federation, index: int, client: Client) -> list[Parent]:
    """Return what a client's adapter of round ``index`` is made from.

    That is its sub-model, and the adapter that it was given before: the global one or its own.
    """
    given = federation.newest
    if federation.gives_own:
        given = own_adapter(federation, index, client)
    made_from = [client.base] if given is None else [client.base, given]
    return [Parent(ref=artifact.ref, digest=artifact.digest) for artifact in made_from]


def _job(federation: Federation, index: int, client: Client) -> Job:
    masks = masks_of(federation, client)
    return Job(
        client=client,
        tensors=start_of(federation, index, client, masks),
        masks=masks,
        residual=client.residual(federation.state),
        seed=derive(federation.plan.config.seed, index, client.name, "tune"),
        round_index=index,
    )


def _unjournalled(federation: Federation, index: int, client: Client) -> Artifact | None:
    """Return an adapter that was published just before the process died."""
    parents = client_parents(federation, index, client)
    key = fingerprint("client-adapter", parents, client_recipe(federation, index, client))
    artifact = federation.registry.find(key, kind="client-adapter")
    if artifact is not None:
        rank = artifact.manifest.details["adapter"]["r"]
        metrics = artifact.manifest.metrics
        _record(federation, index, client.at_rank(rank), artifact, metrics)
    return artifact


def _receive(federation: Federation, index: int, outcome: Outcome) -> Artifact | None:
    """Publish and journal one client's result, or journal its failure."""
    client, result = outcome.job.client, outcome.result
    reason = outcome.reason or (None if result is None else _fault(outcome.job, result))
    if result is None or reason is not None:
        federation.reporter.warn(f"client {client.name} is excluded from the round: {reason}")
        federation.run.record("client_failed", round=index, client=client.name, reason=reason)
        return None
    recipe = client_recipe(federation, index, client)
    client = client.at_rank(result.rank or client.spec.r)
    tensors = first_ranks(result.tensors, client.spec.r)
    masks = first_ranks(client.local(outcome.job.masks), client.spec.r)
    if client.spec.factor_mask == "magnitude" and not masks and client.spec.sparsity > 0:
        masks = {n: magnitude_mask(t, client.spec.sparsity) for n, t in tensors.items()}
        tensors = {n: torch.where(masks[n], t, 0.0) for n, t in tensors.items()}
    metrics = {
        "loss_first": result.losses[0],
        "loss_last": result.losses[-1],
        "tokens": result.tokens,
        "seconds": round(outcome.seconds, 3),
        "payload_bytes": _payload(federation, index, client, tensors),
    }
    artifact = publish_client(
        federation.registry,
        client,
        tensors,
        masks,
        client.local(outcome.job.residual),
        name=f"{federation.plan.config.name}.{client.name}",
        parents=client_parents(federation, index, client),
        recipe=recipe,
        facts={"round": index, "stage": "tuned"},
        metrics=metrics,
        transposed=federation.transposed,
    )
    _record(federation, index, client, artifact, metrics)
    return artifact


def _record(
    federation: Federation,
    index: int,
    client: Client,
    artifact: Artifact,
    metrics: Mapping[str, Any],
) -> None:
    federation.run.record(
        "client",
        round=index,
        client=client.name,
        ref=artifact.ref,
        digest=artifact.digest,
        samples=len(client.plan.rows),
        rank=client.spec.r,
        **metrics,
    )


def _payload(
    federation: Federation, index: int, client: Client, tensors: Mapping[str, Tensor]
) -> int:
    """Return the bytes of what the client has to send: the factors that the server cannot know.

    A factor that rests in the round came from the server, and one that the client keeps for itself
    is nobody else's. The adapter is stored whole all the same, so that PEFT opens it.
    """
    resting = resting_factors([make_tuner(client.plan.tuner)], index)
    kept = resting | federation.personal
    return sum(t.nbytes for name, t in tensors.items() if split_factor(name)[1] not in kept)


def _fault(job: Job, result: TuneResult) -> str | None:
    """Return what makes a result no adapter that this client could have trained."""
    given, tensors, rank = job.client.local(job.tensors), result.tensors, job.client.spec.r
    masks = job.client.local(job.masks)
    if result.rank is not None and not 1 <= result.rank <= rank:
        return f"it says that {result.rank} of its {rank} ranks stay"
    for name in sorted(given.keys() ^ tensors.keys()):
        verb = "lacks" if name in given else "has the unknown tensor"
        return f"its adapter {verb} {name}"
    resting = resting_factors([make_tuner(job.client.plan.tuner)], job.round_index)
    for name, tensor in tensors.items():
        before = given[name]
        if tensor.shape != before.shape:
            return f"{name} came back as {list(tensor.shape)}, not {list(before.shape)}"
        if not bool(torch.isfinite(tensor).all()):
            return f"its adapter has NaN or infinity in {name}"
        if name in masks and bool((tensor * ~masks[name]).any()):
            return f"its adapter has entries of {name} that its mask lacks"
        factor = split_factor(name)[1]
        if factor in resting and not torch.equal(tensor, before.to(tensor.dtype)):
            return f"its {factor} must rest in this round, and {name} came back changed"
    return None
