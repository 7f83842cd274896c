"""What the journal says of a round's updates, and what a person is shown of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

if TYPE_CHECKING:
    from prufed_cli.federation.journal import Event
    from prufed_plugins.aggregators.streaming import Aggregated
    from prufed_plugins.diagnostics import Measurement
    from prufed_plugins.screening import Screened

_DIGITS = 6
_TRUST = "trust."


def summaries(screened: Screened) -> dict[str, dict[str, float]]:
    """Return norm, cosine and weight of every update, and how far it was scaled down."""
    found: dict[str, dict[str, float]] = {}
    weights = {update.client: update.weight for update in screened.updates}
    for client, norm in screened.measured.norms.items():
        found[client] = {"norm": _short(norm), "weight": _short(weights[client])}
        if client in screened.measured.cosines:
            found[client]["cosine"] = _short(screened.measured.cosines[client])
        if client in screened.clipped:
            found[client]["clipped"] = _short(screened.clipped[client])
    return found


def diagnostics(merged: Aggregated, measured: Measurement) -> dict[str, dict[str, Any]]:
    """Return what is known of each module: of the updates, and of what was made of them."""
    return {
        module: {
            key: value if isinstance(value, list) else _short(value)
            for key, value in {**measured.modules.get(module, {}), **own}.items()
        }
        for module, own in merged.diagnostics.items()
    }


def essentials(event: Event) -> str:
    """Return one line about a merged round: the mean over its modules, and what was sent."""
    modules = list(event["diagnostics"].values())
    said = []
    for key, words in (
        ("coverage", "coverage {:.1%}"),
        ("update_norm", "change {:.3g}"),
        ("cosine_mean", "cosine to the mean {:.2f}"),
        ("cross_term", "cross term {:.1%}"),
        ("residual_rank", "residual of {:.0f} ranks"),
    ):
        values = [module[key] for module in modules if key in module]
        if values:
            said.append(words.format(sum(values) / len(values)))
    trust = {key: value for key, value in modules[0].items() if key.startswith(_TRUST)}
    if trust:  # the same in every module
        each = (f"{key.removeprefix(_TRUST)} {value:.2f}" for key, value in trust.items())
        said.append(f"trust in {', '.join(each)}")
    if "payload_bytes" in event:
        said.append(f"{decimal(event['payload_bytes'])} from clients")
    return ", ".join(said)


def of_client(event: Event, client: str) -> Mapping[str, float]:
    """Return what a merged round says of one client's update; empty where it says nothing."""
    found: Mapping[str, float] = event.get("updates", {}).get(client, {})
    return found


def _short(value: float) -> float:
    """Return a number with the digits that mean something."""
    return float(f"{value:.{_DIGITS}g}")
