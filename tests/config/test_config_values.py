"""What a good configuration means: defaults, paths, overrides, YAML's scalars and anchors."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from pydantic import ValidationError

from prufed_cli.config import ConfigError, FederationConfig, load
from prufed_cli.config.documents import validated
from prufed_cli.config.loading import default_name
from prufed_cli.config.pruners import drops_layers, removes_entries
from prufed_plugins import discover
from prufed_plugins.api import Method
from prufed_plugins.discover import Catalog, Entry, catalog
from prufed_plugins.params import LayerDropParams


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("rows.jsonl", "own.jsonl", "text.txt"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    return tmp_path


def config(directory: Path, text: str, name: str = "clients.yaml") -> FederationConfig:
    path = directory / name
    path.write_text(text)
    return load(path)


def test_clients_alone_are_enough_beside_their_data(directory: Path) -> None:
    loaded = config(directory, "clients: [{name: a, data: own.jsonl}]\n", "My Run.yaml")
    assert loaded.name == "my-run"
    assert loaded.base is None
    assert loaded.rounds == 1
    assert loaded.min_clients == 1
    assert (loaded.sampler.name, loaded.aggregator.name) == ("all", "heteagg")
    assert (loaded.pruner.name, loaded.tuner.name) == ("sparsegpt", "lora")
    assert loaded.adapter.preset == "lego"
    assert loaded.evaluate.tasks == ()
    client = loaded.clients[0]
    assert client.sparsity == 0
    assert client.weight == 1
    assert loaded.data_of(client) == directory / "own.jsonl"


def test_paths_are_relative_to_the_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name in ("model", "llama-7b"):
        (directory / name).mkdir()
    (directory / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    loaded = config(
        directory,
        "base: model\n"
        "data: {path: rows.jsonl}\n"
        "pruner: {calibration: text.txt}\n"
        "evaluate: {perplexity: ./text.txt, include_path: .}\n"
        "clients:\n"
        "- {name: a, base: model@v3}\n"
        "- {name: c, base: llama-7b}\n"
        "- {name: b, pruner: {calibration: someone/dataset}}\n",
    )
    assert loaded.base == str(directory / "model")
    assert loaded.data is not None
    assert loaded.data.path == directory / "rows.jsonl"
    assert loaded.pruner.calibration == str(directory / "text.txt")
    assert loaded.evaluate.perplexity == directory / "text.txt"
    assert loaded.evaluate.include_path == directory
    assert loaded.clients[0].base == "model@v3"
    assert loaded.clients[1].base == "llama-7b"  # no model in it: a reference
    assert loaded.pruner_of(loaded.clients[2]).calibration == "someone/dataset"


def test_a_pruner_s_paths_are_relative_to_the_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name in ("before", "other"):
        (directory / name).mkdir()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    loaded = config(
        directory,
        "data: {path: rows.jsonl}\n"
        "pruner: {name: parameter, score: movement, reference: before}\n"
        "clients:\n"
        "- {name: a, keep_layers: 4}\n"
        "- {name: b, keep_layers: 4, pruner: {reference: ./other}}\n",
    )
    first, second = (loaded.pruner_of(client).settings["reference"] for client in loaded.clients)
    assert (first, second) == (str(directory / "before"), str(directory / "other"))


def test_scalars_are_those_of_yaml_1_2(directory: Path) -> None:
    loaded = config(
        directory,
        "data: {path: rows.jsonl}\n"
        "tuner: {lr: 3e-4, weight_decay: 1}\n"
        "adapter: {factor_mask: none, product_mask: False}\n"
        "clients:\n- {name: no, pattern: 2:4}\n- {name: on, sparsity: .5, weight: 1_0}\n",
    )
    assert loaded.tuner.settings == {"lr": 0.0003, "weight_decay": 1}
    assert loaded.adapter.factor_mask == "none"
    assert loaded.adapter.product_mask is False
    assert [client.name for client in loaded.clients] == ["no", "on"]
    assert loaded.clients[0].pattern == "2:4"
    assert (loaded.clients[1].sparsity, loaded.clients[1].weight) == (0.5, 10)


def test_method_names_take_hyphens_underscores_and_the_short_form(directory: Path) -> None:
    loaded = config(
        directory,
        "sampler: By_Sparsity\n"
        "data: {path: rows.jsonl, partition: {name: by_category}}\n"
        "clients: [{name: a, tuner: lora}]\n",
    )
    assert loaded.sampler.name == "by-sparsity"
    assert loaded.data is not None
    assert loaded.data.partition.name == "by-category"
    assert loaded.tuner_of(loaded.clients[0]) == loaded.tuner


def test_anchors_and_merge_keys(directory: Path) -> None:
    loaded = config(
        directory,
        "data: {path: rows.jsonl}\n"
        "clients:\n"
        "- &a {name: a, sparsity: 0.5, tuner: {lr: 0.1}}\n"
        "- {<<: *a, name: b}\n"
        "- {<<: [*a], name: c, sparsity: 0.75}\n",
    )
    assert [client.sparsity for client in loaded.clients] == [0.5, 0.5, 0.75]
    assert {loaded.tuner_of(client).settings["lr"] for client in loaded.clients} == {0.1}


def test_a_section_of_comments_is_the_default(directory: Path) -> None:
    loaded = config(
        directory, "data: {path: rows.jsonl}\nevaluate:\n  # none\nclients: [name: a]\n"
    )
    assert loaded.evaluate.every == 1


def test_a_client_changes_only_what_it_says(directory: Path) -> None:
    loaded = config(
        directory,
        "data: {path: rows.jsonl}\n"
        "pruner: {name: magnitude, group: row, samples: 5}\n"
        "tuner: {lr: 0.1, epochs: 2, cutoff: 64}\n"
        "adapter: {r: 8, alpha: 4}\n"
        "clients:\n"
        "- {name: a, tuner: {lr: 0.2}, adapter: {r: 2, target_modules: all-linear}}\n"
        "- {name: b, sparsity: 0.5, pruner: {samples: 6}}\n"
        "- {name: c, sparsity: 0.5, pruner: {name: wanda}}\n",
    )
    a, b, c = loaded.clients
    assert loaded.tuner_of(a).settings == {"lr": 0.2, "epochs": 2}
    assert loaded.tuner_of(a).cutoff == 64
    assert (loaded.adapter_of(a).r, loaded.adapter_of(a).alpha) == (2, 4)
    assert loaded.adapter_of(a).target_modules == ("all-linear",)
    assert loaded.adapter_of(b) == loaded.adapter
    assert loaded.pruner_of(b).settings == {"group": "row"}
    assert loaded.pruner_of(b).samples == 6
    # Another method: the shared one's own parameters do not apply, the calibration does.
    assert loaded.pruner_of(c).settings == {}
    assert loaded.pruner_of(c).samples == 5


@pytest.mark.parametrize(
    ("shared", "own", "expected"),
    [
        ("sparsegpt", "", "top"),
        ("symmetric", "", "symmetric"),
        ("sparsegpt", ", pruner: bottom", "bottom"),
        ("symmetric", ", pruner: {samples: 3}", "symmetric"),
    ],
)
def test_the_pruner_of_a_client_that_keeps_layers(
    directory: Path, shared: str, own: str, expected: str
) -> None:
    loaded = config(
        directory,
        f"data: {{path: rows.jsonl}}\npruner: {shared}\n"
        f"clients: [{{name: a, keep_layers: 3{own}}}]\n",
    )
    assert loaded.pruner_of(loaded.clients[0]).name == expected


class TheirParams(LayerDropParams):
    """Of a layer pruner that a plugin brings."""


def test_a_plugin_may_bring_a_pruner_that_drops_layers(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Method("theirs", "nowhere:Nothing", TheirParams, "somebody's")
    entry = Entry("pruner", "theirs", method, "somebody", "1.0")
    extended = Catalog({**catalog().entries, ("pruner", "theirs"): entry})
    monkeypatch.setattr(discover, "_installed", lambda disable: extended)
    text = "data: {path: rows.jsonl}\npruner: theirs\nclients: [{name: a, %s}]\n"
    loaded = config(directory, text % "keep_layers: 3")
    assert loaded.pruner_of(loaded.clients[0]).name == "theirs"
    with pytest.raises(ConfigError, match="the pruner theirs drops layers"):
        config(directory, text % "pattern: 2:4")


def test_the_parameters_of_the_built_in_pruners_tell_what_they_make() -> None:
    for entry in filter(lambda entry: entry.builtin, catalog().methods("pruner")):
        module, _, name = entry.method.target.partition(":")
        result = getattr(import_module(module), name).result
        assert drops_layers(entry.name) == (result == "sliced")
        assert removes_entries(entry.name) == (result == "masked")
    assert not drops_layers("nobody's")
    assert not removes_entries("nobody's")


def test_sub_models_to_be_merged_are_references_and_no_paths(directory: Path) -> None:
    loaded = config(
        directory,
        "clients: [{name: a, data: own.jsonl, sparsity: 0.5,"
        " pruner: {name: fedspallm, clients: [one@v1, two]}}]\n",
    )
    assert loaded.pruner_of(loaded.clients[0]).settings == {"clients": ["one@v1", "two"]}


def test_own_data_wins_and_the_others_share(directory: Path) -> None:
    loaded = config(
        directory,
        "data: {path: rows.jsonl}\nclients: [{name: a, data: own.jsonl}, {name: b}]\n",
    )
    assert [loaded.data_of(client) for client in loaded.clients] == [directory / "own.jsonl", None]


def test_the_configuration_is_immutable(directory: Path) -> None:
    loaded = config(directory, "clients: [{name: a, data: own.jsonl}]\n")
    with pytest.raises(ValidationError):
        loaded.rounds = 2  # type: ignore[misc]


def test_a_configuration_made_in_python_is_held_to_the_same_rules() -> None:
    with pytest.raises(ValidationError, match=r"'a' is also the name of clients\.0"):
        FederationConfig.model_validate(
            {"clients": [{"name": "a", "data": "x"}, {"name": "a", "data": "x"}]}
        )


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("clients.yaml", "clients"),
        ("Größe 7.yml", "gr-e-7"),
        ("模.yaml", "federation"),
        ("k.yaml", "federation-k"),
        ("v1.yaml", "federation-v1"),
        ("latest.yaml", "federation-latest"),
    ],
)
def test_the_default_name_comes_from_the_file(file: str, name: str) -> None:
    assert default_name(Path(file)) == name


@pytest.mark.parametrize("length", [46, 300])
def test_the_default_name_is_always_valid(length: int, directory: Path) -> None:
    name = default_name(Path("a" * 45 + "-" + "b" * length))
    assert FederationConfig.model_validate(
        {"name": name, "clients": [{"name": "a", "data": "x"}]}
    ).name.startswith("a" * 45)


def test_a_document_in_memory_is_held_to_the_rules_of_a_file(directory: Path) -> None:
    loaded = config(directory, "clients: [{name: '1e5', data: own.jsonl}]\n")
    document = loaded.model_dump(mode="json", exclude_none=True)
    assert validated(document) == loaded
    assert document["clients"][0]["name"] == "1e5"
    document |= {"rounds": 0, "sampler": {"name": "uniform", "fractoin": 1}}
    document["clients"][0]["sparsity"] = 1
    with pytest.raises(ConfigError) as caught:
        validated(document)
    assert caught.value.message.splitlines() == [
        "sampler.fractoin: unknown key for the sampler uniform; did you mean `fraction`?",
        "rounds: must be at least 1, not 0",
        "clients.0.sparsity: must be less than 1, not 1",
    ]
