"""A CUDA device makes the CPU's decisions, within the rounding of its products."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from prufed_plugins.api import PruneTarget
from prufed_plugins.discover import build
from tests.pruners.whole_models import open_decoder


@pytest.mark.cuda
@pytest.mark.parametrize("target", [PruneTarget(sparsity=0.5), PruneTarget(pattern=(2, 4))])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("magnitude", {}),
        ("magnitude", {"group": "global"}),
        ("wanda", {}),
        ("sparsegpt", {}),
        ("sparsegpt", {"threshold": "reference"}),
    ],
)
def test_masks_agree_with_the_cpu(
    llama: Any, ids: Tensor, method: str, settings: dict[str, object], target: PruneTarget
) -> None:
    masks = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(llama).to(device)
        results = build("pruner", method, settings).prune(
            open_decoder(model), [ids.to(device)], target, lambda *_: None
        )
        masks.append(torch.cat([result.mask.cpu().flatten() for result in results]))
    assert int(masks[0].sum()) == int(masks[1].sum())
    assert float((masks[0] == masks[1]).float().mean()) >= 0.99
