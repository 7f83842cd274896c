"""The use case behind ``prufed federate``: plan, make what is missing, run, resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import INTEGRITY, USAGE, Interrupted, PrufedError
from prufed_cli.federation import journal
from prufed_cli.federation.plan import Plan, make_plan
from prufed_cli.federation.plan_report import describe, warnings
from prufed_cli.progress import SILENT, Reporter
from prufed_plugins.errors import MethodError

if TYPE_CHECKING:
    from prufed_cli.config import FederationConfig
    from prufed_cli.federation.state import Federation
    from prufed_registry import Artifact, Registry


@dataclass(frozen=True)
class FederateResult:
    """A finished run.

    Attributes:
        run: its journal.
        artifact: the last global adapter.
    """

    run: journal.Run
    artifact: Artifact


def plan_federation(clients: Path, registry: Registry | None = None) -> Plan:
    """Return the plan of a clients.yaml; nothing is written and torch is not imported.

    Raises:
        ConfigError: the file is not valid; every error is in the message.
        PrufedError: data, references or disk space do not allow the run.
    """
    from prufed_cli.config import load
    from prufed_cli.home import open_registry

    return make_plan(load(clients), registry or open_registry())


def federate(
    clients: Path | None = None,
    *,
    config: FederationConfig | None = None,
    resume: str | None = None,
    registry: Registry | None = None,
    runs: Path | None = None,
    reporter: Reporter = SILENT,
) -> FederateResult:
    """Run a federation, or go on with one that was interrupted.

    Args:
        clients: the configuration file.
        config: the configuration itself, instead of a file.
        resume: the id of a run; neither ``clients`` nor ``config`` is given then.
        registry: where artifacts go; this machine's by default.
        runs: where runs go; this machine's by default.
        reporter: is told how far the run is.

    Raises:
        ConfigError: the configuration is not valid.
        PrufedError: the run cannot begin, or fewer clients than needed came through a round.
    """
    from prufed_cli.home import open_registry, runs_directory

    registry = registry or open_registry()
    runs = runs or runs_directory()
    if resume is not None:
        if clients is not None or config is not None:
            raise PrufedError(
                "a resumed run has its own configuration", "give --resume RUN alone", USAGE
            )
        run = journal.load(runs, resume)
        with run.locked():
            # Another process may have written to the journal until it released the lock.
            run = journal.load(runs, resume)
            with _resumable(run, reporter):
                return _finish(prepare(run, _planned(run, registry), registry, reporter))
    plan = make_plan(config or _load(clients), registry)
    for warning in warnings(plan):
        reporter.warn(warning)
    run = start(plan, runs)
    try:
        reporter.note(f"run {run.id}")
        with run.locked(), _resumable(run, reporter):
            return _finish(prepare(run, plan, registry, reporter))
    except BaseException:
        if run.find("round") is None:
            run.discard()  # nothing has been trained: a run that could not begin is not resumed
        raise


@contextmanager
def _resumable(run: journal.Run, reporter: Reporter) -> Iterator[None]:
    """Say how a run goes on that Ctrl-C, a full disk or a bug has broken off."""
    how = f"`prufed federate --resume {run.id}` goes on"
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if run.find("round") is None:
            raise
        raise Interrupted(how) from interrupt
    except (PrufedError, MethodError):
        raise  # the same again after a resume, unless its hint has been followed
    except Exception as error:
        if run.find("round") is not None:
            error.add_note(how)
            reporter.note(how)
        raise


def set_values(config: FederationConfig, settings: Mapping[str, Any]) -> FederationConfig:
    """Return a configuration with values replaced by dotted key, such as ``tuner.lr``.

    ``aggregator=fedavg`` replaces the whole section by that method; ``aggregator.beta=0`` beside
    it, before or after, sets a parameter of that method.

    Raises:
        PrufedError: no such key, or a value that is not accepted.
    """
    from prufed_cli.config.documents import validated

    document = config.model_dump(mode="json", exclude_none=True)
    for key in sorted(settings, key=lambda key: key.count(".")):
        *parents, leaf = key.split(".")
        section: Any = document
        for depth, parent in enumerate(parents, start=1):
            if isinstance(section.get(parent), str) and parent in _NAMED:
                section[parent] = {"name": section[parent]}
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise _no_section(key, ".".join(parents[:depth]), section)
        section[leaf] = settings[key]
    return validated(document)


_NAMED: Final = {"sampler", "pruner", "tuner", "aggregator", "server_optimizer", "partition"}
"""Sections that a method's name alone may stand for."""


def _no_section(key: str, name: str, found: object) -> PrufedError:
    if isinstance(found, list):
        return PrufedError(
            f"--set {key}: {name} is a list, of which --set cannot change one entry",
            "change it in the file, or set the key for all clients: --set tuner.lr=1e-4",
            USAGE,
        )
    return PrufedError(
        f"--set {key}: {name} is not a section",
        "write --set section.key=value, such as tuner.lr=1e-4",
        USAGE,
    )


def _load(clients: Path | None) -> FederationConfig:
    from prufed_cli.config import load

    if clients is None:
        raise PrufedError(
            "no configuration given",
            "use --clients clients.yaml; `prufed init` writes one to start from",
            USAGE,
        )
    return load(clients)


def _document(plan: Plan) -> dict[str, Any]:
    return {
        "configuration": plan.config.model_dump(mode="json", exclude_none=True),
        "base": plan.base,
        "plan": describe(plan),
    }


def _planned(run: journal.Run, registry: Registry) -> Plan:
    """Return the plan of a run that exists, and make sure that its data has not changed."""
    from prufed_cli.config.documents import validated

    document = {**run.document["configuration"], "base": run.document["base"]}
    plan = make_plan(validated(document), registry)
    begun = run.document["plan"]
    trained = [*begun["clients"], *filter(None, [begun.get("server")])]
    before = {one["name"]: one["data_digest"] for one in trained}
    for one in plan.training:
        if before.get(one.name) != one.data_digest:
            whose = "the server" if one is plan.server else f"client {one.name}"
            raise PrufedError(
                f"the data of {whose} has changed since run {run.id} began",
                "restore the file, or start a new run",
                INTEGRITY,
            )
    return plan


def start(plan: Plan, runs: Path) -> journal.Run:
    """Create the run of a plan."""
    return journal.create(runs, plan.config.name, _document(plan))


def prepare(run: journal.Run, plan: Plan, registry: Registry, reporter: Reporter) -> Federation:
    """Make the sub-models that are missing and return the federation at its start.

    Raises:
        PrufedError: the device, the models or the tasks do not allow the run.
        MethodError: the aggregator cannot merge what the clients would send.
    """
    from prufed_cli.federation.beginning import begin
    from prufed_cli.federation.making import make_federation
    from prufed_cli.federation.rehearsal import rehearse_plan
    from prufed_cli.models.base import choose_device, find_base

    choose_device(plan.config.device)
    full = find_base(plan.base, registry, reporter)
    beginning = begin(plan.config, full.path)
    rehearse_plan(plan, beginning.state)
    bases = _submodels(plan, full, registry, reporter)
    _check_unchanged(run, full, bases)
    federation = make_federation(run, plan, registry, full, bases, beginning, reporter)
    if run.find("started") is None:
        run.record(
            "started",
            base=full.ref,
            digest=full.digest,
            clients={
                name: {"ref": base.ref, "digest": base.digest} for name, base in bases.items()
            },
        )
    return federation


def _finish(federation: Federation) -> FederateResult:
    from prufed_cli.federation.rounds import run_rounds

    return FederateResult(federation.run, run_rounds(federation))


def _submodels(
    plan: Plan, full: Artifact, registry: Registry, reporter: Reporter
) -> dict[str, Artifact]:
    """Return every client's sub-model, made where the registry has none of that recipe."""
    from dataclasses import replace

    from prufed_cli.pruning import prune

    made: dict[str, Artifact] = {}
    bases: dict[str, Artifact] = {}
    with reporter.task("sub-models", total=len(plan.clients)) as task:
        for client in plan.clients:
            wanted = client.submodel
            if wanted.request is None:
                chosen = full if wanted.reference in {plan.base, None} else None
                bases[client.name] = chosen or registry.resolve(str(wanted.reference))
            else:
                request = replace(wanted.request, base=full.ref)
                key = repr(request)
                if key not in made:
                    made[key] = prune(
                        request,
                        registry=registry,
                        device=plan.config.device,
                        dtype=plan.config.dtype,
                        reporter=reporter,
                    ).artifact
                bases[client.name] = made[key]
            task.advance()
    return bases


def _check_unchanged(run: journal.Run, full: Artifact, bases: Mapping[str, Artifact]) -> None:
    """Refuse to resume on models other than those the run began with."""
    started = run.find("started")
    if started is None:
        return
    begun = {name: facts["digest"] for name, facts in started["clients"].items()}
    now = {name: base.digest for name, base in bases.items()}
    if started["digest"] != full.digest or begun != now:
        raise PrufedError(
            f"the models of run {run.id} are not those it began with",
            "`prufed verify` checks the registry; or start a new run",
            INTEGRITY,
        )
