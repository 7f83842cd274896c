"""The strategies that look at the model: what each score is, and which layers go by it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from prufed_plugins.api import KeptLayers, PruneTarget
from prufed_plugins.discover import build
from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.angular import angular_distances
from prufed_plugins.pruners.layers import lowest
from prufed_plugins.testing.pruner import TinyDecoder, tokens
from tests.pruners.whole_models import open_decoder

LAYERS = 6


def prune(
    decoder: Any,
    method: str,
    settings: Mapping[str, Any],
    calibration: Sequence[Tensor] | None = None,
    target: PruneTarget | None = None,
) -> KeptLayers:
    pruner = build("pruner", method, settings)
    given_text = calibration if pruner.needs_calibration else None
    results = list(pruner.prune(decoder, given_text, target or PruneTarget(), lambda *_: None))
    assert len(results) == 1
    assert isinstance(results[0], KeptLayers)
    return results[0]


def gone(result: KeptLayers, layers: int = LAYERS) -> list[int]:
    return [index for index in range(layers) if index not in result.layers]


# --- by activations ------------------------------------------------------------------------------


class Turn(nn.Module):
    """Rotates every hidden state, (B, T, 2), by one angle."""

    def __init__(self, angle: float) -> None:
        super().__init__()
        c, s = math.cos(angle), math.sin(angle)
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight = nn.Parameter(torch.tensor([[c, -s], [s, c]]))

    def forward(self, hidden: Tensor) -> Tensor:
        turned: Tensor = self.linear(hidden)
        return turned


class TurningDecoder(TinyDecoder):
    """A decoder whose block l turns every state by ``angles[l]``: every score is known."""

    def __init__(self, angles: Sequence[float]) -> None:
        super().__init__(layers=1, width=2, inner=2)
        self.blocks = [Turn(angle) for angle in angles]


ANGLES = [0.5, 0.1, 0.9, 0.3, 0.2, 0.7]


def test_contribution_scores_are_one_minus_the_mean_cosine() -> None:
    result = prune(TurningDecoder(ANGLES), "contribution", {"drop": 2}, tokens())
    assert result.scores == pytest.approx([1 - math.cos(angle) for angle in ANGLES], abs=1e-6)
    assert gone(result) == [1, 4]


def test_contribution_averages_over_tokens_and_not_over_batches() -> None:
    short, long = tokens(1)[0][:1, :2], tokens(1)[0]
    decoder = TinyDecoder()
    together = prune(decoder, "contribution", {"drop": 1}, [short, long]).scores or ()
    of_short = prune(decoder, "contribution", {"drop": 1}, [short]).scores or ()
    of_long = prune(decoder, "contribution", {"drop": 1}, [long]).scores or ()
    for mean, one, other in zip(together, of_short, of_long, strict=True):
        expected = (short.numel() * one + long.numel() * other) / (short.numel() + long.numel())
        assert mean == pytest.approx(expected, abs=1e-6)


def test_contribution_drops_what_is_above_a_threshold() -> None:
    result = prune(TurningDecoder(ANGLES), "contribution", {"threshold": math.cos(0.25)}, tokens())
    assert gone(result) == [1, 4]


@pytest.mark.parametrize(
    ("settings", "target", "message"),
    [
        ({"threshold": 0.999}, PruneTarget(), "the highest is 0.9950"),
        ({"threshold": 0.3}, PruneTarget(), "6 of 6 layers have a mean cosine above 0.3"),
        ({"threshold": 0.9, "drop": 1}, PruneTarget(), "threshold and drop both say"),
        ({"threshold": 0.9}, PruneTarget(sparsity=0.5), "threshold and sparsity both say"),
        ({"threshold": 0.9}, PruneTarget(pattern=(2, 4)), "pattern 2:4"),
        ({"threshold": 1.5}, PruneTarget(), "threshold: must be >= -1, <= 1"),
    ],
)
def test_a_threshold_that_cannot_be_used_is_refused(
    settings: dict[str, Any], target: PruneTarget, message: str
) -> None:
    with pytest.raises(MethodError, match=message) as refusal:
        prune(TurningDecoder(ANGLES), "contribution", settings, tokens(), target)
    assert refusal.value.hint


def test_the_hint_of_a_threshold_leaves_two_layers() -> None:
    with pytest.raises(MethodError) as refusal:
        prune(TurningDecoder(ANGLES), "contribution", {"threshold": 0.3}, tokens())
    said = float(str(refusal.value.hint).split()[3])
    left = prune(TurningDecoder(ANGLES), "contribution", {"threshold": said}, tokens()).layers
    assert left == (2, 5)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_angular_scores_are_the_angles_of_every_run(count: int) -> None:
    result = prune(TurningDecoder(ANGLES), "angular", {"drop": count}, tokens())
    runs = [sum(ANGLES[start : start + count]) / math.pi for start in range(LAYERS - count + 1)]
    assert result.scores == pytest.approx(runs, abs=1e-6)
    start = runs.index(min(runs))
    assert gone(result) == list(range(start, start + count))


@pytest.mark.parametrize(
    ("angles", "dropped"), [([0.1, 0.5, 0.5, 0.5], [0]), ([0.5, 0.5, 0.5, 0.1], [3])]
)
def test_angular_may_drop_the_first_layer_or_the_last(
    angles: list[float], dropped: list[int]
) -> None:
    assert gone(prune(TurningDecoder(angles), "angular", {"drop": 1}, tokens()), 4) == dropped


def test_angular_looks_at_the_last_token_alone() -> None:
    class LastOnly(Turn):
        def forward(self, hidden: Tensor) -> Tensor:
            turned = hidden.clone()
            turned[:, -1] = super().forward(hidden[:, -1])
            return turned

    decoder = TurningDecoder([0.1] * 4)
    decoder.blocks = [LastOnly(angle) for angle in (0.5, 0.2, 0.9, 0.7)]
    scores = prune(decoder, "angular", {"drop": 1}, tokens()).scores
    assert scores == pytest.approx([angle / math.pi for angle in (0.5, 0.2, 0.9, 0.7)], abs=1e-6)


@given(
    seed=st.integers(0, 2**16),
    layers=st.integers(2, 7),
    samples=st.integers(1, 4),
    data=st.data(),
)
def test_angular_distances_by_their_definition(
    seed: int, layers: int, samples: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, layers))
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(layers + 1, samples, 3, generator=generator, dtype=torch.float64)
    found = angular_distances(states, count)
    assert len(found) == layers - count + 1
    for start, distance in enumerate(found):
        angles = [
            math.acos(max(-1.0, min(1.0, float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)))))
            for x, y in zip(states[start], states[start + count], strict=True)
        ]
        assert distance == pytest.approx(sum(angles) / samples / math.pi, abs=1e-7)


def test_of_equal_scores_the_higher_layers_go() -> None:
    still = TurningDecoder([0.0] * LAYERS)
    assert gone(prune(still, "contribution", {"drop": 2}, tokens())) == [4, 5]
    assert gone(prune(still, "angular", {"drop": 2}, tokens())) == [4, 5]
    assert gone(prune(still, "parameter", {"drop": 2})) == [4, 5]
    assert gone(prune(still, "magnitude-layers", {"drop": 2})) == [4, 5]


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 5, 7, 16])
def test_layers_that_change_nothing_have_equal_contributions(length: int) -> None:
    """In float32 the cosine of a state with itself is 1 up to rounding, which differs by state."""
    decoder = TinyDecoder()
    idle = [0, 2, 4]
    for layer in idle:
        decoder.blocks[layer].get_parameter("down.weight").zero_()
    batches = [batch[:3, :length] for batch in tokens()]
    result = prune(decoder, "contribution", {"drop": 1}, batches)
    scores = result.scores or ()
    assert [layer for layer, score in enumerate(scores) if score == 0] == idle
    assert min(scores) == 0
    assert gone(result) == [4]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=9), st.data())
def test_the_lowest_scores(scores: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(scores)))
    chosen = lowest(scores, count)
    assert len(chosen) == count
    for inside in chosen:
        for outside in set(range(len(scores))) - chosen:
            assert (scores[inside], -inside) < (scores[outside], -outside)


@pytest.mark.parametrize("method", ["contribution", "angular"])
def test_the_final_norm_does_not_enter_the_scores(
    new_model: Callable[..., Any], ids: Tensor, method: str
) -> None:
    """A model's last hidden state is behind its final norm, which would flip this ranking."""
    model = new_model("llama")
    with torch.no_grad():
        last = model.model.layers[-1]
        for matrix in (last.self_attn.o_proj, last.mlp.down_proj):
            matrix.weight.mul_(1e-3)  # the last layer does next to nothing
        model.model.norm.weight.copy_(torch.linspace(-2, 2, 32))  # and the norm turns the state
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    naive = [
        1 - float(torch.cosine_similarity(before, after, dim=-1).mean())
        for before, after in pairwise(states)
    ]
    result = prune(open_decoder(model), method, {"drop": 1}, [ids])
    assert gone(result) == [5]
    assert result.scores is not None
    assert min(result.scores) == result.scores[5]
    assert max(naive) == naive[5]
    if method == "contribution":
        assert result.scores[:5] == pytest.approx(naive[:5], abs=1e-5)


def test_scores_of_every_architecture_are_those_of_hooks(model: Any, ids: Tensor) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    decoder = open_decoder(model)

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        seen.append((entering, output[0] if isinstance(output, tuple) else output))

    handles = [b.register_forward_hook(record, with_kwargs=True) for b in decoder.blocks]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    expected = [1 - float(torch.cosine_similarity(x, y, dim=-1).mean()) for x, y in seen]
    scores = prune(decoder, "contribution", {"drop": 1}, [ids]).scores
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", ["contribution", "angular"])
def test_states_that_are_not_finite_are_refused(method: str) -> None:
    decoder = TurningDecoder(ANGLES)
    with torch.no_grad():
        decoder.blocks[2].get_submodule("linear").get_parameter("weight")[0, 0] = torch.inf
    with pytest.raises(MethodError, match="outputs of block 2 are not finite"):
        prune(decoder, method, {"drop": 1}, tokens())
    with pytest.raises(MethodError, match="needs calibration text"):
        prune(decoder, method, {"drop": 1}, [])


# --- by weights ----------------------------------------------------------------------------------

W = [[3.0, -1.0], [1.0, 1.0]]


class WeightedDecoder(TinyDecoder):
    """A decoder whose blocks hold the given matrices."""

    def __init__(self, *blocks: Mapping[str, list[list[float]]]) -> None:
        super().__init__(layers=1, width=2, inner=2)
        self.blocks = []
        for matrices in blocks:
            block = nn.Module()
            for name, values in matrices.items():
                linear = nn.Linear(len(values[0]), len(values), bias=False)
                linear.weight = nn.Parameter(torch.tensor(values))
                block.add_module(name, linear)
            self.blocks.append(block)


THREE = WeightedDecoder(
    {"a": W, "b": [[0.0, 0.0]]},  # l1 (1.5 + 0)/2, l2 (√3 + 0)/2, mean 6/6, variance 12/6 − (4/6)²
    {"a": [[1.0, 1.0], [1.0, 1.0]], "b": [[1.0, 1.0]]},  # 1, 1, 1, 0
    {"a": [[2.0, -2.0], [0.0, 0.0]], "b": [[0.5, -0.5]]},  # (1 + .5)/2, (√2 + .5)/2, 5/6, 8.5/6
)


@pytest.mark.parametrize(
    ("settings", "scores", "dropped"),
    [
        ({"score": "l1"}, [0.75, 1.0, 0.75], 2),
        ({"score": "l2"}, [math.sqrt(3) / 2, 1.0, (math.sqrt(2) + 0.5) / 2], 0),
        ({"score": "mean-abs"}, [1.0, 1.0, 5 / 6], 2),
        ({"score": "variance"}, [2 - 4 / 9, 0.0, 8.5 / 6], 1),
    ],
)
def test_parameter_scores(settings: dict[str, Any], scores: list[float], dropped: int) -> None:
    result = prune(THREE, "parameter", settings | {"drop": 1})
    assert result.scores == pytest.approx(scores)
    assert gone(result, 3) == [dropped]


def test_magnitude_scores_are_the_mean_of_all_entries() -> None:
    result = prune(THREE, "magnitude-layers", {"drop": 1})
    assert result.scores == pytest.approx([1.0, 1.0, 5 / 6])
    assert gone(result, 3) == [2]


def test_scores_do_not_depend_on_the_pieces_they_are_summed_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = prune(TinyDecoder(), "parameter", {"score": "variance", "drop": 1}).scores
    monkeypatch.setattr("prufed_plugins.pruners.weight_scores.PIECE", 7)
    pieces = prune(TinyDecoder(), "parameter", {"score": "variance", "drop": 1}).scores
    assert pieces == pytest.approx(whole, rel=1e-12)
    expected = [
        float(
            torch.cat(
                [p.detach().double().flatten() for p in one.parameters() if p.dim() > 1]
            ).var()
        )
        for one in TinyDecoder().blocks
    ]
    assert pieces == pytest.approx(expected, rel=1e-2)  # var() divides by n − 1


def test_a_weight_that_is_not_finite_is_refused() -> None:
    decoder = TinyDecoder()
    with torch.no_grad():
        decoder.linears(3)["model.layers.3.up"].get_parameter("weight")[0, 0] = torch.nan
    with pytest.raises(MethodError, match=r"layers\.3\.up\.weight holds NaN or infinity"):
        prune(decoder, "parameter", {"drop": 1})


def test_equal_states_are_no_distance_apart() -> None:
    """In floating point the cosine of a vector with itself need not be 1."""
    states = torch.randn(5, 7, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states[2], states[4] = states[1], states[3]
    distances = angular_distances(states, 1)
    assert [one == 0 for one in distances] == [False, True, False, True]


# --- movement ------------------------------------------------------------------------------------


def tensors_of(decoder: TinyDecoder) -> dict[str, Tensor]:
    return {name: value for name, value in decoder.parameters().items() if "layers" in name}


def moved(distances: Sequence[float]) -> TinyDecoder:
    """Return the decoder with every entry of block l moved by ``distances[l]``."""
    decoder = TinyDecoder()
    for index, distance in enumerate(distances):
        for module in decoder.linears(index).values():
            module.weight.data += distance
    return decoder


MOVES = [0.5, -0.1, 0.3, 0.0, 0.2, -0.4]


def shard(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    places = {name: file for file, part in halves.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("layout", ["single", "sharded", "without prefix"])
def test_movement_is_the_distance_from_the_reference(tmp_path: Path, layout: str) -> None:
    before = tensors_of(TinyDecoder())
    if layout == "sharded":
        shard(tmp_path, before)
    else:
        start = len("model.") if layout == "without prefix" else 0
        save_file({k[start:]: v for k, v in before.items()}, tmp_path / "model.safetensors")
    settings = {"score": "movement", "reference": str(tmp_path), "drop": 2}
    result = prune(moved(MOVES), "parameter", settings)
    assert result.scores == pytest.approx([abs(move) for move in MOVES], abs=1e-6)
    assert gone(result) == [1, 3]


def test_movement_reads_a_reference_of_transposed_matrices(
    new_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = new_model("gpt2")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for index, block in enumerate(model.transformer.h):
            for parameter in block.parameters():
                if parameter.dim() == 2:
                    parameter += 0.1 * (6 - index)
    settings = {"score": "movement", "reference": str(tmp_path), "drop": 1}
    result = prune(open_decoder(model), "parameter", settings)
    assert result.scores == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], abs=1e-6)
    assert gone(result) == [5]


def no_directory(directory: Path) -> None:
    directory.rmdir()


def no_weights(directory: Path) -> None:
    (directory / "config.json").write_text("{}")


def cut_off(directory: Path) -> None:
    save_file(tensors_of(TinyDecoder()), directory / "model.safetensors")
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[:-8])


def no_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("[]")


def outside(directory: Path) -> None:
    index = {"weight_map": {"model.layers.0.up.weight": "../elsewhere.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def shallower(directory: Path) -> None:
    save_file(tensors_of(TinyDecoder(layers=5)), directory / "model.safetensors")


def deeper(directory: Path) -> None:
    """A sub-model's layers under new numbers are not those of its base."""
    save_file(tensors_of(TinyDecoder(7)), directory / "model.safetensors")


def wider(directory: Path) -> None:
    save_file(tensors_of(TinyDecoder(width=20)), directory / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_directory, "is no directory"),
        (no_weights, r"cannot read the reference's model\.safetensors"),
        (cut_off, r"cannot read the reference's model\.safetensors"),
        (no_index, "is no index of shards"),
        (outside, "names files outside its directory"),
        (shallower, r"has 5 layers, the model 6"),
        (deeper, r"has 7 layers, the model 6"),
        (wider, r"is \[24, 16\] here and \[24, 20\] in the reference"),
    ],
)
def test_a_reference_that_cannot_be_used_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    directory = tmp_path / "reference"
    directory.mkdir()
    damage(directory)
    settings = {"score": "movement", "reference": str(directory), "drop": 1}
    with pytest.raises(MethodError, match=message) as refusal:
        prune(TinyDecoder(), "parameter", settings)
    assert refusal.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "movement"}, "needs the weights before tuning: reference=DIRECTORY"),
        ({"reference": "."}, "reference is for the score movement; l1 needs none"),
        ({"score": "l3"}, "score: must be l1 | l2 | mean-abs | variance | movement, not 'l3'"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError) as refusal:
        build("pruner", "parameter", settings)
    assert message in refusal.value.message


# --- larger than memory --------------------------------------------------------------------------


class ForgetfulDecoder(TinyDecoder):
    """A decoder whose blocks lose their weights as soon as another one is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._stored = [
            {name: value.clone() for name, value in block.state_dict().items()}
            for block in self.blocks
        ]
        self.held = 0
        self._forget()

    def _forget(self) -> None:
        for block in self.blocks:
            for parameter in block.parameters():
                parameter.data.fill_(torch.nan)

    def linears(self, index: int) -> Mapping[str, nn.Linear]:
        self._forget()
        self.blocks[index].load_state_dict(self._stored[index])
        return super().linears(index)

    def hold(self, hidden: Tensor, instead_of: Tensor | None = None) -> Tensor:
        self.held += 1
        return hidden.half().float()


@pytest.mark.parametrize("method", ["parameter", "magnitude-layers", "contribution", "angular"])
def test_one_block_at_a_time_is_enough(method: str) -> None:
    decoder = ForgetfulDecoder()
    result = prune(decoder, method, {"drop": 2}, tokens())
    expected = prune(TinyDecoder(), method, {"drop": 2}, tokens())
    assert result.layers == expected.layers
    assert result.scores == pytest.approx(expected.scores, abs=1e-3)  # held in fp16
    calibrated = method in {"contribution", "angular"}
    assert decoder.held == (LAYERS * 2 if calibrated else 0)


class OverwritingDecoder(TinyDecoder):
    """A decoder in float64 that keeps a batch's outputs where its inputs were."""

    overwrites = True

    def __init__(self) -> None:
        super().__init__()
        for module in (self.embedding, *self.blocks):
            module.double()

    def hold(self, hidden: Tensor, instead_of: Tensor | None = None) -> Tensor:
        if instead_of is None or not self.overwrites:
            return hidden
        return instead_of.copy_(hidden)


@pytest.mark.parametrize("method", ["contribution", "angular"])
def test_states_may_be_overwritten_once_they_are_scored(method: str) -> None:
    apart = OverwritingDecoder()
    apart.overwrites = False
    expected = prune(apart, method, {"drop": 2}, tokens())
    assert prune(OverwritingDecoder(), method, {"drop": 2}, tokens()) == expected


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("parameter", {"score": "variance"}),
        ("magnitude-layers", {}),
        ("contribution", {}),
        ("angular", {}),
    ],
)
def test_a_cuda_device_gives_the_cpus_scores(
    llama: Any, ids: Tensor, method: str, settings: dict[str, Any]
) -> None:
    here = prune(open_decoder(llama), method, settings | {"drop": 2}, [ids])
    there = prune(open_decoder(llama.to("cuda")), method, settings | {"drop": 2}, [ids.to("cuda")])
    assert there.layers == here.layers
    assert there.scores == pytest.approx(here.scores, abs=1e-3)
