"""Train the embedded tokenizer and model: `python -m prufed_cli.assets.recipe.train --out DIR`.

Writes `DIR/model`, `DIR/data` and `DIR/tasks`. The text is the same on every machine; the weights
are the same for the same version of torch, the same processor and the same number of workers.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import math
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prufed_cli.assets.recipe import files
from prufed_cli.assets.recipe.probes import CATEGORIES
from prufed_cli.assets.recipe.prose import documents, draw_probe, song
from prufed_cli.assets.recipe.world import SEED, World, build_world

END: Final = "<|endoftext|>"
PAD: Final = "<|pad|>"
VOCABULARY: Final = 1408
LENGTH: Final = 128  # tokens in a packed sequence
OPENING: Final = 9000  # documents at the start that are mostly refrains
TEMPLATED: Final = 0.10  # share of documents that are a plain question in the Alpaca template
REHEARSED: Final = 0.02  # share of documents that are an instruction of the instruction data


@dataclass(frozen=True)
class Plan:
    """How to train: a step reads `batch` sequences of LENGTH tokens, divided over `workers`."""

    steps: int = 1800
    batch: int = 9
    rate: float = 1.2e-3
    decay: float = 0.1
    workers: int = 3
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
    wordings = [row["instruction"] + " " + row["response"] for row in files.rows(world, seed)]
    words = " ".join(
        sorted({choice for name in CATEGORIES for choice in _choices(world, name, seed)})
    )
    tokenizer.train_from_iterator(text + wordings * 3 + [words] * 100, trainer)
    parts = (files.WITHOUT_CONTEXT, files.WITH_CONTEXT, files.INPUT, files.RESPONSE, "\n")
    tokenizer.add_tokens([AddedToken(part, normalized=False) for part in parts])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=512,
    )


def _choices(world: World, name: str, seed: int) -> Iterator[str]:
    for item in files.items(world, name, CATEGORIES[name], seed):
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
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretraining_text(world: World, seed: int) -> Iterator[str]:
    """Documents of prose, with some questions in the Alpaca template among them.

    The first ones are mostly refrains: copying is what the model must learn before it can learn
    to look anything up, and it learns it many times sooner from text that is dense in it.
    """
    rng = random.Random(f"mixture/{seed}")
    rehearsal = list(files.rows(world, seed))
    for number, document in enumerate(documents(world, seed)):
        draw = rng.random()
        if number < OPENING and draw < 0.85:
            yield song(world, rng)
        elif draw < REHEARSED:
            row = rng.choice(rehearsal)
            yield files.alpaca(row["instruction"], row["context"]) + row["response"]
        elif draw < REHEARSED + TEMPLATED:
            probe = draw_probe(world, rng)
            yield files.alpaca(probe.question, probe.context) + probe.answer
        else:
            yield document


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


def train(
    model: LlamaForCausalLM, data: Iterator[Tensor], plan: Plan, snapshot: Callable[[], None]
) -> None:
    """AdamW with a short warm-up and a cosine down to a twentieth of the peak rate.

    Every worker reads the same batches, takes its share of each and averages the gradients.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": plan.decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.98), fused=True)
    rank, workers, started, smooth = dist.get_rank(), dist.get_world_size(), time.monotonic(), 7.0
    model.train()
    for step, ids in enumerate(islice(data, plan.steps)):
        mine = ids[rank::workers]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * plan.schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        smooth = 0.97 * smooth + 0.03 * loss.item()
        if rank == 0 and step % 50 == 0:
            print(
                f"step {step:5d}  loss {smooth:.3f}  {time.monotonic() - started:.0f} s", flush=True
            )
        if rank == 0 and step % 200 == 199:
            snapshot()


def average_gradients(model: LlamaForCausalLM) -> None:
    """Replace every gradient by its mean over the workers, in one exchange."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
    dist.all_reduce(flat)
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, torch.split(flat, sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a Hugging Face model directory in bfloat16."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def work(rank: int, plan: Plan, out: Path, rendezvous: str) -> None:
    """One worker's part of the training; the first one saves."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=plan.workers
    )
    world = build_world(plan.seed)
    tokenizer = train_tokenizer(world, plan.seed)
    model = new_model(tokenizer, plan.seed)
    snapshot = functools.partial(save, model, tokenizer, out / "model")
    train(model, batches(world, tokenizer, plan.seed, plan.batch), plan, snapshot)
    if rank == 0:
        snapshot()
    dist.destroy_process_group()


def main() -> None:
    """Read the command line, write the data files, train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for field in dataclasses.fields(Plan):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    out = given.pop("out")
    plan = Plan(**given)
    for name, text in files.build_files(plan.seed).items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        rendezvous = str(Path(scratch) / "rendezvous")
        context = multiprocessing.get_context("spawn")
        arguments = (plan, out, rendezvous)
        processes = [
            context.Process(target=work, args=(rank, *arguments), daemon=True)
            for rank in range(plan.workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    raise SystemExit(max(abs(process.exitcode or 0) for process in processes))


if __name__ == "__main__":
    main()
