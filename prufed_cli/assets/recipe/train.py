"""Train the embedded tokenizer and model: `python -m prufed_cli.assets.recipe.train --out DIR`.

Writes `DIR/model`, `DIR/data` and `DIR/tasks`, in about twenty minutes on one core. The text is the
same on every machine; the weights are the same for the same version of torch and processor.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prufed_cli.assets.recipe import rows
from prufed_cli.assets.recipe.files import END, build_files
from prufed_cli.assets.recipe.pretraining import pretraining_text
from prufed_cli.assets.recipe.probes import CATEGORIES
from prufed_cli.assets.recipe.prose import documents
from prufed_cli.assets.recipe.world import SEED, World, build_world

PAD: Final = "<|pad|>"
VOCABULARY: Final = 1408
LENGTH: Final = 128  # tokens in a packed sequence


@dataclass(frozen=True)
class Plan:
    """How to train: a step reads `batch` sequences of LENGTH tokens."""

    steps: int = 6000
    batch: int = 8
    rate: float = 1.5e-3
    decay: float = 0.1
    gain: float = 10.0  # how much faster the gains of the norms learn
    seed: int = SEED

    def schedule(self, step: int) -> float:
        """The share of the peak rate at `step`: a short warm-up, a cosine down to a twentieth."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min(1.0, (step + 1) / 50) * (0.05 + 0.95 * cosine)


def train_tokenizer(world: World, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose words look the same at the start of a line and inside it.

    The line break and the four fixed parts of the Alpaca prompt are tokens of their own, so a
    prompt is short and ends at a token boundary wherever it is cut.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Replace(Regex("^ "), "")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 5,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [*islice(documents(world, seed + 2), 20000)]
    wordings = [row["instruction"] + " " + row["response"] for row in rows.rows(world, seed)]
    words = " ".join(
        sorted({choice for name in CATEGORIES for choice in _choices(world, name, seed)})
    )
    tokenizer.train_from_iterator(text + wordings * 3 + [words] * 100, trainer)
    parts = (rows.WITHOUT_CONTEXT, rows.WITH_CONTEXT, rows.INPUT, rows.RESPONSE, "\n")
    tokenizer.add_tokens([AddedToken(part, normalized=False) for part in parts])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=LENGTH,
    )


def _choices(world: World, name: str, seed: int) -> Iterator[str]:
    for item in rows.items(world, name, CATEGORIES[name], seed):
        yield from item["choices"]


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model: eight layers, 128 wide, input and output embeddings shared."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    world: World, tokenizer: PreTrainedTokenizerFast, seed: int, size: int
) -> Iterator[Tensor]:
    """Packed token ids, (size, LENGTH)."""
    stream: list[int] = []
    text = pretraining_text(world, seed)
    while True:
        while len(stream) < size * LENGTH:
            for ids in tokenizer(list(islice(text, 256)))["input_ids"]:
                stream += [*ids, tokenizer.eos_token_id]
        yield torch.tensor(stream[: size * LENGTH]).view(size, LENGTH)
        del stream[: size * LENGTH]


def train(model: LlamaForCausalLM, data: Iterator[Tensor], plan: Plan) -> None:
    """AdamW with a short warm-up and a cosine down to a twentieth of the peak rate.

    The gains of the norms learn faster than the matrices, so that the channels come to differ in
    scale as they do in large models.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": plan.decay, "peak": plan.rate},
        {"params": vectors, "weight_decay": 0.0, "peak": plan.rate * plan.gain},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.98), fused=True)
    started, smooth = time.monotonic(), 7.0
    model.train()
    for step, ids in enumerate(islice(data, plan.steps)):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * plan.schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        smooth = 0.97 * smooth + 0.03 * loss.item()
        if step % 50 == 0:
            print(
                f"step {step:5d}  loss {smooth:.3f}  {time.monotonic() - started:.0f} s", flush=True
            )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a Hugging Face model directory in bfloat16."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    """Read the command line, write the data files, train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for field in dataclasses.fields(Plan):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    out = given.pop("out")
    plan = Plan(**given)
    for name, text in build_files(plan.seed).items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    torch.set_num_threads(1)
    world = build_world(plan.seed)
    tokenizer = train_tokenizer(world, plan.seed)
    model = new_model(tokenizer, plan.seed)
    train(model, batches(world, tokenizer, plan.seed, plan.batch), plan)
    save(model, tokenizer, out / "model")


if __name__ == "__main__":
    main()
