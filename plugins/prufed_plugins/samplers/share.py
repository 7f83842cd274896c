"""How many clients a fraction means."""

from __future__ import annotations

_ROUNDING = 1e-9
"""0.29 * 100 is 28.999..., and whoever writes 0.29 of 100 clients means 29."""


def share(fraction: float, total: int) -> int:
    """Return ``max(floor(fraction * total), 1)``, at most ``total``."""
    return min(max(int(fraction * total + _ROUNDING), 1), total)
