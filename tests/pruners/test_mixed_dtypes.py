"""Checkpoints whose matrices are stored in several dtypes: each is rounded to its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prufed_cli.errors import Interrupted
from prufed_cli.progress import Reporter, Task
from prufed_cli.pruning import PruneRequest, prune
from prufed_plugins.errors import MethodError
from prufed_registry import Registry

Save = Callable[..., Path]

NARROW = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")


def stored_as(path: Path, dtypes: Mapping[str, torch.dtype]) -> PruneRequest:
    """Store some tensors of a model in another dtype, and ask for half of it."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors |= {name: tensors[name].to(dtype) for name, dtype in dtypes.items()}
    save_file(tensors, file, {"format": "pt"})
    return PruneRequest(base=str(path), method="sparsegpt", sparsity=0.5, samples=6, length=24)


class Stopper(Reporter):
    """Presses Ctrl-C when so many blocks are pruned."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        blocks = self._blocks if description.startswith("prune") else None

        class Stopping(Task):
            def reach(self, steps: float) -> None:
                if steps == blocks:
                    raise KeyboardInterrupt

        yield Stopping()


def test_a_prune_that_goes_on_gives_the_same_bytes(
    llama: Any, saved: Save, prufed_home: Path
) -> None:
    registry = Registry(prufed_home / "registry")
    request = stored_as(saved(llama), dict.fromkeys(NARROW, torch.bfloat16))
    with pytest.raises(Interrupted, match="goes on after block 1"):
        prune(request, registry=registry, reporter=Stopper(2))
    resumed = prune(request, registry=registry).artifact
    anew = prune(request, registry=registry, force=True).artifact
    assert anew.ref != resumed.ref
    assert anew.digest == resumed.digest
    for name in NARROW:
        assert load_file(anew.path / "model.safetensors")[name].dtype == torch.bfloat16


def test_what_is_stored_wider_than_the_rest_is_not_rounded_with_it(
    llama: Any, saved: Save, prufed_home: Path
) -> None:
    wide = "model.layers.1.mlp.up_proj.weight"
    request = stored_as(saved(llama.to(torch.bfloat16)), {wide: torch.float32})
    made = prune(request, registry=Registry(prufed_home / "registry")).artifact
    weight = load_file(made.path / "model.safetensors")[wide]
    assert not torch.equal(weight, weight.bfloat16().float())


def test_what_its_own_dtype_cannot_hold_is_refused(
    llama: Any, saved: Save, prufed_home: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        weight = llama.get_parameter(name)
        weight.copy_(weight.sign() * 60000)
    request = stored_as(saved(llama), {name: torch.float16})
    with pytest.raises(MethodError, match=r"up_proj is too large for torch\.float16"):
        prune(request, registry=Registry(prufed_home / "registry"))
