"""Sub-models that clients pruned on their own text become one: means, votes, and who has a say."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.pruning import PruneRequest, prune
from prufed_plugins.api import MASKS_FILE, PruneTarget
from prufed_plugins.discover import build
from prufed_plugins.errors import MethodError
from prufed_plugins.mask_files import load_masks, save_masks
from prufed_plugins.pruners.fedspallm import Vote, mean_of_kept, removed_by
from prufed_plugins.tensor_files import entries_of
from prufed_plugins.testing.tiny_decoder import PrunedBefore, TinyDecoder
from prufed_registry import Artifact, Registry
from prufed_registry.errors import NotFound, RegistryError

WEIGHTS = "model.safetensors"

Prune = Callable[..., Artifact]


def votes_of(clients: int, seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return masks (clients, rows, columns) and weights with ties, 0 outside their masks."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(clients, rows, columns, generator=generator) < 0.5
    weights = torch.randint(-3, 4, masks.shape, generator=generator).float()
    return masks, weights * masks


def merged(masks: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and counts as the module finds them, in the shape of one client's matrix."""
    votes = []
    for number, (mask, weight) in enumerate(zip(masks, weights, strict=True)):
        mask_entries, weight_entries = (entries_of({"w": each}, "w") for each in (mask, weight))
        assert mask_entries is not None
        assert weight_entries is not None
        votes.append(Vote(f"client {number}", mask_entries, weight_entries))
    mean, kept = mean_of_kept("w", votes)
    return mean.reshape(masks.shape[1:]), kept.reshape(masks.shape[1:])


# --- one matrix ----------------------------------------------------------------------------------


def test_expansion_removes_what_most_removed_until_the_share_is_met() -> None:
    removed = torch.tensor([[3, 1, 1, 1, 1, 0, 0, 0]])  # of three clients
    gone = removed_by(3 - removed.int(), torch.ones(1, 8), PruneTarget(sparsity=0.5))
    assert gone.tolist() == [[True, True, True, True, False, False, False, False]]


def test_among_as_many_votes_the_smallest_value_goes() -> None:
    kept = torch.tensor([[0, 2, 2, 2, 2, 3, 3, 3]], dtype=torch.int32)
    values = torch.tensor([[0.0, 4.0, -3.0, 2.0, -1.0, 0.1, 0.1, 0.1]])
    gone = removed_by(kept, values, PruneTarget(sparsity=0.5))
    assert gone.tolist() == [[True, False, True, True, True, False, False, False]]


@given(st.integers(1, 300), st.integers(0, 10**6), st.sampled_from([1, 3, 16]))
def test_the_mean_is_over_those_who_kept_an_entry(clients: int, seed: int, rows: int) -> None:
    masks, weights = votes_of(min(clients, 200), seed, rows, 5)
    mean, kept = merged(masks, weights)
    assert torch.equal(kept, masks.sum(dim=0, dtype=torch.int32))  # more than 127 of them as well
    expected = weights.double().sum(dim=0) / masks.sum(dim=0).clamp(min=1)
    assert torch.equal(mean, expected.float())


@given(
    st.integers(1, 6),
    st.integers(0, 10**6),
    st.floats(0, 0.99),
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
)
def test_the_share_is_met_by_votes_then_values_then_order(
    clients: int, seed: int, sparsity: float, shape: tuple[int, int]
) -> None:
    mean, kept = merged(*votes_of(clients, seed, *shape))
    gone = removed_by(kept, mean, PruneTarget(sparsity=sparsity)).flatten().tolist()
    wanted = max(math.ceil(sparsity * kept.numel()), int((kept == 0).sum()))
    keys = zip(kept.flatten().tolist(), mean.abs().flatten().tolist(), strict=True)
    order = sorted((votes, value, index) for index, (votes, value) in enumerate(keys))
    assert [index for index, flag in enumerate(gone) if flag] == sorted(
        index for _, _, index in order[:wanted]
    )


@given(
    st.integers(1, 5), st.integers(0, 10**6), st.integers(2, 12), st.sampled_from([(2, 4), (1, 3)])
)
def test_of_every_group_those_with_most_votes_go(
    clients: int, seed: int, columns: int, pattern: tuple[int, int]
) -> None:
    mean, kept = merged(*votes_of(clients, seed, 3, columns))
    gone = removed_by(kept, mean, PruneTarget(pattern=pattern))
    n, m = pattern
    for row in range(3):
        for start in range(0, columns, m):
            group = range(start, min(start + m, columns))
            order = sorted((int(kept[row, one]), abs(float(mean[row, one])), one) for one in group)
            expected = {one for _, _, one in order[:n]} | {
                one for one in group if kept[row, one] == 0
            }
            assert {one for one in group if gone[row, one]} == expected


@given(st.integers(2, 6), st.integers(0, 10**6), st.sampled_from([0.25, 0.5, 0.7]))
def test_where_all_remove_the_share_the_most_votes_decide(
    clients: int, seed: int, sparsity: float
) -> None:
    """FedSpaLLM's expanded set is then FedPrLLM's: the first ⌈s·n⌉ by votes (2505.13547)."""
    generator = torch.Generator().manual_seed(seed)
    removed = math.ceil(sparsity * 24)
    masks = torch.stack(
        [torch.rand(24, generator=generator).argsort().argsort() >= removed for _ in range(clients)]
    ).reshape(clients, 4, 6)
    weights = torch.randn(clients, 4, 6, generator=generator) * masks
    mean, kept = merged(masks, weights)
    gone = removed_by(kept, mean, PruneTarget(sparsity=sparsity))
    by_votes = (kept.double() + mean.abs() / (mean.abs().max() + 1)).flatten().argsort(stable=True)
    assert set(gone.flatten().nonzero().flatten().tolist()) == set(by_votes[:removed].tolist())


# --- a decoder -----------------------------------------------------------------------------------


def send(directory: Path, decoder: TinyDecoder, seed: int, names: Sequence[str]) -> Path:
    """Write a client's sub-model: half of the entries of some matrices gone, the rest changed."""
    generator = torch.Generator().manual_seed(seed)
    weights, masks = {}, {}
    for name, value in decoder.parameters().items():
        weights[name] = value
        if any(
            name == f"{one}.weight"
            for i in range(len(decoder.blocks))
            for one in decoder.linears(i)
        ):
            before = decoder.masks.get(name, torch.ones_like(value, dtype=torch.bool))
            masks[name] = before
            if name in names:
                masks[name] = before & (torch.rand(value.shape, generator=generator) < 0.5)
                weights[name] = (value + seed) * masks[name]
    directory.mkdir()
    save_file(weights, directory / WEIGHTS)
    save_masks(directory / MASKS_FILE, masks)
    return directory


def merge(
    decoder: TinyDecoder, clients: Sequence[Path], target: PruneTarget, **settings: Any
) -> Any:
    pruner = build("pruner", "fedspallm", {"clients": [str(one) for one in clients], **settings})
    pruner.check(decoder, [target])
    return {one.name: one for one in pruner.prune(decoder, None, target, lambda *_: None)}


def test_who_did_not_prune_a_matrix_has_no_say_in_it(tmp_path: Path) -> None:
    gate, up, down = (f"model.layers.0.{name}.weight" for name in ("gate", "up", "down"))
    before = TinyDecoder(1).parameters()
    clients = [
        send(tmp_path / "a", TinyDecoder(1), 1, [gate, up]),
        send(tmp_path / "b", TinyDecoder(1), 2, [gate]),
    ]
    results = merge(TinyDecoder(1), clients, PruneTarget(sparsity=0.5))
    alone = load_file(tmp_path / "a" / WEIGHTS)[up]
    assert results[gate].report["clients"] == 2
    assert results[up].report["clients"] == 1
    assert torch.equal(results[up].weight[results[up].mask], alone[results[up].mask])
    assert results[down].report == {"sparsity": 0.0, "uncovered": 1.0}
    assert torch.equal(results[down].weight, before[down])


def test_what_the_base_lacks_is_no_vote(tmp_path: Path) -> None:
    decoder = PrunedBefore(1)
    (gate,) = (name for name in decoder.masks if "gate" in name)
    clients = [send(tmp_path / "a", decoder, 1, [])]
    results = merge(decoder, clients, PruneTarget(sparsity=0.5))
    assert all("uncovered" in result.report for result in results.values())
    other = [send(tmp_path / "b", decoder, 1, [gate])]
    results = merge(PrunedBefore(1), other, PruneTarget(sparsity=0.75))
    assert [name for name, one in results.items() if "uncovered" not in one.report] == [gate]
    assert not bool((results[gate].mask & ~decoder.masks[gate]).any())


def test_it_goes_on_after_any_block(tmp_path: Path) -> None:
    names = list(TinyDecoder(3).parameters())
    clients = [send(tmp_path / str(seed), TinyDecoder(3), seed, names) for seed in (1, 2, 3)]
    whole = merge(TinyDecoder(3), clients, PruneTarget(sparsity=0.5))
    rest = TinyDecoder(3)
    rest.start = 2
    found = merge(rest, clients, PruneTarget(sparsity=0.5))
    assert list(found) == [name for name in whole if ".2." in name]
    for name, result in found.items():
        assert torch.equal(result.weight, whole[name].weight)
        assert torch.equal(result.mask, whole[name].mask)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda w, m: w.__setitem__((0, 0), float("nan")), "NaN or infinity"),
        (lambda w, m: w.masked_fill_(~m, 1.0), "not 0 outside its mask"),
    ],
)
def test_weights_that_are_not_what_their_mask_says_are_refused(
    tmp_path: Path, damage: Callable[[Tensor, Tensor], object], said: str
) -> None:
    gate = "model.layers.0.gate.weight"
    client = send(tmp_path / "bad", TinyDecoder(1), 1, [gate])
    weights, masks = load_file(client / WEIGHTS), load_masks(client / MASKS_FILE)
    damage(weights[gate], masks[gate])
    save_file(weights, client / WEIGHTS)
    with pytest.raises(MethodError, match=said) as refused:
        merge(TinyDecoder(1), [client], PruneTarget(sparsity=0.5))
    assert "bad" in refused.value.message
    assert gate in refused.value.message


def test_masks_of_another_model_are_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    client = send(tmp_path / "wide", TinyDecoder(1, inner=32), 1, [])
    with pytest.raises(MethodError, match=r"is \[32, 16\], not \[24, 16\]"):
        merge(TinyDecoder(1), [client], PruneTarget(sparsity=0.5))


# --- artifacts -----------------------------------------------------------------------------------


@pytest.fixture
def registry(prufed_home: Path) -> Registry:
    return Registry(prufed_home / "registry")


@pytest.fixture
def client(tmp_path: Path) -> Prune:
    """Return a function that prunes on a text of the client's own."""

    def make(base: Path | str, name: str, **changes: Any) -> Artifact:
        text = tmp_path / f"{name}.txt"
        text.write_text("".join(random.Random(name).choices("abcdefgh ", k=400)))
        given: dict[str, Any] = {"method": "sparsegpt", "sparsity": 0.5, "calibration": str(text)}
        given |= {"samples": 5, "length": 24, "base": str(base), "name": name}
        return prune(PruneRequest(**(given | changes)), device="cpu").artifact

    return make


def merge_artifacts(base: Path | str | None, clients: str, **changes: Any) -> Artifact:
    settings = {"clients": clients, **changes.pop("settings", {})}
    given = None if base is None else str(base)
    request = PruneRequest(base=given, method="fedspallm", settings=settings, **changes)
    return prune(request, device="cpu").artifact


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt", "gpt2"])
def test_every_layout_of_matrices_is_merged(
    new_model: Callable[..., Any], saved: Callable[..., Path], client: Prune, architecture: str
) -> None:
    base = saved(new_model(architecture))
    parts = [client(base, name, sparsity=0.6) for name in ("one", "two")]
    made = merge_artifacts(base, "one,two", sparsity=0.6)
    masks = [load_masks(part.path / MASKS_FILE) for part in parts]
    weights = [load_file(part.path / WEIGHTS) for part in parts]
    found, mask = load_file(made.path / WEIGHTS), load_masks(made.path / MASKS_FILE)
    assert mask.keys() == masks[0].keys()
    for name in masks[0]:
        first, second = (each[name] for each in masks)
        assert not bool((mask[name] & ~(first | second)).any())
        assert int((~mask[name]).sum()) == max(
            math.ceil(mask[name].numel() * 6 / 10), int((~(first | second)).sum())
        )
        stored = name if name in found else name.partition(".")[2]
        total = weights[0][stored].double() + weights[1][stored].double()
        mean = total / (first.int() + second.int()).clamp(min=1)
        assert torch.equal(found[stored], (mean * mask[name]).float())
    AutoModelForCausalLM.from_pretrained(made.path)


def test_one_client_is_merged_into_itself(
    llama: Any, saved: Callable[..., Path], client: Prune
) -> None:
    base = saved(llama)
    alone = client(base, "alone")
    made = merge_artifacts(base, "alone", sparsity=0.5)
    for file in (WEIGHTS, MASKS_FILE, "config.json"):
        assert (made.path / file).read_bytes() == (alone.path / file).read_bytes()


def test_order_and_names_are_no_part_of_what_is_merged(
    llama: Any, saved: Callable[..., Path], client: Prune, registry: Registry
) -> None:
    base = saved(llama)
    parts = [client(base, name) for name in ("one", "two", "three")]
    made = merge_artifacts(base, "one,two,three", sparsity=0.5)
    assert merge_artifacts(base, "three, two@v1, one@latest", sparsity=0.5) == made
    assert merge_artifacts(None, "two,three,one", sparsity=0.5) == made  # their base is known
    assert merge_artifacts(base, "one,two", sparsity=0.5) != made
    parents = {parent.digest for parent in made.manifest.parents[1:]}
    assert parents == {part.digest for part in parts}
    assert made.manifest.parents[0].ref == "base@v1"
    assert "fedspallm-50" in made.ref
    with pytest.raises(RegistryError, match="two@v1 is the parent of 2 living artifacts"):
        registry.remove("two@v1")


def test_layers_may_be_dealt_out(llama: Any, saved: Callable[..., Path], client: Prune) -> None:
    base = saved(llama)
    parts = {
        name: client(base, name, settings={"include_layers": layers})
        for name, layers in (("odd", "1,3,5"), ("even", [0, 2]))
    }
    made = merge_artifacts(base, "odd,even", sparsity=0.5)
    weights = {name: load_file(part.path / WEIGHTS) for name, part in parts.items()}
    dense = load_file(base / WEIGHTS)
    for name, found in load_file(made.path / WEIGHTS).items():
        number = name.removeprefix("model.layers.")[0]
        of = weights["odd"] if number in "135" else weights["even"] if number in "02" else dense
        assert torch.equal(found, of[name]), name
    assert made.manifest.details["sparsity"] == pytest.approx(0.5 * 5 / 6)


def test_without_a_target_goes_what_everybody_removed(
    llama: Any, saved: Callable[..., Path], client: Prune
) -> None:
    base = saved(llama)
    masks = [load_masks(client(base, name).path / MASKS_FILE) for name in ("one", "two")]
    made = merge_artifacts(base, "one,two")
    for name, mask in load_masks(made.path / MASKS_FILE).items():
        assert torch.equal(mask, masks[0][name] | masks[1][name])


def test_the_base_may_say_what_stays(llama: Any, saved: Callable[..., Path], client: Prune) -> None:
    base = saved(llama)
    for name in ("one", "two"):
        client(base, name)
    made = merge_artifacts(base, "one,two", sparsity=0.5, settings={"values": "base"})
    dense, found = load_file(base / WEIGHTS), load_file(made.path / WEIGHTS)
    for name, mask in load_masks(made.path / MASKS_FILE).items():
        assert torch.equal(found[name], dense[name] * mask)


def test_only_masked_sub_models_of_the_base_are_merged(
    llama: Any, new_model: Callable[..., Any], saved: Callable[..., Path], client: Prune
) -> None:
    base = saved(llama)
    client(base, "good")
    shallow = {"method": "top", "sparsity": None, "layers": 2, "calibration": None}
    client(base, "shallow", **shallow)
    client("good", "shallow-good", **shallow)
    client(saved(new_model("llama", hidden_size=64), "other"), "stranger")
    with pytest.raises(PrufedError, match="shallow-good@v1 lacks layers of good@v1"):
        merge_artifacts("good", "shallow-good", sparsity=0.5)
    for clients, said in (
        ("good,stranger", r"stranger@v1 was pruned from other@v1, not base@v1"),
        ("good,shallow", r"shallow@v1 has no masks"),
        ("base", r"base@v1 has no masks"),
        ("good,good@v1", r"good@v1 is given twice"),
        (f"good,{base}", r"is no artifact"),
    ):
        with pytest.raises(PrufedError, match=said) as refused:
            merge_artifacts(base, clients, sparsity=0.5)
        assert refused.value.exit_code == USAGE
    with pytest.raises(NotFound):
        merge_artifacts(base, "good,nobody", sparsity=0.5)


def test_sub_models_whose_base_is_elsewhere_are_refused(
    llama: Any, saved: Callable[..., Path], client: Prune, tmp_path: Path
) -> None:
    sent = client(saved(llama), "alone").path
    server = Registry(tmp_path / "server")
    server.import_directory(sent, name="alone")
    request = PruneRequest(method="fedspallm", settings={"clients": ["alone"]})
    with pytest.raises(PrufedError, match="the base of alone@v1 is not in the registry"):
        prune(request, registry=server, device="cpu")
    request = replace(request, base=str(saved(llama)))
    assert prune(request, registry=server, device="cpu").artifact.ref == "base-fedspallm@v1"
