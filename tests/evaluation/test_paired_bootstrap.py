"""The paired bootstrap on synthetic answers, and the sparsity as counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prufed_cli.evaluation import measure_footprint, paired_bootstrap
from tests.evaluation.conftest import make_model


def answers(seed: int, count: int, share: float) -> list[float]:
    return list((np.random.default_rng(seed).random(count) < share).astype(float))


def test_a_model_against_itself_differs_by_exactly_nothing():
    same = {"a": answers(1, 200, 0.6), "b": answers(2, 50, 0.3)}
    found = paired_bootstrap(same, same)
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.documents == 250


def test_the_interval_agrees_with_the_normal_one():
    first, second = answers(1, 2000, 0.5), answers(2, 2000, 0.6)
    found = paired_bootstrap({"a": first}, {"a": second})
    differences = np.subtract(second, first)
    assert found.difference == pytest.approx(differences.mean())
    half = 1.96 * differences.std(ddof=1) / np.sqrt(2000)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)
    assert found.low < found.difference < found.high


def test_pairing_narrows_the_interval():
    first = answers(1, 1000, 0.5)
    second = [1.0 if index < 20 else value for index, value in enumerate(first)]
    shuffled = list(np.random.default_rng(0).permutation(second))
    paired = paired_bootstrap({"a": first}, {"a": second})
    unpaired = paired_bootstrap({"a": first}, {"a": shuffled})
    assert paired.difference == pytest.approx(unpaired.difference)
    assert paired.low >= 0
    assert paired.high - paired.low < 0.3 * (unpaired.high - unpaired.low)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        first = (generator.random(150) < 0.5).astype(float)
        second = np.where(generator.random(150) < 0.2, 1.0, first)  # true difference: 0.1
        found = paired_bootstrap({"a": first}, {"a": second}, draws=1000)
        hits += found.low <= 0.1 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_tasks_weigh_the_same_whatever_their_size():
    first = {"small": [0.0] * 10, "large": [0.0] * 1000}
    second = {"small": [1.0] * 10, "large": [0.0] * 1000}
    assert paired_bootstrap(first, second).difference == pytest.approx(0.5)


def test_only_tasks_of_both_are_compared():
    found = paired_bootstrap({"a": [0.0, 1.0], "b": [1.0]}, {"a": [1.0, 1.0], "c": [0.0]})
    assert found.documents == 2
    assert paired_bootstrap({"a": [1.0]}, {"b": [1.0]}) is None


def test_the_same_seed_gives_the_same_interval():
    first, second = {"a": answers(1, 90, 0.5)}, {"a": answers(2, 90, 0.5)}
    assert paired_bootstrap(first, second) == paired_bootstrap(first, second)
    assert paired_bootstrap(first, second) != paired_bootstrap(first, second, seed=1)


def test_different_documents_are_refused():
    with pytest.raises(ValueError, match="2 documents against 1"):
        paired_bootstrap({"a": [0.0, 1.0]}, {"a": [1.0]})


def test_sparsity_is_counted_in_the_decoder_and_nowhere_else():
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[::2] = 0
    found = measure_footprint(model)
    entries = sum(
        module.weight.numel() for module in model.model.modules() if hasattr(module, "in_features")
    )
    assert found.matrix_entries == entries
    assert found.matrix_zeros == 2 * 48 * 32 // 2
    assert found.sparsity == pytest.approx(found.matrix_zeros / entries)
    assert found.parameters == sum(each.numel() for each in model.parameters())
    assert found.bytes == 4 * found.parameters
