"""Packed files that are damaged, or made to do damage: one sentence, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from torch import Tensor

from prufed_cli.errors import INTEGRITY, PrufedError
from prufed_cli.packing import pack_file, unpack_file

Edit = Callable[[dict[str, Any], dict[str, Any]], None]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(0)
    mask = torch.rand(40, 50) < 0.5
    weight = torch.where(mask, torch.randn(40, 50), 0.0).bfloat16()
    source = tmp_path_factory.mktemp("damage") / "model.safetensors"
    save_torch_file({"weight": weight, "norm": torch.ones(60)}, source)
    return source, {"weight": mask}


@pytest.fixture
def packed(original: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    source, masks = original
    pack_file(source, tmp_path / "packed", masks)
    return tmp_path / "packed"


def refuse(packed: Path, masks: dict[str, Tensor], words: str = ".") -> None:
    target = packed.with_name("restored")
    with pytest.raises(PrufedError, match=words) as caught:
        unpack_file(packed, target, masks)
    assert caught.value.exit_code == INTEGRITY
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert not target.exists()


def edit(packed: Path, change: Edit) -> None:
    """Change what a packed file says about itself, and its tensors; it stays a safetensors file."""
    with safe_open(packed, framework="np") as file:
        stated = json.loads(file.metadata()["prufed-packed"])
    tensors = load_file(packed)
    change(stated, tensors)
    save_file(tensors, packed, metadata={"prufed-packed": json.dumps(stated)})


def test_every_truncation_is_refused(
    packed: Path, original: tuple[Path, dict[str, Tensor]]
) -> None:
    whole = packed.read_bytes()
    for length in [*range(0, 200, 9), *range(200, len(whole), 101)]:
        packed.write_bytes(whole[:length])
        refuse(packed, original[1])


def test_every_flipped_bit_is_refused_or_does_not_matter(
    packed: Path, original: tuple[Path, dict[str, Tensor]]
) -> None:
    source, masks = original
    whole = packed.read_bytes()
    draw = np.random.default_rng(0)
    for place in draw.integers(0, len(whole), 400):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(draw.integers(8))
        packed.write_bytes(changed)
        target = packed.with_name("restored")
        with suppress(PrufedError):
            unpack_file(packed, target, masks)
            # blanks at the end of the header, for one, mean nothing
            assert target.read_bytes() == source.read_bytes()
            target.unlink()
            continue
        refuse(packed, masks)


def test_an_unknown_version_is_refused(
    packed: Path, original: tuple[Path, dict[str, Tensor]]
) -> None:
    edit(packed, lambda stated, _: stated.update(layout=2))
    refuse(packed, original[1], "packed layout 2, this version reads 1")


def bomb(stated: dict[str, Any], tensors: dict[str, Any]) -> None:
    """A frame that says truly that it becomes a gigabyte."""
    frame = zstandard.ZstdCompressor().compress(b"\0" * 2**30)
    tensors["norm"] = np.frombuffer(frame, np.uint8)
    stated["tensors"]["norm"] = [["zstd", len(frame)]]


def lying_frame(stated: dict[str, Any], tensors: dict[str, Any]) -> None:
    """A frame that does not say what it becomes."""
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(b"\0" * 2**24)
    tensors["norm"] = np.frombuffer(frame, np.uint8)
    stated["tensors"]["norm"] = [["zstd", len(frame)]]


def more_after_the_frame(stated: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["norm"] = np.append(tensors["norm"], np.uint8(0))
    stated["tensors"]["norm"][0][1] += 1


def enormous_tensor(stated: dict[str, Any], tensors: dict[str, Any]) -> None:
    """An original that says it is an exabyte."""
    header = json.loads(stated["header"])
    begin = header["weight"]["data_offsets"][0]
    places = [begin, begin + 10**18]
    header["weight"] = {"dtype": "U8", "shape": [10**18], "data_offsets": places}
    stated["header"] = json.dumps(header)
    stated["size"] = 8 + len(stated["header"]) + places[1]


def replace(key: str, value: object) -> Edit:
    return lambda stated, _: stated.update({key: value})


def chunks(value: object) -> Edit:
    return lambda stated, _: stated["tensors"].update(norm=value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (bomb, "60 entries take 240 bytes, not 1073741824"),
        (lying_frame, "60 entries take 240 bytes, not -1"),
        (more_after_the_frame, "damaged"),
        (enormous_tensor, "'weight' do not add up"),
        (replace("size", 10**18), "do not add up"),
        (replace("sha256", "0" * 64), "not what was packed"),
        (replace("sha256", "../../x"), "cannot be read"),
        (replace("layout", "1"), "cannot be read"),
        (replace("layout", 0), "cannot be read"),
        (replace("extra", 1), "cannot be read"),
        (replace("header", "[]"), "not that of a safetensors file"),
        (replace("header", '{"a": 1}'), "not that of a safetensors file"),
        (replace("header", "[" * 100_000), "not that of a safetensors file"),
        (replace("header", "{}"), "do not add up"),
        (chunks([]), "'norm' do not add up"),
        (chunks([["zstd", -5]]), "'norm' do not add up"),
        (chunks([["zstd", 5], ["zstd", 5]]), "'norm' do not add up"),
        (chunks([["pickle", 5]]), "cannot be read"),
        (lambda stated, tensors: tensors.pop("norm"), "does not hold what it says of 'norm'"),
        (lambda stated, tensors: stated["tensors"].pop("norm"), "what it says of 'norm'"),
        (lambda stated, tensors: tensors.update(odd=tensors["norm"]), "what it says of 'odd'"),
        (
            lambda stated, tensors: tensors.update(norm=tensors["norm"].astype(np.int16)),
            "'norm' do not add up",
        ),
    ],
)
def test_statements_that_do_not_hold_together_are_refused(
    packed: Path, original: tuple[Path, dict[str, Tensor]], change: Edit, words: str
) -> None:
    edit(packed, change)
    refuse(packed, original[1], words)


def test_an_original_with_a_gap_is_refused(
    packed: Path, original: tuple[Path, dict[str, Tensor]]
) -> None:
    def leave_gap(stated: dict[str, Any], tensors: dict[str, Any]) -> None:
        header = json.loads(stated["header"])
        last = max(header, key=lambda name: header[name].get("data_offsets", [0])[0])
        header[last]["data_offsets"] = [offset + 8 for offset in header[last]["data_offsets"]]
        stated["header"] = json.dumps(header)

    edit(packed, leave_gap)
    refuse(packed, original[1], "leaves a gap")


def test_other_masks_are_refused(packed: Path, original: tuple[Path, dict[str, Tensor]]) -> None:
    mask = original[1]["weight"]
    refuse(packed, {}, "weight: its mask is missing")
    refuse(packed, {"weight": mask.t()}, "weight: its mask is missing")
    refuse(packed, {"weight": ~mask}, "entries take")
    refuse(packed, {"weight": mask.flip(0)}, "not what was packed")


def test_what_is_no_packed_file_is_refused(
    packed: Path, original: tuple[Path, dict[str, Tensor]]
) -> None:
    source, masks = original
    packed.write_bytes(source.read_bytes())
    refuse(packed, masks, "not a packed file")
    packed.write_bytes(b"\x80\x02}q" * 99)
    refuse(packed, masks)


def test_a_damaged_original_is_not_packed(
    tmp_path: Path, original: tuple[Path, dict[str, Tensor]]
) -> None:
    whole = original[0].read_bytes()
    (tmp_path / "source").write_bytes(whole[:-1])
    with pytest.raises(PrufedError, match="not a whole safetensors file"):
        pack_file(tmp_path / "source", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_nothing_is_overwritten(packed: Path, original: tuple[Path, dict[str, Tensor]]) -> None:
    before = packed.read_bytes()
    with pytest.raises(FileExistsError):
        pack_file(original[0], packed, original[1])
    assert packed.read_bytes() == before
