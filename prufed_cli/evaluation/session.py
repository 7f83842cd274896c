"""Leave the process as it was: lm-eval seeds, logs, prints and switches the model's mode."""

from __future__ import annotations

import functools
import io
import logging
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_LOGGERS: Final = ("lm_eval", "lm-eval", "datasets", "transformers", "huggingface_hub", "evaluate")


@contextmanager
def contained() -> Iterator[None]:
    """Keep lm-eval's logs, bars, prints and seeds to itself, and give its templates a cache.

    lm-eval compiles a task's Jinja template anew for every document, which takes longer than a
    small model takes to answer.
    """
    import datasets
    import lm_eval.api.task
    import lm_eval.utils

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    bars = not datasets.are_progress_bars_disabled()
    with ExitStack() as stack:
        stack.enter_context(generators_kept())
        stack.enter_context(redirect_stdout(io.StringIO()))
        silent = functools.partial(lm_eval.api.task.tqdm, disable=True)
        stack.enter_context(_replaced(lm_eval.api.task, "tqdm", silent))
        environment = lm_eval.utils.env
        compiled = functools.lru_cache(maxsize=1024)(environment.from_string)
        stack.enter_context(_replaced(environment, "from_string", compiled))
        stack.enter_context(_one_process())
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if bars:
                datasets.enable_progress_bars()


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _one_process() -> Iterator[None]:
    """Keep lm-eval's bootstrapped standard errors from forking a process that runs torch."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch, on every device, afterwards."""
    import numpy
    import torch

    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; restore every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def padding_token(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> Iterator[None]:
    """Lend a tokenizer a padding token that the model knows; take it back afterwards."""
    before = tokenizer.pad_token
    known = tokenizer.pad_token_id is not None and tokenizer.pad_token_id < embeddings
    try:
        if not known:
            tokenizer.pad_token = (
                tokenizer.eos_token or tokenizer.bos_token or tokenizer.convert_ids_to_tokens(0)
            )
        yield
    finally:
        tokenizer.pad_token = before
