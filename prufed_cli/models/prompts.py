"""From rows of data to token ids: how an instruction is worded, and which tokens carry loss.

A template turns a row into a prompt and a full text that starts with it. The full text is tokenised
once, as the model will see it; the tokens after the longest common beginning with the tokenised
prompt are the response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, get_args

from prufed_cli.data import Row
from prufed_cli.errors import FAILED, USAGE, PrufedError
from prufed_cli.progress import SILENT, Reporter
from prufed_plugins.api import TrainingData

Template = Literal["alpaca", "chat", "plain"]
TrainOn = Literal["all", "response"]

IGNORE: Final = -100
"""The label of a token without loss."""

_ALPACA_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)
_ALPACA: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    template: Template = "alpaca",
    cutoff: int = 512,
    train_on: TrainOn = "all",
    reporter: Reporter = SILENT,
) -> TrainingData:
    """Return the rows as token ids and labels, each ending in the end-of-sequence token.

    Args:
        rows: instructions, or texts under the template ``plain``; a text is all response.
        tokenizer: of the base.
        template: ``alpaca``; ``chat``, the tokenizer's own; or ``plain``, line by line.
        cutoff: a row is cut after so many tokens.
        train_on: which tokens carry loss, all of them or the response's.
        reporter: warned of rows that are left without a token to learn from, which are dropped.

    Raises:
        PrufedError: the template does not fit the rows or the tokenizer, the tokenizer has no
            end-of-sequence token, or every row was dropped.
    """
    _check_request(tokenizer, template, cutoff, train_on)
    texts = [_text(number, row, tokenizer, template) for number, row in enumerate(rows, start=1)]
    chat = template == "chat"  # which writes its special tokens itself, and ends turns its own way
    full = _token_ids(tokenizer, [text for _, text in texts], not chat)
    prompts: list[list[int]] = [[] for _ in rows]
    if chat or train_on == "response":
        prompts = _token_ids(tokenizer, [prompt for prompt, _ in texts], not chat)
    input_ids, labels = [], []
    for ids, prompt in zip(full, prompts, strict=True):
        start = _common_length(ids, prompt)
        last = ids[start:] if chat else ids[-1:]
        ended = (ids if tokenizer.eos_token_id in last else [*ids, tokenizer.eos_token_id])[:cutoff]
        masked = min(start, len(ended)) if train_on == "response" else 0
        label = [IGNORE] * masked + ended[masked:]
        if any(token != IGNORE for token in label[1:]):
            input_ids.append(ended)
            labels.append(label)
    _report_dropped(len(rows), len(input_ids), cutoff, reporter)
    return TrainingData(input_ids=input_ids, labels=labels)


def _check_request(tokenizer: Any, template: str, cutoff: int, train_on: str) -> None:
    for value, known, what in (
        (template, get_args(Template), "template"),
        (train_on, get_args(TrainOn), "train_on"),
    ):
        if value not in known:
            raise PrufedError(f"unknown {what} {value!r}", f"choose from {', '.join(known)}", USAGE)
    if cutoff < 2:
        raise PrufedError(f"cutoff {cutoff} leaves nothing to learn", "set cutoff to 512", USAGE)
    if tokenizer.eos_token_id is None:
        raise PrufedError(
            "the tokenizer has no end-of-sequence token",
            "set eos_token in the base's tokenizer_config.json",
            USAGE,
        )
    if template == "chat" and not tokenizer.chat_template:
        raise PrufedError(
            "the base's tokenizer has no chat template", "use template: alpaca or plain", USAGE
        )


# --- templates -----------------------------------------------------------------------------------


def _text(number: int, row: Row, tokenizer: Any, template: Template) -> tuple[str, str]:
    """Return (prompt, full text) of one row."""
    if row.text is not None:
        if template != "plain":
            raise PrufedError(
                f"row {number} is plain text, which template {template!r} cannot word",
                "use template: plain",
                USAGE,
            )
        return "", row.text
    if template == "chat":
        return _chat(number, row, tokenizer)
    prompt = _WORDINGS[template](row)
    return prompt, prompt + row.response


def _alpaca(row: Row) -> str:
    if row.context:
        return _ALPACA_INPUT.format(instruction=row.instruction, context=row.context)
    return _ALPACA.format(instruction=row.instruction)


def _plain(row: Row) -> str:
    return "".join(f"{part}\n" for part in (row.instruction, row.context) if part)


_WORDINGS: Final[dict[str, Callable[[Row], str]]] = {"alpaca": _alpaca, "plain": _plain}


def _chat(number: int, row: Row, tokenizer: Any) -> tuple[str, str]:
    from jinja2 import TemplateError

    content = f"{row.instruction}\n\n{row.context}" if row.context else row.instruction
    asked = [{"role": "user", "content": content}]
    answered = [*asked, {"role": "assistant", "content": row.response}]
    try:
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return prompt, tokenizer.apply_chat_template(answered, tokenize=False)
    except TemplateError as error:
        raise PrufedError(
            f"the base's chat template cannot word row {number}: {error}",
            "use template: alpaca or plain",
            FAILED,
        ) from error


# --- tokens --------------------------------------------------------------------------------------


def _token_ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _common_length(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many first tokens the two share; the tokenizer may join text across the border."""
    pairs = zip(ids, prompt, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(prompt)))


def _report_dropped(given: int, kept: int, cutoff: int, reporter: Reporter) -> None:
    if not kept:
        raise PrufedError(
            f"none of {given} rows has a token to learn from within {cutoff} tokens",
            "raise cutoff, or set train_on: all",
        )
    if kept < given:
        reporter.warn(
            f"{given - kept} of {given} rows have no token to learn from within {cutoff} tokens "
            "and are left out"
        )
