"""Perplexity of a model on a text file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prufed_cli.errors import NOT_FOUND, USAGE, PrufedError
from prufed_cli.models.base import context_length
from prufed_cli.progress import SILENT, Reporter
from prufed_registry.names import readable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_WINDOW: Final = 2048
_LOGITS_BUDGET: Final = 2**24
"""Entries of logits alive at once: 64 MiB in float32, and at least one window."""


@dataclass(frozen=True)
class Perplexity:
    """A text's likelihood under a model.

    Attributes:
        value: ``exp`` of the mean negative log-likelihood of a token.
        bits_per_byte: total negative log-likelihood in bits over the bytes of the text; unlike
            ``value`` it compares models of different tokenizers.
        tokens: how many tokens were scored.
        bytes: UTF-8 bytes of the text.
        window: tokens of input per window.
    """

    value: float
    bits_per_byte: float
    tokens: int
    bytes: int
    window: int

    @classmethod
    def of_likelihood(cls, nats: float, tokens: int, text: TextFile, window: int) -> Perplexity:
        """Return what a summed negative log-likelihood comes to.

        Args:
            nats: over all scored tokens.
            tokens: how many were scored.
            text: what they are the tokens of.
            window: tokens of input per window.
        """
        size = len(text.text.encode())
        mean = nats / tokens
        value = math.inf if mean >= 700 else math.exp(mean)
        return cls(value, nats / math.log(2) / size, tokens, size, window)

    def checked(self) -> Perplexity:
        """Return the same.

        Raises:
            PrufedError: the likelihood is not finite.
        """
        if not math.isfinite(self.bits_per_byte):
            raise PrufedError(
                "the model's likelihood of the text is not a number",
                "its weights hold NaN or infinity, or its dtype overflows: try --dtype float32",
            )
        return self


@dataclass(frozen=True)
class TextFile:
    """A text to be scored: its content and the SHA-256 of its bytes."""

    path: Path
    text: str
    digest: str

    @property
    def name(self) -> str:
        """The file's name, as it can be stored."""
        return readable(self.path.name)


def read_text(path: Path) -> TextFile:
    """Read a UTF-8 text file.

    Raises:
        PrufedError: there is no such file, it is empty, or it is not UTF-8.
    """
    if not path.is_file():
        raise PrufedError(f"no text file {path}", "give a UTF-8 text file", NOT_FOUND)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PrufedError(
            f"{path} is not UTF-8: byte {error.start} cannot be decoded",
            f"convert it: `iconv -t UTF-8 {path}`",
            USAGE,
        ) from None
    if not text.strip():
        raise PrufedError(f"{path} is empty", "give a text of at least a few sentences", USAGE)
    return TextFile(path, text, "sha256:" + hashlib.sha256(content).hexdigest())


def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextFile,
    *,
    window: int | None = None,
    batch_size: int | None = None,
    reporter: Reporter = SILENT,
) -> Perplexity:
    """Score every token of a text but the first, each once, in windows that do not overlap.

    Window ``i`` reads tokens ``[iL, (i+1)L)`` and predicts tokens ``[iL+1, (i+1)L]``. A beginning
    token that the tokenizer adds is read and not scored.

    Args:
        model: a causal language model; called in the mode it is in.
        tokenizer: its tokenizer.
        text: what to score.
        window: tokens per window; the model's own limit, at most 2048, by default.
        batch_size: windows per forward pass; as many as 64 MiB of logits hold by default.
        reporter: receives progress.

    Raises:
        PrufedError: fewer than two tokens, a token the model has no embedding for, or a
            likelihood that is not finite.
    """
    import torch

    length = window or model_window(model)
    tokens = tokenize(tokenizer, text)
    check_token_ids(model, int(tokens.max()))
    total = torch.zeros((), dtype=torch.float64)
    rows = _rows_per_batch(model, length, batch_size)
    batches = list(windows(tokens, length, rows))
    with reporter.task(f"perplexity on {text.name}", total=len(batches)) as task:
        for batch in batches:
            total += _negative_log_likelihood(model, batch)
            task.advance()
    return Perplexity.of_likelihood(float(total), len(tokens) - 1, text, length).checked()


def model_window(model: PreTrainedModel) -> int:
    """Return how many tokens a model reads at once, at most 2048."""
    return min(context_length(model) or LONGEST_WINDOW, LONGEST_WINDOW)


def check_token_ids(model: PreTrainedModel, largest: int) -> None:
    """Refuse a tokenizer that produces ids the model has no embedding for.

    Raises:
        PrufedError: the largest id is out of range.
    """
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise PrufedError(
            f"the tokenizer produces token {largest}, but the model has {known} embeddings",
            "use the tokenizer that the model was trained with",
        )


def tokenize(tokenizer: PreTrainedTokenizerBase, text: TextFile) -> Tensor:
    """Return the tokens (n,) of a text, at least two.

    Raises:
        PrufedError: there are fewer.
    """
    import torch

    tokens: Sequence[int] = tokenizer(text.text, verbose=False)["input_ids"]
    if len(tokens) < 2:
        raise PrufedError(
            f"{text.path} has {len(tokens)} token(s), at least 2 are needed",
            "give a longer text",
            USAGE,
        )
    return torch.tensor(tokens)  # (n,)


def _rows_per_batch(model: PreTrainedModel, length: int, batch_size: int | None) -> int:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return batch_size or max(1, _LOGITS_BUDGET // (length * vocabulary))


def windows(tokens: Tensor, length: int, rows: int) -> Iterator[Tensor]:
    """Yield batches of (rows, length + 1) tokens; neighbours share one token, the tail is short."""
    import torch

    whole = (len(tokens) - 1) // length
    if whole:
        yield from torch.split(tokens.unfold(0, length + 1, length), rows)
    tail = tokens[whole * length :]
    if len(tail) > 1:
        yield tail.unsqueeze(0)


def _negative_log_likelihood(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of tokens 1.. of each row, in nats, float64."""
    import torch

    batch = batch.to(model.device)
    with torch.no_grad():
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # (b, l, v)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none"
        )
    return losses.cpu().double().sum()
