"""What a run's methods cannot do to one another's results: refused before anybody trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.federation.local import make_tuner
from prufed_cli.federation.resting import resting_factors

if TYPE_CHECKING:
    from prufed_cli.federation.plan import Plan
    from prufed_plugins.api import Aggregator


def refuse_other_starts(plan: Plan, aggregator: Aggregator) -> None:
    """Refuse what needs every client to start from the global adapter's first ranks.

    Raises:
        PrufedError: the aggregator lets clients start elsewhere.
    """
    config = plan.config
    rolls = getattr(aggregator, "window", None) is not None
    personal = frozenset(getattr(aggregator, "personal", ()))
    if plan.server is not None and config.write_back.share > 0:
        raise PrufedError(
            f"{config.aggregator.name} holds changes from the global adapter against the "
            f"server's, and write_back.share {config.write_back.share:g} lets clients start "
            "elsewhere",
            "set write_back.share to 0",
            USAGE,
        )
    if rolls and config.write_back.share > 0:
        raise PrufedError(
            f"{config.aggregator.name} gives clients other ranks each round, of which "
            f"write_back.share {config.write_back.share:g} has no own values to keep",
            "set write_back.share to 0",
            USAGE,
        )
    if (rolls or personal) and config.screen.clip is not None:
        raise PrufedError(
            "screen.clip measures changes from the global adapter, and "
            f"{config.aggregator.name} lets clients start elsewhere",
            "leave out screen.clip, or choose another aggregator",
            USAGE,
        )


def refuse_other_bases(plan: Plan, aggregator: Aggregator) -> None:
    """Refuse what cannot be done to factors of another basis, or to those that left a residual.

    Raises:
        PrufedError: the aggregator makes such factors, and something needs others.
    """
    config = plan.config
    name = config.aggregator.name
    if getattr(aggregator, "leaves_residual", False) and config.server_optimizer is not None:
        raise PrufedError(
            f"{name} adds to the base what the merged factors lack, and server_optimizer "
            f"{config.server_optimizer.name} would step to other factors",
            "leave out server_optimizer, or choose another aggregator",
            USAGE,
        )
    if not getattr(aggregator, "new_factors", False):
        return
    if config.server_optimizer is not None:
        raise PrufedError(
            f"{name} makes new factors in every round, and server_optimizer "
            f"{config.server_optimizer.name} cannot step from the old to them",
            "leave out server_optimizer, or choose another aggregator",
            USAGE,
        )
    for client in plan.clients:
        resting = resting_factors([make_tuner(client.tuner)], 0)
        if resting:
            raise PrufedError(
                f"{name} makes new factors in every round, and tuner "
                f"{client.tuner.name} of client {client.name} leaves "
                f"{', '.join(sorted(resting))} as it was",
                "choose the tuner lora, or an aggregator of factors such as fedit",
                USAGE,
            )
    if config.write_back.share > 0:
        raise PrufedError(
            f"{name} makes new factors in every round, with which write_back.share "
            f"{config.write_back.share:g} cannot mix a client's own",
            "set write_back.share to 0, or choose an aggregator of factors such as fedit",
            USAGE,
        )


def refuse_fewer_ranks(plan: Plan, aggregator: Aggregator) -> None:
    """Refuse clients that prune their ranks where these cannot be merged with the others.

    Raises:
        PrufedError: the aggregator needs equal ranks, or gives clients other ranks each round.
    """
    rolls = getattr(aggregator, "window", None) is not None
    if getattr(aggregator, "mixes_ranks", False) and not rolls:
        return
    name = plan.config.aggregator.name
    why = "rolls the ranks, of which none is the last" if rolls else "merges equal ranks only"
    for client in plan.clients:
        if getattr(make_tuner(client.tuner), "prunes_ranks", False):
            raise PrufedError(
                f"tuner {client.tuner.name} of client {client.name} prunes ranks, and {name} {why}",
                "choose the aggregator hetlora, or another that mixes ranks; or the tuner lora",
                USAGE,
            )


def refuse_beside_own_adapters(plan: Plan, aggregator: Aggregator) -> None:
    """Refuse what goes by the global adapter where no client is given it.

    Raises:
        PrufedError: there is such a thing.
    """
    config = plan.config
    given = {
        "server_optimizer": config.server_optimizer is not None,
        "write_back.share": config.write_back.share > 0,
        "screen.clip": config.screen.clip is not None,
    }
    for what, wanted in given.items():
        if wanted and hasattr(aggregator, "for_client"):
            raise PrufedError(
                f"{config.aggregator.name} gives every client an adapter of its own, and {what} "
                "goes by the global one",
                f"leave out {what}, or choose another aggregator",
                USAGE,
            )
