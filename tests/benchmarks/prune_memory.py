"""Peak memory of a prune, in a process of its own, over what imports leave resident. Linux only.

python prune_memory.py make DIR                     write a random Llama of 270 M parameters
python prune_memory.py prune DIR METHOD [MEMORY]    prune it and print the figures as JSON
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

HIDDEN, INNER, LAYERS, VOCABULARY = 2048, 5632, 4, 16384
SEQUENCES, LENGTH = 64, 128
BLOCK = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
ACTIVATIONS = 4 * SEQUENCES * LENGTH * HIDDEN
HESSIANS = 4 * (3 * HIDDEN * HIDDEN + INNER * INNER)


def make(directory: Path) -> None:
    """Write the model in bfloat16 and a tokenizer of numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=LENGTH,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="100MB")
    vocabulary = {"[UNK]": 0, "</s>": 1} | {str(n): n for n in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>", model_max_length=LENGTH
    ).save_pretrained(directory)
    words = random.Random(0).choices([*vocabulary][2:], k=8 * SEQUENCES * LENGTH)
    (directory / "calibration.txt").write_text(" ".join(words))


def reset_peak() -> int:
    """Set the peak to what is resident now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def prune(directory: Path, method: str, memory: str | None) -> dict[str, object]:
    """Prune the model and return the figures, in bytes."""
    import prufed_cli
    from prufed_cli.models.base import find_base
    from prufed_cli.output import LineReporter
    from prufed_cli.pruning.memory import parse_size
    from prufed_registry import Registry

    with tempfile.TemporaryDirectory(dir=directory.parent) as home:
        registry = Registry(Path(home) / "registry")
        base = find_base(str(directory), registry)
        tiny = prufed_cli.PruneRequest(sparsity=0.5, samples=1, length=16)
        prufed_cli.prune(tiny, registry=registry, device="cpu")  # imports all there is to import
        before = reset_peak()
        wanted = prufed_cli.PruneRequest(
            base=base.ref,
            method=method,
            sparsity=0.5,
            calibration=str(directory / "calibration.txt"),
            samples=SEQUENCES,
            length=LENGTH,
        )
        made = prufed_cli.prune(
            wanted,
            registry=registry,
            device="cpu",
            max_memory=None if memory is None else parse_size(memory),
            reporter=LineReporter(),
        )
        figures = {"before": before, "peak": peak(), "digest": made.artifact.digest}
    return {**figures, "block": BLOCK, "activations": ACTIVATIONS, "hessians": HESSIANS}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        print(json.dumps(prune(Path(sys.argv[2]), sys.argv[3], *(sys.argv[4:5] or [None]))))
