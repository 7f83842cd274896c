"""A model that is streamed from disk gives the bytes of one that is pruned in memory."""

from __future__ import annotations

import json
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from prufed_cli.errors import INTEGRITY, NOT_FOUND, PrufedError
from prufed_cli.evaluation.perplexity import measure_perplexity, read_text, tokenize
from prufed_cli.models.activations import Activations
from prufed_cli.models.base import (
    find_base,
    load_model,
    load_tokenizer,
    stored_dtype,
)
from prufed_cli.models.calibration import calibration_batches
from prufed_cli.models.checkpoint import find_tensors
from prufed_cli.models.skeleton import open_skeleton
from prufed_cli.models.streaming import StreamedDecoder
from prufed_cli.progress import Reporter, Task
from prufed_cli.pruning import (
    PruneRequest,
    PruneResult,
    at_sparsities,
    plan_prune,
    prune,
    prune_several,
)
from prufed_cli.pruning.job import Options, ScoredText
from prufed_cli.pruning.plan import layouts_of, look_at_layouts
from prufed_cli.pruning.scores import streamed_perplexity
from prufed_plugins.api import MASKS_FILE, PruneTarget
from prufed_plugins.discover import build
from prufed_plugins.errors import MethodError
from prufed_plugins.mask_files import load_masks, save_masks
from prufed_registry import Artifact, Registry
from prufed_registry.errors import InvalidRequest, RegistryError
from tests.pruners.whole_models import open_decoder, slice_layers

CPU = torch.device("cpu")
Save = Callable[..., Path]


@pytest.fixture
def registry(prufed_home: Path) -> Registry:
    return Registry(prufed_home / "registry")


def request(base: Path, text: Path, **changes: Any) -> PruneRequest:
    given = {"method": "sparsegpt", "sparsity": 0.5, "samples": 5, "length": 24} | changes
    return PruneRequest(base=str(base), calibration=str(text), **given)


def in_memory(base: Artifact, wanted: PruneRequest, directory: Path) -> None:
    """Prune the model as a whole and let transformers save it."""
    model = load_model(base, device="cpu")
    tokenizer = load_tokenizer(base)
    batches = calibration_batches(
        wanted.calibration, tokenizer, samples=wanted.samples, length=wanted.length
    ).batches
    pruner = build("pruner", wanted.method, dict(wanted.settings or {}))
    target = PruneTarget(sparsity=wanted.sparsity)
    decoder = open_decoder(model, stored_dtype(base))
    masks = {r.name: r.mask for r in pruner.prune(decoder, batches, target, lambda *_: None)}
    model.to(stored_dtype(base)).save_pretrained(directory)
    save_masks(directory / MASKS_FILE, masks)


def same_files(one: Path, other: Path, names: Iterable[str]) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


MODEL_FILES = ("model.safetensors", "config.json", "generation_config.json")


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_every_architecture_gives_the_same_bytes(
    model: Any, saved: Save, text: Path, tmp_path: Path, registry: Registry, method: str
) -> None:
    wanted = request(saved(model), text, method=method)
    made = prune(wanted, device="cpu").artifact
    in_memory(find_base(wanted.base, registry), wanted, tmp_path)
    same_files(made.path, tmp_path, (*MODEL_FILES, MASKS_FILE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_half_precision_gives_the_same_bytes(
    new_model: Callable[..., Any],
    saved: Save,
    text: Path,
    tmp_path: Path,
    registry: Registry,
    architecture: str,
    dtype: torch.dtype,
) -> None:
    wanted = request(saved(new_model(architecture).to(dtype)), text)
    made = prune(wanted, device="cpu").artifact
    in_memory(find_base(wanted.base, registry), wanted, tmp_path)
    same_files(made.path, tmp_path, (*MODEL_FILES, MASKS_FILE))
    assert {tensor.dtype for tensor in load_file(made.path / "model.safetensors").values()} == {
        dtype
    }


def test_a_token_embedding_that_is_tied_to_another_parameter(
    saved: Save, text: Path, tmp_path: Path, registry: Registry
) -> None:
    """ProphetNet's decoder has it under a second name. Alone, it attends to no encoder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "prophetnet",
        hidden_size=32,
        decoder_ffn_dim=64,
        num_encoder_layers=3,
        num_decoder_layers=3,
        num_decoder_attention_heads=4,
        vocab_size=97,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    base = saved(AutoModelForCausalLM.from_config(config))
    with pytest.raises(MethodError, match=r"cross_attn\.key_proj received no calibration input"):
        prune(request(base, text))
    wanted = request(base, text, settings={"exclude": "*cross_attn*"})
    made = prune(wanted, device="cpu").artifact
    in_memory(find_base(wanted.base, registry), wanted, tmp_path)
    same_files(made.path, tmp_path, MODEL_FILES)


def test_a_sliced_model_has_the_bytes_transformers_gives_it(
    model: Any, saved: Save, text: Path, tmp_path: Path, registry: Registry
) -> None:
    wanted = request(saved(model), text, method="symmetric", sparsity=None, layers=2)
    made = prune(wanted, device="cpu").artifact
    whole = load_model(find_base(wanted.base, registry), device="cpu")
    slice_layers(whole, made.manifest.details["kept_layers"]).save_pretrained(tmp_path)
    same_files(made.path, tmp_path, MODEL_FILES)


def test_a_sliced_sub_model_keeps_the_masks_of_its_layers(
    llama: Any, saved: Save, text: Path, registry: Registry
) -> None:
    masked = prune(request(saved(llama), text, method="magnitude"), device="cpu").artifact
    wanted = PruneRequest(base=masked.ref, method="explicit", settings={"layers": [1, 4]})
    sliced = prune(wanted, device="cpu").artifact
    before, after = load_masks(masked.path / MASKS_FILE), load_masks(sliced.path / MASKS_FILE)
    assert len(after) == len(before) // 3
    for local, layer in enumerate([1, 4]):
        name = "self_attn.q_proj.weight"
        found = after[f"model.layers.{local}.{name}"]
        assert torch.equal(found, before[f"model.layers.{layer}.{name}"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_names_without_the_base_prefix_and_shards(
    new_model: Callable[..., Any], saved: Save, text: Path, architecture: str
) -> None:
    model = new_model(architecture, tie_word_embeddings=True)
    base = saved(model)
    plain = prune(request(base, text, name="plain"), device="cpu").artifact
    stripped = base.with_name("stripped")
    shutil.copytree(base, stripped)
    tensors = load_file(base / "model.safetensors")
    prefix = f"{model.base_model_prefix}."
    save_file(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items()},
        stripped / "model.safetensors",
        {"format": "pt"},
    )
    sharded = base.with_name("sharded")
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    for file in base.glob("tokenizer*"):
        shutil.copyfile(file, sharded / file.name)
    for other in (stripped, sharded):
        made = prune(request(other, text, name=other.name), device="cpu").artifact
        same_files(made.path, plain.path, (*MODEL_FILES, MASKS_FILE))


def test_tied_weights_that_are_stored_twice_stay_tied(
    new_model: Callable[..., Any], saved: Save, text: Path
) -> None:
    base = saved(new_model("llama", tie_word_embeddings=True))
    tensors = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    made = prune(request(base, text), device="cpu").artifact
    with safe_open(made.path / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (a handle, no mapping)
    loaded = AutoModelForCausalLM.from_pretrained(made.path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_large_sub_model_is_written_in_shards_that_open(
    llama: Any, saved: Save, text: Path
) -> None:
    base = saved(llama)
    whole = prune(request(base, text), device="cpu").artifact
    sharded = prune(request(base, text), device="cpu", force=True, largest_file=20_000).artifact
    assert not (sharded.path / "model.safetensors").exists()
    assert len(list(sharded.path.glob("model-*.safetensors"))) > 3
    one, other = (AutoModelForCausalLM.from_pretrained(made.path) for made in (whole, sharded))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    again = prune(request(Path(sharded.ref), text, method="top", sparsity=None, layers=1))
    assert again.artifact.manifest.details["layers"] == 5


def streamed(directory: Path, activations: Activations | None = None) -> StreamedDecoder:
    skeleton = open_skeleton(directory, "tiny", torch.float32)
    return StreamedDecoder(skeleton, CPU, activations or Activations())


def test_one_block_is_in_memory_at_a_time(llama: Any, saved: Save, ids: Tensor) -> None:
    decoder = streamed(saved(llama))
    assert not loaded_parameters(decoder)
    decoder.embed([ids])
    for index in (0, 3, 2):
        decoder.linears(index)
        assert {name.split(".")[2] for name in loaded_parameters(decoder)} == {str(index)}
    decoder.release()
    assert not loaded_parameters(decoder)


def test_freed_inputs_do_not_pass_for_shared_ones(llama: Any, saved: Save, ids: Tensor) -> None:
    """A block that copies its input for every matrix: Python uses the memory of each copy again."""
    decoder = streamed(saved(llama))
    (layout,) = look_at_layouts(decoder, ids[:1], layouts_of(decoder))
    assert sorted(len(group) for group in layout.groups) == [1, 1, 2, 3]
    linears = decoder.linears(0)

    def forward(hidden: Tensor, **arguments: Any) -> Tensor:
        for module in linears.values():
            module(torch.zeros(1, module.in_features))
        return hidden

    decoder.blocks[0].forward = forward
    (layout,) = look_at_layouts(decoder, ids[:1], layouts_of(decoder))
    assert len(layout.groups) == len(linears) == 7


def loaded_parameters(decoder: StreamedDecoder) -> list[str]:
    model = decoder._skeleton.model
    return [name for name, value in model.named_parameters() if value.device.type != "meta"]


def test_activations_in_a_file_are_the_same_and_leave_none(
    llama: Any, saved: Save, ids: Tensor, tmp_path: Path
) -> None:
    base, spill = saved(llama), tmp_path / "spill"
    spill.mkdir()
    runs = []
    for again in (False, True):
        for activations in (Activations(), Activations(spill)):
            decoder = streamed(base, activations)
            ((hidden, arguments),) = decoder.embed([ids])
            place = hidden.data_ptr()
            for index in range(6):
                with torch.no_grad():
                    output = decoder.run_block(index, hidden, arguments)
                    hidden = decoder.hold(output, hidden if again else None)
            assert hidden.data_ptr() == place or not again
            runs.append(hidden)
    assert all(torch.equal(hidden, runs[0]) for hidden in runs)
    assert list(spill.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_held_activations_give_their_memory_back(tmp_path: Path) -> None:
    store, source = Activations(tmp_path), torch.empty(2**20)
    before = resident()
    held = [store.hold(source.fill_(value)) for value in range(64)]
    assert resident() - before < 32 * 2**20  # of the 256 MiB that are held
    for value, tensor in enumerate(held):
        assert bool((tensor == value).all())


@pytest.mark.parametrize("in_file", [False, True])
def test_what_does_not_fit_is_held_elsewhere(tmp_path: Path, in_file: bool) -> None:
    store = Activations(tmp_path if in_file else None)
    values = torch.arange(6.0).reshape(2, 3)
    strange = [torch.ones(3, 2), torch.ones(2, 3).double(), torch.ones(1, 3).expand(2, 3)]
    for other in strange:
        before = other.clone()
        assert torch.equal(store.hold(values, other), values)
        assert torch.equal(other, before)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_equal_masks_of_batches_are_kept_once(
    new_model: Callable[..., Any], saved: Save, ids: Tensor
) -> None:
    decoder = streamed(saved(new_model("gemma3")))
    states = decoder.embed([ids, ids.flip(0), ids[:1]])
    calls = [arguments["blocks"] for _, arguments in states]
    assert calls[0] is calls[1]
    assert calls[2] is not calls[0]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt", "gpt2"])
def test_streamed_perplexity_is_the_perplexity(
    new_model: Callable[..., Any],
    saved: Save,
    text: Path,
    tmp_path: Path,
    registry: Registry,
    architecture: str,
) -> None:
    base = find_base(str(saved(new_model(architecture))), registry)
    file, tokenizer, options = read_text(text), load_tokenizer(base), Options(CPU, torch.float32)
    scored = ScoredText(file, tokenize(tokenizer, file))
    found = streamed_perplexity(base.path, base, scored, options, tmp_path)
    expected = measure_perplexity(load_model(base, device="cpu"), tokenizer, file)
    assert found.value == pytest.approx(expected.value, rel=1e-6)
    assert (found.tokens, found.bytes, found.window) == (
        expected.tokens,
        expected.bytes,
        expected.window,
    )


def test_perplexity_before_and_after_is_reported(llama: Any, saved: Save, text: Path) -> None:
    result = prune(request(saved(llama), text, perplexity=str(text)), device="cpu")
    scores = result.report["perplexity"]
    assert scores["file"] == text.name
    assert scores["tokens"] > 100
    assert scores["base"] != scores["pruned"]
    assert result.artifact.manifest.recipe["perplexity"]["file"] == text.name


def test_several_sparsities_share_one_calibration_text(
    llama: Any, saved: Save, text: Path, registry: Registry
) -> None:
    base = saved(llama)
    requests = [request(base, text, sparsity=s, method="wanda") for s in (0.25, 0.5)]
    both = prune_several(requests, device="cpu")
    alone = prune(requests[1], device="cpu", force=True)
    assert [one.artifact.name for one in both] == ["base-wanda-25", "base-wanda-50"]
    assert both[1].artifact.digest == alone.artifact.digest
    assert all(one.reused for one in prune_several(requests, device="cpu"))


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_nested_sub_models_come_from_one_pass_and_lie_inside_one_another(
    llama: Any, saved: Save, text: Path, method: str
) -> None:
    base = saved(llama)
    requests = at_sparsities(request(base, text, method=method, name="tier"), [0.25, 0.5, 0.75])
    made = prune_several(requests, nested=True, device="cpu")
    assert [one.artifact.ref for one in made] == ["tier-25@v1", "tier-50@v1", "tier-75@v1"]
    masks = [load_masks(one.artifact.path / MASKS_FILE) for one in made]
    for name in masks[0]:
        for smaller, larger in pairwise(masks):
            assert not bool((larger[name] & ~smaller[name]).any()), name
    assert made[1].artifact.manifest.recipe["nested"] == [0.25, 0.5, 0.75]
    for one, found in zip(made, masks, strict=True):
        weights = load_file(one.artifact.path / "model.safetensors")
        assert all(not bool(weights[name][~mask].any()) for name, mask in found.items())
    assert all(one.reused for one in prune_several(requests, nested=True, device="cpu"))
    alone = prune(replace(requests[0], name=None), device="cpu")
    assert not alone.reused


class Counting(Reporter, Task):
    """Counts the blocks that each kind of step says it has been through."""

    def __init__(self) -> None:
        self.steps: Counter[str] = Counter()

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Task]:
        yield self

    def update(self, description: str | None = None, total: float | None = None) -> None:
        self.steps[str(description).rpartition(" ")[0]] += 1


@pytest.mark.parametrize(
    ("method", "settings", "looks"),
    [("wanda", {"layer_ratio": "owl"}, 1), ("magnitude", {"group": "global"}, 3), ("wanda", {}, 0)],
)
def test_nested_sub_models_are_surveyed_together(
    llama: Any, saved: Save, text: Path, method: str, settings: dict[str, str], looks: int
) -> None:
    base = saved(llama)
    requests = at_sparsities(request(base, text, method=method, settings=settings), [0.2, 0.4, 0.8])
    counting = Counting()
    made = prune_several(requests, nested=True, device="cpu", reporter=counting)
    assert counting.steps["survey of block"] == looks * 6
    assert counting.steps[f"prune with {method}: block"] == 6
    found = [one.artifact.manifest.details["sparsity"] for one in made]
    assert found == pytest.approx([0.2, 0.4, 0.8], abs=0.03)


def test_nested_needs_a_method_that_can_and_several_sparsities(
    llama: Any, saved: Save, text: Path
) -> None:
    base = saved(llama)
    for method, sparsities, words in (
        ("top", [0.25, 0.5], "cannot make sub-models that lie inside one another"),
        ("wanda", [0.5], "--nested needs several sparsities"),
    ):
        requests = at_sparsities(request(base, text, method=method), sparsities)
        with pytest.raises(PrufedError, match=words):
            prune_several(requests, nested=True, device="cpu")


def test_compat_stands_for_the_published_threshold(llama: Any, saved: Save, text: Path) -> None:
    base = saved(llama)
    made = prune(request(base, text, method="wanda", compat="reference"), device="cpu")
    assert made.artifact.manifest.recipe["params"]["threshold"] == "reference"
    with pytest.raises(PrufedError, match="top has no published code"):
        prune(request(base, text, method="top", compat="reference"), device="cpu")
    settings = {"threshold": "exact"}
    with pytest.raises(PrufedError, match="exclude each other"):
        prune(request(base, text, compat="reference", settings=settings), device="cpu")


def test_two_names_of_a_method_make_one_artifact(llama: Any, saved: Save, text: Path) -> None:
    base = saved(llama)
    wanted = request(base, text, method="top-alternate", sparsity=None, layers=2)
    made = prune(wanted, device="cpu")
    assert made.artifact.name == "base-even-alternate-drop2"
    assert made.artifact.manifest.recipe["plugin"] == "even-alternate"
    for other in ("even-alternate", "even_alternate"):
        again = prune(replace(wanted, method=other), device="cpu")
        assert again.reused
        assert again.artifact.digest == made.artifact.digest
        anew = prune(replace(wanted, method=other), device="cpu", force=True).artifact
        assert anew.digest == made.artifact.digest


def test_a_reference_is_known_by_its_content(
    llama: Any, saved: Save, text: Path, tmp_path: Path
) -> None:
    base, original = saved(llama), tmp_path / "original"
    with torch.no_grad():
        llama.model.layers[2].mlp.up_proj.weight += 1
    llama.save_pretrained(original)

    def made(reference: Path) -> PruneResult:
        settings = {"score": "movement", "reference": str(reference)}
        wanted = {"method": "parameter", "sparsity": None, "layers": 2, "settings": settings}
        return prune(request(base, text, **wanted), device="cpu")

    first = made(original)
    assert 2 in first.report["kept_layers"]
    assert first.artifact.manifest.recipe["params"]["reference"].startswith("sha256:")
    elsewhere = shutil.copytree(original, tmp_path / "elsewhere" / "original")
    assert made(elsewhere).artifact.ref == first.artifact.ref
    with torch.no_grad():
        llama.model.layers[4].mlp.up_proj.weight += 2
    llama.save_pretrained(original)
    other = made(original)
    assert not other.reused
    assert other.report["scores"] != first.report["scores"]
    with pytest.raises(PrufedError, match=r"reference .*nowhere does not exist") as refusal:
        made(tmp_path / "nowhere")
    assert refusal.value.exit_code == NOT_FOUND


def test_excluded_blocks_stay_as_they_are(llama: Any, saved: Save, text: Path) -> None:
    base = saved(llama)
    settings = {"include": "model.layers.3.*"}
    made = prune(request(base, text, method="magnitude", settings=settings), device="cpu").artifact
    before, after = (load_file(one / "model.safetensors") for one in (base, made.path))
    for name, value in before.items():
        pruned = name.startswith("model.layers.3.") and "proj" in name
        assert torch.equal(value, after[name]) != pruned, name


# --- bad input -----------------------------------------------------------------------------------


def test_a_missing_shard_is_named(llama: Any, saved: Save, text: Path, tmp_path: Path) -> None:
    base = saved(llama)
    (base / "model.safetensors").unlink()
    llama.save_pretrained(base, max_shard_size="20KB")
    lost = sorted(base.glob("model-*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(PrufedError, match=f"its index names {lost.name}") as refusal:
        find_tensors(base, "base")
    assert refusal.value.exit_code == INTEGRITY
    with pytest.raises(RegistryError, match=f"lacks the shard '{lost.name}'"):
        prune(request(base, text), device="cpu")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "cannot be read"),
        ('{"weight_map": {"a": "../../model.safetensors"}}', "is no file beside it"),
        ('{"weight_map": {}}', "maps no weights"),
    ],
)
def test_a_damaged_index(llama: Any, saved: Save, index: str, words: str) -> None:
    base = saved(llama)
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(index)
    with pytest.raises(PrufedError, match=words):
        find_tensors(base, "base")


def test_a_sparse_format_is_refused_with_the_reason(llama: Any, saved: Save, text: Path) -> None:
    base = saved(llama)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-bitmask"},
    }
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match="sparse-bitmask', which transformers would pass over"):
        prune(request(base, text, method="magnitude"), device="cpu")


def test_few_tokens_are_told_with_the_number_to_use(
    new_model: Callable[..., Any], saved: Save, text: Path
) -> None:
    class Heard(Reporter):
        warnings: ClassVar[list[str]] = []

        def warn(self, message: str) -> None:
            self.warnings.append(message)

    wanted = request(saved(new_model("llama")), text, samples=1, length=24)
    prune(wanted, device="cpu", reporter=Heard())
    assert len(Heard.warnings) == 1
    assert (
        "24 calibration tokens are fewer than the 48 columns of model.layers.0."
        in (Heard.warnings[0])
    )
    assert "--samples 2" in Heard.warnings[0]
    prune(replace(wanted, method="wanda"), device="cpu", reporter=Heard())
    assert len(Heard.warnings) == 1


def test_too_little_memory_is_refused_with_the_figure(
    llama: Any, saved: Save, text: Path, registry: Registry
) -> None:
    wanted = request(saved(llama), text)
    with pytest.raises(PrufedError, match=r"more than the 1.0 kB there may be") as refusal:
        prune(wanted, device="cpu", max_memory=1000)
    assert "--max-memory 1MB" in str(refusal.value.hint)
    plan = plan_prune([wanted], device="cpu")
    tight = plan_prune([wanted], device="cpu", max_memory=plan.least + 1)
    assert not plan.in_file
    assert tight.in_file
    assert tight.peak < plan.peak
    assert plan.activations == 5 * 24 * 32 * 4
    one = prune(wanted, device="cpu")
    other = prune(wanted, device="cpu", max_memory=plan.least + 1, force=True)
    assert one.artifact.digest == other.artifact.digest


def test_the_plan_counts_all_passes_and_what_is_scored(llama: Any, saved: Save, text: Path) -> None:
    wanted = request(saved(llama), text)
    passes = at_sparsities(wanted, [0.2, 0.4, 0.6])
    # the time is measured, so it differs from one plan to the next
    one = [plan_prune([wanted], device="cpu") for _ in range(3)]
    three = [plan_prune(passes, device="cpu") for _ in range(3)]
    assert three[0].least == one[0].least
    assert max(plan.seconds for plan in three) > 1.5 * min(plan.seconds for plan in one)
    plain = request(wanted.base, text, method="magnitude")
    unscored, scored = (
        plan_prune([replace(plain, perplexity=file)], device="cpu") for file in (None, str(text))
    )
    assert scored.batch > unscored.batch
    assert scored.seconds > unscored.seconds
    with pytest.raises(PrufedError, match="more than the 0 bytes there may be"):
        plan_prune([wanted], device="cpu", max_memory=0)


def test_a_pattern_is_recorded_as_one_however_it_is_typed(
    llama: Any, saved: Save, text: Path
) -> None:
    base = saved(llama)
    first, second = (
        prune(request(base, text, method="magnitude", sparsity=None, pattern=spelled), device="cpu")
        for spelled in ("2:4", "02:04")
    )
    assert second.reused
    assert first.artifact.name.endswith("magnitude-2-of-4")


def test_a_text_that_no_method_reads_is_told(llama: Any, saved: Save, text: Path) -> None:
    told: list[str] = []

    class Told(Reporter):
        def warn(self, message: str) -> None:
            told.append(message)

    prune(request(saved(llama), text, method="magnitude"), device="cpu", reporter=Told())
    assert told == [f"magnitude does not calibrate; {text} is not read"]


def test_a_configuration_that_promises_more_positions_than_there_are(
    saved: Save, text: Path
) -> None:
    """RoBERTa's positions begin behind the one for padding."""
    config = RobertaConfig(
        vocab_size=65, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=18, pad_token_id=1, is_decoder=True,
    )  # fmt: skip
    base = saved(RobertaForCausalLM(config))
    with pytest.raises(PrufedError, match="cannot embed sequences of 18 tokens") as refusal:
        prune(request(base, text, length=18))
    assert "--length" in (refusal.value.hint or "")
    assert prune(request(base, text, length=16)).artifact.manifest.details["sparsity"] == 0.5


def test_a_tokenizer_of_another_model(
    new_model: Callable[..., Any], saved: Save, text: Path
) -> None:
    base = saved(new_model("llama", vocab_size=20))
    with pytest.raises(PrufedError, match=r"the tokenizer produces token .* has 20 embeddings"):
        prune(request(base, text), device="cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_on_cuda_one_block_is_on_the_device_and_activations_are_on_the_host(
    llama: Any, saved: Save, text: Path, ids: Tensor, method: str
) -> None:
    base = saved(llama)
    skeleton = open_skeleton(base, "tiny", torch.float32)
    decoder = StreamedDecoder(skeleton, torch.device("cuda"), Activations())
    states = decoder.embed([ids])
    assert states[0][0].device.type == "cpu"
    decoder.linears(2)
    on_device = [n for n, p in skeleton.model.named_parameters() if p.device.type == "cuda"]
    assert {name.split(".")[2] for name in on_device} == {"2"}
    wanted = request(base, text, method=method)
    made = [prune(wanted, device=device, force=True).artifact for device in ("cpu", "cuda")]
    one, other = (load_masks(each.path / MASKS_FILE) for each in made)
    equal = sum(int((one[name] == other[name]).sum()) for name in one)
    assert equal >= 0.999 * sum(mask.numel() for mask in one.values())


@pytest.mark.skipif("zaya" not in CONFIG_MAPPING, reason="this transformers has no ZAYA")
def test_blocks_that_hand_on_more_than_hidden_states_are_refused(
    saved: Save, registry: Registry, text: Path
) -> None:
    """ZAYA's routers go on from the state of the router before; run alone they would have none."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "zaya",
        hidden_size=32,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=1,
        vocab_size=97,
        max_position_embeddings=64,
        eos_token_id=2,
    )
    base = saved(AutoModelForCausalLM.from_config(config))
    wanted = request(base, text, method="contribution", sparsity=None, layers=1)
    with pytest.raises(PrufedError, match="block 1 needs more of the one before than its output"):
        prune(wanted, registry=registry)
    assert prune(replace(wanted, method="top"), registry=registry).artifact.kind == "pruned"
