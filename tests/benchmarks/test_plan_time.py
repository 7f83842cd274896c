"""The time that a plan foretells against the time that the prune takes, on a random Llama of 100 M.

Printed are both, from the moment the plan is told on, as a user would wait, and the CPU seconds:
what else runs on the machine meanwhile belongs to neither.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from prufed_cli.progress import Reporter

torch = pytest.importorskip("torch")

SAMPLES, LENGTH = 8, 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 104 M parameters in float32 and a tokenizer of one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("models") / "random"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=LENGTH,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
    return directory


class Clock(Reporter):
    """Starts when it is told a plan."""

    def note(self, message: str) -> None:
        if message.startswith("time about"):
            self.wall, self.cpu = time.perf_counter(), time.process_time()


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("sparsegpt", {"sparsity": 0.5}),
        ("wanda", {"sparsity": 0.5}),
        ("magnitude", {"sparsity": 0.5}),
        ("contribution", {"layers": 2}),
    ],
)
def test_the_plan_says_how_long_it_takes(
    model: Path, tmp_path: Path, method: str, target: dict[str, Any], threads: int
) -> None:
    from prufed_cli.pruning import PruneRequest, plan_prune, prune

    torch.set_num_threads(threads)
    ids = torch.randint(0, 512, (SAMPLES * LENGTH * 5,)).tolist()
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{token}" for token in ids))
    wanted = PruneRequest(
        base=str(model), method=method, calibration=str(text), samples=SAMPLES, length=LENGTH,
        **target,
    )  # fmt: skip
    plan = plan_prune([wanted], device="cpu")
    clock = Clock()
    prune(wanted, device="cpu", force=True, reporter=clock)
    wall, cpu = time.perf_counter() - clock.wall, time.process_time() - clock.cpu
    found = {
        "method": method,
        "threads": threads,
        "foretold": round(plan.seconds, 1),
        "took": round(wall, 1),
    }
    ratio = {"ratio": round(plan.seconds / wall, 2), "budget": 1.5}
    print(json.dumps({**found, "cpu": round(cpu, 1), **ratio}))
    assert plan.seconds > 0
