"""Layers are dropped only where the sub-model's layers then compute what they did before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BertConfig,
    BertForMaskedLM,
    DiffLlamaConfig,
    Gemma3Config,
    Gemma4TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    HunYuanMoEV1Config,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    XLMConfig,
    xLSTMConfig,
)

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.exporting import export_packed
from prufed_cli.importing import import_directory
from prufed_cli.packing.directories import PACKED
from prufed_cli.packing.files import read_packed
from prufed_cli.progress import Reporter
from prufed_cli.pruning import PruneRequest, PruneResult, prune, prune_several
from prufed_plugins.api import MASKS_FILE
from prufed_plugins.mask_files import MaskFile, load_masks
from tests.pruners.conftest import SHAPE, make_model

Save = Callable[..., Path]

TEXT = SHAPE | {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(autouse=True)
def home(prufed_home: Path) -> Path:
    return prufed_home


def seeing(vision_layers: int) -> Any:
    """Return a Gemma 3 with a vision tower."""
    config = Gemma3Config(
        text_config=TEXT,
        vision_config=VISION | {"num_hidden_layers": vision_layers},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tower_of(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a vision tower, with or without the prefix of the model around it."""
    tensors = load_file(directory / "model.safetensors").items()
    return {name.removeprefix("model."): value for name, value in tensors if "vision" in name}


def keep(base: Path, *layers: int) -> PruneResult:
    wanted = PruneRequest(base=str(base), method="explicit", settings={"layers": list(layers)})
    return prune(wanted, device="cpu")


def test_a_vision_tower_keeps_all_of_its_layers(saved: Save) -> None:
    path = saved(seeing(vision_layers=3))
    made = keep(path, 0, 3).artifact
    before, after = tower_of(path), tower_of(made.path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    _, loading = AutoModelForCausalLM.from_pretrained(made.path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_a_vision_tower_as_deep_as_the_decoder_is_not_pruned(
    method: str, saved: Save, text: Path
) -> None:
    path = saved(seeing(vision_layers=4))
    made = prune(
        PruneRequest(
            base=str(path),
            method=method,
            sparsity=0.5,
            calibration=str(text),
            samples=4,
            length=24,
        ),
        device="cpu",
    )
    pruned = {row["name"] for row in made.report["matrices"]}
    assert len(pruned) == 4 * 7
    assert all("language_model" in name for name in pruned)


def test_masks_of_tensors_that_are_stored_under_other_names_are_packed_with(
    saved: Save, tmp_path: Path
) -> None:
    """Gemma 3 with a vision tower: the model's names of its matrices are not the checkpoint's."""
    base = saved(seeing(vision_layers=3))
    wanted = PruneRequest(base=str(base), method="magnitude", sparsity=0.75)
    pruned = prune(wanted, device="cpu").artifact
    dropped = PruneRequest(base=pruned.ref, method="top", layers=1)
    for number, artifact in enumerate((pruned, prune(dropped, device="cpu").artifact)):
        masks = MaskFile(artifact.path / MASKS_FILE)
        stored = load_file(artifact.path / "model.safetensors")
        assert not masks.shapes.keys() <= stored.keys()
        assert masks.as_stored().keys() <= stored.keys()
        for name, mask in masks.as_stored().items():
            assert torch.equal(stored[name] != 0, mask)
        packed = tmp_path / f"packed-{number}"
        export_packed(artifact.ref, packed)
        stated = read_packed(packed / PACKED / "model.safetensors")
        encodings = {kind for name in masks.as_stored() for kind, _ in stated.tensors[name]}
        assert encodings <= {"masked", "masked-zstd"}
        assert import_directory(packed, name="back").digest == artifact.digest


def test_lists_whose_names_do_not_speak_of_layers(saved: Save) -> None:
    config = HunYuanMoEV1Config(
        **(SHAPE | {"num_hidden_layers": 4, "head_dim": 8}),
        num_experts=4,
        moe_topk=[1, 2, 3, 1],
        pad_id=0,
    )
    made = keep(saved(AutoModelForCausalLM.from_config(config).eval()), 1, 2)
    loaded = AutoModelForCausalLM.from_pretrained(made.artifact.path)
    assert list(loaded.config.moe_topk) == [2, 3]


def test_blocks_that_compute_with_their_number_are_not_renumbered(saved: Save) -> None:
    path = saved(make_model("gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(PrufedError, match="as layer 1, layer 2 would have another attn"):
        keep(path, 0, 2)
    assert keep(path, 0, 1).artifact.manifest.details["kept_layers"] == [0, 1]
    config = DiffLlamaConfig(**SHAPE)
    path = saved(AutoModelForCausalLM.from_config(config).eval(), "diff")
    with pytest.raises(PrufedError, match="as layer 0, layer 1 would have another self_attn"):
        keep(path, 1, 2)


def test_a_configuration_that_does_not_hold_together_is_one_sentence(saved: Save) -> None:
    path = saved(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)))
    config = path / "config.json"
    stored = config.read_text()
    for old, new in (
        ('"hidden_size": 32', '"hidden_size": 33'),
        ('"hidden_size": 32', '"hidden_size": "thirty"'),
        ('"dtype": "float32"', '"dtype": "float33"'),
    ):
        assert old in stored
        config.write_text(stored.replace(old, new))
        with pytest.raises(PrufedError, match="cannot be opened as a causal language model"):
            prune(PruneRequest(base=str(path), method="magnitude", sparsity=0.5), device="cpu")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(
    ("sparsity", "settings", "least"),
    [(0.25, {}, 0.5), (0.75, {"exclude": "*.q_proj"}, 0.5), (0.75, {}, 0.75)],
)
def test_what_is_pruned_stays_pruned(
    method: str,
    sparsity: float,
    settings: dict[str, str],
    least: float,
    llama: Any,
    saved: Save,
    text: Path,
) -> None:
    def again(base: Path | str, sparsity: float, **settings: str) -> Any:
        wanted = PruneRequest(
            base=str(base),
            method=method if settings or base != path else "wanda",
            sparsity=sparsity,
            settings=settings,
            calibration=str(text),
            samples=4,
            length=24,
        )
        return prune(wanted, device="cpu").artifact

    path = saved(llama)
    first = again(path, 0.5)
    second = again(first.ref, sparsity, **settings)
    before, after = load_masks(first.path / MASKS_FILE), load_masks(second.path / MASKS_FILE)
    weights = load_file(second.path / "model.safetensors")
    zeros = total = 0
    for name, mask in after.items():
        assert bool((mask <= before[name]).all()), name
        assert not weights[name][~mask].any(), name
        assert 1 - float(mask.float().mean()) >= least - 0.01, name
        zeros += int((~mask).sum())
        total += mask.numel()
    assert second.manifest.details["sparsity"] == pytest.approx(zeros / total, abs=1e-6)


def plain(**more: Any) -> dict[str, Any]:
    return SHAPE | {"num_hidden_layers": 4} | more


OTHER_BLOCKS: dict[str, Callable[[], Any]] = {
    "experts that stay fused": lambda: GptOssConfig(
        **plain(head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    ),
    "routers of their own": lambda: GraniteMoeConfig(
        **plain(num_local_experts=4, num_experts_per_tok=2)
    ),
    "state spaces": lambda: MambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, state_size=8, pad_token_id=0
    ),
}


OTHERWISE = {
    "experts that stay fused": "mlp.experts.gate_up_proj holds the matrices of all experts in one",
    "routers of their own": "experts.gate_up_proj holds the matrices of all experts in one",
    "state spaces": "backbone.layers.0.mixer.conv1d.weight belongs to a convolution",
}
"""Why the entries of these cannot be pruned."""


@torch.no_grad()
@pytest.mark.parametrize("kind", OTHER_BLOCKS)
def test_layers_are_dropped_whatever_they_hold(kind: str, saved: Save, text: Path) -> None:
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(OTHER_BLOCKS[kind]()).eval()
    base = saved(whole)
    ids = torch.arange(1, 21)[None]
    for method in ("symmetric", "contribution"):
        wanted = PruneRequest(
            base=str(base), method=method, layers=1, calibration=str(text), samples=4, length=24
        )
        made = prune(wanted, device="cpu")
        sliced, loading = AutoModelForCausalLM.from_pretrained(
            made.artifact.path, output_loading_info=True
        )
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys"))
        kept = made.report["kept_layers"]
        reference = AutoModelForCausalLM.from_pretrained(base)
        gone = next(layer for layer in range(4) if layer not in kept)
        del reference.base_model.layers[gone]
        reference.config.num_hidden_layers = 3
        types = getattr(reference.config, "layer_types", [])
        if len(types) == 4:  # which mask is whose
            del types[gone]
        torch.testing.assert_close(
            sliced(input_ids=ids, use_cache=False).logits,
            reference(input_ids=ids, use_cache=False).logits,
        )
    with pytest.raises(PrufedError, match=OTHERWISE[kind]) as refused:
        prune(PruneRequest(base=str(base), method="magnitude", sparsity=0.5), device="cpu")
    assert "--method top" in str(refused.value.hint)
    with pytest.raises(PrufedError, match=OTHERWISE[kind]):
        prune(PruneRequest(base=str(base), method="magnitude-layers", layers=1), device="cpu")


UNREADABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "experts stored one by one": (
        lambda: Qwen3NextConfig(
            **plain(head_dim=8, num_experts=4, num_experts_per_tok=2),
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        "layers.0.mlp.experts.gate_up_proj is stored in another form, which is not read here",
    ),
    "blocks of two kinds": (
        lambda: JambaConfig(
            **plain(num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4),
            use_mamba_kernels=False,
        ),
        "of several kinds: JambaAttentionDecoderLayer, JambaMambaDecoderLayer",
    ),
    "layers in several lists": (
        lambda: XLMConfig(vocab_size=97, emb_dim=32, n_layers=4, n_heads=4),
        "one part of its layers is in transformer.attentions, another in ffns",
    ),
}
"""Models of which neither entries nor layers can be pruned, and why."""


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_no_method_can_prune_is_refused_with_the_reason(kind: str, saved: Save) -> None:
    configuration, reason = UNREADABLE[kind]
    base = str(saved(AutoModelForCausalLM.from_config(configuration())))
    for how in ({"method": "magnitude", "sparsity": 0.5}, {"method": "top", "layers": 1}):
        with pytest.raises(PrufedError, match=reason):
            prune(PruneRequest(base=base, **how), device="cpu")


def llama4(step: int) -> Any:
    return Llama4TextConfig(
        **(SHAPE | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}),
        interleave_moe_layer_step=step,
        no_rope_layer_interval=2,
        attention_chunk_size=8,
        pad_token_id=0,
    )


def bamba() -> Any:
    return BambaConfig(
        **SHAPE,
        attn_layer_indices=[1, 4],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=8,
    )


def gemma4() -> Any:
    return Gemma4TextConfig(
        **(SHAPE | {"head_dim": 8, "sliding_window": 8}),
        global_head_dim=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=97,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    )


KEEP_THREE = {"layers": [2, 3, 5]}


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "method", "settings"),
    [
        (lambda: llama4(1), "symmetric", {}),
        (lambda: llama4(1), "even-alternate", {}),
        (lambda: llama4(1), "explicit", KEEP_THREE),
        (lambda: llama4(2), "symmetric", {}),
        (lambda: llama4(2), "even-alternate", {}),
        (lambda: llama4(2), "explicit", KEEP_THREE),
        (bamba, "symmetric", {}),
        (bamba, "even-alternate", {}),
        (bamba, "explicit", {"layers": [0, 3, 4]}),
        (gemma4, "bottom", {}),
        (gemma4, "explicit", KEEP_THREE),
    ],
)
def test_layers_that_a_configuration_lists_by_number(
    config: Callable[[], Any], method: str, settings: dict[str, Any], saved: Save
) -> None:
    torch.manual_seed(0)
    base = saved(AutoModelForCausalLM.from_config(config()).eval())
    layers = None if settings else 2
    wanted = PruneRequest(base=str(base), method=method, layers=layers, settings=settings)
    made = prune(wanted, device="cpu")
    sliced, loading = AutoModelForCausalLM.from_pretrained(
        made.artifact.path, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys"))
    reference = AutoModelForCausalLM.from_pretrained(base)
    for layer, block in enumerate(reference.model.layers):
        if layer not in made.report["kept_layers"]:
            block.register_forward_hook(
                lambda _, inputs, output: (
                    (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]
                )
            )
    ids = torch.arange(1, 21)[None]
    expected = reference(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(sliced(input_ids=ids, use_cache=False).logits, expected)
    written = sliced.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert int(written[0, -1]) == int(expected[0, -1].argmax())


HYBRIDS: dict[str, Callable[[], Any]] = {
    "lfm2": lambda: Lfm2Config(
        **plain(), layer_types=["conv", "full_attention", "conv", "conv"], pad_token_id=0
    ),
    "qwen3_5_text": lambda: Qwen3_5TextConfig(
        **plain(head_dim=8),
        layer_types=["linear_attention", "full_attention"] + ["linear_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_hybrid_keeps_an_attention_layer(kind: str, saved: Save) -> None:
    """Without one, the cache knows no length, and ``generate`` fails."""
    base = saved(AutoModelForCausalLM.from_config(HYBRIDS[kind]()).eval())
    with pytest.raises(PrufedError, match=f"a {kind} model would have no attention") as refusal:
        keep(base, 0, 2, 3)
    assert refusal.value.exit_code == USAGE
    assert refusal.value.hint == "keep one of layers 1"
    model = AutoModelForCausalLM.from_pretrained(keep(base, 0, 1).artifact.path)
    ids = torch.arange(1, 6)[None]
    assert model.generate(ids, max_new_tokens=2, pad_token_id=0).shape[1] > 5


def test_layers_for_multi_token_prediction_are_not_counted(saved: Save, text: Path) -> None:
    """They are stored as layers after the last, which the model itself has no parameters for."""

    class Heard(Reporter):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, message: str) -> None:
            self.notes.append(message)

    config = Glm4MoeConfig(
        **(plain(head_dim=8) | {"num_hidden_layers": 3}),
        first_k_dense_replace=3,
        num_nextn_predict_layers=1,
        n_routed_experts=2,
        moe_intermediate_size=16,
    )
    base = saved(AutoModelForCausalLM.from_config(config).eval())
    weights = load_file(base / "model.safetensors")
    weights |= {
        name.replace("layers.2.", "layers.3."): tensor.clone()
        for name, tensor in weights.items()
        if "layers.2." in name
    }
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    heard = Heard()
    dropped = PruneRequest(base=str(base), method="top", layers=1)
    masked = [
        PruneRequest(
            base=str(base),
            method="sparsegpt",
            sparsity=sparsity,
            calibration=str(text),
            samples=4,
            length=24,
        )
        for sparsity in (0.5, 0.75)
    ]
    made = [prune(dropped, device="cpu", reporter=heard)]
    made += prune_several(masked, device="cpu", nested=True, reporter=heard)
    said = "layers for multi-token prediction are left out: num_mtp_layers is now 0"
    assert heard.notes.count(said) == 2  # once in every pass
    for one in made:
        model, loading = AutoModelForCausalLM.from_pretrained(
            one.artifact.path, output_loading_info=True
        )
        assert model.config.num_mtp_layers == model.config.num_nextn_predict_layers == 0
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys"))


def test_a_configuration_that_counts_layers_twice_is_refused(saved: Save, text: Path) -> None:
    """xLSTM builds as many blocks as ``num_blocks`` says: one of four would be random."""
    config = xLSTMConfig(
        vocab_size=97, hidden_size=32, num_heads=4, num_blocks=4, num_hidden_layers=4,
        chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native",
        step_kernel="native",
    )  # fmt: skip
    base = saved(AutoModelForCausalLM.from_config(config).eval())
    for method in ("top", "contribution"):
        wanted = PruneRequest(
            base=str(base), method=method, layers=1, calibration=str(text), samples=4, length=24
        )
        with pytest.raises(PrufedError, match="still speaks of 4 layers where 3 are left"):
            prune(wanted, device="cpu")


def test_an_encoder_is_no_decoder(saved: Save) -> None:
    config = BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    with pytest.raises(PrufedError, match="is stored as a BertForMaskedLM, an encoder"):
        keep(saved(BertForMaskedLM(config)), 0, 1)
