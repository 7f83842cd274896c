"""Server optimizers: the papers' formulas by hand, and coverage."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import GlobalState, ServerOptimizer, Update
from prufed_plugins.discover import build, catalog
from prufed_plugins.errors import MethodError
from prufed_plugins.testing import check_optimizer

NAMES = [entry.name for entry in catalog().methods("optimizer")]
ADAPTIVE = [name for name in NAMES if name != "fedavgm"]
numbers = st.floats(-2, 2, width=32)


def optimizer(name: str, **settings: Any) -> ServerOptimizer:
    made: ServerOptimizer = build("optimizer", name, settings)
    return made


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def steps(made: ServerOptimizer, deltas: list[float]) -> list[float]:
    """Return where rounds with these pseudo-gradients lead, from 0."""
    found, value = [], one(0.0)
    for delta in deltas:
        value = made.step("x", value, value + delta, None)
        found.append(float(value))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_conforms(name: str) -> None:
    check_optimizer(lambda: optimizer(name)).require()


@pytest.mark.parametrize("name", ["fedyogi", "fedadam"])
def test_the_corrected_variants_conform(name: str) -> None:
    check_optimizer(lambda: optimizer(name, bias_correction=True)).require()


# --- worked examples -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fedadagrad", 0.0995012), ("fedyogi", 0.0951249), ("fedadam", 0.0951261)],
)
def test_the_first_step_by_the_paper(name: str, expected: float) -> None:
    # eta .1, Delta .2, m = 0, v = tau^2 with tau 1e-3; beta1 0 for Adagrad, else .9; beta2 .99
    assert steps(optimizer(name, lr=0.1), [0.2]) == [pytest.approx(expected, abs=5e-8)]


def test_three_rounds_of_momentum() -> None:
    # m: 1, .9 + 2 = 2.9, 2.61 - 1 = 1.61
    found = steps(optimizer("fedavgm"), [1.0, 2.0, -1.0])
    assert found == pytest.approx([1.0, 3.9, 5.51], rel=1e-6)
    assert steps(optimizer("fedavgm", momentum=0.0), [1.0, 2.0]) == [1.0, 3.0]
    assert steps(optimizer("fedavgm", momentum=0.0, lr=0.5), [1.0]) == [0.5]


def test_two_rounds_of_each_adaptive_method() -> None:
    eta, tau, d1, d2 = 0.1, 1e-3, 0.2, -0.1
    m1, m2 = 0.1 * d1, 0.9 * 0.1 * d1 + 0.1 * d2
    adagrad = (tau**2 + d1**2, tau**2 + d1**2 + d2**2)
    adam1 = 0.99 * tau**2 + 0.01 * d1**2
    adam = (adam1, 0.99 * adam1 + 0.01 * d2**2)
    yogi1 = tau**2 + 0.01 * d1**2  # v below Delta^2: it grows
    yogi = (yogi1, yogi1 + 0.01 * d2**2)
    for name, (v1, v2), (first, second) in (
        ("fedadagrad", adagrad, (d1, d2)),
        ("fedadam", adam, (m1, m2)),
        ("fedyogi", yogi, (m1, m2)),
    ):
        x1 = eta * first / (math.sqrt(v1) + tau)
        x2 = x1 + eta * second / (math.sqrt(v2) + tau)
        assert steps(optimizer(name, lr=eta), [d1, d2]) == pytest.approx([x1, x2], rel=1e-6)


def test_yogi_shrinks_by_the_square_of_the_change_where_adam_shrinks_by_v() -> None:
    yogi, adam = optimizer("fedyogi"), optimizer("fedadam")
    for made in (yogi, adam):
        steps(made, [1.0, 1e-3])
    v = {name: float(made.state()["v/x"]) for name, made in (("yogi", yogi), ("adam", adam))}
    first = 1e-6 + 0.01
    assert v["yogi"] == pytest.approx(first - 0.01 * 1e-6, rel=1e-6)
    assert v["adam"] == pytest.approx(0.99 * (0.99e-6 + 0.01) + 0.01 * 1e-6, rel=1e-6)


def test_bias_correction_makes_the_first_step_the_learning_rate() -> None:
    # m / (1 - beta1) = Delta, v / (1 - beta2) = Delta^2: the step is eta Delta / (|Delta| + tau)
    found = steps(optimizer("fedadam", lr=0.1, bias_correction=True), [0.2])
    assert found == [pytest.approx(0.1 * 0.2 / 0.201, rel=1e-6)]


# --- coverage ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    corrected=st.booleans(),
    rounds=st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=8),
)
def test_an_entry_steps_as_if_rounds_without_coverage_had_not_been(
    name: str, corrected: bool, rounds: list[tuple[float, bool]]
) -> None:
    given = {"bias_correction": True} if corrected and name in {"fedyogi", "fedadam"} else {}
    masked, alone = optimizer(name, **given), optimizer(name, **given)
    value = torch.zeros(2, dtype=torch.float64)
    expected = one(0.0)
    for delta, present in rounds:
        covered = torch.tensor([present, True])
        value = masked.step("x", value, value + delta, covered)
        if present:
            expected = alone.step("x", expected, expected + delta, None)
        assert value[:1].equal(expected)


class Mean:
    """The plain mean, and says nothing about coverage: it follows from the clients' masks."""

    def prepare(self, updates: Any, state: GlobalState) -> None:
        pass

    def merge(self, module: str, parts: Any, current: Any) -> Any:
        from prufed_plugins.aggregators.coverage import coverage_mean

        merged = coverage_mean(parts, current, {"a": 1.0, "b": 1.0})
        return type(merged)(merged.tensors)


def test_a_federation_steps_where_clients_are_and_nowhere_else() -> None:
    names = [
        f"model.layers.{layer}.q_proj.lora_{factor}.weight" for layer in (0, 1) for factor in "AB"
    ]
    shapes = {name: (2, 3) if "lora_A" in name else (4, 2) for name in names}
    state = GlobalState({n: torch.ones(s) for n, s in shapes.items()}, 2, 1.0, 2)
    here = names[:2]  # nobody has layer 1
    masks = {name: torch.ones(shapes[name], dtype=torch.bool) for name in here}
    masks[here[0]][0, 0] = False
    update = Update(
        "a", {n: torch.full(shapes[n], 3.0) for n in here}, masks, 5, 2, 1.0, kept_layers=(0,)
    )
    made = optimizer("fedavgm", lr=0.5)
    result = aggregate(Mean(), [update], state, optimizer=made)
    new = result.state.tensors
    assert torch.equal(new[here[0]], torch.tensor([[1.0, 2, 2], [2, 2, 2]]))
    assert torch.equal(new[here[1]], torch.full((4, 2), 2.0))
    assert all(torch.equal(new[name], state.tensors[name]) for name in names[2:])
    assert made.state().keys() == {f"m/{name}" for name in here}
    assert made.state()[f"m/{here[0]}"][0, 0] == 0


def test_a_state_of_other_shapes_is_refused() -> None:
    made = optimizer("fedadam")
    made.load_state({"m/x": torch.zeros(3)})
    with pytest.raises(MethodError, match=r"state of x has shape \[3\], not \[1\]"):
        made.step("x", one(0.0), one(1.0), None)
