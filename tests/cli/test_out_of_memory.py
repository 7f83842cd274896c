"""Errors that say memory ran out, raised by what cannot be had, are told from all others."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np
import pytest
import torch

from prufed_cli.out_of_memory import is_out_of_memory

TOO_MUCH = 2**60  # bytes


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
        lambda: np.empty(TOO_MUCH, dtype=np.uint8),
        lambda: bytearray(TOO_MUCH),
        lambda: mmap.mmap(-1, TOO_MUCH),
    ],
    ids=["torch", "numpy", "python", "mapped"],
)
def test_what_cannot_be_had_is_out_of_memory(ask: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError, OSError)) as raised:
        ask()
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError(2, "No such file or directory"),
        ValueError("memory"),
    ],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_a_device_without_memory_left_is() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
