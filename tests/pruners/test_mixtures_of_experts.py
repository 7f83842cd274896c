"""Mixtures of experts: unfused they compute the same, are pruned expert by expert, open again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from prufed_cli.assets import embedded_model
from prufed_cli.errors import PrufedError
from prufed_cli.home import open_registry
from prufed_cli.main import main
from prufed_cli.models.decoder import check_matrices
from prufed_cli.models.experts import SUPPORTED, Experts, router_names, unfuse_experts
from prufed_plugins.api import MASKS_FILE, PruneTarget
from prufed_plugins.discover import build
from prufed_plugins.mask_files import MaskFile
from tests.pruners.whole_models import open_decoder, slice_layers

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED = ROUTED | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        FOUR | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        FOUR | {"moe_intermediate_size": 16, "mlp_only_layers": [0], "head_dim": 8},
    ),
    "olmoe": ("OlmoeConfig", FOUR),
    "flex_olmo": ("FlexOlmoConfig", FOUR),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Config",
        {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    ),
    "glm4_moe": ("Glm4MoeConfig", GROUPED | {"head_dim": 8}),
    "dots1": ("Dots1Config", GROUPED | {"head_dim": 8, "n_shared_experts": 1}),
    "deepseek_v2": ("DeepseekV2Config", GROUPED | LATENT),
    "deepseek_v3": ("DeepseekV3Config", GROUPED | LATENT),
}


def make_mixture(name: str, **changes: Any) -> Any:
    config_class, extra = MIXTURES[name]
    config = getattr(transformers, config_class)(**(SHAPE | extra | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=sorted(MIXTURES))
def mixture(request: pytest.FixtureRequest) -> Any:
    return make_mixture(request.param)


def stored(directory: Path) -> dict[str, Tensor]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_every_supported_mixture_is_tested_here() -> None:
    assert set(MIXTURES) == SUPPORTED


@torch.no_grad()
def test_unfused_it_computes_and_is_stored_the_same(
    mixture: Any, ids: Tensor, tmp_path: Path
) -> None:
    before = mixture(ids).logits
    mixture.save_pretrained(tmp_path / "fused")
    unfuse_experts(mixture)
    assert not [name for name, parameter in mixture.named_parameters() if parameter.dim() > 2]
    torch.testing.assert_close(mixture(ids).logits, before, rtol=1e-5, atol=1e-6)

    mixture.save_pretrained(tmp_path / "unfused")
    fused, unfused = stored(tmp_path / "fused"), stored(tmp_path / "unfused")
    assert fused.keys() == unfused.keys()
    for name, tensor in fused.items():
        assert torch.equal(tensor, unfused[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "unfused").eval()
    assert torch.equal(loaded(ids).logits, before)


def test_modules_have_the_names_of_the_checkpoint(mixture: Any, tmp_path: Path) -> None:
    mixture.save_pretrained(tmp_path)
    matrices = {
        name
        for name, tensor in stored(tmp_path).items()
        if ".layers." in name
        and tensor.dim() == 2
        and not name.endswith(("gate.weight", "gate.wg.weight"))
    }
    decoder = open_decoder(mixture)
    found = {f"{name}.weight" for index in range(3) for name in decoder.linears(index)}
    assert found == matrices


@torch.no_grad()
def test_a_loaded_mixture_is_unfused_as_well(tmp_path: Path, ids: Tensor) -> None:
    make_mixture("mixtral").save_pretrained(tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    unfuse_experts(model)
    model.save_pretrained(tmp_path / "two")
    assert stored(tmp_path / "one").keys() == stored(tmp_path / "two").keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


def test_an_empty_skeleton_can_be_unfused_and_filled_from_the_checkpoint(
    mixture: Any, tmp_path: Path
) -> None:
    mixture.save_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(mixture.config)
    unfuse_experts(skeleton)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    for name, tensor in stored(tmp_path).items():
        if ".experts." in name:
            assert shapes[name] == tensor.shape


def test_unfusing_twice_is_unfusing_once(ids: Tensor) -> None:
    model = make_mixture("mixtral")
    unfuse_experts(model)
    names = [name for name, _ in model.named_modules()]
    unfuse_experts(model)
    assert [name for name, _ in model.named_modules()] == names


def test_a_dense_model_stays_as_it_is(llama: Any) -> None:
    before = [(name, id(module)) for name, module in llama.named_modules()]
    unfuse_experts(llama)
    assert [(name, id(module)) for name, module in llama.named_modules()] == before


def test_routers_are_no_matrices() -> None:
    mixtral, qwen = make_mixture("mixtral"), make_mixture("qwen2_moe")
    unfuse_experts(mixtral)
    unfuse_experts(qwen)
    assert router_names(mixtral.model.layers[0]) == {"block_sparse_moe.gate"}
    assert router_names(qwen.model.layers[0]) == {"mlp.gate", "mlp.shared_expert_gate"}


@torch.no_grad()
def test_an_expert_sees_the_inputs_that_were_routed_to_it(ids: Tensor) -> None:
    model = make_mixture("mixtral")
    decoder = open_decoder(model)
    block = model.model.layers[1].block_sparse_moe
    seen: dict[str, Tensor] = {}
    routed: list[tuple[Tensor, Tensor]] = []
    for name, module in decoder.linears(1).items():
        module.register_forward_pre_hook(
            lambda module, inputs, name=name: seen.__setitem__(name, inputs[0])
        )
    assert isinstance(block.experts, Experts)
    block.experts.register_forward_pre_hook(
        lambda module, inputs: routed.append((inputs[0], inputs[1]))
    )
    model(ids)
    ((hidden, chosen),) = routed
    prefix = "model.layers.1.block_sparse_moe.experts"
    for expert in range(4):
        expected = hidden[(chosen == expert).any(dim=-1)]
        assert len(expected)
        assert torch.equal(seen[f"{prefix}.{expert}.w1"], expected)
        assert seen[f"{prefix}.{expert}.w1"] is seen[f"{prefix}.{expert}.w3"]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_expert_is_pruned_and_no_router(method: str, mixture: Any, ids: Tensor) -> None:
    batches = [torch.randint(0, 97, (8, 32), generator=torch.Generator().manual_seed(3))]
    decoder = open_decoder(mixture)
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    results = build("pruner", method, {}).prune(
        decoder, batches, PruneTarget(sparsity=0.5), lambda *_: None
    )
    masks = {result.name: result.mask.clone() for result in results}
    matrices = {f"{name}.weight" for index in range(3) for name in decoder.linears(index)}
    assert masks.keys() == matrices
    for name, value in mixture.state_dict().items():
        if name in masks:
            assert float((value == 0).float().mean()) == pytest.approx(0.5, abs=0.02), name
            assert not bool(value[~masks[name]].any()), name
        else:
            assert torch.equal(value, before[name]), name
    assert torch.isfinite(mixture(ids).logits).all()


@pytest.mark.parametrize("kept", [[1, 2], [0, 2], [0, 1]])
@torch.no_grad()
def test_a_sliced_mixture_opens_again(
    mixture: Any, ids: Tensor, tmp_path: Path, kept: list[int]
) -> None:
    slice_layers(mixture, kept)
    check_opens(mixture, ids, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("kept", [[0, 2, 5], [1, 3, 4], [2, 3]])
def test_a_rule_for_every_second_layer_becomes_a_list(
    name: str, kept: list[int], ids: Tensor, tmp_path: Path
) -> None:
    model = make_mixture(name, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1])
    sparse = [layer for layer in (3, 5) if layer in kept]
    slice_layers(model, kept)
    dense = [local for local, layer in enumerate(kept) if layer not in sparse]
    assert list(model.config.mlp_only_layers) == dense
    check_opens(model, ids, tmp_path)


def check_opens(sliced: Any, ids: Tensor, directory: Path) -> None:
    sliced.save_pretrained(directory)
    loaded, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    expected = sliced(ids).logits
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_experts_that_cannot_be_unfused_are_refused_by_name() -> None:
    config = transformers.GraniteMoeConfig(**SHAPE, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config)
    prefix = open_decoder(model).prefix
    with pytest.raises(PrufedError, match=r"cannot prune a GraniteMoe.* of all experts in one"):
        check_matrices(model, prefix)


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture
def prufed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    monkeypatch.setenv("PRUFED_HOME", str(tmp_path / "home"))

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 0, capsys.readouterr().err
        return capsys.readouterr().out.strip()

    return run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "mixture"
    make_mixture("mixtral", vocab_size=2048, max_position_embeddings=64).save_pretrained(directory)
    for file in embedded_model().glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


@torch.no_grad()
def test_a_mixture_is_pruned_from_end_to_end(
    prufed: Callable[..., str], base: Path, ids: Tensor
) -> None:
    reference = prufed(
        *("prune", "--base", str(base), "--method", "wanda", "--sparsity", "0.5"),
        *("--samples", "16", "--length", "32", "--dtype", "float32"),
    )
    path = open_registry().resolve(reference).path
    before, after = stored(base), stored(path)
    masks = MaskFile(path / MASKS_FILE)
    assert before.keys() == after.keys()
    assert len([name for name in masks if ".experts." in name]) == 3 * 4 * 3
    for name, tensor in after.items():
        if name in masks:
            assert torch.equal(tensor, before[name] * masks[name]), name
        else:
            assert torch.equal(tensor, before[name]), name
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    assert torch.isfinite(model(ids).logits).all()


def test_experts_that_no_token_reaches_are_kept_and_reported(
    prufed: Callable[..., str], tmp_path: Path
) -> None:
    directory = tmp_path / "wide"
    make_mixture("mixtral", vocab_size=2048, num_local_experts=8).save_pretrained(directory)
    for file in embedded_model().glob("tokenizer*"):
        shutil.copy(file, directory)
    reference = prufed(
        *("prune", "--base", str(directory), "--method", "wanda", "--sparsity", "0.5"),
        *("--samples", "1", "--length", "2", "--dtype", "float32"),
    )
    before, after = stored(directory), stored(open_registry().resolve(reference).path)
    experts = {name: bool((tensor == 0).any()) for name, tensor in after.items() if "w1" in name}
    kept = [name for name, pruned in experts.items() if not pruned]
    assert len(kept) >= 3 * (8 - 2 * 2)  # two tokens, two experts each, in three blocks
    assert len(kept) < len(experts)
    for name in kept:
        assert torch.equal(after[name], before[name])
    lines = prufed("show", reference, "--all").splitlines()
    said = [line.split()[0] for line in lines if "no calibration token was routed to it" in line]
    assert sorted(name for name in said if "w1" in name) == sorted(kept)


@torch.no_grad()
def test_layers_of_a_mixture_are_dropped_from_end_to_end(
    prufed: Callable[..., str], base: Path, ids: Tensor
) -> None:
    reference = prufed(
        *("prune", "--base", str(base), "--method", "contribution", "--layers", "1"),
        *("--samples", "4", "--length", "32"),
    )
    path = open_registry().resolve(reference).path
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    assert model.config.num_hidden_layers == 2
    assert torch.isfinite(model(ids).logits).all()
