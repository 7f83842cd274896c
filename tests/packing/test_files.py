"""One safetensors file, packed and restored: every byte comes back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from prufed_cli.packing import pack_file, unpack_file
from prufed_cli.packing.layout import CHUNK

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS = ["uniform", "n:m", "none", "all"]


def round_trip(source: Path, masks: Mapping[str, Tensor] | None = None) -> Path:
    """Pack and unpack a file, compare it with the original, and return the packed one."""
    packed, restored = source.with_name("packed.safetensors"), source.with_name("restored")
    packed.unlink(missing_ok=True)
    restored.unlink(missing_ok=True)
    pack_file(source, packed, masks)
    unpack_file(packed, restored, masks)
    assert restored.read_bytes() == source.read_bytes()
    return packed


def encodings(packed: Path, name: str) -> list[str]:
    from prufed_cli.packing.files import read_packed

    return [encoding for encoding, _ in read_packed(packed).tensors[name]]


def write_raw(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path


@st.composite
def masked_tensors(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Return a tensor of any bits, NaN and -0.0 included, and a mask it mostly respects."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=3)))
    size = math.prod(shape)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(KINDS))
    if kind == "n:m":
        n, m = draw(st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 5)]))
        kept = np.argsort(random.random((-(-size // m), m)), axis=1).reshape(-1)[:size] >= n
    else:
        kept = random.random(size) < {"uniform": 0.4, "none": 0.0, "all": 1.1}[kind]
    width = torch.empty(0, dtype=dtype).element_size()
    bits = random.integers(0, 256, (size, width), dtype=np.uint8)
    bits[~kept] = 0
    bits[random.random(size) < draw(st.sampled_from([0.0, 0.3]))] = 0  # zero, and kept
    if size and draw(st.booleans()):
        bits[draw(st.integers(0, size - 1)), -1] ^= 0x80  # -0.0 where it was 0, kept or not
    raw = torch.from_numpy(bits.reshape(-1))
    return raw.view(dtype).reshape(shape), torch.from_numpy(kept).reshape(shape)


@settings(deadline=None, max_examples=200)
@given(st.lists(masked_tensors(), max_size=4))
def test_any_bits_under_any_mask_come_back(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[Tensor, Tensor]]
) -> None:
    source = tmp_path_factory.mktemp("any") / "model.safetensors"
    save_file({f"t{index}": tensor for index, (tensor, _) in enumerate(pairs)}, source)
    masks = {f"t{index}": mask for index, (_, mask) in enumerate(pairs)}
    round_trip(source, masks)
    round_trip(source)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_several_chunks_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, CHUNK // 2 + 5)
    mask = torch.rand(weight.shape) < 0.5
    tensors = {"pruned": torch.where(mask, weight, 0.0).to(dtype), "whole": weight.to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    packed = round_trip(tmp_path / "model.safetensors", {"pruned": mask})
    assert encodings(packed, "pruned") == ["masked-zstd", "masked-zstd"]
    assert encodings(packed, "whole") == ["zstd", "zstd"]


def test_entries_outside_the_mask_that_are_not_zero_are_kept(tmp_path: Path) -> None:
    mask = torch.arange(4096) % 2 == 0
    exact = torch.where(mask, 1.5, 0.0)
    negative = torch.where(mask, 1.5, -0.0)
    save_file({"exact": exact, "negative": negative}, tmp_path / "model.safetensors")
    packed = round_trip(tmp_path / "model.safetensors", {"exact": mask, "negative": mask})
    assert encodings(packed, "exact") == ["masked-zstd"]
    assert encodings(packed, "negative") == ["zstd"]


def test_what_compression_would_make_longer_is_stored_plain(tmp_path: Path) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8))
    mask = torch.tensor([True] * 5)
    tensors = {"noise": noise, "short": torch.randn(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    packed = round_trip(tmp_path / "model.safetensors", {"short": mask})
    assert encodings(packed, "noise") == ["plain"]
    assert encodings(packed, "short") == ["masked"]


def test_other_dtypes_come_back(tmp_path: Path) -> None:
    tensors = {
        "bool": torch.rand(77) < 0.5,
        "int64": torch.arange(2000),
        "float8": torch.randn(300).to(torch.float8_e4m3fn),
        "complex": torch.randn(50, dtype=torch.complex64),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "a": "b"})
    round_trip(tmp_path / "model.safetensors")


def test_the_headers_own_form_comes_back(tmp_path: Path) -> None:
    """Order, blanks, metadata and escapes are nobody's but the writer's."""
    header = json.dumps(
        {
            "späte": {"dtype": "F32", "shape": [2], "data_offsets": [6, 14]},
            "__metadata__": {"note": 'a "quoted" \u2713 word'},
            "early": {"shape": [3], "data_offsets": [0, 6], "dtype": "BF16"},
        },
        indent=3,
    )
    source = write_raw(tmp_path / "model.safetensors", header + "     ", bytes(range(14)))
    packed = round_trip(source)
    assert sorted(load_file(packed)) == ["early", "späte"], "it is a safetensors file too"


def test_a_file_without_tensors_comes_back(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    round_trip(tmp_path / "model.safetensors")


def test_a_mask_of_another_shape_is_not_used(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(4, 6)}, tmp_path / "model.safetensors")
    packed = round_trip(tmp_path / "model.safetensors", {"weight": torch.zeros(6, 4) > 0})
    assert encodings(packed, "weight") == ["zstd"]


@pytest.mark.parametrize(("sparsity", "limit"), [(0.5, 0.40), (0.75, 0.22)])
def test_sizes_of_a_pruned_matrix(tmp_path: Path, sparsity: float, limit: float) -> None:
    """Masks and values in bf16 against the dense matrix; 4096 x 4096 is a benchmark."""
    from prufed_plugins.factor_masks import magnitude_mask
    from prufed_plugins.mask_files import save_masks

    torch.manual_seed(0)
    weight = torch.randn(1024, 1024) * 0.02
    mask = magnitude_mask(weight, sparsity)
    dense = tmp_path / "model.safetensors"
    save_file({"weight": torch.where(mask, weight, 0.0).bfloat16()}, dense)
    save_masks(tmp_path / "masks", {"weight": mask})
    values = round_trip(dense, {"weight": mask}).stat().st_size
    masks = round_trip(tmp_path / "masks").stat().st_size
    assert (values + masks) / dense.stat().st_size <= limit


class Claimed(Mapping[str, Tensor]):
    """Masks that must not be unpacked, of the shapes they state."""

    shapes: Mapping[str, list[int]] = {"a": [2**40]}

    def __getitem__(self, name: str) -> Tensor:
        raise AssertionError("a mask of another shape is unpacked")

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def test_a_mask_of_another_shape_is_not_unpacked(tmp_path: Path) -> None:
    """A few bytes can state a mask of any size."""
    source = tmp_path / "source.safetensors"
    save_file({"a": torch.randn(4, 4)}, source)
    packed = round_trip(source, Claimed())
    assert "masked" not in encodings(packed, "a")
