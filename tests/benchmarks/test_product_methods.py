"""Methods that look at products B A of a 4096 x 4096 module: time as ratios, and peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prufed_plugins.aggregators.products import A, B, stacked, truncated
from prufed_plugins.api import Part

MEASURE = Path(__file__).with_name("measure_heteagg_ls.py")
RANKS = (8, 8, 16, 16, 32, 32, 64, 64)
SIZE = 4096


def parts() -> list[Part]:
    generator = torch.Generator().manual_seed(0)
    return [
        Part(
            f"c{index}",
            {
                A: torch.randn(rank, SIZE, generator=generator),
                B: torch.randn(SIZE, rank, generator=generator),
            },
            {A: None, B: None},
            1,
            1.0,
            rank,
        )
        for index, rank in enumerate(RANKS)
    ]


def dense(clients: list[Part]) -> tuple[Tensor, float]:
    """Return the singular values of the mean product, formed as d x k, and the CPU seconds."""
    started = time.process_time()
    product = torch.zeros(SIZE, SIZE)
    for part in clients:
        product += part.tensors[B] @ part.tensors[A] / len(clients)
    _, values, _ = torch.linalg.svd(product, full_matrices=False)
    return values, time.process_time() - started


@pytest.mark.slow
def test_flexlora_against_forming_the_product() -> None:
    """Eight clients of rank 8 to 64: the same singular values."""
    clients = parts()
    current = {A: torch.zeros(64, SIZE), B: torch.zeros(SIZE, 64)}
    weights = {part.client: 1.0 for part in clients}
    started = time.process_time()
    merged = truncated(*stacked(clients, weights), current, "left")
    ours = time.process_time() - started
    values, theirs = dense(clients)
    found = merged.tensors[B].norm(dim=0)  # A's rows are orthonormal
    error = float(((found - values[:64]) / values[0]).abs().max())
    print(
        f"\nflexlora {ours:.2f} s, product {theirs:.2f} s, ratio {theirs / ours:.1f} (budget 20), "
        f"error {error:.1e}"
    )
    assert error <= 1e-5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_heteagg_ls_of_one_module() -> None:
    """Four clients of rank 16 with masks: under 1 GB in all."""
    command = [sys.executable, str(MEASURE)]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(output.stdout)
    print(
        "\nheteagg-ls:",
        ", ".join(f"{key} {value:.1f}" for key, value in figures.items()),
        "(s, MiB; budget 10 s of two cores)",
    )
    assert figures["peak"] <= 1024
