"""What a sub-model is to be, and what is wrong with asking for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from prufed_cli.errors import USAGE, PrufedError

if TYPE_CHECKING:
    from prufed_plugins.api import Pruner, PruneTarget

_DIGITS: Final = 9
"""Of a pattern's numbers, at most; no matrix has so many columns."""


@dataclass(frozen=True)
class PruneRequest:
    """Everything that decides what a sub-model is.

    Attributes:
        base: reference, path or Hub id; None for the default base.
        method: a pruner's name.
        sparsity: share of entries, or of layers, to remove, in [0, 1).
        pattern: ``n:m``, n of every m removed.
        layers: number of decoder layers to drop.
        settings: parameters of the method.
        compat: ``reference`` for the masks of the published code, off-by-one and all.
        calibration: text, JSONL, directory or Hub data set; None for the embedded text.
        samples: calibration sequences.
        length: tokens per calibration sequence; None for the model's own limit, at most 2048.
        seed: decides which calibration sequences are drawn.
        perplexity: a text file to score base and sub-model on; None for no scores.
        name: of the artifact; None for one made from base, method and target.
    """

    base: str | None = None
    method: str = "sparsegpt"
    sparsity: float | None = None
    pattern: str | None = None
    layers: int | None = None
    settings: Mapping[str, Any] | None = None
    compat: str | None = None
    calibration: str | None = None
    samples: int = 128
    length: int | None = None
    seed: int = 0
    perplexity: str | None = None
    name: str | None = None


def at_sparsities(request: PruneRequest, sparsities: Sequence[float]) -> list[PruneRequest]:
    """Return one request per sparsity; a name gets each one's percentage at its end."""
    if len(sparsities) == 1:
        return [replace(request, sparsity=sparsities[0])]
    return [
        replace(
            request,
            sparsity=sparsity,
            name=f"{request.name}-{percent(sparsity)}" if request.name else None,
        )
        for sparsity in sparsities
    ]


def percent(sparsity: float) -> str:
    """Return a sparsity as it stands in names: ``75``, ``12_5``."""
    whole, _, part = f"{Decimal(repr(float(sparsity))) * 100:f}".partition(".")
    return f"{whole}_{part.rstrip('0')}".rstrip("_")


def parse_sparsities(text: str) -> list[float]:
    """Return the sparsities of ``0.25,0.5,0.75``, in the order given.

    Raises:
        PrufedError: one of them is no number, or is there twice.
    """
    found: list[float] = []
    for part in text.split(","):
        try:
            found.append(float(part) + 0.0)  # −0 is 0
        except ValueError:
            raise PrufedError(
                f"--sparsity {part.strip()!r} is no number", "for example --sparsity 0.5", USAGE
            ) from None
        if found.count(found[-1]) > 1:
            raise PrufedError(f"sparsity {found[-1]:g} is there twice", "give it once", USAGE)
    return found


def parse_target(request: PruneRequest) -> PruneTarget:
    """Return what to remove.

    Raises:
        PrufedError: two targets at once, or one out of range.
    """
    from prufed_plugins.api import PruneTarget

    given = [
        flag
        for flag, value in (
            ("--sparsity", request.sparsity),
            ("--pattern", request.pattern),
            ("--layers", request.layers),
        )
        if value is not None
    ]
    if len(given) > 1:
        raise PrufedError(f"{' and '.join(given)} exclude each other", "give one of them", USAGE)
    if request.sparsity is not None and not 0 <= request.sparsity < 1:
        raise PrufedError(
            f"sparsity {request.sparsity:g} is outside [0, 1)",
            "0.75 removes three quarters of the entries",
            USAGE,
        )
    pattern = parse_pattern(request.pattern) if request.pattern is not None else None
    if request.layers is not None and request.layers < 1:
        raise PrufedError(f"--layers {request.layers} drops nothing", "give 1 or more", USAGE)
    return PruneTarget(sparsity=request.sparsity, pattern=pattern, layers=request.layers)


def parse_pattern(text: str) -> tuple[int, int]:
    """Return (n, m) of ``n:m``: n of every m consecutive inputs are removed."""
    parts = text.split(":")
    if len(parts) == 2 and all(part.isdecimal() and len(part) <= _DIGITS for part in parts):
        n, m = int(parts[0]), int(parts[1])
        if 0 < n < m:
            return n, m
    raise PrufedError(
        f"pattern {text!r} is not n:m with 0 < n < m", "for example --pattern 2:4", USAGE
    )


def method_settings(request: PruneRequest) -> dict[str, Any]:
    """Return the method's parameters, those that ``compat`` stands for among them.

    Raises:
        PrufedError: the method has no such mode, or the parameters say otherwise.
    """
    from prufed_plugins.discover import catalog

    settings = dict(request.settings or {})
    if request.compat is None:
        return settings
    if request.compat != "reference":
        raise PrufedError(f"no mode {request.compat!r}", "use --compat reference", USAGE)
    if "threshold" not in catalog().get("pruner", request.method).method.params.model_fields:
        raise PrufedError(
            f"{request.method} has no published code to be compatible with",
            "leave --compat out, or use sparsegpt, wanda or magnitude",
            USAGE,
        )
    if settings.setdefault("threshold", "reference") != "reference":
        raise PrufedError(
            f"--compat reference and --set threshold={settings['threshold']} exclude each other",
            "give one of them",
            USAGE,
        )
    return settings


def check_target(pruner: Pruner, target: PruneTarget, request: PruneRequest) -> None:
    """Refuse a target of the wrong kind before any work."""
    empty = target.sparsity is None and target.pattern is None and target.layers is None
    if pruner.result == "masked" and empty and getattr(pruner, "needs_target", True):
        raise PrufedError(
            f"{request.method} needs to know how much to remove",
            "add --sparsity 0.5 or --pattern 2:4",
            USAGE,
        )
    if pruner.result == "masked" and target.layers is not None:
        raise PrufedError(
            f"{request.method} removes entries, not layers",
            "use --sparsity, or a method such as top with --layers",
            USAGE,
        )
    if pruner.result == "sliced" and target.pattern is not None:
        raise PrufedError(
            f"{request.method} removes layers; a pattern does not apply",
            "use --layers 8 or --sparsity 0.25",
            USAGE,
        )


def check_nested(pruner: Pruner, requests: Sequence[PruneRequest]) -> None:
    """Refuse nested sub-models of a method that cannot make them, or not of rising sparsities."""
    sparsities = [one.sparsity for one in requests if one.sparsity is not None]
    if len(requests) < 2 or len(sparsities) < len(requests):
        raise PrufedError(
            "--nested needs several sparsities", "for example --sparsity 0.25,0.5,0.75", USAGE
        )
    if sparsities != (ascending := sorted(sparsities)):
        raise PrufedError(
            "--nested needs ascending sparsities: each sub-model lies inside the one before",
            f"write --sparsity {','.join(f'{one:g}' for one in ascending)}",
            USAGE,
        )
    if not hasattr(pruner, "prune_nested"):
        raise PrufedError(
            f"{requests[0].method} cannot make sub-models that lie inside one another",
            "leave --nested out: each sparsity then has a calibration pass of its own",
            USAGE,
        )
