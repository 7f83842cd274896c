"""Names of parameters in a sub-model with fewer layers, and in the model it came from.

A layer number is the first component of a name that is a number: ``3`` in
``model.layers.3.self_attn.q_proj.lora_A.weight``. A sub-model numbers its layers 0, 1, 2, …
(*local*); ``kept_layers[j]`` is the number of its layer j in the full model (*global*).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prufed_cli.errors import FAILED, PrufedError


def layer_number(name: str) -> int | None:
    """Return the layer that ``name`` belongs to, None where it belongs to none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def to_global(name: str, kept_layers: Sequence[int]) -> str:
    """Return the name in the full model of a sub-model's ``name``.

    Raises:
        PrufedError: the sub-model has no such layer.
    """

    def number(local: int) -> int:
        if local >= len(kept_layers):
            raise PrufedError(
                f"{name} names layer {local}, the sub-model has {len(kept_layers)} layers",
                "the adapter and the base do not belong together",
                FAILED,
            )
        return kept_layers[local]

    return _renumber(name, number)


def to_local(name: str, kept_layers: Sequence[int]) -> str | None:
    """Return the name in the sub-model of a full model's ``name``; None if the layer is gone."""
    number = layer_number(name)
    if number is not None and number not in kept_layers:
        return None
    return _renumber(name, kept_layers.index)


def _renumber(name: str, number: Callable[[int], int]) -> str:
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            parts[position] = str(number(int(part)))
            break
    return ".".join(parts)
