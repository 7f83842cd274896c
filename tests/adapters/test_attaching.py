from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from prufed_cli.errors import INTEGRITY, USAGE, PrufedError
from prufed_cli.models.adapters import (
    AdapterSpec,
    adapter_spec,
    attach,
    client_masks,
    init_global,
    merge,
    target_layers,
    target_shapes,
)

EVERY = ("all-linear",)


def _adapter(model: nn.Module, spec: AdapterSpec, seed: int = 5) -> dict[str, Tensor]:
    """A start with a B that is not zero, so that the update is not."""
    tensors = init_global(target_shapes(model, spec.target_modules), spec, 0)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


# --- the specification ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("lego", ("nested", True, "density", 4.0)),
        ("lego-literal", ("nested", False, "none", 1.0)),
        ("sparse-peft", ("none", True, "none", 1.0)),
        ("dense", ("none", False, "none", 1.0)),
    ],
)
def test_presets(preset: str, expected: tuple[str, bool, str, float]) -> None:
    spec = adapter_spec(preset, sparsity=0.75)
    assert (spec.factor_mask, spec.product_mask, spec.rescale, spec.scaling) == expected
    assert AdapterSpec.from_dict(spec.to_dict()) == spec


def test_a_depth_pruned_client_has_no_masks() -> None:
    spec = adapter_spec("lego", depth_pruned=True, sparsity=0.5)
    assert (spec.preset, spec.factor_mask, spec.product_mask) == ("lego", "none", False)
    assert spec.scaling == 1.0


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    assert adapter_spec("dense", r=4, alpha=8, use_rslora=True).scaling == 4.0


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"sparsity": 1.0},
        {"target_modules": ()},
        {"factor_mask": "random"},
        {"rescale": "sometimes"},
        {"rank": 4},
        {"preset": "leggo"},
    ],
)
def test_specifications_that_make_no_sense_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(PrufedError) as caught:
        adapter_spec(**settings)  # type: ignore[arg-type]
    assert caught.value.exit_code == USAGE
    assert caught.value.hint


# --- targets -------------------------------------------------------------------------------------


def test_targets_match_by_the_end_of_their_names(llama: nn.Module) -> None:
    assert list(target_layers(llama, ["q_proj"])) == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(3)
    ]
    assert list(target_layers(llama, ["mlp.up_proj"])) == [
        f"model.layers.{i}.mlp.up_proj" for i in range(3)
    ]
    assert len(target_layers(llama, EVERY)) == 3 * 7
    assert target_shapes(llama, ["k_proj"])["model.layers.0.self_attn.k_proj"] == (16, 32)


def test_conv1d_layers_are_targets_too(gpt2: nn.Module) -> None:
    assert target_shapes(gpt2, ["c_attn"])["transformer.h.0.attn.c_attn"] == (96, 32)


@pytest.mark.parametrize("target", ["proj", "lm_head", "q_porj"])
def test_a_target_that_matches_nothing_lists_the_candidates(llama: nn.Module, target: str) -> None:
    with pytest.raises(PrufedError, match=target) as caught:
        target_layers(llama, ["q_proj", target])
    assert "down_proj" in (caught.value.hint or "")
    assert "all-linear" in (caught.value.hint or "")


# --- the start -----------------------------------------------------------------------------------


def test_the_start_depends_on_each_name_alone(llama: nn.Module) -> None:
    spec = adapter_spec(r=4, target_modules=EVERY)
    shapes = target_shapes(llama, EVERY)
    every = init_global(shapes, spec, 0)
    name = "model.layers.1.self_attn.v_proj"
    one = init_global({name: shapes[name]}, spec, 0)
    assert torch.equal(one[f"{name}.lora_A.weight"], every[f"{name}.lora_A.weight"])
    other = init_global({name: shapes[name]}, spec, 1)
    assert not torch.equal(one[f"{name}.lora_A.weight"], other[f"{name}.lora_A.weight"])


def test_the_start_is_lora_s() -> None:
    tensors = init_global({"m": (8, 400)}, adapter_spec(r=16), 0)
    A, B = tensors["m.lora_A.weight"], tensors["m.lora_B.weight"]
    assert A.shape == (16, 400)
    assert B.shape == (8, 16)
    assert not B.any()
    # Kaiming-uniform with a = √5 is uniform in ±1/√k
    assert 0.045 < float(A.abs().max()) <= 0.05
    assert abs(float(A.std()) - 0.05 / 3**0.5) < 1e-3


# --- on and off ----------------------------------------------------------------------------------


def test_detaching_leaves_the_model_as_it_was(
    model: nn.Module, base_masks: dict[str, Tensor], ids: Tensor
) -> None:
    modules = dict(model.named_modules())
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = next(model.parameters()).requires_grad_(False)
    before = _logits(model, ids)
    spec = adapter_spec(r=4, target_modules=EVERY, sparsity=0.5)
    with attach(model, spec, _adapter(model, spec), None, base_masks) as adapted:
        assert not torch.equal(_logits(model, ids), before)
        assert {p for p in model.parameters() if p.requires_grad} == set(
            adapted.parameters.values()
        )
    assert dict(model.named_modules()) == modules
    assert torch.equal(_logits(model, ids), before)
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    adapted.detach()  # a second time is harmless
    assert dict(model.named_modules()) == modules


def test_one_base_serves_several_clients(model: nn.Module, ids: Tensor) -> None:
    spec = adapter_spec("dense", r=4, target_modules=EVERY)
    first, start = _adapter(model, spec), init_global(target_shapes(model, EVERY), spec, 0)
    before = _logits(model, ids)
    with attach(model, spec, first):
        with_first = _logits(model, ids)
    with attach(model, spec, start):
        torch.testing.assert_close(_logits(model, ids), before)  # B is zero
    with attach(model, spec, first) as again:
        assert torch.equal(_logits(model, ids), with_first)
        assert all(torch.equal(again.state()[name], first[name]) for name in first)


def test_attaching_copies_the_tensors_and_clears_what_is_masked(llama: nn.Module) -> None:
    spec = adapter_spec(r=4, sparsity=0.5)
    tensors = _adapter(llama, spec)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    masks = client_masks(spec, tensors)
    with attach(llama, spec, tensors, masks) as adapted:
        assert masks.keys() == adapted.parameters.keys() == adapted.masks.keys()
        for name, tensor in adapted.state().items():
            assert torch.equal(tensor, kept[name] * masks[name])
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


def test_structured_masks_come_from_the_client_s_base(
    model: nn.Module, base_masks: dict[str, Tensor]
) -> None:
    spec = adapter_spec(r=4, target_modules=EVERY, sparsity=0.5, factor_mask="structured")
    tensors = _adapter(model, spec)
    masks = client_masks(spec, tensors, model=model, base_masks=base_masks)
    assert masks.keys() == tensors.keys()
    for name, mask in masks.items():
        whole = mask.all(dim=0) if "lora_A" in name else mask.all(dim=1)
        assert int(whole.sum()) * 2 == whole.numel()


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "mask name", "mask shape", "base"])
def test_adapters_of_another_base_are_refused(llama: nn.Module, fault: str) -> None:
    spec = adapter_spec(r=4)
    tensors, masks, products = _adapter(llama, spec), {}, {}
    name = "model.layers.2.self_attn.q_proj.lora_A.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["model.layers.3.self_attn.q_proj.lora_A.weight"] = tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][:, 1:]
    elif fault == "mask name":
        masks["model.layers.3.self_attn.q_proj.lora_A.weight"] = tensors[name] > 0
    elif fault == "mask shape":
        masks[name] = torch.ones(3, 3, dtype=torch.bool)
    else:
        products["model.layers.2.self_attn.q_proj.weight"] = torch.ones(4, 4, dtype=torch.bool)
    modules = dict(llama.named_modules())
    with pytest.raises(PrufedError, match=r"layers\.[23]\.self_attn\.q_proj") as caught:
        attach(llama, spec, tensors, masks, products)
    assert caught.value.exit_code == INTEGRITY
    assert dict(llama.named_modules()) == modules


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_merging_equals_attaching(
    model: nn.Module, base_masks: dict[str, Tensor], ids: Tensor, masked: bool
) -> None:
    spec = adapter_spec("sparse-peft" if masked else "dense", r=4, target_modules=EVERY)
    tensors = _adapter(model, spec)
    with attach(model, spec, tensors, None, base_masks):
        attached = _logits(model, ids)
    merge(model, tensors, spec.scaling, base_masks if masked else None)
    torch.testing.assert_close(_logits(model, ids), attached, rtol=1e-4, atol=1e-5)
    if masked:
        assert torch.equal(_logits(model, ids), attached)  # the very same weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_keeps_the_sparsity_exactly(
    model: nn.Module, base_masks: dict[str, Tensor], dtype: torch.dtype
) -> None:
    model.to(dtype)
    before = {n: model.get_parameter(n).detach().clone() for n in base_masks}
    spec = adapter_spec(r=4, target_modules=EVERY, sparsity=0.5)
    merge(model, _adapter(model, spec), spec.scaling, base_masks)
    for name, mask in base_masks.items():
        weight = model.get_parameter(name)
        assert weight.dtype == dtype
        assert not weight[~mask].any()
        assert not torch.equal(weight, before[name])


def test_a_merge_that_does_not_fit_changes_nothing(llama: nn.Module) -> None:
    spec = adapter_spec(r=4)
    tensors = _adapter(llama, spec)
    tensors["model.layers.2.self_attn.q_proj.lora_B.weight"] = torch.ones(3, 4)
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    with pytest.raises(PrufedError, match="shape"):
        merge(llama, tensors, 1.0)
    with pytest.raises(PrufedError, match=r"no linear layer model\.norm"):
        merge(llama, {"model.norm.lora_A.weight": torch.ones(4, 32)}, 1.0)
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


# --- a residual ----------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_a_residual_is_part_of_the_base_while_the_adapter_is_on(
    model: nn.Module, base_masks: dict[str, Tensor], ids: Tensor, masked: bool
) -> None:
    spec = adapter_spec("sparse-peft" if masked else "dense", r=4, target_modules=EVERY)
    tensors, residual = _adapter(model, spec), _adapter(model, replace(spec, r=3), seed=6)
    wide = replace(spec, r=7, alpha=spec.scaling * 7)
    both = {
        name: torch.cat([tensor, residual[name]], dim=0 if "lora_A" in name else 1)
        for name, tensor in tensors.items()
    }
    with attach(model, wide, both, None, base_masks):
        expected = _logits(model, ids)
    before = _logits(model, ids)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    with attach(model, spec, tensors, None, base_masks, residual) as adapted:
        torch.testing.assert_close(_logits(model, ids), expected, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(adapted.state()[name], tensors[name]) for name in tensors)
        for name, mask in base_masks.items():
            weight = model.get_submodule(name.removesuffix(".weight")).weight
            assert isinstance(weight, Tensor)
            assert not torch.equal(weight, parameters[name])
            assert bool(weight[~mask].any()) is not masked
    assert torch.equal(_logits(model, ids), before)
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())


def test_a_residual_of_another_base_is_refused(llama: nn.Module) -> None:
    spec = adapter_spec("dense", r=4)
    tensors = _adapter(llama, spec)
    with pytest.raises(PrufedError, match="the adapter lacks"):
        attach(llama, spec, tensors, residual=dict(list(tensors.items())[2:]))
    assert not any(parameter.requires_grad is False for parameter in llama.parameters())
