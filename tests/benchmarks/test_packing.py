"""Packing a pruned bfloat16 matrix of 4096 x 4096: bytes and seconds against the dense file.

Times are CPU seconds of one thread, the best of three. Sizes are asserted; times are printed beside
those of safetensors writing and reading the same matrix.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prufed_cli.packing import pack_file, unpack_file
from prufed_plugins.factor_masks import magnitude_mask
from prufed_plugins.mask_files import MaskFile, save_masks

SIZE = 4096


def pattern_mask(weight: Tensor) -> Tensor:
    """Keep the two largest of every four."""
    groups = weight.abs().reshape(-1, 4)
    mask = torch.zeros(groups.shape, dtype=torch.bool)
    return mask.scatter_(1, groups.topk(2, dim=1).indices, True).reshape(weight.shape)


def best(action: Callable[[Path], object], target: Path) -> float:
    spent = []
    for _ in range(3):
        target.unlink(missing_ok=True)
        begin = time.process_time()
        action(target)
        spent.append(time.process_time() - begin)
    return min(spent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "choose", "limit"),
    [
        ("50 %", lambda weight: magnitude_mask(weight, 0.5), 0.40),
        ("75 %", lambda weight: magnitude_mask(weight, 0.75), 0.22),
        ("2:4", pattern_mask, 0.40),
    ],
    ids=["50", "75", "2of4"],
)
def test_a_pruned_matrix(
    tmp_path: Path,
    name: str,
    choose: Callable[[Tensor], Tensor],
    limit: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE) * 0.02
    mask = choose(weight)
    tensors = {"weight": torch.where(mask, weight, 0.0).bfloat16()}
    dense, masks = tmp_path / "dense.safetensors", tmp_path / "masks.safetensors"
    packed, packed_masks = tmp_path / "packed", tmp_path / "packed-masks"
    save_masks(masks, {"weight": mask})
    writing = best(lambda target: save_file(tensors, target), dense)
    reading = best(lambda _: load_file(dense)["weight"].clone(), tmp_path / "nothing")
    packing = best(lambda target: pack_file(dense, target, MaskFile(masks)), packed)
    packing += best(lambda target: pack_file(masks, target), packed_masks)
    restored = tmp_path / "restored"
    unpacking = best(lambda target: unpack_file(packed_masks, target), tmp_path / "masks-again")
    unpacking += best(lambda target: unpack_file(packed, target, MaskFile(masks)), restored)
    assert restored.read_bytes() == dense.read_bytes()
    ratio = (packed.stat().st_size + packed_masks.stat().st_size) / dense.stat().st_size
    with capsys.disabled():
        print(
            f"\n{name}: {ratio:.4f} of dense; packing {packing:.2f} s = {packing / writing:.1f} x"
            f" writing, unpacking {unpacking:.2f} s = {unpacking / reading:.1f} x reading"
        )
    assert ratio <= limit
