"""lm-eval's view of a loaded model: quiet, counted, and checked."""

from __future__ import annotations

import hashlib
import math
from array import array
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from prufed_cli.errors import PrufedError
from prufed_cli.evaluation.perplexity import check_token_ids
from prufed_cli.progress import SILENT, Reporter, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Request = tuple[tuple[str, str], list[int], list[int]]
"""Texts of context and continuation, tokens of the context, tokens of the continuation."""

Encodings = dict[tuple[str, str], tuple["array[int]", "array[int]"]]
"""Context and continuation to their tokens."""


class Scorer(HFLM):  # type: ignore[misc]
    """A causal language model that answers lm-eval's requests.

    Attributes:
        tokens_read: tokens of all contexts and continuations scored so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        encodings: Encodings,
        reporter: Reporter = SILENT,
    ) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            prefix_token_id=_prefix_token(model, tokenizer),
        )
        self.tokens_read = 0
        self._encodings = encodings
        self._reporter = reporter
        self._progress = Task()
        self._answered = 0

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood given its context."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return each text's log-likelihood."""
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return what the model writes after each context."""
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both parts; a text that was encoded before is not encoded again."""
        key = (context, continuation)
        if key not in self._encodings:
            before, after = super()._encode_pair(context, continuation)
            self._encodings[key] = array("q", before), array("q", after)
        before, after = self._encodings[key]
        return before.tolist(), after.tolist()

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the logits of a batch: (b, l) token ids to (b, l, v)."""
        import torch

        with torch.no_grad():
            # A key-value cache would be filled for nothing: no token follows.
            logits: Tensor = self.model(input_ids=inps, use_cache=False).logits
        self._advance(len(inps))
        return logits

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood and whether greedy decoding yields it."""
        self._check(requests)
        self._answered = 0
        with self._reporter.task("scoring", total=len(requests)) as self._progress:
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs
            )
            # Continuations of one token share a forward pass and were counted as one.
            self._advance(len(requests) - self._answered)
        self.tokens_read += sum(len(context) + len(text) for _, context, text in requests)
        for (texts, _, _), (likelihood, _) in zip(requests, answers, strict=True):
            if math.isnan(likelihood):
                raise PrufedError(
                    f"the model's likelihood of {texts!r} is not a number"[:200],
                    "its weights hold NaN or infinity, or its dtype overflows: try float32",
                )
        return answers

    def _advance(self, requests: int) -> None:
        self._answered += requests
        self._progress.advance(requests)

    def _check(self, requests: list[Request]) -> None:
        for texts, context, continuation in requests:
            check_token_ids(self.model, max(context + continuation, default=0))
            if not context or not 0 < len(continuation) <= self.max_length:
                raise PrufedError(
                    f"a continuation of {len(continuation)} tokens cannot be scored: {texts!r}"[
                        :200
                    ],
                    f"the model reads 1 to {self.max_length} tokens of it; check the task",
                )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a digest of everything that decides a tokenizer's output; None where it is not known.

    Two tokenizers loaded from copies of one file have the same digest.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    text = f"{type(tokenizer).__qualname__} {tokenizer.special_tokens_map} {backend.to_str()}"
    return hashlib.sha256(text.encode()).hexdigest()


def _prefix_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that stands before an empty context; None for lm-eval's own choice."""
    if tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None:
        return None
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(model.config, name, None)
        if isinstance(token, int):
            return token
    return 0
