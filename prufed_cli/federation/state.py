"""Everything a run works with, and what of it stands in the journal and the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from prufed_cli.errors import INTEGRITY, PrufedError
from prufed_cli.federation.artifacts import read_parts

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_cli.federation.clients import Client
    from prufed_cli.federation.journal import Event, Run
    from prufed_cli.federation.local import LocalEngine
    from prufed_cli.federation.plan import Plan
    from prufed_cli.federation.scoring import Scoring
    from prufed_cli.models.adapters import AdapterSpec
    from prufed_cli.progress import Reporter
    from prufed_plugins.api import Aggregator, GlobalState, ServerOptimizer
    from prufed_registry import Artifact, Registry


@dataclass
class Federation:
    """Everything a run works with.

    Attributes:
        run: the journal.
        plan: what to do.
        registry: where artifacts go.
        full: the full model.
        clients: by name, in the order of the configuration, as they begin.
        spec: the global adapter.
        state: the global adapter's tensors after the last merged round.
        engine: trains clients.
        scoring: measures models between rounds.
        reporter: is told how far the run is.
        transposed: whether the target layers keep their weights as (k, d).
        aggregator: merges the clients' adapters.
        optimizer: takes the step from one global adapter to the next; None takes the merged one.
        evaluates: whether rounds are evaluated as the configuration says.
        newest: the last global adapter that was published.
        masks: of every client's factors, by client and global name, at its first rank.
        similarities: how much client j counts in client i's own adapter, by i and j; empty where
            clients are given the global one.
        root: the server as one that trains on rows of its own, where the aggregator needs that.
        first: the global adapter before the first round.
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
    aggregator: Aggregator
    optimizer: ServerOptimizer | None = None
    evaluates: bool = True
    newest: Artifact | None = None
    masks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    similarities: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    root: Client | None = None
    first: GlobalState = field(init=False)

    def __post_init__(self) -> None:
        self.first = self.state

    @property
    def personal(self) -> frozenset[str]:
        """The factors, of A and B, that the aggregator leaves to each client."""
        return frozenset(getattr(self.aggregator, "personal", ()))

    @property
    def gives_own(self) -> bool:
        """Whether the aggregator gives every client an adapter of its own."""
        return hasattr(self.aggregator, "for_client")

    @property
    def window(self) -> Callable[[int, int, int], Sequence[int]] | None:
        """The ranks a client has in a round, by (round, its rank, global rank); None: the first."""
        found: Callable[[int, int, int], Sequence[int]] | None
        found = getattr(self.aggregator, "window", None)
        return found

    def last_update(self, index: int, name: str) -> Event | None:
        """Return the event of a client's last training before round ``index``."""
        events = reversed(self.run.select("client", client=name))
        return next((event for event in events if event["round"] < index), None)

    def beginner(self, name: str) -> Client:
        """Return a client, or the server, as it begins."""
        return self.root if self.root and name == self.root.name else self.clients[name]

    def client_at(self, index: int, name: str) -> Client:
        """Return a client, or the server, as it is before round ``index``: with the ranks left."""
        event, client = self.last_update(index, name), self.beginner(name)
        return client if event is None else client.at_rank(event.get("rank", client.spec.r))

    def stored(self, event: Event) -> Artifact:
        """Return the artifact that an event names.

        Raises:
            PrufedError: another artifact has its reference now.
        """
        artifact = self.registry.resolve(event["ref"])
        if artifact.digest != event["digest"]:
            raise PrufedError(
                f"{event['ref']} is not what run {self.run.id} published",
                f"`prufed verify {event['ref']}` checks it",
                INTEGRITY,
            )
        return artifact

    def state_after(self, merged: Event) -> GlobalState:
        """Return the global adapter that a ``merged`` event names."""
        tensors, residual = read_parts(self.stored(merged))
        ordered = {name: tensors[name] for name in self.state.tensors}
        return replace(self.state, tensors=ordered, residual=residual)

    def adopt(self, merged: Event) -> None:
        """Take over a round that the journal says is merged."""
        self.newest = self.stored(merged)
        self.state = self.state_after(merged)
