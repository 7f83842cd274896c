"""Merge adapters from files in a process of its own: prints its peak memory and times as JSON.

::

    python merge_files.py write DIRECTORY CLIENTS LAYERS WIDTH DENSITY [DISTINCT]
    python merge_files.py merge DIRECTORY CLIENTS...
    python merge_files.py compare DIRECTORY CLIENTS

``write`` makes adapters of rank 16 on four WIDTH × WIDTH matrices per layer; at a DENSITY below 1
each client also has a mask file. Clients beyond DISTINCT are hard links to the first: all files are
read from the page cache, where it makes no difference. ``merge`` prints a line per number of
clients, where ``again`` is a merge by a method that met the same masks before; ``compare`` the
times of two plain ways to the same mean, and of the round's diagnostics.
Linux only: the peak is read from /proc.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prufed_plugins.aggregators.heteagg import HeteAgg
from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.diagnostics import measure
from prufed_plugins.params import HeteAggParams
from prufed_plugins.tensor_files import TensorFile

RANK = 16
TIMES = 3
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write(
    directory: Path, clients: int, layers: int, width: int, density: float, distinct: int = 10**9
) -> None:
    for client in range(-1, clients):
        name = "global" if client < 0 else f"client.{client:03}"
        if client >= distinct:
            link(directory, client, client % distinct)
            continue
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


def link(directory: Path, client: int, original: int) -> None:
    for kind in ("client", "mask"):
        source = directory / f"{kind}.{original:03}.safetensors"
        if source.exists():
            (directory / f"{kind}.{client:03}.safetensors").hardlink_to(source)


def merge(directory: Path, clients: Sequence[int]) -> Iterator[dict[str, float]]:
    """Merge the first so many clients; yield peaks in bytes, and times: the best of several.

    Reading and merging take turns, so that what else the machine does meets both alike.
    """
    torch.set_num_threads(1)
    state = read_state(directory)
    # one buffer for all reads, as the peaks are compared with one another
    buffer = bytearray((directory / "global.safetensors").stat().st_size + 4096)
    for count in clients:
        read_once(directory, count, buffer)  # brings the files into the page cache
        before = reset_peak()
        spent: dict[str, list[tuple[float, float]]] = {"reading": [], "merging": [], "again": []}
        for what in ("merging", "again"):
            method = HeteAgg(HeteAggParams()) if what == "again" else None
            merge_once(directory, count, state, method)
            for _ in range(TIMES):
                spent["reading"].append(timed(lambda: read_once(directory, count, buffer)))  # noqa: B023
                spent[what].append(timed(lambda: merge_once(directory, count, state, method)))  # noqa: B023
        yield {
            "clients": count,
            "before": before,
            "peak": peak_bytes(),
            **{what: min(cpu for cpu, _ in times) for what, times in spent.items()},
            **{f"{what}_wall": min(wall for _, wall in times) for what, times in spent.items()},
        }


def compare(directory: Path, count: int) -> dict[str, float]:
    """Return the CPU seconds of plain ways to the mean, which hold more and check nothing.

    ``diagnostics`` are those of the round: how the updates lie to one another.
    """
    torch.set_num_threads(1)
    state = read_state(directory)
    updates = [read_update(directory, index, state) for index in range(count)]
    return {
        "clients": count,
        "merging": timed(lambda: merge_once(directory, count, state))[0],
        "diagnostics": timed(lambda: measure(updates, state))[0],
        "stacked": timed(lambda: stacked_mean(updates, state))[0],
        "state_dicts": timed(lambda: state_dict_mean(directory, updates))[0],
    }


def merge_once(
    directory: Path, count: int, state: GlobalState, method: HeteAgg | None = None
) -> None:
    updates = [read_update(directory, index, state) for index in range(count)]
    aggregate(method or HeteAgg(HeteAggParams()), updates, state)


def stacked_mean(updates: Sequence[Update], state: GlobalState) -> None:
    """All clients' values of a tensor in one tensor, in float32."""
    for name, old in state.tensors.items():
        values = torch.stack([update.tensors[name] for update in updates])
        if updates[0].masks is None:
            values.mean(dim=0)
            continue
        masks = torch.stack([update.masks[name] for update in updates if update.masks])
        counts = masks.sum(dim=0)
        torch.where(counts > 0, torch.where(masks, values, 0.0).sum(dim=0) / counts, old)


def state_dict_mean(directory: Path, updates: Sequence[Update]) -> None:
    """One client's whole state after the other's, added up in float32."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for index, update in enumerate(updates):
        state = load_file(directory / f"client.{index:03}.safetensors")
        masks = update.masks or {}
        for name, tensor in state.items():
            mask = masks[name] if name in masks else torch.ones_like(tensor, dtype=torch.bool)
            kept = torch.where(mask, tensor, 0.0)
            sums[name] = sums[name] + kept if name in sums else kept
            counts[name] = counts[name] + mask if name in counts else mask.int()
    for name, total in sums.items():
        total /= counts[name].clamp(min=1)


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU seconds and the seconds on the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return time.process_time() - cpu, time.perf_counter() - wall


def read_state(directory: Path) -> GlobalState:
    tensors = dict(TensorFile(directory / "global.safetensors").items())
    layers = len(tensors) // (2 * len(PROJECTIONS))
    return GlobalState(tensors, rank=RANK, scaling=1.0, layers=layers)


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
        # stands for the digest that is in an artifact's manifest
        masks_digest=str(masks.stat().st_ino) if masks.exists() else None,
    )


def read_once(directory: Path, clients: int, buffer: bytearray) -> None:
    """Read the clients' files once into the buffer, each from its start."""
    for index in range(clients):
        for kind in ("client", "mask"):
            path = directory / f"{kind}.{index:03}.safetensors"
            if path.exists():
                with path.open("rb", buffering=0) as file:
                    file.readinto(buffer)


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
        layers, width, density, *distinct = rest
        few = [int(count) for count in distinct]
        write(Path(directory), int(clients), int(layers), int(width), float(density), *few)
    elif what == "compare":
        print(json.dumps(compare(Path(directory), int(clients))))
    else:
        for figures in merge(Path(directory), [int(count) for count in (clients, *rest)]):
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
