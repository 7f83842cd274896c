"""What a safetensors file says of its tensors, read by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from prufed_plugins.safetensors_header import header_bytes, read_header, with_length


def test_a_header_says_where_each_tensor_lies(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, path, metadata={"x": "y"})
    start, header = read_header(path)
    assert header == {
        "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [2, 2], "data_offsets": [12, 28]},
    }
    content = path.read_bytes()
    assert len(content) == start + 28
    assert content[:start] == with_length(header_bytes(path))


def test_a_file_that_is_not_whole_has_no_header(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.zeros(3)}, path)
    content = path.read_bytes()
    for damaged in (b"", content[:5], content[:40], content[:-1], content + b"0"):
        path.write_bytes(damaged)
        with pytest.raises(SafetensorError):
            read_header(path)
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "nothing")
