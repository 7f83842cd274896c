"""What kind of adapter a client trains, said without torch.

Two switches are independent (LEGO, 2410.18287, asks for both of what they do): ``factor_mask`` puts
zeros into A and B at the client's sparsity, ``product_mask`` applies ``s · M⊙(B A)`` with M the
base's own mask, so that merging keeps the base's sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from prufed_cli.errors import USAGE, PrufedError

FactorMask = Literal["none", "nested", "magnitude", "rank", "structured"]
Rescale = Literal["none", "density"]

ALL_LINEAR: Final = "all-linear"
"""The target that means every linear module except the output embedding."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "lego": {"factor_mask": "nested", "product_mask": True, "rescale": "density"},
        "lego-literal": {"factor_mask": "nested", "product_mask": False, "rescale": "none"},
        "sparse-peft": {"factor_mask": "none", "product_mask": True, "rescale": "none"},
        "dense": {"factor_mask": "none", "product_mask": False, "rescale": "none"},
    }
)
"""``lego-literal`` is reading R1 of the paper's words, ``sparse-peft`` R3 (SQFT), ``dense`` R0."""


@dataclass(frozen=True)
class AdapterSpec:
    """One client's adapter.

    Attributes:
        r: LoRA rank.
        alpha: LoRA alpha; the update is scaled by alpha / r.
        dropout: probability of LoRA dropout, in [0, 1).
        target_modules: suffixes of module names, or ``("all-linear",)``.
        preset: the preset the switches came from.
        factor_mask: where A and B are zero.
        product_mask: whether the update is masked by the base's own mask.
        rescale: ``density`` multiplies the scaling by 1/density of masked factors, as inverted
            dropout does.
        seed: seed of the nested masks.
        sparsity: share of the factors' entries that ``factor_mask`` removes, in [0, 1).
        use_rslora: divide alpha by the square root of r instead of r (2312.03732).
    """

    r: int = 16
    alpha: float = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj",)
    preset: str = "lego"
    factor_mask: FactorMask = "nested"
    product_mask: bool = True
    rescale: Rescale = "density"
    seed: int = 0
    sparsity: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        problem = next(_problems(self), None)
        if problem:
            message, hint = problem
            raise PrufedError(message, hint, USAGE)

    @property
    def density(self) -> float:
        """Return the share of the factors' entries that exist."""
        return 1.0 if self.factor_mask == "none" else 1.0 - self.sparsity

    @property
    def scaling(self) -> float:
        """Return s, the factor on B A."""
        scaling = self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        return scaling / self.density if self.rescale == "density" else scaling

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterSpec:
        """Return the specification that :meth:`to_dict` described.

        Raises:
            PrufedError: a key is unknown or a value is out of range.
        """
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise PrufedError(
                f"unknown adapter setting {unknown[0]!r}",
                f"known are {', '.join(field.name for field in fields(cls))}",
                USAGE,
            )
        targets = {key: tuple(value) for key, value in values.items() if key == "target_modules"}
        return cls(**{**values, **targets})


def adapter_spec(
    preset: str = "lego", *, depth_pruned: bool = False, **settings: Any
) -> AdapterSpec:
    """Return the adapter of a preset.

    Args:
        preset: one of :data:`PRESETS`.
        depth_pruned: whether the base lost whole layers; then no mask of the preset applies, since
            every matrix it has is whole.
        settings: fields of :class:`AdapterSpec`, which win over the preset's.

    Raises:
        PrufedError: an unknown preset or setting, or a value out of range.
    """
    if preset not in PRESETS:
        raise PrufedError(
            f"unknown adapter preset {preset!r}", f"choose from {', '.join(PRESETS)}", USAGE
        )
    switches = PRESETS["dense" if depth_pruned else preset]
    return AdapterSpec.from_dict({"preset": preset, **switches, **settings})


def _problems(spec: AdapterSpec) -> Iterator[tuple[str, str]]:
    """Yield (message, hint) for each field out of range."""
    if spec.r < 1:
        yield f"adapter rank {spec.r} is below 1", "set r to 1 or more"
    if not (math.isfinite(spec.alpha) and spec.alpha > 0):
        yield f"adapter alpha {spec.alpha} is not positive", "set alpha to r or a multiple of it"
    if not 0 <= spec.dropout < 1:
        yield f"adapter dropout {spec.dropout} is outside [0, 1)", "set dropout to 0.05"
    if not 0 <= spec.sparsity < 1:
        yield f"adapter sparsity {spec.sparsity} is outside [0, 1)", "set sparsity to 0.5"
    if not spec.target_modules:
        yield "no target modules", f"set target_modules to [q_proj] or [{ALL_LINEAR}]"
    for name, value, known in (
        ("factor_mask", spec.factor_mask, get_args(FactorMask)),
        ("rescale", spec.rescale, get_args(Rescale)),
    ):
        if value not in known:
            yield f"unknown {name} {value!r}", f"choose from {', '.join(known)}"
