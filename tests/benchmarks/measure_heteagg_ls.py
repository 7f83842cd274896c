"""Merges one q_proj of 4096 x 4096 by heteagg-ls, and prints seconds and MiB as JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.discover import build

SIZE, RANK, CLIENTS = 4096, 16, 4
MODULE = "model.layers.0.self_attn.q_proj"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"


def update(index: int) -> Update:
    """Return a client whose base lacks ``index`` of four entries."""
    generator = torch.Generator().manual_seed(index)
    tensors = {
        A: torch.randn(RANK, SIZE, generator=generator),
        B: torch.randn(SIZE, RANK, generator=generator),
    }
    draws = torch.randint(0, CLIENTS, (SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return Update(
        client=f"c{index}",
        tensors=tensors,
        masks=None,
        samples=1,
        rank=RANK,
        scaling=1.0,
        kept_layers=(0,),
        base_masks={f"{MODULE}.weight": draws >= index},
    )


def peak() -> float:
    """Return the peak of this process in MiB; rusage would count the parent's from before exec."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    """Measure one merge."""
    updates = [update(index) for index in range(CLIENTS)]
    state = GlobalState({A: torch.zeros(RANK, SIZE), B: torch.zeros(SIZE, RANK)}, RANK, 1.0, 1)
    started, cpu = time.monotonic(), time.process_time()
    aggregate(build("aggregator", "heteagg-ls", {}), updates, state)
    figures = {
        "seconds": time.monotonic() - started,
        "cpu": time.process_time() - cpu,
        "peak": peak(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
