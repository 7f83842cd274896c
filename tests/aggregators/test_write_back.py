"""Giving the global adapter back: mask, layers, scale, rank, share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from prufed_plugins.aggregators.heteagg import HeteAgg
from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.errors import MethodError
from prufed_plugins.params import HeteAggParams
from prufed_plugins.testing.federation import random_state, random_update
from prufed_plugins.write_back import write_back

STATE = random_state(layers=3, seed=1)
WHOLE: dict[str, Any] = {"masks": None, "kept_layers": (0, 1, 2), "scaling": 1.0, "rank": 2}
A = "model.layers.0.self_attn.q_proj.lora_A.weight"


def test_a_client_gets_its_layers_and_the_shared_modules_only() -> None:
    given = write_back(STATE, **{**WHOLE, "kept_layers": (0, 2)})
    assert list(given) == [name for name in STATE.tensors if ".1." not in name]
    for name, tensor in given.items():
        assert torch.equal(tensor, STATE.tensors[name])


def test_zeros_stay_zeros_and_entries_stay_entries() -> None:
    client = random_update(STATE, "a", seed=2, density=0.5)
    masks = client.masks or {}
    given = write_back(STATE, **{**WHOLE, "masks": masks}, own=client.tensors, share=0.5)
    for name, tensor in given.items():
        assert torch.equal(tensor != 0, masks[name])


def test_nan_in_a_masked_entry_of_the_clients_own_is_not_seen() -> None:
    client = random_update(STATE, "a", seed=2, density=0.5)
    masks = client.masks or {}
    dirty = {name: torch.where(masks[name], t, float("nan")) for name, t in client.tensors.items()}
    given = write_back(STATE, **{**WHOLE, "masks": masks}, own=dirty, share=0.5)
    clean = write_back(STATE, **{**WHOLE, "masks": masks}, own=client.tensors, share=0.5)
    for name, tensor in given.items():
        assert torch.equal(tensor, clean[name])


@pytest.mark.parametrize("scaling", [0.25, 1.0, 16.0, 3.7])
def test_the_clients_scale_undoes_the_common_scale(scaling: float) -> None:
    state = replace(STATE, scaling=2.0)
    given = write_back(state, **{**WHOLE, "scaling": scaling})
    client = replace(random_update(state, "a", seed=0), tensors=given, scaling=scaling)
    again = aggregate(HeteAgg(HeteAggParams(include_global=False)), [client], state).state
    for name, tensor in again.tensors.items():
        torch.testing.assert_close(tensor, state.tensors[name])
    a, b = given[A], given[A.replace("lora_A", "lora_B")]
    whole_a, whole_b = state.tensors[A], state.tensors[A.replace("lora_A", "lora_B")]
    torch.testing.assert_close(scaling * (b @ a), 2.0 * (whole_b @ whole_a))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_client_can_keep_a_share_of_its_own_values(share: float) -> None:
    own = random_update(STATE, "a", seed=3).tensors
    given = write_back(STATE, **WHOLE, own=own, share=share)
    for name, tensor in given.items():
        mixed = (1 - share) * STATE.tensors[name].double() + share * own[name].double()
        assert torch.equal(tensor, mixed.float())


def test_the_share_is_in_the_clients_own_scale() -> None:
    own = {name: torch.full_like(tensor, 8.0) for name, tensor in STATE.tensors.items()}
    ones = replace(STATE, tensors={n: torch.ones_like(t) for n, t in STATE.tensors.items()})
    given = write_back(ones, **{**WHOLE, "scaling": 0.25}, own=own, share=0.5)
    assert torch.equal(given[A], torch.full_like(given[A], 5.0))  # (1 · sqrt(1 / 0.25) + 8) / 2


def test_a_client_of_lower_rank_gets_the_first_ranks() -> None:
    given = write_back(STATE, **{**WHOLE, "rank": 1})
    b = A.replace("lora_A", "lora_B")
    assert torch.equal(given[A], STATE.tensors[A][:1])
    assert torch.equal(given[b], STATE.tensors[b][:, :1])
    assert given[b].is_contiguous()


def test_the_global_adapter_is_not_shared_with_the_client() -> None:
    before = STATE.tensors[A].clone()
    write_back(STATE, **WHOLE)[A].zero_()
    assert torch.equal(STATE.tensors[A], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 3}, "rank 3 is not between 1 and the global rank 2"),
        ({"rank": 0}, "rank 0"),
        ({"scaling": 0.0}, "scaling is 0.0"),
        ({"share": 1.5}, r"share 1.5 is outside \[0, 1\]"),
        ({"share": float("nan")}, "share nan"),
        ({"share": 0.5}, "own tensor .* is missing"),
        (
            {"share": 0.5, "own": {n: t[:1] for n, t in STATE.tensors.items()}},
            "own tensor .* shape",
        ),
        ({"masks": {"other": torch.ones(1).bool()}}, "mask other is unknown"),
        ({"masks": {A: torch.ones(1).bool()}}, "mask .* has shape"),
        ({"kept_layers": (1,), "masks": {A: torch.ones(2, 5).bool()}}, "mask .* is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message) as caught:
        write_back(STATE, **{**WHOLE, **change})
    assert caught.value.hint


def test_a_personal_factor_stays_with_the_client() -> None:
    own = {name: torch.full_like(tensor, 7.0) for name, tensor in STATE.tensors.items()}
    given = write_back(STATE, **WHOLE, own=own, personal={"B"})
    for name, tensor in given.items():
        assert torch.equal(tensor, own[name] if "lora_B" in name else STATE.tensors[name])
    with pytest.raises(MethodError, match=r"own tensor .* is missing"):
        write_back(STATE, **WHOLE, own={}, personal={"B"})


@pytest.mark.parametrize("window", [[0], [0, 2], [0, 0], [0, 1, 1]])
def test_a_window_that_does_not_fit_is_refused(window: list[int]) -> None:
    with pytest.raises(MethodError, match="of the 2 ranks"):
        write_back(STATE, **WHOLE, window=window)
