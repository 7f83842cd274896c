"""Does an aggregator keep the contracts C1 to C14? ::

    from prufed_plugins.testing import check_aggregator

    def test_my_method() -> None:
        check_aggregator(lambda: MyMethod(MyParams())).require()

Everything runs through the same driver as a real round, on small random adapters. Two attributes
say what a method needs, and the kit's federations are then as large:
``least_clients``, the fewest it can merge, and ``stacks``, that its global rank is the sum of the
clients' ranks. To a method that holds the clients against an update of the server's own, the kit
gives one that halves the global adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from prufed_plugins.aggregators.streaming import aggregate
from prufed_plugins.api import Aggregator, GlobalState, Update
from prufed_plugins.errors import MethodError, UpdateError
from prufed_plugins.names import layer_index
from prufed_plugins.testing.checks import Outcome, run_checks
from prufed_plugins.testing.federation import random_state, random_update
from prufed_plugins.write_back import write_back

Tensors = Mapping[str, Tensor]

_DENSITIES: Final = (1.0, 0.75, 0.5, 0.25)


def check_aggregator(make: Callable[[], Aggregator]) -> Outcome:
    """Check an aggregator against the contracts.

    Args:
        make: constructs the method under test.

    Returns:
        One check per contract, named like ``c1_identical_clients``. Those that the method's
        ``breaks`` declares may be broken, by design.
    """
    return run_checks(make, CONTRACTS)


# --- the contracts -------------------------------------------------------------------------------


def c1_identical_clients(aggregator: Aggregator) -> None:
    """Clients that hold parts of one adapter give that adapter back where any of them has it."""
    state, theta = random_state(seed=1), random_state(seed=2).tensors
    updates = [
        _holding(theta, random_update(state, f"c{i}", seed=i, density=_DENSITIES[i % 4]))
        for i in _several(aggregator, 4)
    ]
    _assert_close(_run(aggregator, updates, state), theta)


def c2_order_of_clients(aggregator: Aggregator) -> None:
    """The order in which updates arrive changes no bit."""
    state, updates = _mixed_federation(aggregator)
    first = _run(aggregator, updates, state)
    for order in ((3, 1, 0, 2), (2, 3, 1, 0)):
        moved = [*updates[4:], *(updates[index] for index in order)]
        _assert_equal(_run(aggregator, moved, state), first)


def c3_scale_of_weights(aggregator: Aggregator) -> None:
    """Multiplying all weights by one number changes nothing."""
    state, updates = _mixed_federation(aggregator)
    scaled = [replace(update, weight=update.weight * 3.7) for update in updates]
    _assert_close(_run(aggregator, scaled, state), _run(aggregator, updates, state))


def c4_full_masks_are_fedavg(aggregator: Aggregator) -> None:
    """With nothing masked and equal samples, the result is the plain mean."""
    state = random_state(seed=3)
    updates = [random_update(state, f"c{i}", seed=i) for i in _several(aggregator, 3)]
    mean = {
        name: torch.stack([update.tensors[name].double() for update in updates]).mean(dim=0)
        for name in state.tensors
    }
    _assert_close(_run(aggregator, updates, state), mean)


def c5_entries_without_a_client(aggregator: Aggregator) -> None:
    """An entry that no client has stays exactly as it was."""
    state = random_state(seed=4)
    updates = [random_update(state, f"c{i}", seed=i, density=0.4) for i in _several(aggregator, 3)]
    result = _run(aggregator, updates, state)
    for name, old in state.tensors.items():
        absent = ~torch.stack([(update.masks or {})[name] for update in updates]).any(dim=0)
        _assert_shape(name, result[name], old)
        assert torch.equal(result[name][absent], old[absent]), f"{name} moved where nobody has it"


def c6_write_back_keeps_sparsity(aggregator: Aggregator) -> None:
    """Written back, the result leaves every client its zeros and its number of entries."""
    state = random_state(seed=5)
    updates = [
        random_update(state, f"c{index}", seed=index, density=_DENSITIES[index % 4])
        for index in _several(aggregator, 4)
    ]
    result = replace(state, tensors=_run(aggregator, updates, state))
    for update in updates:
        masks = update.masks or {}
        given = write_back(
            result,
            masks=masks,
            kept_layers=update.kept_layers,
            scaling=update.scaling,
            rank=update.rank,
        )
        for name, tensor in given.items():
            assert torch.equal(tensor != 0, masks[name]), f"{name} has other zeros than its mask"


def c7_one_client(aggregator: Aggregator) -> None:
    """A single client's own entries come back as they were sent."""
    state = random_state(seed=6)
    update = random_update(state, "only", seed=1, density=0.5)
    result = _run(aggregator, [update], state)
    for name, mask in (update.masks or {}).items():
        _assert_close({name: result[name][mask]}, {name: update.tensors[name][mask]})


def c8_strict_updates(aggregator: Aggregator) -> None:
    """An update that does not fit is refused with the client's name, never cut to size."""
    state = random_state(seed=7)
    good = [random_update(state, f"c{i}", seed=i, density=0.5) for i in _several(aggregator, 2)]
    for what, bad in _misfits(random_update(state, "bad", seed=9, density=0.5), state).items():
        if what == "wrong rank" and getattr(aggregator, "mixes_ranks", False):
            continue
        blamed = _blamed(aggregator, [*good, bad], state)
        assert blamed == "bad", f"{what}: blamed {blamed or 'nobody'}"


def c9_precise_sums(aggregator: Aggregator) -> None:
    """Sums are taken in float32 or better whatever the clients send, and cast once."""
    state = random_state(seed=8)
    generator = torch.Generator().manual_seed(0)
    updates = []
    for index in range(40):  # near 2,000 float16 knows whole numbers only, and 40 overflow it
        client = random_update(state, f"c{index:02}", seed=index)
        tensors = {
            name: 2000.0 + torch.randint(0, 40, tensor.shape, generator=generator)
            for name, tensor in client.tensors.items()
        }
        updates.append(replace(client, tensors=tensors))
    precise = _run(aggregator, updates, state)
    sent = [replace(update, tensors=_as_float16(update.tensors)) for update in updates]
    result = _run(aggregator, sent, replace(state, tensors=_as_float16(state.tensors)))
    for name, tensor in result.items():
        assert tensor.dtype == torch.float16, f"{name} came back as {tensor.dtype}"
        error = float((tensor.double() - precise[name].double()).abs().max())
        assert error <= 1, f"{name} is off by {error:.3g}"


def c10_empty_round(aggregator: Aggregator) -> None:
    """Without updates nothing changes."""
    state = random_state(seed=10)
    _assert_equal(_run(aggregator, [], state), state.tensors)


def c11_nan_and_infinity(aggregator: Aggregator) -> None:
    """NaN or infinity in an entry costs its client the round; in a masked entry it is ignored."""
    state = random_state(seed=11)
    good = [random_update(state, f"c{i}", seed=i, density=0.5) for i in _several(aggregator, 2)]
    other = random_update(state, "x", seed=7, density=0.5)
    state = _room(aggregator, [*good, other], state)
    without, whole = _run(aggregator, good, state), _run(aggregator, [*good, other], state)
    for value in (float("nan"), float("inf")):
        hidden = _poisoned(other, value, present=False)
        _assert_equal(_run(aggregator, [*good, hidden], state), whole)
        visible = [*good, _poisoned(other, value, present=True)]
        blamed = _blamed(aggregator, visible, state)
        assert blamed == "x", f"{value}: blamed {blamed or 'nobody'}"
        result = aggregate(aggregator, visible, state, on_invalid="exclude")
        assert set(result.excluded) == {"x"}, f"excluded {sorted(result.excluded)}"
        _assert_equal(result.state.tensors, without)


def c12_splitting_tensors(aggregator: Aggregator) -> None:
    """Cutting every tensor in two along its features and merging the halves changes no bit."""
    state = random_state(k=6, d=4, seed=12)
    updates = [
        random_update(state, f"c{index}", seed=index, density=_DENSITIES[index % 4])
        for index in _several(aggregator, 4)
    ]
    halves = []
    for part in (0, 1):
        cut = [
            replace(
                update,
                tensors=_one_half(update.tensors, part),
                masks=_one_half(update.masks or {}, part),
            )
            for update in updates
        ]
        small = replace(state, tensors=_one_half(state.tensors, part))
        halves.append(_run(aggregator, cut, small))
    joined = {
        name: torch.cat([half[name] for half in halves], dim=_feature_axis(name))
        for name in state.tensors
    }
    _assert_equal(joined, _run(aggregator, updates, state))


def c13_names_of_layers(aggregator: Aggregator) -> None:
    """Renumbering the layers for everyone renumbers the result and does nothing else."""
    state, updates = _mixed_federation(aggregator)
    moved_state = replace(state, tensors=_renumbered(state.tensors))
    moved = [
        replace(
            update,
            tensors=_renumbered(update.tensors),
            masks=_renumbered(update.masks or {}),
            kept_layers=tuple(sorted(_NEW_NUMBER[layer] for layer in update.kept_layers)),
        )
        for update in updates
    ]
    expected = _renumbered(_run(aggregator, updates, state))
    _assert_equal(_run(aggregator, moved, moved_state), expected)


def c14_copies_of_the_global_adapter(aggregator: Aggregator) -> None:
    """Clients that send the global adapter back unchanged leave it unchanged."""
    state = random_state(seed=14)
    updates = [
        replace(random_update(state, f"c{index}", seed=index), tensors=dict(state.tensors))
        for index in _several(aggregator, 5)
    ]
    _assert_close(_run(aggregator, updates, state), state.tensors)


def inputs_are_left_alone(aggregator: Aggregator) -> None:
    """Neither the updates nor the old global adapter are written to."""
    state, updates = _mixed_federation(aggregator)
    kept = [{name: tensor.clone() for name, tensor in u.tensors.items()} for u in updates]
    old = {name: tensor.clone() for name, tensor in state.tensors.items()}
    _run(aggregator, updates, state)
    _assert_equal(state.tensors, old)
    for update, before in zip(updates, kept, strict=True):
        _assert_equal(update.tensors, before)


CONTRACTS: Final[tuple[Callable[[Aggregator], None], ...]] = (
    c1_identical_clients,
    c2_order_of_clients,
    c3_scale_of_weights,
    c4_full_masks_are_fedavg,
    c5_entries_without_a_client,
    c6_write_back_keeps_sparsity,
    c7_one_client,
    c8_strict_updates,
    c9_precise_sums,
    c10_empty_round,
    c11_nan_and_infinity,
    c12_splitting_tensors,
    c13_names_of_layers,
    c14_copies_of_the_global_adapter,
    inputs_are_left_alone,
)


# --- federations and comparisons -----------------------------------------------------------------

_NEW_NUMBER: Final = {0: 2, 1: 0, 2: 1}


def _run(aggregator: Aggregator, updates: Sequence[Update], state: GlobalState) -> Tensors:
    whole = _room(aggregator, updates, state)
    trust = getattr(aggregator, "trust", None)
    if trust is not None:
        trust(_root(whole))
    return aggregate(aggregator, updates, whole).state.tensors


def _root(state: GlobalState) -> Update:
    """Return an update of the server's own; it follows from the state, so a renamed one fits."""
    tensors = {name: tensor / 2 for name, tensor in state.tensors.items()}
    layers = tuple(range(state.layers))
    return Update("root", tensors, None, 1, state.rank, state.scaling, layers)


def _room(aggregator: Aggregator, updates: Sequence[Update], state: GlobalState) -> GlobalState:
    """Return the state at the rank that a method needs which stacks the clients' factors."""
    ranks = sum(update.rank for update in updates)
    if not getattr(aggregator, "stacks", False) or ranks <= state.rank:
        return state
    tensors = {}
    for name, tensor in state.tensors.items():
        shape = list(tensor.shape)
        shape[1 - _feature_axis(name)] = ranks - state.rank
        tensors[name] = torch.cat([tensor, tensor.new_zeros(shape)], dim=1 - _feature_axis(name))
    return replace(state, tensors=tensors, rank=ranks)


def _several(aggregator: Aggregator, number: int) -> range:
    """Return indices of that many clients, or of as many as the method needs."""
    return range(max(number, getattr(aggregator, "least_clients", 1)))


def _blamed(aggregator: Aggregator, updates: Sequence[Update], state: GlobalState) -> str | None:
    """Return the client for whose update the round is refused."""
    try:
        _run(aggregator, updates, state)
    except UpdateError as error:
        return error.client
    return None


def _mixed_federation(aggregator: Aggregator) -> tuple[GlobalState, list[Update]]:
    """Return clients of several densities and sizes, and depths where the method allows it."""
    state = random_state(layers=3, seed=20)
    depths: Sequence[Sequence[int]] = ((0, 1, 2), (0, 2), (0, 1, 2), (1,))
    updates = [_client(state, index, depths[index % 4]) for index in _several(aggregator, 4)]
    try:
        aggregator.prepare(updates, state)
    except MethodError:
        return state, [_client(state, index, (0, 1, 2)) for index in range(len(updates))]
    return state, updates


def _client(state: GlobalState, index: int, layers: Sequence[int]) -> Update:
    return random_update(
        state,
        f"c{index}",
        seed=30 + index,
        density=_DENSITIES[index % 4],
        kept_layers=layers,
        samples=10 * (index + 1),
    )


def _holding(theta: Tensors, update: Update) -> Update:
    """Return the update with the values of ``theta`` where its masks are True."""
    masks = update.masks or {}
    tensors = {name: torch.where(masks[name], theta[name], 0.0) for name in update.tensors}
    return replace(update, tensors=tensors)


def _misfits(update: Update, state: GlobalState) -> dict[str, Update]:
    """Return updates that must be refused, by what is wrong with them."""
    name = next(iter(state.tensors))
    tensors, masks = dict(update.tensors), dict(update.masks or {})
    fewer = {key: value for key, value in tensors.items() if key != name}
    other: dict[str, Any] = {
        "missing tensor": {"tensors": fewer, "masks": None},
        "unknown tensor": {"tensors": tensors | {f"model.{name}": tensors[name]}},
        "wrong shape": {"tensors": tensors | {name: tensors[name][:, :-1].contiguous()}},
        "wrong rank": {
            "rank": state.rank + 1,
            "tensors": {key: _wider(key, value) for key, value in tensors.items()},
            "masks": None,
        },
        "wrong mask shape": {"masks": masks | {name: masks[name][:, :-1].contiguous()}},
        "mask that is not bool": {"masks": masks | {name: masks[name].float()}},
        "mask of an unknown tensor": {"masks": masks | {f"model.{name}": masks[name]}},
        "tensor of integers": {"tensors": tensors | {name: tensors[name].int()}},
        "layer out of range": {"kept_layers": (*update.kept_layers, state.layers)},
        "repeated layer": {"kept_layers": (0, *update.kept_layers)},
        "tensor of a layer the client lacks": {"kept_layers": update.kept_layers[1:]},
    }
    other |= {
        f"{field} {value}": {field: value}
        for field in ("weight", "samples", "scaling")
        for value in (0, -1, float("nan"), float("inf"))
    }
    return {what: replace(update, **fields) for what, fields in other.items()}


def _wider(name: str, tensor: Tensor) -> Tensor:
    """Return the factor with one rank more."""
    axis = 1 - _feature_axis(name)
    return torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)


def _poisoned(update: Update, value: float, *, present: bool) -> Update:
    """Return the update with ``value`` in an entry of every tensor that it has, or lacks."""
    tensors = {}
    for name, tensor in update.tensors.items():
        where = (update.masks or {})[name] == present
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[where.flatten().nonzero()[0]] = value
    return replace(update, tensors=tensors)


def _feature_axis(name: str) -> int:
    """Return the axis of k in A (r, k), of d in B (d, r)."""
    return 1 if name.endswith("lora_A.weight") else 0


def _as_float16(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.half() for name, tensor in tensors.items()}


def _one_half(tensors: Tensors, part: int) -> dict[str, Tensor]:
    return {
        name: tensor.chunk(2, dim=_feature_axis(name))[part].contiguous()
        for name, tensor in tensors.items()
    }


def _renumbered(tensors: Tensors) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        layer = layer_index(name)
        new = "" if layer is None else f".{_NEW_NUMBER[layer]}."
        renamed[name if layer is None else name.replace(f".{layer}.", new, 1)] = tensor
    return renamed


def _assert_shape(name: str, result: Tensor, expected: Tensor) -> None:
    shapes = list(result.shape), list(expected.shape)
    assert shapes[0] == shapes[1], f"{name} has shape {shapes[0]}, not {shapes[1]}"


def _assert_equal(result: Tensors, expected: Tensors) -> None:
    assert result.keys() == expected.keys(), f"other tensors: {sorted(result)}"
    for name, tensor in expected.items():
        assert torch.equal(result[name], tensor), f"{name} differs"


def _assert_close(result: Tensors, expected: Tensors) -> None:
    for name, tensor in expected.items():
        _assert_shape(name, result[name], tensor)
        error = float((result[name].double() - tensor.double()).abs().max())
        assert error <= 1e-5, f"{name} differs by up to {error:.2g}"
