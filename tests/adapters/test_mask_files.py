"""Masks in files: every bit comes back, and what contradicts itself is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from prufed_plugins.errors import MethodError
from prufed_plugins.mask_files import (
    METADATA_KEY,
    MaskFile,
    digest,
    load_masks,
    pack,
    save_masks,
    unpack,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(0, 2**32))
def test_packing_is_undone_by_unpacking(shape: list[int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(mask)
    assert packed.numel() == (mask.numel() + 7) // 8
    assert torch.equal(unpack(packed, shape), mask)


@pytest.mark.parametrize(
    ("packed", "shape"),
    [
        (torch.zeros(2, dtype=torch.uint8), (4, 2)),  # a byte too many
        (torch.zeros(1, dtype=torch.uint8), (3, 3)),  # a bit too few
        (torch.zeros(1, dtype=torch.int8), (4, 2)),
        (torch.tensor([0b1000_0000], dtype=torch.uint8), (7,)),  # a bit beyond the end
    ],
)
def test_packed_masks_of_another_length_are_refused(
    packed: torch.Tensor, shape: tuple[int, ...]
) -> None:
    with pytest.raises(MethodError, match="packed mask"):
        unpack(packed, shape)


def test_files_keep_masks_and_are_the_same_bytes(tmp_path: Path) -> None:
    masks = {"b": torch.rand(3, 5) < 0.5, "a": torch.rand(4, 4) < 0.5}
    save_masks(tmp_path / "one", masks)
    save_masks(tmp_path / "two", dict(reversed(masks.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = load_masks(tmp_path / "one")
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    assert digest(loaded) == digest(masks)


def test_a_mask_file_unpacks_what_is_asked_for(tmp_path: Path) -> None:
    masks = {"b": torch.rand(3, 5) < 0.5, "a": torch.rand(4, 4) < 0.5}
    save_masks(tmp_path / "masks", masks)
    file = MaskFile(tmp_path / "masks")
    assert list(file) == ["a", "b"]
    assert len(file) == 2
    assert torch.equal(file["b"], masks["b"])
    assert file.get("c") is None


def test_digests_tell_names_shapes_and_entries_apart() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    others = [{"b": mask}, {"a": mask.T}, {"a": ~mask}, {"a": mask, "b": mask}, {}]
    assert len({digest({"a": mask}), *map(digest, others)}) == 6


def _stated(shapes: object, layout: object = 1, **more: object) -> dict[str, str]:
    return {METADATA_KEY: json.dumps({"layout": layout, "shapes": shapes, **more})}


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        (None, "not a mask file"),
        ({"format": "pt"}, "not a mask file"),
        ({METADATA_KEY: "{"}, "unreadable metadata"),
        ({METADATA_KEY: "[]"}, "unreadable metadata"),
        (_stated({"a": [-8]}), "unreadable metadata"),
        (_stated({"a": "8"}), "unreadable metadata"),
        (_stated([8]), "unreadable metadata"),
        (_stated({"a": [8]}, stored=["b"]), "unreadable metadata"),
        (_stated({"a": [8]}, stored={"b": "c"}), "unreadable metadata"),
        (_stated({"a": [8]}, stored={"a": 1}), "unreadable metadata"),
        (_stated({"a": [8], "b": [8]}, stored={"a": "b"}), "unreadable metadata"),
        (_stated({"a": [8]}, layout=2), "layout 2"),
        (_stated({"a": [8], "b": [8]}), "differ in b"),
        (_stated({}), "differ in a"),
        (_stated({"a": [9]}), "takes 2 bytes"),
    ],
)
def test_files_that_contradict_themselves_are_refused(
    tmp_path: Path, metadata: dict[str, str] | None, match: str
) -> None:
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "masks", metadata=metadata)
    with pytest.raises(MethodError, match=match):
        load_masks(tmp_path / "masks")


def test_files_that_are_cut_short_or_missing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    with pytest.raises(MethodError, match="cannot read masks"):
        load_masks(path)
    save_masks(path, {"a": torch.ones(64, 64, dtype=torch.bool)})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(MethodError, match="cannot read masks"):
        load_masks(path)
