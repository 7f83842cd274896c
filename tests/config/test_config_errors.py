"""Every bad configuration is refused with the place, the key and the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prufed_cli.config import ConfigError, load
from prufed_cli.errors import NOT_FOUND, USAGE

SHARED = "data: {path: rows.jsonl}\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "clients.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def heads(directory: Path, text: str | bytes) -> list[str]:
    """Return ``line:column: message`` of every error."""
    path = write(directory, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.exit_code == USAGE
    found = re.findall(rf"^{re.escape(str(path))}:(\d+:\d+: .*)$", caught.value.message, re.M)
    count = "1 error" if len(found) == 1 else f"{len(found)} errors"
    assert caught.value.message.splitlines()[0] == f"{count} in {path}"
    return [head.replace(str(directory), "DIR") for head in found]


CASES = {
    "unknown key in a block client": (
        SHARED + "clients:\n  - name: a\n    epochs: 3\n",
        ["4:5: clients.0.epochs: unknown key"],
    ),
    "unknown key in a flow client, near name": (
        SHARED + "clients:\n  - {name: a, sparsty: 0.5}\n",
        ["3:15: clients.0.sparsty: unknown key; did you mean `sparsity`?"],
    ),
    "unknown top-level key": (
        SHARED + "round: 3\nclients: [{name: a}]\n",
        ["2:1: round: unknown key; did you mean `rounds`?"],
    ),
    "unknown key in an override": (
        SHARED + "clients:\n- {name: a, adapter: {rank: 4}}\n",
        ["3:23: clients.0.adapter.rank: unknown key"],
    ),
    "unknown key in a section": (
        "data: {path: rows.jsonl, partitions: iid}\nclients: [{name: a}]\n",
        ["1:26: data.partitions: unknown key; did you mean `partition`?"],
    ),
    "Windows line endings": (
        "rounds: 2\r\ndata:\r\n  path: rows.jsonl\r\nclients:\r\n  - name: a\r\n    wieght: 2\r\n",
        ["6:5: clients.0.wieght: unknown key; did you mean `weight`?"],
    ),
    "nested sequences": (
        SHARED + "adapter:\n  target_modules:\n  - q_proj\n  - - v_proj\nclients: [{name: a}]\n",
        ["5:5: adapter.target_modules.1: must be text, not a list"],
    ),
    "sparsity of one": (
        SHARED + "clients: [{name: a, sparsity: 1}]\n",
        ["2:31: clients.0.sparsity: must be less than 1, not 1"],
    ),
    "negative sparsity": (
        SHARED + "clients: [{name: a, sparsity: -0.5}]\n",
        ["2:31: clients.0.sparsity: must be at least 0, not -0.5"],
    ),
    "an aggregator without the server's rows": (
        SHARED + "aggregator: {name: fltrust}\nclients: [{name: a}]\n",
        ["2:13: aggregator: fltrust needs rows that the server trusts; give `server_data`"],
    ),
    "the server's rows that are not there": (
        SHARED + "server_data: trusted.jsonl\nclients: [{name: a}]\n",
        ["2:14: server_data: no file 'trusted.jsonl' (looked for DIR/trusted.jsonl)"],
    ),
    "a client called as the server's own adapter": (
        SHARED + "server_data: rows.jsonl\nclients: [{name: root}]\n",
        [
            "3:18: clients.0.name: 'root' is what the server's own adapter is called; "
            "choose another name"
        ],
    ),
    "sparsity as text": (
        SHARED + "clients: [{name: a, sparsity: half}]\n",
        ["2:31: clients.0.sparsity: must be a number, not 'half'"],
    ),
    "sparsity that is no number": (
        SHARED + "clients: [{name: a, sparsity: .nan}]\n",
        ["2:31: clients.0.sparsity: must be a finite number, not nan"],
    ),
    "pattern of everything": (
        SHARED + "clients: [{name: a, pattern: 4:4}]\n",
        ["2:30: clients.0.pattern: '4:4' removes everything: n must be less than m"],
    ),
    "pattern of nothing": (
        SHARED + "clients: [{name: a, pattern: 0:4}]\n",
        ["2:30: clients.0.pattern: '0:4' is not an n:m pattern such as 2:4"],
    ),
    "pattern that is a number": (
        SHARED + "clients: [{name: a, pattern: 2}]\n",
        ["2:30: clients.0.pattern: must be text, not 2"],
    ),
    "one layer": (
        SHARED + "clients: [{name: a, keep_layers: 1}]\n",
        ["2:34: clients.0.keep_layers: must be at least 2, not 1"],
    ),
    "two targets": (
        SHARED + "clients: [{name: a, sparsity: 0.5, keep_layers: 4}]\n",
        [
            "2:36: clients.0.keep_layers: give one of sparsity, pattern, keep_layers, base, "
            "not both sparsity and keep_layers"
        ],
    ),
    "a base that is also pruned": (
        SHARED + "clients: [{name: a, base: x, pruner: wanda}]\n",
        [
            "2:30: clients.0.pruner: a client with a base of its own is not pruned; "
            "remove `pruner` or `base`"
        ],
    ),
    "layers of an element-wise pruner": (
        SHARED + "clients: [{name: a, keep_layers: 4, pruner: wanda}]\n",
        [
            "2:21: clients.0.keep_layers: the pruner wanda removes entries, not layers; "
            "use one such as `top`"
        ],
    ),
    "a pattern of a layer pruner": (
        SHARED + "clients: [{name: a, pattern: 2:4, pruner: {name: top}}]\n",
        [
            "2:21: clients.0.pattern: the pruner top drops layers; "
            "a pattern needs one such as `sparsegpt`"
        ],
    ),
    "no rounds": (
        SHARED + "rounds: 0\nclients: [{name: a}]\n",
        ["2:9: rounds: must be at least 1, not 0"],
    ),
    "rounds that are not whole": (
        SHARED + "rounds: 1.5\nclients: [{name: a}]\n",
        ["2:9: rounds: must be a whole number, not 1.5"],
    ),
    "rounds that are a truth value": (
        SHARED + "rounds: true\nclients: [{name: a}]\n",
        ["2:9: rounds: must be a whole number, not true"],
    ),
    "yes is not a truth value": (
        SHARED + "evaluate: {clients: yes}\nclients: [{name: a}]\n",
        ["2:21: evaluate.clients: must be true or false, not 'yes'"],
    ),
    "unknown choice": (
        SHARED + "adapter: {preset: legos}\nclients: [{name: a}]\n",
        [
            "2:19: adapter.preset: must be 'lego', 'lego-literal', 'sparse-peft' or 'dense', "
            "not 'legos'; did you mean `lego`?"
        ],
    ),
    "unknown device": (
        SHARED + "device: gpu\nclients: [{name: a}]\n",
        ["2:9: device: 'gpu' is not a device: auto, cpu, cuda, cuda:N or mps"],
    ),
    "two clients of one name": (
        SHARED + "clients:\n  - {name: a}\n  - name: a\n",
        ["4:11: clients.1.name: 'a' is also the name of clients.0"],
    ),
    "a client without a name": (
        SHARED + "clients:\n  - {name: a}\n  - {sparsity: 0.5}\n",
        ["4:5: clients.1.name: missing"],
    ),
    "a name no artifact can have": (
        SHARED + "clients: [{name: Phone 1}]\n",
        [
            "2:18: clients.0.name: 'Phone 1' is not a valid name: lower-case letters, digits, "
            "'.', '_' and '-', beginning and ending with a letter or digit"
        ],
    ),
    "a federation's name that is reserved": (
        "name: v1\n" + SHARED + "clients: [{name: a}]\n",
        [
            "1:7: name: 'v1' cannot name an artifact: use 2 letters or more; `latest` and "
            "v1, v2, ... are reserved"
        ],
    ),
    "a name that is a number": (
        SHARED + "clients: [{name: 7}]\n",
        ["2:18: clients.0.name: must be text, not 7"],
    ),
    "no clients": (SHARED + "clients: []\n", ["2:10: clients: needs at least 1, has 0"]),
    "clients missing": (SHARED, ["1:1: clients: missing"]),
    "clients as a mapping": (
        SHARED + "clients: {a: {}}\n",
        ["2:10: clients: must be a list, not a mapping"],
    ),
    "a client that is text": (
        SHARED + "clients: [a]\n",
        ["2:11: clients.0: must be a mapping, not 'a'"],
    ),
    "more needed than there are": (
        SHARED + "min_clients: 2\nclients: [{name: a}]\n",
        ["2:14: min_clients: 2 are needed but there are 1 clients"],
    ),
    "no data at all": (
        "clients:\n  - {name: a, data: rows.jsonl}\n  - {name: b}\n",
        ["3:5: clients.1: no data: give it `data`, or the federation a shared `data.path`"],
    ),
    "missing shared data": (
        "data: {path: none.jsonl}\nclients: [{name: a}]\n",
        ["1:14: data.path: no file 'none.jsonl' (looked for DIR/none.jsonl)"],
    ),
    "missing data of a client": (
        SHARED + "clients: [{name: a, data: none.jsonl}]\n",
        ["2:27: clients.0.data: no file 'none.jsonl' (looked for DIR/none.jsonl)"],
    ),
    "missing calibration": (
        SHARED + "pruner: {calibration: c.txt}\nclients: [{name: a}]\n",
        ["2:23: pruner.calibration: no file or directory 'c.txt' (looked for DIR/c.txt)"],
    ),
    "missing reference of a pruner": (
        SHARED + "pruner: {name: parameter, score: movement, reference: r}\nclients: [{name: a}]\n",
        ["2:55: pruner.reference: no file 'r' (looked for DIR/r)"],
    ),
    "missing base directory": (
        SHARED + "base: ./model\nclients: [{name: a}]\n",
        ["2:7: base: no directory './model' (looked for DIR/model)"],
    ),
    "task files that are no directory": (
        SHARED + "evaluate: {include_path: rows.jsonl}\nclients: [{name: a}]\n",
        ["2:26: evaluate.include_path: no directory 'rows.jsonl' (looked for DIR/rows.jsonl)"],
    ),
    "unknown sampler": (
        SHARED + "sampler: {name: sequentail}\nclients: [{name: a}]\n",
        ["2:17: sampler.name: no sampler is called 'sequentail'; did you mean sequential?"],
    ),
    "unknown partitioner, short form": (
        "data: {path: rows.jsonl, partition: dirichlett}\nclients: [{name: a}]\n",
        [
            "1:37: data.partition.name: no partitioner is called 'dirichlett'; "
            "did you mean dirichlet?"
        ],
    ),
    "unknown key of a method": (
        SHARED + "sampler: {name: uniform, fractoin: 0.5}\nclients: [{name: a}]\n",
        ["2:26: sampler.fractoin: unknown key for the sampler uniform; did you mean `fraction`?"],
    ),
    "our key misspelt beside a method's": (
        SHARED + "tuner: {cutof: 5}\nclients: [{name: a}]\n",
        ["2:9: tuner.cutof: unknown key for the tuner lora; did you mean `cutoff`?"],
    ),
    "unknown key of a client's tuner": (
        SHARED + "clients:\n- name: a\n  tuner:\n    epoch: 3\n",
        [
            "5:5: clients.0.tuner.epoch: unknown key for the tuner lora; did you mean `epochs`?",
        ],
    ),
    "a shared fault is told once": (
        SHARED + "tuner: {lrr: 1}\nclients: [{name: a, tuner: {epochs: 2}}]\n",
        ["2:9: tuner.lrr: unknown key for the tuner lora; did you mean `lr`?"],
    ),
    "duplicate key": (
        SHARED + "rounds: 2\nclients: [{name: a}]\nrounds: 3\n",
        ["4:1: rounds: duplicate key, first on line 2"],
    ),
    "duplicate key in a flow mapping": (
        SHARED + "clients: [{name: a, name: b}]\n",
        ["2:21: clients.0.name: duplicate key, first on line 2"],
    ),
    "key that is a number": (
        SHARED + "1: x\nclients: [{name: a}]\n",
        ["2:1: a key must be text, '1' is not; put it in quotes"],
    ),
    "unknown tag": (
        SHARED + "rounds: !!python/object/apply:os.system [ls]\nclients: [{name: a}]\n",
        [
            "2:9: rounds: must be a whole number, not nothing",
            "2:9: rounds: unknown tag !!python/object/apply:os.system",
        ],
    ),
    "an alias to itself": (
        SHARED + "clients: &a [*a]\n",
        ["2:10: clients.0: an alias refers to itself"],
    ),
    "syntax error": (
        SHARED + "clients: [{name: a}\nrounds: 3\n",
        [
            "3:1: not valid YAML: while parsing a flow sequence, "
            "expected ',' or ']', but got '<scalar>'",
        ],
    ),
    "tab for indentation": (
        SHARED + "clients:\n\t- {name: a}\n",
        [
            "3:1: not valid YAML: while scanning for the next token, "
            "found character '\\t' that cannot start any token"
        ],
    ),
    "control character": (
        SHARED + "name: a\x07\nclients: [{name: a}]\n",
        ["2:8: the character U+0007 is not allowed"],
    ),
    "not UTF-8": (
        SHARED.encode() + b"name: caf\xe9\nclients: [{name: a}]\n",
        ["2:10: the file is not UTF-8 text"],
    ),
    "empty": ("", ["1:1: the file is empty"]),
    "only a comment": ("# nothing\n", ["1:1: the file is empty"]),
    "a list": ("- a\n", ["1:1: the top level must be a mapping with the key `clients`"]),
    "text": ("hello\n", ["1:1: the top level must be a mapping with the key `clients`"]),
    "two documents": (
        SHARED + "clients: [{name: a}]\n---\na: 1\n",
        [
            "3:1: not valid YAML: expected a single document in the stream, "
            "but found another document"
        ],
    ),
    "everything at once, in the order of the file": (
        "rounds: 0\nsampler: {name: sequentail, fraction: 1}\ndata: {path: none.txt}\n"
        "clients:\n- {name: a, sparsity: 2}\n- {name: a, epochs: 2}\n",
        [
            "1:9: rounds: must be at least 1, not 0",
            "2:17: sampler.name: no sampler is called 'sequentail'; did you mean sequential?",
            "3:14: data.path: no file 'none.txt' (looked for DIR/none.txt)",
            "5:23: clients.0.sparsity: must be less than 1, not 2",
            "6:10: clients.1.name: 'a' is also the name of clients.0",
            "6:13: clients.1.epochs: unknown key",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_configuration_is_told_with_its_place(case: str, directory: Path) -> None:
    text, expected = CASES[case]
    assert heads(directory, text) == expected


def test_whole_rendering_has_source_line_caret_and_hint(directory: Path) -> None:
    path = write(directory, SHARED + "clients:\n  - {name: a, epochs: 3}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.message == (
        f"1 error in {path}\n"
        f"{path}:3:15: clients.0.epochs: unknown key\n"
        "      - {name: a, epochs: 3}\n"
        "                  ^"
    )
    assert caught.value.hint is not None
    assert "prufed schema" in caught.value.hint


def test_caret_stands_under_the_value_behind_tabs_and_wide_characters(directory: Path) -> None:
    path = write(directory, SHARED + 'clients: [{name: "a\t模型", x: 1}]\n')
    with pytest.raises(ConfigError) as caught:
        load(path)
    lines = caught.value.message.splitlines()
    assert lines[-2:] == ['    clients: [{name: "a 模型", x: 1}]', " " * 31 + "^"]


def test_a_long_line_is_cut_around_the_caret(directory: Path) -> None:
    clients = ", ".join(f"{{name: c{i}}}" for i in range(50))
    path = write(directory, SHARED + f"clients: [{clients}, {{name: c7}}, {clients}]\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    source, caret = caught.value.message.splitlines()[2:4]
    assert len(source) <= 104
    assert source[caret.index("^") :].startswith("c7}")


def test_many_errors_are_counted_and_the_first_shown(directory: Path) -> None:
    path = write(directory, SHARED + "clients:\n" + "- {name: a, x: 1}\n" * 40)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.message.startswith(f"79 errors in {path}\n")
    assert caught.value.message.endswith("\nand 54 more")


def test_aliases_that_explode_are_refused_quickly(directory: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    found = heads(directory, "\n".join(lines))
    assert len(found) == 1
    assert found[0].endswith("aliases expand to too many values")


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused(opening: str, directory: Path) -> None:
    found = heads(directory, opening * 1500)
    assert len(found) == 1
    assert "nested more than 40 levels deep" in found[0]


def test_control_characters_of_a_value_do_not_reach_the_terminal(directory: Path) -> None:
    path = write(directory, SHARED + 'device: "\\e[31m"\n"\\e[2J": 1\nclients: [{name: a}]\n')
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert "\x1b" not in caught.value.message


def test_missing_file_names_init(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "clients.yaml")
    assert caught.value.exit_code == NOT_FOUND
    assert caught.value.hint == f"`prufed init {tmp_path / 'clients.yaml'}` writes one"


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path)
