"""Perplexity of a text: every token once, against a direct computation."""

from __future__ import annotations

import math

import pytest
import torch

from prufed_cli.errors import NOT_FOUND, USAGE, PrufedError
from prufed_cli.evaluation import evaluate_model, measure_perplexity, read_text
from tests.evaluation.conftest import make_model, make_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, then sleeps under the old oak tree. " * 2


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return read_text(path)


def direct(model, tokens: list[int], window: int) -> float:
    """Score token after token, each from the window of tokens that ends before it."""
    total = 0.0
    for place in range(1, len(tokens)):
        start = (place - 1) // window * window
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:place]])).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[tokens[place]])
    return total


@pytest.mark.parametrize(("window", "batch_size"), [(None, None), (7, 3), (1, 64), (1000, 1)])
def test_perplexity_equals_the_direct_computation(tokenizer, text, window, batch_size):
    model = make_model(positions=64 if window != 1000 else 1024)
    found = measure_perplexity(model, tokenizer, text, window=window, batch_size=batch_size)
    tokens = tokenizer(TEXT)["input_ids"]
    nats = direct(model, tokens, window or 64)
    assert found.window == (window or 64)
    assert found.tokens == len(tokens) - 1
    assert found.value == pytest.approx(math.exp(nats / found.tokens), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_a_window_that_ends_with_the_text_leaves_no_tail(tokenizer, text):
    length = len(tokenizer(TEXT)["input_ids"]) - 1
    model = make_model(positions=1024)
    assert measure_perplexity(model, tokenizer, text, window=length).tokens == length


def test_the_model_is_scored_without_dropout_and_keeps_its_mode(tokenizer, text):
    model = make_model()
    expected = evaluate_model(model, tokenizer, perplexity=text.path).perplexity
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    assert evaluate_model(model, tokenizer, perplexity=text.path).perplexity == expected
    assert model.training


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(PrufedError, match="no text file") as caught:
        read_text(tmp_path / "nothing.txt")
    assert caught.value.exit_code == NOT_FOUND


@pytest.mark.parametrize(("content", "message"), [(b" \n ", "is empty"), (b"ab\xff", "byte 2")])
def test_a_file_without_text_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(PrufedError, match=message) as caught:
        read_text(path)
    assert caught.value.exit_code == USAGE


def test_one_token_is_too_short(model, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a")
    with pytest.raises(PrufedError, match="at least 2"):
        measure_perplexity(model, make_tokenizer(), read_text(path))


def test_a_foreign_tokenizer_is_refused(tokenizer, text):
    with pytest.raises(PrufedError, match="has 10 embeddings"):
        measure_perplexity(make_model(vocabulary=10), tokenizer, text)


def test_a_model_with_infinite_weights_is_an_error(tokenizer, text):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(PrufedError, match="not a number"):
        measure_perplexity(model, tokenizer, text)
