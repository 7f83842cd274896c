"""What ``prufed init`` writes is valid, and what ``prufed schema`` prints describes every key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prufed_cli.app import run
from prufed_cli.assets import EMBEDDED_TASKS
from prufed_cli.config import FederationConfig, load
from prufed_cli.config.models import ClientConfig, Section
from prufed_cli.config.schema import json_schema
from prufed_cli.config.starter import STARTER
from prufed_cli.errors import NOT_FOUND, OK, USAGE
from prufed_plugins.discover import catalog

COMMENTED = ("# - {", "# base", "# name")


def test_init_writes_a_valid_configuration_and_prints_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my.yaml"
    assert run(["init", str(path)]) == OK
    output = capsys.readouterr()
    assert output.out == f"{path}\n"
    assert f"prufed federate --clients {path} --dry-run" in output.err
    loaded = load(path)
    assert loaded.name == "my"
    assert [client.sparsity for client in loaded.clients] == [0, 0.25, 0.5, 0.75]
    assert loaded.data is not None
    assert loaded.data.path.is_file()
    assert loaded.evaluate.include_path is not None
    assert loaded.evaluate.include_path.is_dir()
    assert set(loaded.evaluate.tasks) < set(EMBEDDED_TASKS)


def test_init_writes_into_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["init"]) == OK
    assert (tmp_path / "clients.yaml").read_text(encoding="utf-8") == STARTER


def test_init_replaces_a_file_only_when_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clients.yaml"
    path.write_text("mine")
    assert run(["init", str(path)]) == USAGE
    assert path.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err
    assert run(["init", str(path), "--force"]) == OK
    assert path.read_text(encoding="utf-8") == STARTER


def test_init_into_a_missing_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", str(tmp_path / "none" / "clients.yaml")]) == NOT_FOUND
    assert f"mkdir -p {tmp_path / 'none'}" in capsys.readouterr().err


def test_the_commented_examples_are_valid_too(tmp_path: Path) -> None:
    lines = []
    for line in STARTER.splitlines():
        bare = line.lstrip()
        indent = " " * (len(line) - len(bare))
        lines.append(indent + bare[2:] if bare.startswith(COMMENTED) else line)
    (tmp_path / "tablet.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "clients.yaml"
    path.write_text("\n".join(lines))
    loaded = load(path)
    assert len(loaded.clients) == 7
    assert loaded.base == "my-model"


def test_the_starter_shows_every_key() -> None:
    words = STARTER.replace("# ", "")
    for model in (FederationConfig, ClientConfig):
        for key in model.model_fields:
            assert f"{key}:" in words, key


def test_the_starter_states_the_defaults() -> None:
    document = yaml.safe_load(STARTER)
    defaults = FederationConfig(clients=({"name": "a", "data": "x"},))  # type: ignore[arg-type]
    for section in ("sampler", "adapter", "aggregator", "write_back"):
        said = FederationConfig.model_validate(
            {section: document[section], "clients": [{"name": "a", "data": "x"}]}
        )
        assert getattr(said, section) == getattr(defaults, section)


# --- the schema ----------------------------------------------------------------------------------


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for inner in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(inner, dict | list):
            yield from nodes(inner)


def test_schema_prints_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == OK
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(json_schema()))
    assert printed["title"] == "clients.yaml"


def test_every_reference_in_the_schema_leads_somewhere() -> None:
    schema = json_schema()
    references = {node["$ref"] for node in nodes(schema) if isinstance(node.get("$ref"), str)}
    assert references
    for reference in references:
        head, name = reference.rsplit("/", 1)
        assert head == "#/$defs"
        assert name in schema["$defs"], name


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ("SamplerConfig", "sampler"),
        ("AggregatorConfig", "aggregator"),
        ("ServerOptimizerConfig", "optimizer"),
        ("PartitionConfig", "partitioner"),
        ("PrunerConfig", "pruner"),
        ("TunerConfig", "tuner"),
    ],
)
def test_a_section_offers_every_method_and_its_parameters(section: str, kind: Any) -> None:
    schema = json_schema()
    mapping, short = schema["$defs"][section]["anyOf"]
    entries = catalog().methods(kind)
    assert [entry.name for entry in entries] == short["anyOf"][0]["enum"]
    for entry, rule in zip(entries, mapping["allOf"], strict=True):
        assert rule["if"]["properties"] == {"name": {"const": entry.name}}
        parameters = schema["$defs"][rule["then"]["$ref"].rsplit("/", 1)[1]]
        assert parameters.get("properties", {}).keys() == entry.method.params.model_fields.keys()


def test_every_key_is_described() -> None:
    def sections(model: type[Section]) -> Iterator[type[Section]]:
        yield from (each for each in model.__subclasses__())
        for each in model.__subclasses__():
            yield from sections(each)

    for model in set(sections(Section)):
        if model.__name__ == "MethodSection" or model.__name__.endswith("Override"):
            continue  # an override's keys are described where they are shared
        for key, field in model.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            assert field.description or nested or key in {"settings", "data", "clients"}, key
