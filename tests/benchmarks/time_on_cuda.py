"""Prune a random model of Llama-7B's shape on a CUDA device, and by the published procedure.

    python time_on_cuda.py [--device cuda] [--blocks 32] [--hidden 4096] [--inner 11008]
                           [--heads 32] [--samples 128] [--length 2048]

Prints one JSON object per method: seconds of the model and per block, and the device's peak memory.
The published procedure keeps the whole model on the device and prunes it with SparseGPT at 50 %;
give fewer ``--blocks`` where it does not fit. ``--device cpu`` with a small shape tries the script.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import plain_pruning
import torch

from prufed_cli.pruning import PruneRequest, prune
from prufed_registry import Registry

METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("wanda 50 %", {"method": "wanda", "sparsity": 0.5}),
    ("sparsegpt 50 %", {"method": "sparsegpt", "sparsity": 0.5}),
    ("sparsegpt 2:4", {"method": "sparsegpt", "pattern": "2:4"}),
)
VOCABULARY = 32000


def make_model(directory: Path, given: argparse.Namespace) -> None:
    """Save a random Llama in bfloat16, and a tokenizer of one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=given.hidden,
        intermediate_size=given.inner,
        num_hidden_layers=given.blocks,
        num_attention_heads=given.heads,
        num_key_value_heads=given.heads,
        max_position_embeddings=given.length,
        dtype=torch.bfloat16,
    )
    with torch.device(given.device):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)


def reset(device: str) -> None:
    """Start to count the device's peak memory anew."""
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def tell(what: str, started: float, given: argparse.Namespace) -> None:
    """Print what one method took."""
    on_cuda = given.device != "cpu"
    if on_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            {
                "what": what,
                "device": torch.cuda.get_device_name() if on_cuda else "cpu",
                "seconds": round(seconds, 2),
                "seconds per block": round(seconds / given.blocks, 3),
                "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_cuda else 0,
            }
        ),
        flush=True,
    )


def main(given: argparse.Namespace) -> None:
    """Time every method of ours, then the published procedure."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (given.samples, given.length), generator=generator)
    with tempfile.TemporaryDirectory() as scratch:
        base, text = Path(scratch) / "base", Path(scratch) / "calibration.txt"
        make_model(base, given)
        text.write_text(" ".join(f"w{token}" for token in tokens.flatten().tolist()))
        registry = Registry(Path(scratch) / "home")
        for what, target in METHODS:
            reset(given.device)
            started = time.perf_counter()
            request = PruneRequest(
                base=str(base), calibration=str(text), samples=given.samples, length=given.length,
                **target,
            )  # fmt: skip
            prune(request, registry=registry, device=given.device)
            tell(what, started, given)
        reset(given.device)
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(given.device)
        plain_pruning.prune(model.eval(), tokens.to(given.device), 0.5)
        tell("published procedure, sparsegpt 50 %", started, given)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    for name, value in (
        ("blocks", 32), ("hidden", 4096), ("inner", 11008), ("heads", 32), ("samples", 128),
        ("length", 2048),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
