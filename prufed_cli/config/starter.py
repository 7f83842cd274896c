"""The clients.yaml that ``prufed init`` writes: complete, commented, and valid as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from prufed_cli.errors import FAILED, NOT_FOUND, USAGE, PrufedError

STARTER: Final = """\
# clients.yaml: one run of `prufed federate --clients clients.yaml`.
# Everything but `clients` has a default. `prufed schema` prints the JSON schema of this file;
# `prufed plugins` lists the methods, and `prufed plugins show NAME` what can be set on each.

# base: my-model                # a reference, a directory or a Hub id;
                                # default: $PRUFED_BASE, else the embedded model
# name: my-federation           # begins the names of the artifacts; default: this file's name
rounds: 4
seed: 0                         # the same seed gives the same adapters, byte for byte, on a CPU
device: auto                    # auto, cpu, cuda, cuda:N, mps
dtype: auto                     # auto, float32, bfloat16, float16

# Who trains in a round: all, uniform, sequential, by-sparsity, by-depth.
sampler: {name: all}

# How sub-models are made: sparsegpt, wanda, magnitude; top, bottom, symmetric ... for whole layers.
pruner:
  name: sparsegpt
  # calibration: calibration.txt  # default: the embedded text
  samples: 64
  length: 128

# The masked LoRA adapter. Presets: lego, lego-literal, sparse-peft, dense.
adapter: {r: 16, alpha: 16, dropout: 0.05, target_modules: [q_proj], preset: lego}

# How a client trains on its rows: lora, ffa, rolora, fedprox.
tuner:
  name: lora
  epochs: 1
  batch_size: 64
  micro_batch_size: 8
  lr: 2e-3                      # for the embedded model; 3e-4 suits a large one
  cutoff: 512                   # tokens per row
  template: alpaca              # alpaca, chat, plain
  train_on: all                 # all tokens carry loss, or only the response's

# How the adapters are merged: heteagg, heteagg-layer, fedavg.
aggregator: {name: heteagg}

# How the global adapter steps towards the merged one, by default all the way: fedavgm, fedadagrad,
# fedyogi, fedadam.
# server_optimizer: {name: fedavgm, lr: 1.0, momentum: 0.9}

# What an update must be like to be merged: a change that is too large is scaled down or excluded.
screen:
  # clip: median                # scale larger changes down to this norm, a number or the median
  outlier: 1000                 # exclude one so many times the others' median norm

# One file split over the clients that have no `data` of their own: iid, stratified-iid,
# by-category, dirichlet, shards, quantity, natural. A row is {"instruction": ..., "context": ...,
# "response": ..., "category": ...}; Alpaca's fields, chat `messages` and plain `text` work too.
data:
  path: embedded                # the data that comes with prufed; yours: rows.jsonl
  partition: {name: by-category}

# server_data: trusted.jsonl     # rows of the server's own, which the aggregator fltrust needs

# What to measure, and after which rounds.
evaluate:
  tasks: [prufed_open_qa, prufed_classification]  # of lm-eval, such as hellaswag and sciq
  include_path: embedded        # the tasks that come with prufed; yours: a directory
  # perplexity: held-out.txt
  every: 1
  limit: 100                    # documents per task
  clients: false                # also every client's own model

write_back: {share: 0.0}        # how much of its own adapter a client keeps after a round
tier_weight: none               # inverse-density: the sparser a client, the more it weighs;
                                # update-norm: the longer its product B A, the more it weighs
min_clients: 1                  # a round with fewer updates than this does not count

# Each client has a sub-model: by `sparsity`, by `pattern`, by `keep_layers`, or a `base` made
# before. What it says under `pruner`, `tuner` and `adapter` replaces the keys above.
clients:
  - {name: server}
  - {name: desktop, sparsity: 0.25}
  - {name: laptop, sparsity: 0.5}
  - {name: phone, sparsity: 0.75, tuner: {lr: 4e-3}}
  # - {name: tablet, pattern: 2:4, data: tablet.jsonl}
  # - {name: edge, keep_layers: 6, pruner: {name: symmetric}, adapter: {r: 8}}
  # - {name: old, base: my-model-sparsegpt-50@v3, weight: 0.5}
"""


def write_starter(path: Path, *, force: bool = False) -> None:
    """Write the starting configuration.

    Raises:
        PrufedError: the file exists and ``force`` is not given, or it cannot be written.
    """
    try:
        with path.open("w" if force else "x", encoding="utf-8", newline="\n") as file:
            file.write(STARTER)
    except FileExistsError as error:
        message = f"{str(path)!r} exists already"
        raise PrufedError(message, "`--force` replaces it; or name another file", USAGE) from error
    except FileNotFoundError as error:
        message = f"no directory {str(path.parent)!r}"
        raise PrufedError(message, f"make it: mkdir -p {path.parent}", NOT_FOUND) from error
    except (IsADirectoryError, PermissionError) as error:
        message = f"cannot write {str(path)!r}: {error.strerror}"
        raise PrufedError(message, "name another file", FAILED) from error
