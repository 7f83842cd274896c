"""Put a federation together from its plan and its models, at its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prufed_cli.federation.clients import make_client
from prufed_cli.federation.local import LocalEngine
from prufed_cli.federation.scoring import Scoring
from prufed_cli.federation.state import Federation
from prufed_plugins.discover import build

if TYPE_CHECKING:
    from prufed_cli.federation.beginning import Beginning
    from prufed_cli.federation.journal import Run
    from prufed_cli.federation.plan import Plan
    from prufed_cli.progress import Reporter
    from prufed_registry import Artifact, Registry


def make_federation(
    run: Run,
    plan: Plan,
    registry: Registry,
    full: Artifact,
    bases: Mapping[str, Artifact],
    beginning: Beginning,
    reporter: Reporter,
) -> Federation:
    """Return a federation at its start.

    Args:
        run: its journal.
        plan: what to do.
        registry: where artifacts go.
        full: the full model.
        bases: every client's sub-model by client name.
        beginning: the global adapter before the first round.
        reporter: is told how far the run is.

    Raises:
        PrufedError: a sub-model or an adapter does not belong to the full model.
        MethodError: a method cannot be made, for want of what it requires.
    """
    config = plan.config
    layers = beginning.state.layers
    clients = {
        client.name: make_client(client, bases[client.name], full, layers, config.seed, registry)
        for client in plan.clients
    }
    engine = LocalEngine(config.device, config.dtype, reporter)
    scoring = Scoring(config.evaluate, engine, reporter)
    if config.evaluate.tasks:
        scoring.find()  # an unknown task must not be found out after hours of tuning
    optimizer = config.server_optimizer
    return Federation(
        run=run,
        plan=plan,
        registry=registry,
        full=full,
        clients=clients,
        spec=beginning.spec,
        state=beginning.state,
        engine=engine,
        scoring=scoring,
        reporter=reporter,
        transposed=beginning.transposed,
        aggregator=build("aggregator", config.aggregator.name, config.aggregator.settings),
        root=None
        if plan.server is None
        else make_client(plan.server, full, full, layers, config.seed, registry),
        optimizer=None
        if optimizer is None
        else build("optimizer", optimizer.name, optimizer.settings),
    )
