from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prufed_cli.data import Row
from prufed_cli.errors import USAGE, PrufedError
from prufed_cli.models.prompts import tokenize_rows
from prufed_cli.progress import Reporter

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def _tokenizer(*, merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """Bytes, plus the merges asked for; <s> in front of every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = ["".join(pair) for pair in merges or []]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, *joined])}
    bpe = Tokenizer(models.BPE(vocabulary, merges or []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return _tokenizer()


class Listener(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


ROW = Row(instruction="Add.", context="1 2", response="3")


def _text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode([token for token in ids if token != -100]))


@pytest.mark.parametrize(
    ("row", "template", "text"),
    [
        (
            ROW,
            "alpaca",
            "<s>Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>",
        ),
        (
            Row(instruction="Hi", response="Ho"),
            "alpaca",
            "<s>Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nHi\n\n### Response:\nHo</s>",
        ),
        (ROW, "plain", "<s>Add.\n1 2\n3</s>"),
        (Row(instruction="Hi", response="Ho"), "plain", "<s>Hi\nHo</s>"),
        (Row(text="Once upon a time"), "plain", "<s>Once upon a time</s>"),
        (ROW, "chat", "<s>user:Add.\n\n1 2</s><s>assistant:3</s>"),
        (Row(instruction="{curly} {0}", response="{}"), "plain", "<s>{curly} {0}\n{}</s>"),
    ],
)
def test_templates(tokenizer: PreTrainedTokenizerFast, row: Row, template: str, text: str) -> None:
    tokenizer.chat_template = CHAT
    data = tokenize_rows([row], tokenizer, template=template, cutoff=2048)  # type: ignore[arg-type]
    assert _text(tokenizer, list(data.input_ids[0])) == text
    assert data.labels == data.input_ids


@pytest.mark.parametrize(
    ("template", "learned"), [("alpaca", "3</s>"), ("plain", "3</s>"), ("chat", "3</s>")]
)
def test_only_the_response_carries_loss(
    tokenizer: PreTrainedTokenizerFast, template: str, learned: str
) -> None:
    tokenizer.chat_template = CHAT
    data = tokenize_rows(
        [ROW],
        tokenizer,
        template=template,  # type: ignore[arg-type]
        cutoff=2048,
        train_on="response",
    )
    ids, labels = list(data.input_ids[0]), list(data.labels[0])
    assert _text(tokenizer, labels) == learned
    kept = len(learned.replace("</s>", "x"))
    assert labels == [-100] * (len(ids) - kept) + ids[-kept:]


def test_a_token_that_joins_prompt_and_response_is_response() -> None:
    tokenizer = _tokenizer(merges=[("Ċ", "3")])  # "\n3" is one token
    data = tokenize_rows([ROW], tokenizer, template="plain", train_on="response")
    assert _text(tokenizer, list(data.labels[0])) == "\n3</s>"


@pytest.mark.parametrize("train_on", ["all", "response"])
def test_a_tokenizer_with_one_token_for_beginning_and_end(
    tokenizer: PreTrainedTokenizerFast, train_on: str
) -> None:
    tokenizer.eos_token = "<s>"  # as OPT has it
    data = tokenize_rows([ROW], tokenizer, template="plain", train_on=train_on)  # type: ignore[arg-type]
    assert _text(tokenizer, list(data.input_ids[0])) == "<s>Add.\n1 2\n3<s>"


def test_rows_are_cut_and_a_row_without_response_left_is_dropped(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [
        Row(instruction="ab", response="cdefgh"),
        Row(instruction="a longer instruction", response="x"),
        Row(instruction="a", response=""),
    ]
    listener = Listener()
    data = tokenize_rows(
        rows, tokenizer, template="plain", cutoff=6, train_on="response", reporter=listener
    )
    assert [_text(tokenizer, list(ids)) for ids in data.input_ids] == ["<s>ab\ncd", "<s>a\n</s>"]
    assert [_text(tokenizer, list(ids)) for ids in data.labels] == ["cd", "</s>"]
    assert len(listener.warnings) == 1
    assert listener.warnings[0].startswith("1 of 3 rows")
    everything = tokenize_rows(rows, tokenizer, template="plain", cutoff=6, reporter=listener)
    assert len(everything) == 3
    assert max(map(len, everything.input_ids)) == 6
    assert len(listener.warnings) == 1


def test_no_row_left_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PrufedError, match="none of 1 rows") as caught:
        tokenize_rows([ROW], tokenizer, template="alpaca", cutoff=20, train_on="response")
    assert "cutoff" in (caught.value.hint or "")
    with pytest.raises(PrufedError, match="none of 0 rows"):
        tokenize_rows([], tokenizer)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"template": "vicuna"}, "unknown template 'vicuna'"),
        ({"train_on": "prompt"}, "unknown train_on 'prompt'"),
        ({"cutoff": 1}, "cutoff 1"),
        ({"template": "chat"}, "no chat template"),
    ],
)
def test_requests_that_cannot_be_met(
    tokenizer: PreTrainedTokenizerFast, settings: dict[str, object], match: str
) -> None:
    with pytest.raises(PrufedError, match=match) as caught:
        tokenize_rows([ROW], tokenizer, **settings)  # type: ignore[arg-type]
    assert caught.value.exit_code == USAGE
    assert caught.value.hint


def test_text_needs_the_plain_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(PrufedError, match="row 2 is plain text"):
        tokenize_rows([ROW, Row(text="x")], tokenizer, template="alpaca")


def test_a_chat_template_that_refuses_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('system prompt wanted') }}"
    with pytest.raises(PrufedError, match="row 1: system prompt wanted"):
        tokenize_rows([ROW], tokenizer, template="chat")


def test_a_tokenizer_without_an_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(PrufedError, match="no end-of-sequence token"):
        tokenize_rows([ROW], tokenizer)
