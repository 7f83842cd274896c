"""Where every client stands between rounds: its adapter and its masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prufed_cli.federation.artifacts import read_masks, read_tensors
from prufed_plugins.aggregators.products import best_first
from prufed_plugins.write_back import ranks_of

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_cli.federation.clients import Client
    from prufed_cli.federation.state import Federation
    from prufed_registry import Artifact


def start_of(
    federation: Federation, index: int, client: Client, masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return where the client's adapter stands before round ``index``, by global name.

    With ``write_back.share`` 0 that follows from the global adapter alone. Otherwise every
    round since the client last trained has mixed the global adapter in once more. Of a factor
    that the aggregator leaves to the clients, a client that has never trained has the first. The
    first ranks of a stack are some client's alone, so they are put in order before.
    """
    if federation.gives_own:
        given = own_adapter(federation, index, client)
        if given is None:
            return client.start(federation.first, masks, None, 0.0)
        return first_ranks(client.globally(read_tensors(given)), client.spec.r)
    state, personal = federation.state, federation.personal
    if getattr(federation.aggregator, "stacks", False):
        state = best_first(state)
    if federation.window is not None:
        window = federation.window(index, client.spec.r, state.rank)
        return client.start(state, masks, None, 0.0, window=window)
    share = federation.plan.config.write_back.share
    event = federation.last_update(index, client.name)
    if event is None and personal:
        own = client.start(federation.first, masks, None, 0.0)
        return client.start(state, masks, own, 0.0, personal)
    if event is None or (share == 0 and not personal):
        return client.start(state, masks, None, 0.0)
    own = client.globally(read_tensors(federation.stored(event)))
    for earlier in range(event["round"], index):
        merged = federation.run.find("merged", round=earlier)
        between = federation.state_after(merged) if merged is not None else state
        own = client.start(between, masks, own, share, personal)
    return own


def own_adapter(federation: Federation, index: int, client: Client) -> Artifact | None:
    """Return the adapter of its own that a client was given last before round ``index``."""
    events = federation.run.select("own", client=client.name)
    events = [event for event in events if event["round"] < index]
    return federation.stored(events[-1]) if events else None


def masks_of(federation: Federation, client: Client) -> dict[str, Tensor]:
    """Return the masks of a client's factors by global name; the same in every round.

    ``magnitude`` has none until the client has trained once; then they are frozen. A client that
    has pruned some of its ranks has the masks of those that are left.
    """
    if client.name not in federation.masks:
        if client.spec.factor_mask == "magnitude":
            trained = federation.run.select("client", client=client.name)
            if not trained:
                return {}
            found = client.globally(read_masks(federation.stored(trained[0])))
        else:
            found = federation.beginner(client.name).masks(federation.state.tensors)
        federation.masks[client.name] = found
    return first_ranks(federation.masks[client.name], client.spec.r)


def first_ranks(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Return the first ``rank`` ranks of factors, or of their masks, by the same names."""
    return {name: ranks_of(name, tensor, range(rank)) for name, tensor in tensors.items()}
