"""Tensors go from file to file: cast here, or copied by the system as they are."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prufed_cli.errors import PrufedError
from prufed_cli.models.stored import Spec, TensorWriter, stored_tensors

TENSORS = {
    "a": torch.arange(35.0).reshape(5, 7),
    "b": torch.arange(6, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "last": torch.full((3,), 2.5),
}


def copied(source: Path, target: Path, dtype: torch.dtype | None = None) -> dict[str, Any]:
    stored = stored_tensors(source)
    specs = {
        name: Spec(dtype if dtype and one.dtype.is_floating_point else one.dtype, one.shape)
        for name, one in stored.items()
    }
    with TensorWriter(target, specs) as writer:
        for name in reversed(specs):
            writer.copy(name, stored[name])
    return load_file(target)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("refused", [None, 0, errno.EXDEV, errno.EPERM])
def test_a_copy_is_the_same_whoever_copies(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype | None,
    refused: int | None,
) -> None:
    save_file(TENSORS, tmp_path / "source.safetensors")
    if refused is not None:

        def refuse(*_: object) -> int:
            if refused:
                raise OSError(refused, os.strerror(refused))
            return 0

        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    found = copied(tmp_path / "source.safetensors", tmp_path / "target.safetensors", dtype)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        cast = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert found[name].dtype == cast.dtype
        assert torch.equal(found[name], cast), name


def test_a_source_that_has_become_shorter_is_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    save_file(TENSORS, source)
    stored = stored_tensors(source)
    os.truncate(source, source.stat().st_size - 8)
    last = max(stored.values(), key=lambda one: (one.size > 0, one.offset)).name
    with (
        pytest.raises(PrufedError, match="shorter"),
        TensorWriter(target, {last: Spec(stored[last].dtype, stored[last].shape)}) as writer,
    ):
        writer.copy(last, stored[last])
    assert [file.name for file in tmp_path.iterdir()] == ["source.safetensors"]
