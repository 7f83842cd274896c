"""What every server optimizer must do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prufed_plugins.api import ServerOptimizer
from prufed_plugins.testing.checks import Outcome, run_checks

NAME = "model.layers.0.self_attn.q_proj.lora_B.weight"
SHAPE = (6, 4)


def check_optimizer(make: Callable[[], ServerOptimizer]) -> Outcome:
    """Run every check on a server optimizer.

    Args:
        make: constructs it; called once per check.
    """
    return run_checks(
        make,
        (
            keeps_shape_and_dtype,
            steps_towards_the_aggregate,
            stays_where_the_aggregate_is_the_old_value,
            leaves_uncovered_entries_alone,
            remembers_nothing_of_rounds_without_coverage,
            keeps_tensors_apart,
            goes_on_from_its_state,
            leaves_its_arguments_alone,
        ),
    )


def keeps_shape_and_dtype(optimizer: ServerOptimizer) -> None:
    """It returns a finite tensor of the old one's shape and dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        old, aggregate = _draw(0).to(dtype), _draw(1).to(dtype)
        new = optimizer.step(str(dtype), old, aggregate, None)
        assert new.shape == old.shape, f"it became {list(new.shape)}"
        assert new.dtype == dtype, f"{dtype} became {new.dtype}"
        assert bool(torch.isfinite(new).all()), "it is not finite"


def steps_towards_the_aggregate(optimizer: ServerOptimizer) -> None:
    """The first step moves every entry towards the aggregate."""
    old, aggregate = _draw(0), _draw(1)
    step = optimizer.step(NAME, old, aggregate, None) - old
    away = int((step * (aggregate - old) <= 0).sum())
    assert away == 0, f"{away} entries move away or not at all"


def stays_where_the_aggregate_is_the_old_value(optimizer: ServerOptimizer) -> None:
    """In a first round that changes nothing, nothing moves."""
    old = _draw(0)
    assert torch.equal(optimizer.step(NAME, old, old.clone(), None), old), "it moves"


def leaves_uncovered_entries_alone(optimizer: ServerOptimizer) -> None:
    """Entries without coverage keep their value, whatever momentum there is."""
    value, covered = _draw(0), _covered()
    value = optimizer.step(NAME, value, _draw(1), None)
    for index in range(2, 5):
        new = optimizer.step(NAME, value, _draw(index), covered)
        assert torch.equal(new[~covered], value[~covered]), "uncovered entries move"
        assert not torch.equal(new[covered], value[covered]), "covered entries do not"
        value = new


def remembers_nothing_of_rounds_without_coverage(optimizer: ServerOptimizer) -> None:
    """After rounds without coverage, an entry steps as if they had not been: nothing decays."""
    value, aggregate, nowhere = _draw(0), _draw(1), torch.zeros(SHAPE, dtype=torch.bool)
    for name in ("with", "without"):
        optimizer.step(name, value, aggregate, None)
    for index in range(3):
        optimizer.step("with", value, _draw(10 + index), nowhere)
    steps = [optimizer.step(name, value, _draw(2), None) for name in ("with", "without")]
    assert torch.equal(*steps), "its moments changed where nothing was covered"


def keeps_tensors_apart(optimizer: ServerOptimizer) -> None:
    """The step of one tensor does not depend on another's."""
    value, aggregate = _draw(0), _draw(1)
    alone = optimizer.step("one", value, aggregate, None)
    optimizer.step("two", _draw(5), _draw(6), None)
    assert torch.equal(optimizer.step("three", value, aggregate, None), alone), "it does"


def goes_on_from_its_state(optimizer: ServerOptimizer) -> None:
    """Given back the state it had, it takes the same step again, to the bit."""
    value = optimizer.step(NAME, _draw(0), _draw(1), _covered())
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    first = optimizer.step(NAME, value, _draw(2), None)
    optimizer.load_state(state)
    assert torch.equal(optimizer.step(NAME, value, _draw(2), None), first), "the steps differ"


def leaves_its_arguments_alone(optimizer: ServerOptimizer) -> None:
    """The tensors it is given are not changed."""
    old, aggregate, covered = _draw(0), _draw(1), _covered()
    for _ in range(2):
        optimizer.step(NAME, old, aggregate, covered)
    assert torch.equal(old, _draw(0)), "it changed the old tensor"
    assert torch.equal(aggregate, _draw(1)), "it changed the aggregate"
    assert torch.equal(covered, _covered()), "it changed the coverage"


def _draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def _covered() -> Tensor:
    return torch.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE) % 3 != 0
