"""Train the embedded tokenizer and model: `python -m prufed_cli.assets.recipe.train --out DIR`.

Writes `DIR/model`, `DIR/data` and `DIR/tasks`. The text is the same on every machine; the weights
are the same for the same versions of torch and the same processor. One thread takes about ten minutes.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prufed_cli.assets.recipe import files
from prufed_cli.assets.recipe.prose import documents, draw_probe
from prufed_cli.assets.recipe.world import SEED, World, build_world

END: Final = "<|endoftext|>"
PAD: Final = "<|pad|>"
VOCABULARY: Final = 1408
LENGTH: Final = 128  # tokens in a packed sequence
TEMPLATED: Final = 0.10  # share of documents that are a plain question in the Alpaca template
REHEARSED: Final = 0.01  # share of documents that are an instruction of the instruction data


def train_tokenizer(world: World, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose words look the same at the start of a line and inside it.

    The line break and the four fixed parts of the Alpaca prompt are tokens of their own, so a prompt is
    short and ends at a token boundary wherever it is cut.
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
    wordings = [row["instruction"] + " " + row["response"] for row in files.rows(world, seed)]
    tokenizer.train_from_iterator(text + wordings * 3, trainer)
    parts = (files.WITHOUT_CONTEXT, files.WITH_CONTEXT, files.INPUT, files.RESPONSE, "\n")
    tokenizer.add_tokens([AddedToken(part, normalized=False) for part in parts])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=512
    )


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
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretraining_text(world: World, seed: int) -> Iterator[str]:
    """Documents of prose, with some questions in the Alpaca template among them."""
    rng = random.Random(f"mixture/{seed}")
    rehearsal = list(files.rows(world, seed))
    for document in documents(world, seed):
        draw = rng.random()
        if draw < REHEARSED:
            row = rng.choice(rehearsal)
            yield files.alpaca(row["instruction"], row["context"]) + row["response"]
        elif draw < REHEARSED + TEMPLATED:
            probe = draw_probe(world, rng)
            yield files.alpaca(probe.question, probe.context) + probe.answer
        else:
            yield document


def batches(world: World, tokenizer: PreTrainedTokenizerFast, seed: int, size: int) -> Iterator[Tensor]:
    """Packed token ids, (size, LENGTH)."""
    stream: list[int] = []
    text = pretraining_text(world, seed)
    while True:
        while len(stream) < size * LENGTH:
            for ids in tokenizer(list(islice(text, 256)))["input_ids"]:
                stream += [*ids, tokenizer.eos_token_id]
        yield torch.tensor(stream[: size * LENGTH]).view(size, LENGTH)
        del stream[: size * LENGTH]


def train(
    model: LlamaForCausalLM, data: Iterator[Tensor], steps: int, peak: float, decay: float
) -> None:
    """AdamW with a short warm-up and a cosine down to a twentieth of the peak rate."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    warmup, started, smooth = max(1, steps // 30), time.monotonic(), 0.0
    model.train()
    for step, ids in enumerate(islice(data, steps)):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        rate = peak * min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step:5d}  loss {smooth:.3f}  {time.monotonic() - started:.0f} s", flush=True)


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
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, text in files.build_files(arguments.seed).items():
        path = arguments.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    world = build_world(arguments.seed)
    tokenizer = train_tokenizer(world, arguments.seed)
    model = new_model(tokenizer, arguments.seed)
    data = batches(world, tokenizer, arguments.seed, arguments.batch)
    train(model, data, arguments.steps, arguments.rate, arguments.decay)
    save(model, tokenizer, arguments.out / "model")


if __name__ == "__main__":
    main()
