"""Every random choice of a run comes from here, so that a resumed run makes the same ones."""

from __future__ import annotations

import hashlib


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, such as ``(round, client, "tune")``.

    Equal arguments give equal seeds on every machine; different ones are unrelated.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
