"""What the global name of an adapter tensor says."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Final, Literal

from prufed_plugins.errors import MethodError

_FACTOR_A: Final = ".lora_A.weight"
_FACTOR_B: Final = ".lora_B.weight"


@lru_cache(maxsize=2**16)  # a merge asks for every name of every client
def layer_index(name: str) -> int | None:
    """Return the decoder layer a module or tensor belongs to; None where it belongs to none.

    It is the first component that is a number: 3 in ``model.layers.3.self_attn.q_proj``,
    ``transformer.h.3.attn.c_attn`` and ``model.decoder.layers.3.fc1``.
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def in_layers(name: str, layers: Iterable[int]) -> bool:
    """Return whether a client with these decoder layers has the module; all share the others."""
    index = layer_index(name)
    return index is None or index in layers


def split_factor(name: str) -> tuple[str, Literal["A", "B"]]:
    """Return (module, factor) of an adapter tensor's name.

    Raises:
        MethodError: the name ends neither in ``.lora_A.weight`` nor in ``.lora_B.weight``.
    """
    if name.endswith(_FACTOR_A):
        return name.removesuffix(_FACTOR_A), "A"
    if name.endswith(_FACTOR_B):
        return name.removesuffix(_FACTOR_B), "B"
    raise MethodError(
        f"{name!r} is not the name of an adapter tensor",
        f"names look like model.layers.0.self_attn.q_proj{_FACTOR_A}",
    )


def by_module(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return {module: {``lora_A.weight``: name, …}} in the order in which modules first occur.

    Raises:
        MethodError: a name is not ``<module>.lora_A.weight`` or ``<module>.lora_B.weight``.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        module, factor = split_factor(name)
        modules.setdefault(module, {})[f"lora_{factor}.weight"] = name
    return modules
