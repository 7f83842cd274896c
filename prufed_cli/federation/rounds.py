"""The run: sample, tune, merge, write back, evaluate; every step journalled after it is true.

A step that the journal already has is not done again, and a step that was published but not yet
journalled when the process died is found in the registry by its fingerprint. All randomness derives
from (run seed, round, client, purpose), so a resumed run ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from prufed_cli.errors import INTEGRITY, USAGE, PrufedError
from prufed_cli.federation.artifacts import (
    publish_client,
    publish_global,
    read_masks,
    read_tensors,
    read_update,
)
from prufed_cli.federation.clients import Client, make_client, make_spec
from prufed_cli.federation.local import Job, LocalEngine, Outcome, make_tuner
from prufed_cli.federation.measured import diagnostics, summaries
from prufed_cli.federation.rehearsal import rehearse
from prufed_cli.federation.resting import RestingOptimizer, rested, resting_factors
from prufed_cli.federation.scoring import Scoring, numbers
from prufed_cli.federation.seeds import derive
from prufed_cli.federation.server_state import forget_older, load_state, save_state
from prufed_cli.models.adapters import AdapterSpec, init_global, target_layers, target_shapes
from prufed_plugins.aggregators.streaming import Aggregated, aggregate
from prufed_plugins.api import (
    Aggregator,
    GlobalState,
    Sampler,
    ServerOptimizer,
    TuneStep,
    Update,
)
from prufed_plugins.diagnostics import Sending
from prufed_plugins.discover import build
from prufed_plugins.masks import magnitude_mask
from prufed_plugins.screening import Screened, screen
from prufed_registry import Parent, fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_cli.config.models import ServerOptimizerConfig
    from prufed_cli.federation.journal import Event, Run
    from prufed_cli.federation.plan import Plan
    from prufed_cli.progress import Reporter
    from prufed_registry import Artifact, Registry


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


@dataclass
class Federation:
    """Everything a run works with.

    Attributes:
        run: the journal.
        plan: what to do.
        registry: where artifacts go.
        full: the full model.
        clients: by name, in the order of the configuration.
        spec: the global adapter.
        state: the global adapter's tensors after the last merged round.
        engine: trains clients.
        scoring: measures models between rounds.
        reporter: is told how far the run is.
        transposed: whether the target layers keep their weights as (k, d).
        evaluates: whether rounds are evaluated as the configuration says.
        newest: the last global adapter that was published.
        masks: of every client's factors, by client and global name.
        optimizer: takes the step from one global adapter to the next; None takes the merged one.
        first: the global adapter before the first round.
        personal: the factors that the aggregator leaves to each client.
        window: the ranks that a client has in a round, by (round, its rank, global rank); None
            where all have the first.
    """

    run: Run
    plan: Plan
    registry: Registry
    full: Artifact
    clients: dict[str, Client]
    spec: AdapterSpec
    state: GlobalState
    engine: LocalEngine
    scoring: Scoring
    reporter: Reporter
    transposed: bool
    evaluates: bool = True
    newest: Artifact | None = None
    masks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    optimizer: ServerOptimizer | None = None
    first: GlobalState = field(init=False)
    personal: frozenset[str] = frozenset()
    window: Callable[[int, int, int], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        self.first = self.state

    # --- the loop --------------------------------------------------------------------------------

    def rounds(self) -> Artifact:
        """Run every round that is not done, write back, and return the last global adapter."""
        config = self.plan.config
        sampler: Sampler = build("sampler", config.sampler.name, config.sampler.settings)
        aggregator: Aggregator = build(
            "aggregator", config.aggregator.name, config.aggregator.settings
        )
        self.personal = frozenset(getattr(aggregator, "personal", ()))
        self.window = getattr(aggregator, "window", None)
        self._refuse_other_starts()
        self._refuse_other_bases(aggregator)
        infos = [client.info for client in self.clients.values()]
        sampled = [
            sampler.sample(index, infos, derive(config.seed, "sampler", index))
            for index in range(config.rounds)
        ]
        rehearse(sampled, self.clients, aggregator, self.state)
        self._restore_optimizer()
        self._warn_of_two_steps(alone=any(len(names) == 1 for names in sampled))
        with self.reporter.task("rounds", total=config.rounds) as task:
            for index, names in enumerate(sampled):
                merged = self.run.find("merged", round=index)
                if merged is not None:
                    self._adopt(merged)
                else:
                    self._round(index, names, aggregator)
                self._evaluate(index)
                task.advance()
        if self.newest is None:
            raise PrufedError("no round was merged")
        self._write_back()
        if not self.run.finished:
            self.run.record("finished", ref=self.newest.ref, digest=self.newest.digest)
        return self.newest

    def _refuse_other_starts(self) -> None:
        """Refuse what needs every client to start from the global adapter's first ranks."""
        config = self.plan.config
        if self.window is not None and config.write_back.share > 0:
            raise PrufedError(
                f"{config.aggregator.name} gives clients other ranks each round, of which "
                f"write_back.share {config.write_back.share:g} has no own values to keep",
                "set write_back.share to 0",
                USAGE,
            )
        if (self.window is not None or self.personal) and config.screen.clip is not None:
            raise PrufedError(
                "screen.clip measures changes from the global adapter, and "
                f"{config.aggregator.name} lets clients start elsewhere",
                "leave out screen.clip, or choose another aggregator",
                USAGE,
            )

    def _refuse_other_bases(self, aggregator: Aggregator) -> None:
        """Refuse what cannot be done to factors that come back in another basis."""
        if not getattr(aggregator, "new_factors", False):
            return
        name = self.plan.config.aggregator.name
        if self.plan.config.server_optimizer is not None:
            raise PrufedError(
                f"{name} makes new factors in every round, and server_optimizer "
                f"{self.plan.config.server_optimizer.name} cannot step from the old to them",
                "leave out server_optimizer, or choose another aggregator",
                USAGE,
            )
        for client in self.clients.values():
            resting = resting_factors([make_tuner(client)], 0)
            if resting:
                raise PrufedError(
                    f"{name} makes new factors in every round, and tuner "
                    f"{client.plan.tuner.name} of client {client.name} leaves "
                    f"{', '.join(sorted(resting))} as it was",
                    "choose the tuner lora, or an aggregator of factors such as fedit",
                    USAGE,
                )

    def _restore_optimizer(self) -> None:
        """Take back the optimizer's state after the last merged round."""
        merged = self.run.find("merged")
        if self.optimizer is not None and merged is not None:
            load_state(self.run.directory, merged["optimizer"], self.optimizer)

    def _warn_of_two_steps(self, *, alone: bool) -> None:
        """Say where the aggregator shortens the step before the server optimizer takes its own.

        Args:
            alone: whether a client is alone in some round, where heteagg's ``auto`` shortens it.
        """
        aggregator = self.plan.config.aggregator
        joins = aggregator.settings.get("include_global", "auto")
        shortens = aggregator.name == "heteagg" and (alone if joins == "auto" else joins)
        if self.optimizer is not None and shortens:
            self.reporter.warn(
                "heteagg lets the global adapter join the mean, which shortens the step before "
                "the server optimizer takes it; aggregator.include_global=false leaves it alone"
            )

    def _round(self, index: int, names: Sequence[str], aggregator: Aggregator) -> None:
        if self.run.find("round", round=index) is None:
            self.run.record("round", round=index, clients=list(names))
        done = self._tune(index, names)
        needed = self.plan.config.min_clients
        if len(done) < needed:
            raise PrufedError(
                f"round {index + 1} stands with {len(done)} of {len(names)} clients, "
                f"{needed} are needed",
                f"see `prufed runs show {self.run.id}` for what went wrong with each",
            )
        self._merge(index, done, aggregator)

    # --- tuning ----------------------------------------------------------------------------------

    def _tune(self, index: int, names: Sequence[str]) -> dict[str, Artifact]:
        """Return the adapter of every client of the round that did not fail."""
        done: dict[str, Artifact] = {}
        jobs = []
        for name in names:
            event = self.run.find("client", round=index, client=name)
            if event is not None:
                done[name] = self._stored(event)
            elif self.run.find("client_failed", round=index, client=name) is None:
                adopted = self._unjournalled(index, self.clients[name])
                if adopted is None:
                    jobs.append(self._job(index, self.clients[name]))
                else:
                    done[name] = adopted
        with self.reporter.task(f"round {index + 1}: tune", total=len(jobs)) as task:
            speed = Speed()

            def on_step(job: Job, step: TuneStep) -> None:
                task.advance(1 / step.total)
                task.update(
                    f"round {index + 1}: {job.client.name} step {step.step}/{step.total} "
                    f"loss {step.loss:.3f} {speed.of(step):.0f} tokens/s"
                )

            for outcome in self.engine.tune(jobs, on_step):
                artifact = self._receive(index, outcome)
                if artifact is not None:
                    done[outcome.job.client.name] = artifact
        return {name: done[name] for name in names if name in done}

    def _job(self, index: int, client: Client) -> Job:
        masks = self._masks(client)
        return Job(
            client=client,
            tensors=self._start(index, client, masks),
            masks=masks,
            seed=derive(self.plan.config.seed, index, client.name, "tune"),
            round_index=index,
        )

    def _start(self, index: int, client: Client, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return where the client's adapter stands before round ``index``, by global name.

        With ``write_back.share`` 0 that follows from the global adapter alone. Otherwise every
        round since the client last trained has mixed the global adapter in once more. Of a factor
        that the aggregator leaves to the clients, a client that has never trained has the first.
        """
        if self.window is not None:
            window = self.window(index, client.spec.r, self.state.rank)
            return client.start(self.state, masks, None, 0.0, window=window)
        share = self.plan.config.write_back.share
        event = next(
            (
                e
                for e in reversed(self.run.select("client", client=client.name))
                if e["round"] < index
            ),
            None,
        )
        if event is None and self.personal:
            own = client.start(self.first, masks, None, 0.0)
            return client.start(self.state, masks, own, 0.0, self.personal)
        if event is None or (share == 0 and not self.personal):
            return client.start(self.state, masks, None, 0.0)
        own = client.globally(read_tensors(self._stored(event)))
        for earlier in range(event["round"], index):
            merged = self.run.find("merged", round=earlier)
            state = self._state_of(merged) if merged is not None else self.state
            own = client.start(state, masks, own, share, self.personal)
        return own

    def _masks(self, client: Client) -> dict[str, Tensor]:
        """Return the masks of a client's factors by global name; the same in every round.

        ``magnitude`` has none until the client has trained once; then they are frozen.
        """
        if client.name not in self.masks:
            if client.spec.factor_mask == "magnitude":
                event = self.run.find("client", client=client.name)
                if event is None:
                    return {}
                found = client.globally(read_masks(self._stored(event)))
            else:
                found = client.masks(self.state.tensors)
            self.masks[client.name] = found
        return self.masks[client.name]

    def _recipe(self, index: int, client: Client) -> dict[str, Any]:
        tuner = client.plan.tuner
        return {
            "command": "federate",
            "run": self.run.id,
            "run_created": self.run.document["created"],
            "round": index,
            "client": client.name,
            "plugin": tuner.name,
            "params": tuner.model_dump(mode="json"),
            "adapter": client.spec.to_dict(),
            "data_digest": client.plan.data_digest,
            "seed": self.plan.config.seed,
            "stage": "tuned",
        }

    def _parents(self, client: Client) -> list[Parent]:
        parents = [Parent(ref=client.base.ref, digest=client.base.digest)]
        if self.newest is not None:
            parents.append(Parent(ref=self.newest.ref, digest=self.newest.digest))
        return parents

    def _unjournalled(self, index: int, client: Client) -> Artifact | None:
        """Return an adapter that was published just before the process died."""
        key = fingerprint("client-adapter", self._parents(client), self._recipe(index, client))
        artifact = self.registry.find(key, kind="client-adapter")
        if artifact is not None:
            self._record_client(index, client, artifact, artifact.manifest.metrics)
        return artifact

    def _receive(self, index: int, outcome: Outcome) -> Artifact | None:
        """Publish and journal one client's result, or journal its failure."""
        client, result = outcome.job.client, outcome.result
        reason = outcome.reason or (None if result is None else _not_finite(result.tensors))
        if result is None or reason is not None:
            self.reporter.warn(f"client {client.name} is excluded from the round: {reason}")
            self.run.record("client_failed", round=index, client=client.name, reason=reason)
            return None
        tensors, masks = dict(result.tensors), client.local(outcome.job.masks)
        if client.spec.factor_mask == "magnitude" and not masks and client.spec.sparsity > 0:
            masks = {n: magnitude_mask(t, client.spec.sparsity) for n, t in tensors.items()}
            tensors = {n: torch.where(masks[n], t, 0.0) for n, t in tensors.items()}
        metrics = {
            "loss_first": result.losses[0],
            "loss_last": result.losses[-1],
            "tokens": result.tokens,
            "seconds": round(outcome.seconds, 3),
        }
        artifact = publish_client(
            self.registry,
            client,
            tensors,
            masks,
            name=f"{self.plan.config.name}.{client.name}",
            parents=self._parents(client),
            recipe=self._recipe(index, client),
            facts={"round": index, "stage": "tuned"},
            metrics=metrics,
            transposed=self.transposed,
        )
        self._record_client(index, client, artifact, metrics)
        return artifact

    def _record_client(
        self, index: int, client: Client, artifact: Artifact, metrics: Mapping[str, Any]
    ) -> None:
        self.run.record(
            "client",
            round=index,
            client=client.name,
            ref=artifact.ref,
            digest=artifact.digest,
            samples=len(client.plan.rows),
            **metrics,
        )

    # --- merging ---------------------------------------------------------------------------------

    def _merge(self, index: int, done: Mapping[str, Artifact], aggregator: Aggregator) -> None:
        """Merge the round's adapters, publish the global one and journal it."""
        started = time.monotonic()
        config = self.plan.config
        parents = [Parent(ref=self.full.ref, digest=self.full.digest)]
        if self.newest is not None:
            parents.append(Parent(ref=self.newest.ref, digest=self.newest.digest))
        parents += [Parent(ref=a.ref, digest=a.digest) for _, a in sorted(done.items())]
        recipe = {
            "command": "federate",
            "run": self.run.id,
            "run_created": self.run.document["created"],
            "round": index,
            "plugin": config.aggregator.name,
            "params": config.aggregator.settings,
            "seed": config.seed,
        }
        if config.server_optimizer is not None:
            recipe["server_optimizer"] = config.server_optimizer.model_dump(mode="json")
        updates = [
            read_update(self.clients[name], done[name], index, transposed=self.transposed)
            for name in done
        ]
        with self.reporter.task(f"round {index + 1}: merge {len(updates)} adapters"):
            screened = self._screen(index, updates)
            merged = self._aggregate(index, screened.updates, aggregator)
        excluded = {**screened.excluded, **merged.excluded}
        for name, reason in excluded.items():
            self.reporter.warn(f"client {name} is excluded from the merge: {reason}")
        if len(done) - len(excluded) < config.min_clients:
            raise PrufedError(
                f"round {index + 1} stands with {len(done) - len(excluded)} usable updates, "
                f"{config.min_clients} are needed",
                f"see `prufed runs show {self.run.id}`",
            )
        self.state = merged.state
        artifact = self.registry.find(
            fingerprint("global-adapter", parents, recipe), kind="global-adapter"
        ) or publish_global(
            self.registry,
            self.state.tensors,
            self.spec,
            self.full,
            name=config.name,
            parents=parents,
            recipe=recipe,
            facts={"round": index, "clients": sorted(done)},
            transposed=self.transposed,
        )
        self.newest = artifact
        extra: dict[str, Any] = {}
        if self.optimizer is not None:
            extra["optimizer"] = save_state(self.run.directory, index, self.optimizer)
        self.run.record(
            "merged",
            round=index,
            ref=artifact.ref,
            digest=artifact.digest,
            clients=sorted(set(done) - set(excluded)),
            excluded=excluded,
            updates=summaries(screened),
            diagnostics=diagnostics(merged, screened.measured),
            seconds=round(time.monotonic() - started, 3),
            **extra,
        )
        if self.optimizer is not None:
            forget_older(self.run.directory, extra["optimizer"])
        self.reporter.note(
            f"round {index + 1}: {artifact.ref} from {', '.join(sorted(done))} "
            f"({_losses(self.run.select('client', round=index))})"
        )

    def _screen(self, index: int, updates: Sequence[Update]) -> Screened:
        """Leave out and scale down what is not to be merged as it came."""
        config = self.plan.config.screen
        masks = {update.client: self._masks(self.clients[update.client]) for update in updates}
        windows = {
            update.client: self.window(index, update.rank, self.state.rank)
            for update in updates
            if self.window is not None
        }
        screened = screen(
            updates,
            self.state,
            clip=config.clip,
            outlier=config.outlier,
            given_masks=masks,
            sending=Sending(windows, self.personal),
        )
        for name, factor in screened.clipped.items():
            self.reporter.note(f"client {name}: its change is scaled by {factor:.3g}")
        return screened

    def _aggregate(
        self, index: int, updates: Sequence[Update], aggregator: Aggregator
    ) -> Aggregated:
        """Merge, step, and leave alone what nobody trained."""
        tuners = [make_tuner(self.clients[update.client]) for update in updates]
        resting = resting_factors(tuners, index)
        optimizer = self.optimizer and RestingOptimizer(self.optimizer, resting)
        merged = aggregate(
            aggregator, updates, self.state, optimizer=optimizer, on_invalid="exclude"
        )
        return replace(merged, state=rested(merged.state, self.state, resting))

    # --- writing back ----------------------------------------------------------------------------

    def _write_back(self) -> None:
        """Publish the final global adapter as every client has it."""
        if self.newest is None:
            return
        with self.reporter.task("write back", total=len(self.clients)) as task:
            for client in self.clients.values():
                if self.run.find("written_back", client=client.name) is None:
                    self._write_back_one(client)
                task.advance()

    def _write_back_one(self, client: Client) -> None:
        masks = self._masks(client)
        tensors = self._start(self.plan.config.rounds, client, masks)
        recipe = {
            **self._recipe(self.plan.config.rounds, client),
            "stage": "written-back",
            "share": self.plan.config.write_back.share,
        }
        parents = self._parents(client)
        artifact = self.registry.find(
            fingerprint("client-adapter", parents, recipe), kind="client-adapter"
        ) or publish_client(
            self.registry,
            client,
            client.local(tensors),
            client.local(masks),
            name=f"{self.plan.config.name}.{client.name}",
            parents=parents,
            recipe=recipe,
            facts={"round": self.plan.config.rounds - 1, "stage": "written-back"},
            metrics={},
            transposed=self.transposed,
        )
        self.run.record(
            "written_back", client=client.name, ref=artifact.ref, digest=artifact.digest
        )

    # --- evaluation ------------------------------------------------------------------------------

    def _evaluate(self, index: int) -> None:
        """Score the global adapter, and the clients if asked, when the round is due."""
        wanted = self.plan.config.evaluate
        last = index + 1 == self.plan.config.rounds
        due = last or (index + 1) % wanted.every == 0
        if not self.evaluates or not due or not (wanted.tasks or wanted.perplexity):
            return
        self._score(index, "global", self.full, (self.spec, self.state.tensors))
        for client in self.clients.values() if wanted.clients else ():
            tensors = self._start(index + 1, client, self._masks(client))
            self._score(index, client.name, client.base, (client.spec, client.local(tensors)))

    def _score(
        self,
        index: int,
        subject: str,
        base: Artifact,
        adapter: tuple[AdapterSpec, Mapping[str, Tensor]],
    ) -> None:
        if self.run.find("evaluated", round=index, subject=subject) is not None:
            return
        with self.reporter.task(f"round {index + 1}: evaluate {subject}"):
            scores = numbers(self.scoring.score(base, adapter))
        self.run.record("evaluated", round=index, subject=subject, scores=scores)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self.reporter.note(f"round {index + 1}: {subject}: {shown}")

    # --- reading back ----------------------------------------------------------------------------

    def _stored(self, event: Event) -> Artifact:
        artifact = self.registry.resolve(event["ref"])
        if artifact.digest != event["digest"]:
            raise PrufedError(
                f"{event['ref']} is not what run {self.run.id} published",
                f"`prufed verify {event['ref']}` checks it",
                INTEGRITY,
            )
        return artifact

    def _state_of(self, merged: Event) -> GlobalState:
        tensors = read_tensors(self._stored(merged))
        ordered = {name: tensors[name] for name in self.state.tensors}
        return GlobalState(ordered, self.state.rank, self.state.scaling, self.state.layers)

    def _adopt(self, merged: Event) -> None:
        """Take over a round that the journal says is merged."""
        self.newest = self._stored(merged)
        self.state = self._state_of(merged)


def make_federation(
    run: Run,
    plan: Plan,
    registry: Registry,
    full: Artifact,
    bases: Mapping[str, Artifact],
    reporter: Reporter,
) -> Federation:
    """Return a federation at its start.

    Args:
        run: its journal.
        plan: what to do.
        registry: where artifacts go.
        full: the full model.
        bases: every client's sub-model by client name.
        reporter: is told how far the run is.

    Raises:
        PrufedError: a sub-model or an adapter does not belong to the full model.
    """
    config = plan.config
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(full.path, local_files_only=True)
        )
    layers = int(skeleton.config.get_text_config().num_hidden_layers)
    spec = make_spec(config.adapter, config.seed, sparsity=0.0, depth_pruned=False)
    shapes = target_shapes(skeleton, spec.target_modules)
    transposed = any(
        isinstance(layer, Conv1D) for layer in target_layers(skeleton, spec.target_modules).values()
    )
    state = GlobalState(
        tensors=init_global(shapes, spec, config.seed),
        rank=spec.r,
        scaling=spec.scaling,
        layers=layers,
    )
    clients = {
        client.name: make_client(client, bases[client.name], full, layers, config.seed, registry)
        for client in plan.clients
    }
    engine = LocalEngine(config.device, config.dtype, reporter)
    scoring = Scoring(config.evaluate, engine, reporter)
    if config.evaluate.tasks:
        scoring.find()  # an unknown task must not be found out after hours of tuning
    return Federation(
        run=run,
        plan=plan,
        registry=registry,
        full=full,
        clients=clients,
        spec=spec,
        state=state,
        engine=engine,
        scoring=scoring,
        reporter=reporter,
        transposed=transposed,
        optimizer=_optimizer(config.server_optimizer),
    )


def _optimizer(config: ServerOptimizerConfig | None) -> ServerOptimizer | None:
    if config is None:
        return None
    made: ServerOptimizer = build("optimizer", config.name, config.settings)
    return made


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            return f"its adapter has NaN or infinity in {name}"
    return None


def _losses(events: Sequence[Event]) -> str:
    if not events:
        return "no client trained"
    first = sum(event["loss_first"] for event in events) / len(events)
    last = sum(event["loss_last"] for event in events) / len(events)
    return f"mean loss {first:.3f} to {last:.3f}"
