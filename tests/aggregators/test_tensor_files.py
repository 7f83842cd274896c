"""Reading tensors from files: the same values as safetensors, and every kind of bad file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prufed_plugins.errors import MethodError
from prufed_plugins.tensor_files import TensorFile

TENSORS = {
    "float32": torch.randn(3, 5),
    "float64": torch.randn(2).double(),
    "bfloat16": torch.randn(4, 3).bfloat16(),
    "float16": torch.randn(1, 1, 2).half(),
    "bool": torch.rand(7) < 0.5,
    "int64": torch.arange(4),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
}


def test_every_tensor_is_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file(TENSORS, path, metadata={"some": "thing"})
    file, expected = TensorFile(path), load_file(path)
    assert set(file) == set(expected)
    assert len(file) == len(TENSORS)
    for name, tensor in expected.items():
        assert file[name].dtype == tensor.dtype
        assert torch.equal(file[name], tensor)
    assert "other" not in file
    with pytest.raises(KeyError):
        file["other"]


def test_tensors_are_the_callers_own(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file(TENSORS, path)
    file = TensorFile(path)
    one, other = file["float32"], file["float32"]
    one.zero_()
    assert torch.equal(other, TENSORS["float32"])
    assert torch.equal(file["float32"], TENSORS["float32"])


@pytest.mark.parametrize(
    "content",
    [b"", b"\x10", b"not a tensor file at all", b"\x80\x04\x95pickle", b"\xff" * 64],
    ids=["empty", "one byte", "text", "pickle", "huge header"],
)
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(MethodError, match="cannot read tensors from"):
        TensorFile(path)


def test_a_missing_or_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(MethodError, match="cannot read tensors from"):
        TensorFile(path)
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(MethodError, match="cannot read tensors from"):
            TensorFile(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.randn(100), "b": torch.randn(100)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert file["a"].shape == (100,)
    with pytest.raises(MethodError, match=r"cannot read b from .*1 bytes are missing"):
        file["b"]
