"""Small federations of random adapters, to try an aggregator on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prufed_plugins.api import GlobalState, Update
from prufed_plugins.names import in_layers


def random_state(
    *, layers: int = 2, rank: int = 2, k: int = 5, d: int = 4, seed: int = 0
) -> GlobalState:
    """Return a global adapter of ``q_proj`` in every layer and of ``lm_head``, in float32.

    Args:
        layers: number of decoder layers.
        rank: r.
        k: input features; A is (r, k).
        d: output features; B is (d, r).
        seed: of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = [f"model.layers.{index}.self_attn.q_proj" for index in range(layers)]
    tensors = {}
    for module in [*modules, "lm_head"]:
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, k, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(d, rank, generator=generator)
    return GlobalState(tensors, rank=rank, scaling=1.0, layers=layers)


def random_update(
    state: GlobalState,
    client: str,
    *,
    seed: int,
    density: float | None = None,
    kept_layers: Sequence[int] | None = None,
    samples: int = 10,
) -> Update:
    """Return an update of random values.

    Args:
        state: the global adapter.
        client: the client's name.
        seed: of values and masks.
        density: share of entries that the client has; the others are False in its masks, and
            zero. None gives no masks at all.
        kept_layers: the client's layers; all by default.
        samples: n_i.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(range(state.layers)) if kept_layers is None else tuple(kept_layers)
    names = [name for name in state.tensors if in_layers(name, layers)]
    tensors: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name in names:
        tensors[name] = torch.randn(state.tensors[name].shape, generator=generator)
        if density is not None:
            masks[name] = torch.rand(tensors[name].shape, generator=generator) < density
            tensors[name] = torch.where(masks[name], tensors[name], 0.0)
    return Update(
        client=client,
        tensors=tensors,
        masks=None if density is None else masks,
        samples=samples,
        rank=state.rank,
        scaling=state.scaling,
        kept_layers=layers,
    )
