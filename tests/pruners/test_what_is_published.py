"""What a sub-model is called, which dtypes it keeps, and what does not come along."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.main import main
from prufed_cli.models.base import SMALL_MODEL, share_cores, slug, threads_restored
from prufed_cli.progress import Reporter, Task
from prufed_cli.pruning import PruneRequest, PruneResult, prune, prune_several
from prufed_cli.pruning.passes import run_pass
from prufed_cli.pruning.submodels import _job
from prufed_plugins.api import KeptLayers, PrunedMatrix
from prufed_plugins.errors import MethodError
from prufed_plugins.mask_files import MaskFile
from prufed_plugins.mask_files import digest as masks_digest
from prufed_registry import Registry
from prufed_registry.names import check_name

Save = Callable[..., Path]


@pytest.fixture
def registry(prufed_home: Path) -> Registry:
    return Registry(prufed_home / "registry")


def magnitude(base: Path | str, **changes: Any) -> PruneRequest:
    return PruneRequest(**({"base": str(base), "method": "magnitude", "sparsity": 0.5} | changes))


def weights_of(result: PruneResult) -> dict[str, torch.Tensor]:
    return load_file(result.artifact.path / "model.safetensors")


def test_a_long_name_of_a_base_is_cut_and_how_it_was_pruned_is_not(
    llama: Any, saved: Save, registry: Registry
) -> None:
    path = saved(llama, "a" * 63 + "-" + "b" * 40)  # the cut would leave a dash at the end
    half, most = (prune(magnitude(path, sparsity=s), registry=registry) for s in (0.5, 0.75))
    assert half.artifact.ref == f"{'a' * 63}-magnitude-50@v1"
    assert most.artifact.ref == f"{'a' * 63}-magnitude-75@v1"
    kept = registry.import_directory(path, name="c" * 96, kind="base")
    named = prune(magnitude(kept.ref, settings={"exclude": "*.0.*"}), registry=registry)
    assert named.artifact.name == "c" * 83 + "-magnitude-50"


@pytest.mark.parametrize("text", ["a" * 63 + "-b", "-" * 70, "Ä" * 70, "x" * 200, "v3", ""])
def test_any_text_makes_a_name(text: str) -> None:
    check_name(slug(text))


@pytest.mark.parametrize("stated", ["bfloat16", "float16", None])
def test_every_tensor_keeps_its_dtype_whatever_the_configuration_says(
    stated: str | None, llama: Any, saved: Save, registry: Registry
) -> None:
    path = saved(llama.to(torch.bfloat16))
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].float() + 1e-6
    save_file(tensors, file, {"format": "pt"})
    configuration = json.loads((path / "config.json").read_text())
    configuration.pop("dtype")
    if stated is not None:
        configuration["dtype"] = stated
    (path / "config.json").write_text(json.dumps(configuration))
    result = prune(magnitude(path, settings={"exclude": "*.down_proj"}), registry=registry)
    for name, value in weights_of(result).items():
        assert value.dtype == tensors[name].dtype, name
        if "proj" not in name or "down_proj" in name:
            assert torch.equal(value, tensors[name]), name
    stored = json.loads((result.artifact.path / "config.json").read_text())
    assert stored["dtype"] == stated or (stated is None and stored["dtype"] == "bfloat16")


def test_weights_that_stay_are_never_rounded(llama: Any, saved: Save, registry: Registry) -> None:
    path = saved(llama)
    with pytest.raises(PrufedError, match="bfloat16 would round model") as refused:
        prune(magnitude(path), registry=registry, dtype="bfloat16")
    assert refused.value.exit_code == USAGE
    assert [each.kind for each in registry.list()] == ["base"]
    layers = PruneRequest(base=str(path), method="top", layers=2)
    dense = load_file(path / "model.safetensors")
    for name, value in weights_of(prune(layers, registry=registry, dtype="bf16")).items():
        assert torch.equal(value, dense[name])


def test_weights_in_other_formats_stay_behind(llama: Any, saved: Save, registry: Registry) -> None:
    path = saved(llama)
    formats = ("tf_model.h5", "flax_model.msgpack", "model.gguf")
    for name in (*formats, "LICENSE", "chat_template.jinja", "merges.txt"):
        (path / name).write_text("x")
    there = {
        file.name for file in prune(magnitude(path), registry=registry).artifact.path.iterdir()
    }
    assert not there & set(formats)
    assert {"LICENSE", "chat_template.jinja", "merges.txt", "tokenizer.json"} <= there


def test_chat_templates_and_how_to_generate_come_along_as_they_are(
    llama: Any, saved: Save, registry: Registry
) -> None:
    """Some releases of transformers refuse to save such a file: a temperature without sampling."""
    path = saved(llama)
    (path / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    made = prune(magnitude(path), registry=registry).artifact.path
    for name in ("generation_config.json", "additional_chat_templates/tools.jinja"):
        assert (made / name).read_bytes() == (path / name).read_bytes()


def test_how_to_generate_may_stand_in_the_configuration(
    llama: Any, saved: Save, registry: Registry
) -> None:
    path = saved(llama)
    (path / "generation_config.json").unlink()
    configuration = json.loads((path / "config.json").read_text())
    told = {"temperature": 0.9, "do_sample": True, "max_length": 33}
    (path / "config.json").write_text(json.dumps({**configuration, **told}))
    made = prune(magnitude(path), registry=registry).artifact.path
    opened = GenerationConfig.from_pretrained(made)
    assert {key: getattr(opened, key) for key in told} == told


def test_what_was_masked_stays_masked_when_layers_are_dropped(
    llama: Any, saved: Save, registry: Registry
) -> None:
    masked = prune(magnitude(saved(llama), sparsity=0.75), registry=registry).artifact
    request = PruneRequest(base=masked.ref, method="top", layers=1)
    sliced = prune(request, registry=registry).artifact
    details, earlier = sliced.manifest.details, masked.manifest.details
    assert details["result"] == "masked"
    assert details["sparsity"] == pytest.approx(earlier["sparsity"], abs=1e-4)
    assert details["kept_layers"] == list(range(earlier["layers"] - 1))
    masks = MaskFile(sliced.path / "prufed-masks.safetensors")
    assert details["masks_digest"] == masks_digest(masks)
    card = (sliced.path / "README.md").read_text()
    assert f"it keeps the decoder layers {details['kept_layers']}" in card
    assert "75.00% of the entries" in card


def test_requests_that_differ_in_their_method_are_not_made_together(
    llama: Any, saved: Save, registry: Registry
) -> None:
    half = magnitude(saved(llama))
    for other in (replace(half, method="wanda"), replace(half, base="elsewhere")):
        with pytest.raises(PrufedError, match="differ in their targets and names alone"):
            prune_several([half, replace(other, sparsity=0.25)], registry=registry)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_torch_has_as_many_threads_afterwards(
    llama: Any, saved: Save, registry: Registry, threads: Callable[[int], None]
) -> None:
    threads(3)
    prune(magnitude(saved(llama)), registry=registry)
    assert torch.get_num_threads() == 3


def test_a_large_model_has_the_threads_that_the_caller_wants(
    threads: Callable[[int], None],
) -> None:
    for wanted in (3, 1, 2):
        threads(wanted)
        with threads_restored():
            share_cores(SMALL_MODEL)
            assert torch.get_num_threads() == wanted
            share_cores(SMALL_MODEL - 1)
            assert torch.get_num_threads() == 1
            share_cores(SMALL_MODEL)
            assert torch.get_num_threads() == wanted
        assert torch.get_num_threads() == wanted


def test_the_same_work_is_known_by_any_name_and_any_spelling(
    llama: Any, saved: Save, registry: Registry
) -> None:
    path = saved(llama)
    first, second, again = (
        prune(magnitude(path, name=n), registry=registry) for n in ("a1", "b1", "a1")
    )
    assert (first.reused, second.reused, again.reused) == (False, False, True)
    assert again.artifact.ref == first.artifact.ref
    for dtype in ("auto", "float32", "fp32"):
        found = prune(magnitude(path), registry=registry, device="cpu", dtype=dtype)
        assert found.reused


def test_a_likelihood_that_is_not_finite_costs_no_sub_model(
    llama: Any, saved: Save, text: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(llama)
    with torch.no_grad():
        llama.lm_head.weight *= 1e6
    loud = saved(llama, "loud")
    for base in (path, loud):
        ran = ["prune", "--base", str(base), "--sparsity", "0.5", "--perplexity", str(text)]
        assert main([*ran, "--device", "cpu"]) == 0
    assert "perplexity not finite before, not finite after" in capsys.readouterr().err
    with torch.no_grad():
        llama.model.norm.weight.fill_(torch.nan)
    with pytest.raises(PrufedError, match="likelihood of the text is not a number"):
        prune(magnitude(saved(llama, "damaged"), perplexity=str(text)), registry=registry)


class Answers:
    """A pruner that says what it was told to say."""

    needs_calibration = False

    def __init__(self, result: str, answers: list[Any]) -> None:
        self.result = result
        self._answers = answers

    def prune(self, *_: Any) -> Iterator[Any]:
        yield from self._answers


KEPT = KeptLayers((0, 1), None)
MATRIX = PrunedMatrix("model.layers.0.mlp.up_proj.weight", torch.ones(1), torch.ones(1).bool(), {})


@pytest.mark.parametrize(
    ("result", "answers", "words"),
    [
        ("sliced", [], "did not say once which to keep"),
        ("sliced", [KEPT, KEPT], "did not say once which to keep"),
        ("sliced", [MATRIX], "did not say once which to keep"),
        ("masked", [KEPT], "prunes matrices, but gave a KeptLayers"),
    ],
)
def test_a_pruner_that_does_not_do_what_it_says_is_refused(
    result: str, answers: list[Any], words: str, llama: Any, saved: Save, registry: Registry
) -> None:
    job = _job([magnitude(saved(llama))], {"registry": registry})
    with pytest.raises(MethodError, match=words):
        run_pass(replace(job, pruner=Answers(result, answers)), [0])
    assert [each.kind for each in registry.list()] == ["base"]


class Places(Reporter):
    """Remembers how far each task said it was."""

    def __init__(self) -> None:
        self.said: list[tuple[float | None, float | None]] = []

    def task(self, description: str, total: float | None = None) -> Any:  # type: ignore[override]
        from contextlib import nullcontext

        said = self.said

        class Place(Task):
            total: float | None = None

            def reach(self, steps: float) -> None:
                said.append((steps, self.total))

            def update(self, description: str | None = None, total: float | None = None) -> None:
                self.total = total or self.total

        return nullcontext(Place())


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("magnitude", {"settings": {"group": "global"}}),
        ("top", {"sparsity": None, "layers": 2}),
        ("wanda", {"settings": {"layer_ratio": "owl"}}),
    ],
)
def test_a_task_ends_where_it_said_it_would(
    method: str, changes: dict[str, Any], llama: Any, saved: Save, text: Path, registry: Registry
) -> None:
    places = Places()
    wanted = magnitude(
        saved(llama), method=method, calibration=str(text), samples=4, length=24, **changes
    )
    prune(wanted, registry=registry, reporter=places)
    assert all(done is None or total is None or done <= total for done, total in places.said)
    assert places.said[-1][0] == places.said[-1][1]
