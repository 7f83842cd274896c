"""Any valid configuration survives YAML and JSON; any text at all is read or refused cleanly."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from prufed_cli.config import ConfigError, FederationConfig, load
from prufed_registry.names import is_name

# A letter first: PyYAML writes 1e5 without the quotes that YAML 1.2 wants.
names = st.from_regex(r"[a-z]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True)
counts = st.integers(1, 10**6)
shares = st.floats(0, 1, exclude_max=True)
positive = st.floats(1e-6, 1e6)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return mappings with any subset of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


adapters = some(
    r=counts,
    alpha=positive,
    dropout=shares,
    target_modules=st.lists(st.sampled_from(["q_proj", "v_proj", "fc1"]), min_size=1),
    preset=st.sampled_from(["lego", "lego-literal", "sparse-peft", "dense"]),
    factor_mask=st.sampled_from(["none", "nested", "magnitude", "rank", "structured"]),
    product_mask=st.booleans(),
    rescale=st.sampled_from(["density", "none"]),
)
tuners = some(
    name=st.just("lora"),
    epochs=counts,
    lr=positive,
    max_steps=counts,
    cutoff=st.integers(2, 10**6),
    template=st.sampled_from(["alpaca", "chat", "plain"]),
    train_on=st.sampled_from(["all", "response"]),
)
pruners = some(name=st.sampled_from(["sparsegpt", "wanda"]), samples=counts)
targets = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"sparsity": shares}, optional={"pruner": pruners}),
    st.fixed_dictionaries({"pattern": st.sampled_from(["1:4", "2:4", "4:8"])}),
    st.fixed_dictionaries({"keep_layers": st.integers(2, 100)}),
    st.fixed_dictionaries({"base": st.just("sub@v3")}),
)
clients = st.tuples(
    st.fixed_dictionaries({"name": names}),
    targets,
    some(tuner=tuners, adapter=adapters, weight=positive),
).map(lambda parts: {**parts[0], **parts[1], **parts[2]})
documents = st.fixed_dictionaries(
    {
        "data": st.just({"path": "rows.jsonl"}),
        "clients": st.lists(clients, min_size=1, max_size=4, unique_by=lambda c: c["name"]),
    },
    optional={
        "base": st.sampled_from(["some-model", "some/model"]),
        "name": names.filter(is_name),
        "rounds": counts,
        "seed": st.integers(0, 2**63 - 1),
        "device": st.sampled_from(["auto", "cpu", "cuda:1"]),
        "dtype": st.sampled_from(["auto", "float16"]),
        "sampler": st.just("all")
        | st.fixed_dictionaries({"name": st.just("uniform"), "fraction": st.floats(0.01, 1)}),
        "pruner": pruners,
        "adapter": adapters,
        "tuner": tuners,
        "aggregator": st.sampled_from(["heteagg", "fedavg"]),
        "server_optimizer": st.sampled_from(["none", "fedavgm", {"name": "fedadam", "lr": 0.5}]),
        "evaluate": some(tasks=st.lists(names), every=counts, limit=counts, clients=st.booleans()),
        "write_back": some(share=shares),
        "min_clients": st.just(1),
    },
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("config")
    (made / "rows.jsonl").write_text('{"text": "a"}\n')
    return made


@given(document=documents, flow=st.booleans())
@settings(max_examples=20, deadline=None)
def test_valid_configurations_round_trip(
    directory: Path, document: dict[str, Any], flow: bool
) -> None:
    path = directory / "good.yaml"
    path.write_text(yaml.safe_dump(document, default_flow_style=flow), encoding="utf-8")
    loaded = load(path)
    assert [client.name for client in loaded.clients] == [c["name"] for c in document["clients"]]
    assert loaded.tuner.settings.get("lr") == document.get("tuner", {}).get("lr")
    assert FederationConfig.model_validate(loaded.model_dump(mode="json")) == loaded
    path.write_text(yaml.safe_dump(loaded.model_dump(mode="json")), encoding="utf-8")
    assert load(path) == loaded


SEED_TEXT = """\
data: {path: rows.jsonl, partition: {name: dirichlet, alpha: 0.5}}
rounds: 3
tuner: &t {name: lora, lr: 3e-4}
evaluate:
  tasks: [one, two]
clients:
  - {name: a, sparsity: 0.5, tuner: {<<: *t, epochs: 2}}
  - name: "b"
    keep_layers: 4
    pruner: {name: top}
"""
FRAGMENTS = [
    *"{}[],:-#&*!|>'\"%@`? \n\t\r\0",
    "<<: ",
    "*t",
    "&t ",
    "!!set ",
    "- ",
    ": ",
    "~",
    "null",
]
FRAGMENTS += [
    "1e999",
    ".inf",
    "0x",
    "true",
    "\u2028",
    "\ufeff",
    "é",
    "\x85",
    "---\n",
    "...\n",
    "9" * 5000,
]


@given(st.randoms(use_true_random=False), st.integers(1, 12))
@settings(max_examples=120, deadline=None)
def test_mutated_yaml_is_read_or_refused(
    directory: Path, chance: random.Random, changes: int
) -> None:
    text = SEED_TEXT
    for _ in range(changes):
        start = chance.randrange(len(text) + 1)
        end = min(len(text), start + chance.choice([0, 0, 1, 3, 20]))
        text = text[:start] + chance.choice([*FRAGMENTS, text[end : end + 30]]) + text[end:]
    path = directory / "mutated.yaml"
    path.write_bytes(text.encode())
    _read_or_refuse(path)


@given(st.binary(max_size=60))
@settings(max_examples=120, deadline=None)
def test_any_bytes_are_refused(directory: Path, content: bytes) -> None:
    path = directory / "bytes.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load(path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
keys = st.sampled_from(
    [
        *FederationConfig.model_fields,
        *("clients.0", "clients.0.name", "clients.0.tuner", "clients.0.pruner", "clients.0.data"),
        *("data.path", "data.partition", "tuner.name", "tuner.lr"),
    ]
)


@given(key=keys, value=values)
@settings(max_examples=50, deadline=None)
def test_any_value_at_any_key_is_read_or_refused(directory: Path, key: str, value: Any) -> None:
    document: Any = yaml.safe_load(SEED_TEXT)
    holder = document
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("."))
    for parent in parents:
        holder = holder[parent]
    holder[last] = value
    path = directory / "value.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    _read_or_refuse(path)


def _read_or_refuse(path: Path) -> None:
    """Read; a refusal must place every error inside the file."""
    try:
        load(path)
    except ConfigError as refused:
        message = refused.message
    else:
        return
    assert message.splitlines()[0].endswith(f"in {path}")
    assert f"\n{path}:" in message
    assert all(character.isprintable() or character == "\n" for character in message)
