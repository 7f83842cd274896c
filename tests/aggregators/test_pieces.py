"""Reading clients piece by piece gives the very bytes that reading them whole gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from prufed_plugins.aggregators import pieces
from prufed_plugins.aggregators.fedavg import FedAvg
from prufed_plugins.aggregators.heteagg import HeteAgg
from prufed_plugins.aggregators.heteagg_layer import HeteAggLayer
from prufed_plugins.aggregators.streaming import Aggregated, aggregate
from prufed_plugins.api import GlobalState, Update
from prufed_plugins.errors import UpdateError
from prufed_plugins.mask_files import MaskFile, digest, save_masks
from prufed_plugins.memory import scratch
from prufed_plugins.params import FedAvgParams, HeteAggLayerParams, HeteAggParams
from prufed_plugins.tensor_files import TensorFile
from prufed_plugins.testing.federation import random_state, random_update

METHODS: dict[str, Callable[[], Any]] = {
    "heteagg": lambda: HeteAgg(HeteAggParams(include_global=False)),
    "weighted": lambda: HeteAgg(HeteAggParams(include_global=False, beta=0.5)),
    "joined": lambda: HeteAgg(HeteAggParams(include_global=True, global_weight=0.3)),
    "zero": lambda: HeteAgg(HeteAggParams(include_global=False, fallback="zero")),
    "of two": lambda: HeteAgg(HeteAggParams(include_global=False, min_count=2)),
    "layer": lambda: HeteAggLayer(HeteAggLayerParams()),
    "fedavg": lambda: FedAvg(FedAvgParams()),
}


class Whole(Mapping[str, Tensor]):
    """Tensors that can only be had whole."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> int:
    """Make pieces so short that tiny tensors have several, some of them odd."""
    monkeypatch.setattr(pieces, "RUN", 7)
    return 7


def whole(update: Update) -> Update:
    masks = None if update.masks is None else Whole(update.masks)
    return replace(update, tensors=Whole(update.tensors), masks=masks)


def on_disk(update: Update, directory: Path) -> Update:
    tensors, masks = directory / f"{update.client}.safetensors", directory / f"{update.client}.m"
    save_file(dict(update.tensors), tensors)
    if update.masks is None:
        return replace(update, tensors=TensorFile(tensors))
    save_masks(masks, update.masks)
    return replace(update, tensors=TensorFile(tensors), masks=MaskFile(masks))


def vouched(update: Update) -> Update:
    """Say what is so: nothing but zeros outside the masks."""
    return replace(update, masks_digest=digest(update.masks)) if update.masks else update


def assert_equal(one: Aggregated, other: Aggregated) -> None:
    assert one.diagnostics == other.diagnostics
    assert one.excluded == other.excluded
    for name, tensor in one.state.tensors.items():
        assert torch.equal(tensor, other.state.tensors[name])


def federation(seed: int, scaling: float = 1.0) -> tuple[GlobalState, list[Update]]:
    state = random_state(layers=2, rank=3, k=11, d=6, seed=seed)
    plans: list[dict[str, Any]] = [
        {"density": 0.5},
        {"density": 0.2, "kept_layers": (1,)},
        {},
        {"density": 0.0},
    ]
    updates = [
        random_update(state, f"c{index}", seed=seed + index, samples=10 + index, **plan)
        for index, plan in enumerate(plans)
    ]
    return state, [replace(update, scaling=scaling) for update in updates]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 99),
    st.sampled_from(sorted(METHODS)),
    st.sampled_from([1.0, 4.0, 0.3]),
    st.sets(st.integers(0, 3), min_size=1),
)
def test_pieces_and_files_change_nothing(
    tmp_path: Path, run: int, seed: int, name: str, scaling: float, chosen: set[int]
) -> None:
    state, updates = federation(seed, scaling)
    updates = [updates[index] for index in sorted(chosen)]
    if name == "fedavg":
        updates = [update for update in updates if len(update.kept_layers) == 2]
    expected = aggregate(METHODS[name](), [whole(update) for update in updates], state)
    assert_equal(aggregate(METHODS[name](), updates, state), expected)
    stored = [on_disk(update, tmp_path) for update in updates]
    assert_equal(aggregate(METHODS[name](), stored, state), expected)
    mixed = [stored[0], *map(whole, updates[1:])] if stored else []
    assert_equal(aggregate(METHODS[name](), mixed, state), expected)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(sorted(METHODS)),
    st.lists(
        st.tuples(st.integers(0, 3), st.sets(st.integers(0, 3), min_size=1), st.booleans()),
        min_size=1,
        max_size=5,
    ),
)
def test_counts_of_the_round_before_change_nothing(
    tmp_path: Path, run: int, name: str, rounds: list[tuple[int, set[int], bool]]
) -> None:
    """Clients come and go, their values change, and sometimes one has other masks."""
    method = METHODS[name]()
    state, first = federation(1)
    for seed, chosen, other_masks in rounds:
        updates = []
        for index in sorted(chosen):
            fresh = federation(seed)[1][index]
            masks = (fresh if other_masks and index == max(chosen) else first[index]).masks
            tensors = {
                key: tensor if masks is None else torch.where(masks[key], tensor, 0.0)
                for key, tensor in fresh.tensors.items()
            }
            updates.append(replace(fresh, tensors=tensors, masks=masks))
        if name == "fedavg":
            updates = [update for update in updates if len(update.kept_layers) == 2]
        expected = aggregate(METHODS[name](), [whole(update) for update in updates], state)
        stored = [vouched(on_disk(update, tmp_path)) for update in updates]
        assert_equal(aggregate(method, stored, state), expected)


def test_masks_that_have_not_changed_are_not_read_again(run: int, tmp_path: Path) -> None:
    state, updates = federation(5)
    expected = aggregate(METHODS["heteagg"](), updates, state)
    for is_vouched in (True, False):
        method = METHODS["heteagg"]()
        stored = [on_disk(update, tmp_path) for update in updates]
        stored = list(map(vouched, stored)) if is_vouched else stored
        assert_equal(aggregate(method, stored, state), expected)
        for file in tmp_path.glob("*.m"):
            file.unlink()
        if is_vouched:
            assert_equal(aggregate(method, stored, state), expected)
            continue
        with pytest.raises(UpdateError, match="client c0: cannot read"):
            aggregate(method, stored, state)


def test_nan_outside_masks_that_are_not_read_is_ignored(run: int, tmp_path: Path) -> None:
    state, updates = federation(5)
    name = next(iter(updates[0].tensors))
    assert updates[0].masks is not None
    absent = (~updates[0].masks[name]).reshape(-1).nonzero().reshape(-1).tolist()
    expected = aggregate(METHODS["heteagg"](), updates, state)
    method = METHODS["heteagg"]()
    for update in (updates[0], spoil(updates[0], name, absent), updates[0]):
        stored = [vouched(on_disk(one, tmp_path)) for one in (update, *updates[1:])]
        assert_equal(aggregate(method, stored, state), expected)


def spoil(update: Update, name: str, places: list[int]) -> Update:
    tensors = {key: tensor.clone() for key, tensor in update.tensors.items()}
    tensors[name].reshape(-1)[places] = float("nan")
    return replace(update, tensors=tensors)


def test_nan_outside_the_mask_is_ignored_in_every_piece(run: int, tmp_path: Path) -> None:
    state, updates = federation(5)
    name = next(iter(updates[0].tensors))
    assert updates[0].masks is not None
    absent = (~updates[0].masks[name]).reshape(-1).nonzero().reshape(-1).tolist()
    assert max(absent) > run
    spoiled = spoil(updates[0], name, absent)
    expected = aggregate(METHODS["heteagg"](), updates, state)
    for update in (spoiled, on_disk(spoiled, tmp_path)):
        assert_equal(aggregate(METHODS["heteagg"](), [update, *updates[1:]], state), expected)


def test_nan_that_exists_is_counted_over_all_pieces(run: int, tmp_path: Path) -> None:
    state, updates = federation(5)
    name = next(iter(updates[2].tensors))
    spoiled = on_disk(spoil(updates[2], name, [0, 1, 12, 30]), tmp_path)
    with pytest.raises(UpdateError, match=f"client c2: {name} has 4 entries that are NaN"):
        aggregate(METHODS["heteagg"](), [*updates[:2], spoiled], state)
    result = aggregate(METHODS["heteagg"](), [*updates[:2], spoiled], state, on_invalid="exclude")
    assert list(result.excluded) == ["c2"]
    expected = aggregate(METHODS["heteagg"](), updates[:2], state)
    assert result.diagnostics == expected.diagnostics


def test_a_mask_is_read_in_pieces_as_it_is_whole(tmp_path: Path) -> None:
    mask = torch.rand(5, 9) < 0.5
    save_masks(tmp_path / "m", {"w": mask})
    entries = MaskFile(tmp_path / "m").entries("w")
    assert (entries.dtype, entries.shape) == (torch.bool, (5, 9))
    for start in range(46):
        for stop in range(start, 46):
            assert torch.equal(entries.read(start, stop, None), mask.reshape(-1)[start:stop])


def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    first = scratch([3, 1000], "f4")
    place = first.__array_interface__["data"][0]
    tensor = torch.from_numpy(first).view(torch.int32)[1]
    del first
    other = scratch([3, 1000], "f4")
    assert other.__array_interface__["data"][0] != place
    view = tensor.numpy()[5:]
    del tensor
    assert scratch([3, 1000], "f4").__array_interface__["data"][0] != place
    del view
    again = [scratch([3, 1000], "f4") for _ in range(3)]
    assert place in {array.__array_interface__["data"][0] for array in again}
