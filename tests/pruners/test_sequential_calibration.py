"""Each block is calibrated with the outputs of the blocks already pruned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prufed_plugins.api import PrunedMatrix, PruneTarget
from prufed_plugins.discover import build
from prufed_plugins.errors import MethodError
from prufed_plugins.pruners.collecting import InputCollector, observe
from prufed_plugins.pruners.hessian import InputHessian, InputNorms
from prufed_plugins.pruners.matrices import Choice, apply, as_matrix
from prufed_plugins.pruners.selection import smallest
from prufed_plugins.testing.pruner import TinyDecoder, tokens
from tests.pruners.whole_models import open_decoder

HALF = PruneTarget(sparsity=0.5)


def prune(
    model: Any, method: str, ids: Tensor, target: PruneTarget = HALF
) -> dict[str, PrunedMatrix]:
    pruner = build("pruner", method, {})
    batches = [ids] if pruner.needs_calibration else None
    results = pruner.prune(open_decoder(model), batches, target, lambda *_: None)
    return {result.name: result for result in results}


def inputs_of(model: Any, name: str, ids: Tensor) -> Tensor:
    """Return what a module receives in the model's own forward, (tokens, columns)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0]


def test_the_second_block_sees_what_the_pruned_first_block_puts_out(
    llama: Any, ids: Tensor
) -> None:
    dense = copy.deepcopy(llama)
    results = prune(llama, "wanda", ids)
    one_pruned = copy.deepcopy(dense)
    for name, result in results.items():
        if name.startswith("model.layers.0."):
            one_pruned.get_parameter(name).data.copy_(result.weight)
    for name in open_decoder(dense).linears(1):
        weight = dense.get_submodule(name).weight.detach()
        found = results[f"{name}.weight"].mask
        for source in (one_pruned, dense):
            scores = weight.abs() * inputs_of(source, name, ids).norm(dim=0)
            expected = ~smallest(scores, weight.shape[1] // 2)
            assert torch.equal(found, expected) == (source is one_pruned), name


def test_matrices_with_one_input_share_one_statistic(llama: Any, ids: Tensor) -> None:
    decoder = open_decoder(llama)
    ((hidden, arguments),) = decoder.embed([ids])
    linears = decoder.linears(0)
    with InputCollector(linears, InputNorms, stops=False) as collector, torch.no_grad():
        for _ in range(2):
            decoder.run_block(0, hidden, arguments)
            collector.end_batch()
    observed = collector.observed()
    found = {name.split(".")[-1]: one.statistic for name, one in observed.items()}
    assert found["q_proj"] is found["k_proj"] is found["v_proj"]
    assert found["gate_proj"] is found["up_proj"]
    assert len({id(one) for one in found.values()}) == 4
    assert all(one.tokens == 2 * ids.numel() for one in found.values())


def test_hooks_are_gone_afterwards(llama: Any, ids: Tensor) -> None:
    prune(llama, "wanda", ids)
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_a_block_is_left_where_its_last_matrix_has_its_input(llama: Any, ids: Tensor) -> None:
    """Once one batch has shown which that is; what is collected is the same."""
    decoder = open_decoder(llama)
    batches = [ids[:1], ids[1:2], ids[2:]]
    runs: list[Tensor] = []
    down = llama.model.layers[0].mlp.down_proj
    handle = down.register_forward_hook(lambda module, inputs, output: runs.append(output))
    found = observe(decoder, 0, set(decoder.linears(0)), InputNorms, decoder.embed(batches))
    assert len(runs) == 1
    advancing = observe(decoder, 0, set(found), InputNorms, decoder.embed(batches), advancing=True)
    handle.remove()
    assert len(runs) == 1 + len(batches)
    assert found.keys() == advancing.keys()
    for name, one in found.items():
        norms = one.statistic
        assert norms.tokens == ids.numel()
        assert torch.equal(norms.second_moments(), advancing[name].statistic.second_moments())


def test_batches_do_not_change_the_result(llama: Any, ids: Tensor) -> None:
    other = copy.deepcopy(llama)
    whole = prune(llama, "wanda", ids)
    results = build("pruner", "wanda", {}).prune(
        open_decoder(other), [ids[:1], ids[1:]], HALF, lambda *_: None
    )
    for result in results:
        assert torch.equal(result.mask, whole[result.name].mask), result.name


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_its_zeros(
    llama: Any, ids: Tensor, method: str, dtype: torch.dtype
) -> None:
    llama.to(dtype)
    for result in prune(llama, method, ids).values():
        assert result.weight.dtype == dtype
        assert not result.weight[~result.mask].any()
        assert torch.equal(llama.get_parameter(result.name), result.weight)
        assert int((~result.mask).sum()) == result.mask.numel() // 2


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_sparsity_zero_is_the_identity_bit_for_bit(llama: Any, ids: Tensor, method: str) -> None:
    llama.to(torch.bfloat16)
    llama.model.layers[0].mlp.up_proj.weight.data[0, 0] = -0.0
    before = copy.deepcopy(llama.state_dict())
    results = prune(llama, method, ids, PruneTarget(sparsity=0.0))
    assert all(result.mask.all() for result in results.values())
    for name, value in llama.state_dict().items():
        assert torch.equal(value.view(torch.int16), before[name].view(torch.int16)), name


def test_a_kept_zero_stays_kept(llama: Any, ids: Tensor) -> None:
    weight = llama.model.layers[0].self_attn.q_proj.weight.data
    weight[0, :20] = 0.0
    result = prune(llama, "wanda", ids)["model.layers.0.self_attn.q_proj.weight"]
    assert int(result.mask[0].sum()) == 16
    assert int((result.weight[0] != 0).sum()) == 12


def test_conv1d_is_pruned_per_output(gpt2: Any, ids: Tensor) -> None:
    dense = copy.deepcopy(gpt2)
    result = prune(gpt2, "wanda", ids)["transformer.h.0.attn.c_attn.weight"]
    assert result.mask.shape == (32, 96)  # GPT-2 stores (inputs, outputs)
    assert (~result.mask).sum(dim=0).tolist() == [16] * 96
    name = "transformer.h.0.attn.c_attn"
    norms = inputs_of(dense, name, ids).norm(dim=0)
    scores = dense.get_submodule(name).weight.detach().abs().t() * norms
    assert torch.equal(result.mask.t(), ~smallest(scores, 16))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_only_the_decoder_matrices_change(
    new_model: Callable[..., Any], ids: Tensor, architecture: str
) -> None:
    model = new_model(architecture, tie_word_embeddings=True)
    before = copy.deepcopy(dict(model.named_parameters()))
    pruned = prune(model, "sparsegpt", ids)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for name, value in model.named_parameters():
        assert (name in pruned) != torch.equal(value, before[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_block(
    llama: Any, ids: Tensor, value: float
) -> None:
    llama.model.layers[2].post_attention_layernorm.weight.data[3] = value
    with pytest.raises(MethodError, match="block 2 are not finite"):
        prune(llama, "wanda", ids)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_damaged_weight_names_its_matrix(method: str) -> None:
    decoder = TinyDecoder()
    decoder.blocks[1].down.weight.data[2, 3] = float("nan")
    with pytest.raises(MethodError, match=r"model\.layers\.1\.down\.weight holds NaN"):
        list(build("pruner", method, {}).prune(decoder, tokens(), HALF, lambda *_: None))


def test_an_update_that_overflows_its_dtype_names_its_matrix() -> None:
    layer = torch.nn.Linear(2, 2, dtype=torch.float16)
    choice = Choice(torch.zeros(2, 2, dtype=torch.bool), torch.full((2, 2), 1e6))
    with pytest.raises(MethodError, match=r"layer is too large for torch\.float16"):
        apply("layer", layer, choice, torch.float16, {}, in_place=True)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (PruneTarget(), "either a sparsity or a pattern"),
        (PruneTarget(sparsity=0.5, pattern=(2, 4)), "either a sparsity or a pattern"),
        (PruneTarget(sparsity=1.0), r"1\.0 is outside \[0, 1\)"),
        (PruneTarget(sparsity=-0.1), "outside"),
        (PruneTarget(sparsity=float("nan")), "outside"),
        (PruneTarget(pattern=(4, 4)), "pattern 4:4"),
        (PruneTarget(pattern=(16, 32)), r"16:32 would remove all 16 columns of model\.layers\.0"),
        (PruneTarget(layers=3), "cannot drop 3 layers"),
    ],
)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_target_that_cannot_be_met_is_refused_before_anything_changes(
    method: str, target: PruneTarget, message: str
) -> None:
    decoder = TinyDecoder()
    before = decoder.parameters()
    with pytest.raises(MethodError, match=message) as refusal:
        list(build("pruner", method, {}).prune(decoder, tokens(), target, lambda *_: None))
    assert refusal.value.hint
    assert all(torch.equal(value, before[name]) for name, value in decoder.parameters().items())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_no_calibration_is_refused(method: str) -> None:
    with pytest.raises(MethodError, match="needs calibration text"):
        list(build("pruner", method, {}).prune(TinyDecoder(), None, HALF, lambda *_: None))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("advancing", [False, True])
def test_the_energy_of_outputs_is_that_of_the_hessian(
    family: str, advancing: bool, ids: Tensor, request: pytest.FixtureRequest
) -> None:
    """Biases are no part of it; where not every output was seen, there is none."""
    decoder = open_decoder(request.getfixturevalue(family))
    states = decoder.embed([ids[:1], ids[1:]])
    names = set(decoder.linears(0))
    found = observe(decoder, 0, names, InputHessian, states, energies=True, advancing=advancing)
    unseen = {name for name, one in found.items() if one.energy is None}
    assert len(unseen) == (0 if advancing else 1)
    for name, one in found.items():
        if one.energy is not None:
            expected = one.statistic.factor.energy(as_matrix(decoder.linears(0)[name]))
            assert one.energy == pytest.approx(expected, rel=1e-3), name


def test_every_token_is_as_likely_to_be_sampled_as_any_other() -> None:
    """Evenly spaced ones would be the first of a sequence far too often: an attention sink."""
    norms = InputNorms(2, torch.device("cpu"), sampled=128)
    for batch in range(16):
        positions = torch.arange(64.0).repeat(16)  # sixteen sequences of 64
        norms.add(torch.stack((positions, torch.full_like(positions, float(batch))), dim=1))
        assert len(norms.sample) == 128
    positions, batches = (column.long() for column in norms.sample.t())
    assert torch.bincount(positions, minlength=64).max() < 9  # 2 each on average
    assert torch.bincount(batches, minlength=16).min() > 0
    assert torch.bincount(batches).max() < 20  # 8 each
    norms.add(torch.empty(0, 2))
    assert norms.tokens == 16 * 1024


def test_a_large_bias_in_half_precision_does_not_hide_the_error() -> None:
    """The outputs are rounded beside the bias: what they are without it is not read from them."""
    decoder = TinyDecoder(1)
    gate = decoder.blocks[0].get_submodule("gate")
    gate.bias = torch.nn.Parameter(torch.full((gate.get_parameter("weight").shape[0],), 3000.0))
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        run = copy.deepcopy(decoder)
        for block in (run.embedding, *run.blocks):
            block.to(dtype)
        results = build("pruner", "sparsegpt", {}).prune(run, tokens(), HALF, lambda *_: None)
        errors += [one.report["error"] for one in results if one.name.endswith("gate.weight")]
    exact, found = errors
    assert found == pytest.approx(exact, rel=0.1)
