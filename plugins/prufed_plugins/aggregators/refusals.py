"""What a method says when it cannot mix the clients of a round."""

from __future__ import annotations

from collections.abc import Sequence

from prufed_plugins.api import Update
from prufed_plugins.errors import UpdateError


def refuse_depths(updates: Sequence[Update], method: str) -> None:
    """Refuse clients of different layers.

    Args:
        updates: at least one.
        method: the method's name, for the message.

    Raises:
        UpdateError: a client has other layers than the first.
    """
    first = updates[0]
    for update in updates:
        if set(update.kept_layers) != set(first.kept_layers):
            raise UpdateError(
                update.client,
                f"has other layers than client {first.client}, which {method} cannot average",
                "choose the aggregator heteagg-layer",
            )
