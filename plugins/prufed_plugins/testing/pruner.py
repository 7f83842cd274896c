"""What every pruner must do, checked on a small decoder of our own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch

from prufed_plugins.api import KeptLayers, PrunedMatrix, PruneTarget
from prufed_plugins.errors import MethodError
from prufed_plugins.testing.checks import Outcome, run_checks
from prufed_plugins.testing.tiny_decoder import (
    LAYERS,
    OfConv1D,
    PrunedBefore,
    StoredInBfloat16,
    TinyDecoder,
    tokens,
)

if TYPE_CHECKING:
    from torch import Tensor

    from prufed_plugins.api import Pruner

__all__ = ["LAYERS", "TinyDecoder", "check_pruner", "tokens"]

HALF = PruneTarget(sparsity=0.5)

MORE_THAN_HALF: Final = 5
"""Of eight that are gone: whoever removes half without a look at the masks brings some back."""

Model = Callable[[], TinyDecoder]

MODELS: Final[Mapping[str, Model]] = {
    "a model in float32": TinyDecoder,
    "a model stored in bfloat16": StoredInBfloat16,
    "a model that was pruned before": PrunedBefore,
    "a model of Conv1D": OfConv1D,
}
"""What a masked pruner is tried on, and what each is called where it fails."""


def check_pruner(make: Callable[[], Pruner], target: PruneTarget | None = None) -> Outcome:
    """Check a pruner against its contract.

    Args:
        make: constructs the pruner.
        target: what to ask of it where any target will do. By default half of the model; nothing
            of a pruner that refuses that because its parameters already say what to remove.
    """
    target = target or _target_of(make())

    def told(check: Callable[[Pruner, PruneTarget], None]) -> Callable[[Pruner], None]:
        def run(pruner: Pruner) -> None:
            check(pruner, target)

        run.__name__, run.__doc__ = check.__name__, check.__doc__
        return run

    def on_each(check: Callable[[Pruner, PruneTarget, Model], None]) -> Callable[[Pruner], None]:
        def run(pruner: Pruner) -> None:
            for what, model in MODELS.items():
                try:
                    check(pruner, target, model)
                except AssertionError as error:
                    raise AssertionError(f"{error}, in {what}") from error

        run.__name__, run.__doc__ = check.__name__, check.__doc__
        return run

    kind = make().result
    checks = [_states_its_result, told(_same_input_same_result), told(_reports_its_progress)]
    if kind == "masked":
        checks += [
            told(_every_matrix_once_in_block_order),
            told(_weights_keep_their_layout),
            on_each(_pruned_entries_are_zero),
            told(_new_weights_can_be_stored),
            told(_what_is_gone_goes_first),
            told(_weights_are_written_into_the_model),
            told(_only_the_matrices_change),
            _sparsity_zero_changes_nothing,
            _sparsity_is_met,
            _pattern_is_met_or_refused,
            _sparsity_one_is_refused,
            on_each(_goes_on_where_it_was_stopped),
        ]
        checks += [_the_survey_changes_nothing] if hasattr(make(), "survey") else []
        if hasattr(make(), "prune_nested"):
            checks += [_nested_masks_are_nested, _nested_masks_lack_what_is_gone]
        checks += [_one_survey_is_every_survey] if hasattr(make(), "survey_nested") else []
    else:
        checks += [told(_keeps_layers_in_order), told(_the_model_stays_as_it_is)]
        checks += [_layer_count_is_met] if target is HALF else []
    return run_checks(make, checks)


def _prune(pruner: Pruner, decoder: TinyDecoder, target: PruneTarget) -> list[Any]:
    calibration = tokens() if pruner.needs_calibration else None
    return [
        copy.deepcopy(result)
        for result in pruner.prune(decoder, calibration, target, lambda what, done, total: None)
    ]


def _target_of(pruner: Pruner) -> PruneTarget:
    try:
        _prune(pruner, TinyDecoder(), HALF)
    except MethodError:
        return PruneTarget()
    except Exception:  # a broken pruner: the checks that follow report it
        return HALF
    return HALF


def _as_stored(decoder: TinyDecoder, result: PrunedMatrix) -> Tensor:
    """Return a new weight as it is read again once it was stored."""
    return result.weight.to(decoder.stored_dtype(result.name)).to(result.weight.dtype)


def _require_share(results: list[PrunedMatrix], sparsity: float) -> None:
    entries = sum(result.mask.numel() for result in results)
    kept = sum(int(result.mask.sum()) for result in results)
    found = 1 - kept / entries
    assert abs(found - sparsity) <= 0.02, f"asked for {sparsity}, pruned {found:.4f}"


def _require_gone(decoder: TinyDecoder, result: PrunedMatrix) -> None:
    before = decoder.masks.get(result.name)
    back = before is not None and bool((result.mask & ~before).any())
    assert not back, f"{result.name} has entries again that an earlier prune removed"


def _require_every_matrix_once(names: list[str], decoder: TinyDecoder) -> None:
    blocks = [int(name.split(".")[2]) for name in names]
    assert blocks == sorted(blocks), f"blocks came in the order {blocks}"
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    assert not twice, f"{twice[0]} came more than once"
    expected = {f"{name}.weight" for i in range(LAYERS) for name in decoder.linears(i)}
    assert sorted(names) == sorted(expected), "names differ"


def _states_its_result(pruner: Pruner) -> None:
    """The pruner says what it yields and whether it needs calibration."""
    assert pruner.result in {"masked", "sliced"}, f"result is {pruner.result!r}"
    assert isinstance(pruner.needs_calibration, bool), "needs_calibration is no bool"


def _same_input_same_result(pruner: Pruner, target: PruneTarget) -> None:
    """Two runs on equal models give equal bits."""
    first = _prune(pruner, TinyDecoder(), target)
    second = _prune(pruner, TinyDecoder(), target)
    assert len(first) == len(second), "the number of results differs"
    for one, other in zip(first, second, strict=True):
        if isinstance(one, KeptLayers):
            assert one == other, "the kept layers differ"
        else:
            assert torch.equal(one.mask, other.mask), f"the mask of {one.name} differs"
            assert torch.equal(one.weight, other.weight), f"{one.name} differs"


def _reports_its_progress(pruner: Pruner, target: PruneTarget) -> None:
    """Progress is reported and ends at its total."""
    calls: list[tuple[int, int]] = []
    calibration = tokens() if pruner.needs_calibration else None
    run = pruner.prune(
        TinyDecoder(), calibration, target, lambda what, done, total: calls.append((done, total))
    )
    for _ in run:
        pass
    assert calls, "no progress was reported"
    assert calls[-1][0] == calls[-1][1], f"progress ended at {calls[-1][0]} of {calls[-1][1]}"


def _every_matrix_once_in_block_order(pruner: Pruner, target: PruneTarget) -> None:
    """Every matrix is yielded once, block by block, in its own shape and dtype."""
    decoder = TinyDecoder()
    before = decoder.parameters()
    results: list[PrunedMatrix] = _prune(pruner, decoder, target)
    _require_every_matrix_once([result.name for result in results], decoder)
    for result in results:
        assert result.weight.shape == before[result.name].shape, f"{result.name} changed shape"
        assert result.weight.dtype == before[result.name].dtype, f"{result.name} changed dtype"
        assert result.mask.shape == result.weight.shape, f"mask of {result.name} has another shape"
        assert result.mask.dtype == torch.bool, f"mask of {result.name} is {result.mask.dtype}"


def _weights_keep_their_layout(pruner: Pruner, target: PruneTarget) -> None:
    """A matrix kept as (inputs, outputs), as in a Conv1D, is read and given back as that."""
    decoder = OfConv1D(inner=24)
    before = decoder.parameters()
    for result in _prune(pruner, decoder, target):
        for what, tensor in (("weight", result.weight), ("mask", result.mask)):
            found, stored = list(tensor.shape), list(before[result.name].shape)
            assert found == stored, f"the {what} of {result.name} is {found}, not {stored}"


def _new_weights_can_be_stored(pruner: Pruner, target: PruneTarget) -> None:
    """New weights are rounded to what is stored, so that later blocks see what it will give."""
    decoder = StoredInBfloat16()
    for result in _prune(pruner, decoder, target):
        stored = _as_stored(decoder, result)
        assert torch.equal(result.weight, stored), (
            f"{result.name} is not rounded to {decoder.stored_dtype(result.name)}, "
            "which it is stored in"
        )


def _what_is_gone_goes_first(pruner: Pruner, target: PruneTarget) -> None:
    """What the decoder's masks leave out stays out, and counts as pruned."""
    for gone in (1, MORE_THAN_HALF):
        decoder = PrunedBefore(gone=gone)
        results: list[PrunedMatrix] = _prune(pruner, decoder, target)
        for result in results:
            _require_gone(decoder, result)
        if target is HALF and gone < MORE_THAN_HALF:
            _require_share(results, 0.5)


def _pruned_entries_are_zero(pruner: Pruner, target: PruneTarget, model: Model) -> None:
    """A weight is exactly zero wherever its mask is False, and finite elsewhere."""
    for result in _prune(pruner, model(), target):
        assert not bool(result.weight[~result.mask].any()), f"{result.name} keeps pruned entries"
        assert bool(result.weight.isfinite().all()), f"{result.name} is not finite"


def _weights_are_written_into_the_model(pruner: Pruner, target: PruneTarget) -> None:
    """The model ends with the weights that were yielded."""
    decoder = TinyDecoder()
    results = _prune(pruner, decoder, target)
    after = decoder.parameters()
    for result in results:
        assert torch.equal(after[result.name], result.weight), f"{result.name} was not written"


def _only_the_matrices_change(pruner: Pruner, target: PruneTarget) -> None:
    """Embeddings, norms and biases stay as they were."""
    decoder = TinyDecoder()
    before = decoder.parameters()
    pruned = {result.name for result in _prune(pruner, decoder, target)}
    after = decoder.parameters()
    for name in before.keys() - pruned:
        assert torch.equal(before[name], after[name]), f"{name} was changed"


def _sparsity_zero_changes_nothing(pruner: Pruner) -> None:
    """Sparsity 0 keeps every entry, bit for bit."""
    decoder = TinyDecoder()
    before = decoder.parameters()
    for result in _prune(pruner, decoder, PruneTarget(sparsity=0.0)):
        assert bool(result.mask.all()), f"{result.name} lost entries"
        assert torch.equal(before[result.name], result.weight), f"{result.name} was changed"


def _sparsity_is_met(pruner: Pruner) -> None:
    """The share of pruned entries, over all matrices, is the sparsity within two points."""
    for sparsity in (0.25, 0.5, 0.75):
        results = _prune(pruner, TinyDecoder(), PruneTarget(sparsity=sparsity))
        _require_share(results, sparsity)


def _pattern_is_met_or_refused(pruner: Pruner) -> None:
    """A pattern n:m removes exactly n of every m, or is refused with a MethodError."""
    for what in ("a model in float32", "a model of Conv1D"):
        for n, m in ((2, 4), (4, 8), (1, 4)):
            decoder = MODELS[what]()
            try:
                results = _prune(pruner, decoder, PruneTarget(pattern=(n, m)))
            except MethodError:
                continue
            for result in results:
                removed = (~decoder.by_rows(result.mask)).reshape(-1, m).sum(dim=1)
                met = bool((removed == n).all())
                assert met, f"the inputs of {result.name} break {n}:{m}, in {what}"


def _sparsity_one_is_refused(pruner: Pruner) -> None:
    """Removing everything is refused with a MethodError."""
    try:
        _prune(pruner, TinyDecoder(), PruneTarget(sparsity=1.0))
    except MethodError:
        return
    raise AssertionError("sparsity 1.0 was accepted")


def _goes_on_where_it_was_stopped(pruner: Pruner, target: PruneTarget, model: Model) -> None:
    """Given the survey's answer and a model pruned up to a block, the rest comes out the same."""
    dense, rest = model(), model()
    calibration = tokens() if pruner.needs_calibration else None
    if hasattr(pruner, "survey"):
        target = pruner.survey(dense, calibration, target, lambda what, done, total: None)
    whole = {result.name: result for result in _prune(pruner, dense, target)}
    total = len(rest.blocks)
    rest.start = total // 2
    for index in range(rest.start):
        for name, module in rest.linears(index).items():
            stored = _as_stored(rest, whole[f"{name}.weight"])
            module.get_parameter("weight").data.copy_(stored)
    results: list[PrunedMatrix] = _prune(pruner, rest, target)
    blocks = {int(result.name.split(".")[2]) for result in results}
    assert blocks == set(range(rest.start, total)), f"blocks {sorted(blocks)} came out"
    for result in results:
        assert torch.equal(result.mask, whole[result.name].mask), f"mask of {result.name} differs"
        assert torch.equal(result.weight, whole[result.name].weight), f"{result.name} differs"


def _the_survey_changes_nothing(pruner: Any) -> None:
    """Surveying leaves the model as it is, and says what pruning without it would find."""
    decoder = TinyDecoder()
    before = decoder.parameters()
    calibration = tokens() if pruner.needs_calibration else None
    target = pruner.survey(decoder, calibration, HALF, lambda what, done, total: None)
    for name, value in decoder.parameters().items():
        assert torch.equal(before[name], value), f"{name} was changed"
    with_answer, without = _prune(pruner, decoder, target), _prune(pruner, TinyDecoder(), HALF)
    for one, other in zip(with_answer, without, strict=True):
        assert torch.equal(one.mask, other.mask), f"the mask of {one.name} differs"


def _one_survey_is_every_survey(pruner: Any) -> None:
    """A survey for several targets says for each what a survey for it alone says."""
    calibration = tokens() if pruner.needs_calibration else None
    targets = [PruneTarget(sparsity=sparsity) for sparsity in (0.25, 0.5, 0.75)]
    together = pruner.survey_nested(TinyDecoder(), calibration, targets, lambda *_: None)
    alone = [pruner.survey(TinyDecoder(), calibration, one, lambda *_: None) for one in targets]
    assert list(together) == alone, "the answers differ"


def _nested_masks_are_nested(pruner: Any) -> None:
    """Each target removes its share and all that the one before removes; the model stays dense."""
    decoder = TinyDecoder()
    before = decoder.parameters()
    calibration = tokens() if pruner.needs_calibration else None
    sparsities = (0.25, 0.5, 0.75)
    targets = [PruneTarget(sparsity=sparsity) for sparsity in sparsities]
    kept, entries = [0] * len(targets), 0
    names: list[str] = []
    for results in pruner.prune_nested(decoder, calibration, targets, lambda *_: None):
        assert len(results) == len(targets), f"{len(results)} results for {len(targets)} targets"
        entries += results[0].mask.numel()
        names.append(results[0].name)
        for position, result in enumerate(results):
            kept[position] += int(result.mask.sum())
            assert not bool(result.weight[~result.mask].any()), f"{result.name} keeps pruned ones"
            inside = bool((result.mask <= results[max(position - 1, 0)].mask).all())
            assert inside, f"{result.name} at {sparsities[position]} is not nested"
    _require_every_matrix_once(names, decoder)
    for found, sparsity in zip(kept, sparsities, strict=True):
        assert abs(1 - found / entries - sparsity) <= 0.02, f"{sparsity} left {found} of {entries}"
    for name, value in decoder.parameters().items():
        assert torch.equal(before[name], value), f"{name} was changed"


def _nested_masks_lack_what_is_gone(pruner: Any) -> None:
    """Of several targets, too, each leaves out what the decoder's masks leave out."""
    decoder = PrunedBefore(gone=MORE_THAN_HALF)
    calibration = tokens() if pruner.needs_calibration else None
    targets = [PruneTarget(sparsity=sparsity) for sparsity in (0.25, 0.5)]
    for results in pruner.prune_nested(decoder, calibration, targets, lambda *_: None):
        for result in results:
            _require_gone(decoder, result)


def _keeps_layers_in_order(pruner: Pruner, target: PruneTarget) -> None:
    """One result names at least two layers of the model, ascending."""
    results = _prune(pruner, TinyDecoder(), target)
    assert len(results) == 1, f"{len(results)} results instead of one"
    layers = results[0].layers
    assert list(layers) == sorted(set(layers)), f"{layers} is not ascending"
    assert len(layers) >= 2, f"only {len(layers)} layers are left"
    assert 0 <= layers[0] <= layers[-1] < LAYERS, f"{layers} are not layers of the model"


def _the_model_stays_as_it_is(pruner: Pruner, target: PruneTarget) -> None:
    """Choosing layers changes no parameter."""
    decoder = TinyDecoder()
    before = decoder.parameters()
    _prune(pruner, decoder, target)
    after = decoder.parameters()
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"{name} was changed"


def _layer_count_is_met(pruner: Pruner) -> None:
    """K layers, or round(L x sparsity), are dropped; fewer than two left is refused."""
    for target, left in ((HALF, 3), (PruneTarget(layers=2), 4), (PruneTarget(sparsity=0.0), 6)):
        kept = _prune(pruner, TinyDecoder(), target)[0].layers
        assert len(kept) == left, f"{target} kept {len(kept)} of {LAYERS} layers"
    try:
        _prune(pruner, TinyDecoder(), PruneTarget(layers=LAYERS - 1))
    except MethodError:
        return
    raise AssertionError(f"dropping {LAYERS - 1} of {LAYERS} layers was accepted")
