"""Merge adapters from files in a process of its own: prints its peak memory and times as JSON.

::

    python merge_files.py write DIRECTORY CLIENTS LAYERS WIDTH DENSITY
    python merge_files.py merge DIRECTORY CLIENTS...

``write`` makes adapters of rank 16 on four WIDTH × WIDTH matrices per layer; at a DENSITY below 1
each client also has a mask file. Linux only: the peak is read from /proc.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from prufed_plugins.aggregators.heteagg import HeteAgg
from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.params import HeteAggParams
from prufed_plugins.tensor_files import TensorFile

RANK = 16
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write(directory: Path, clients: int, layers: int, width: int, density: float) -> None:
    for client in range(-1, clients):
        name = "global" if client < 0 else f"client.{client:03}"
        torch.manual_seed(client + 1)
        tensors, masks = {}, {}
        for module in (
            f"model.layers.{layer}.self_attn.{projection}"
            for layer in range(layers)
            for projection in PROJECTIONS
        ):
            for factor, shape in (("A", (RANK, width)), ("B", (width, RANK))):
                key = f"{module}.lora_{factor}.weight"
                tensors[key] = torch.randn(shape)
                if client >= 0 and density < 1:
                    masks[key] = torch.rand(shape) < density
                    tensors[key] = torch.where(masks[key], tensors[key], 0.0)
        save_file(tensors, directory / f"{name}.safetensors")
        if masks:
            save_file(masks, directory / f"mask.{client:03}.safetensors")


def merge(directory: Path, clients: Sequence[int]) -> Iterator[dict[str, float]]:
    """Merge the first so many clients; yield peaks in bytes and times in CPU seconds."""
    torch.set_num_threads(1)
    tensors = dict(TensorFile(directory / "global.safetensors").items())
    layers = len(tensors) // (2 * len(PROJECTIONS))
    state = GlobalState(tensors, rank=RANK, scaling=1.0, layers=layers)
    # one buffer for all reads, as the peaks are compared with one another
    buffer = bytearray((directory / "global.safetensors").stat().st_size + 4096)
    for count in clients:
        reading = read_once(directory, count, buffer)  # also brings the files into the page cache
        before = reset_peak()
        begin = time.process_time()
        updates = [read_update(directory, index, state) for index in range(count)]
        aggregate(HeteAgg(HeteAggParams()), updates, state)
        merging = time.process_time() - begin
        yield {
            "clients": count,
            "before": before,
            "peak": peak_bytes(),
            "merging": merging,
            "reading": min(reading, read_once(directory, count, buffer)),
        }


def read_update(directory: Path, index: int, state: GlobalState) -> Update:
    masks = directory / f"mask.{index:03}.safetensors"
    return Update(
        client=f"client-{index:03}",
        tensors=TensorFile(directory / f"client.{index:03}.safetensors"),
        masks=TensorFile(masks) if masks.exists() else None,
        samples=10 + index,
        rank=state.rank,
        scaling=state.scaling,
        kept_layers=tuple(range(state.layers)),
    )


def read_once(directory: Path, clients: int, buffer: bytearray) -> float:
    """Read the clients' files once into the buffer, each from its start; return the CPU seconds."""
    paths = [
        path
        for index in range(clients)
        for kind in ("client", "mask")
        if (path := directory / f"{kind}.{index:03}.safetensors").exists()
    ]
    begin = time.process_time()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer)
    return time.process_time() - begin


def reset_peak() -> int:
    """Set the peak to what is resident now, and return that. getrusage inherits the parent's."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def main() -> None:
    what, directory, clients, *rest = sys.argv[1:]
    if what == "write":
        layers, width, density = rest
        write(Path(directory), int(clients), int(layers), int(width), float(density))
    else:
        for figures in merge(Path(directory), [int(count) for count in (clients, *rest)]):
            print(json.dumps(figures))


if __name__ == "__main__":
    main()
