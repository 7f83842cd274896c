"""One data file becomes one file per client: nothing lost, nothing changed, all or nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prufed_cli.config.documents import validated
from prufed_cli.data import read_rows, rows_digest
from prufed_cli.errors import PrufedError
from prufed_cli.federation.plan import make_plan
from prufed_cli.partition_chart import MOST_COLOURS, draw
from prufed_cli.partitioning import Part, PartitionRequest, client_names, partition
from prufed_plugins.discover import catalog
from prufed_plugins.errors import MethodError
from prufed_registry import Registry

Prufed = Callable[..., tuple[int, str, str]]
NAMES = [entry.name for entry in catalog().methods("partitioner")]
CATEGORIES = ("qa", "art", "code", "zoo")


def line(index: int) -> str:
    """Return a row that no JSON writer would write the same way again."""
    category = CATEGORIES[index % 3 if index < 30 else 3]
    return (
        f'{{ "response":"r{index}",  "instruction": "caf\\u00e9 é {index}", '
        f'"category":"{category}", "user": {index % 5} }}'
    )


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\r\n".join(line(index) for index in range(40)).encode() + b"\r\n")
    return path


@pytest.mark.parametrize("by", NAMES)
def test_every_line_goes_to_one_client_byte_for_byte(
    by: str, data_file: Path, tmp_path: Path
) -> None:
    parts = partition(PartitionRequest(data_file, by, 4, tmp_path / "parts"))
    assert [part.client for part in parts] == client_names(4)
    written = [part.path.read_bytes().splitlines(keepends=True) for part in parts]
    before = data_file.read_bytes().splitlines(keepends=True)
    assert sorted(row for part in written for row in part) == sorted(before)
    for part, lines in zip(parts, written, strict=True):
        assert part.rows == len(lines) == sum(part.categories.values())
        held = Counter(json.loads(text)["category"] for text in lines)
        assert held == dict(part.categories)
        assert lines == [text for text in before if text in set(lines)], "in the file's order"


@pytest.mark.parametrize("by", NAMES)
def test_it_is_the_split_that_a_federation_makes(
    by: str, data_file: Path, tmp_path: Path, prufed_home: Path
) -> None:
    parts = partition(PartitionRequest(data_file, by, 3, tmp_path / "parts", seed=7))
    document: dict[str, Any] = {
        "seed": 7,
        "data": {"path": str(data_file), "partition": {"name": by}},
        "clients": [{"name": name} for name in client_names(3)],
    }
    plan = make_plan(validated(document), Registry(prufed_home / "registry"))
    digests = {part.client: rows_digest(read_rows(part.path)) for part in parts}
    assert digests == {client.name: client.data_digest for client in plan.clients}


def test_natural_goes_by_a_field_in_clients_yaml_too(
    data_file: Path, tmp_path: Path, prufed_home: Path
) -> None:
    document: dict[str, Any] = {
        "data": {"path": str(data_file), "partition": {"name": "natural", "key": "user"}},
        "clients": [{"name": name} for name in client_names(5)],
    }
    plan = make_plan(validated(document), Registry(prufed_home / "registry"))
    for client in plan.clients:
        assert len({int(row.response[1:]) % 5 for row in client.rows}) == 1
    document["data"]["partition"]["key"] = "nobody"
    with pytest.raises(MethodError, match="row 1 has no nobody"):
        make_plan(validated(document), Registry(prufed_home / "registry"))


def test_without_a_number_natural_makes_one_client_per_value(
    data_file: Path, tmp_path: Path
) -> None:
    request = PartitionRequest(data_file, "natural", None, tmp_path / "users", {"key": "user"})
    assert [part.rows for part in partition(request)] == [8] * 5
    by_category = PartitionRequest(data_file, "by_category", None, tmp_path / "categories")
    assert len(partition(by_category)) == len(CATEGORIES)
    with pytest.raises(PrufedError, match="iid does not say into how many"):
        partition(PartitionRequest(data_file, "iid", None, tmp_path / "parts"))


def test_a_list_and_a_text_become_lines(tmp_path: Path) -> None:
    rows = [{"text": f"é {index}", "id": index} for index in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "rows.txt").write_text("\n\n".join(f"é {index}" for index in range(6)))
    for name, expected in (("json", rows), ("txt", [{"text": row["text"]} for row in rows])):
        request = PartitionRequest(tmp_path / f"rows.{name}", "iid", 2, tmp_path / f"of-{name}")
        written = [
            json.loads(text)
            for part in partition(request)
            for text in part.path.read_text(encoding="utf-8").splitlines()
        ]
        assert sorted(map(str, written)) == sorted(map(str, expected))


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
        min_size=3,
        max_size=12,
    ),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_text_survives_the_split(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], seed: int
) -> None:
    directory = tmp_path_factory.mktemp("split")
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (directory / "rows.jsonl").write_bytes(content.encode())
    parts = partition(
        PartitionRequest(directory / "rows.jsonl", "iid", 3, directory / "parts", seed=seed)
    )
    written = b"".join(part.path.read_bytes() for part in parts)
    assert sorted(written.split(b"\n")) == sorted(content.encode().split(b"\n"))


def test_what_is_there_already_is_left_alone(data_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    out.mkdir()
    partition(PartitionRequest(data_file, "iid", 2, out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(PrufedError, match="exists already"):
        partition(PartitionRequest(data_file, "iid", 3, out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(PrufedError, match="exists already"):
        partition(PartitionRequest(data_file, "iid", 3, data_file))
    with pytest.raises(PrufedError, match="no directory"):
        partition(PartitionRequest(data_file, "iid", 3, tmp_path / "no" / "parts"))


def test_a_failure_leaves_nothing_behind(data_file: Path, tmp_path: Path) -> None:
    with data_file.open("a") as file:
        file.write('{"x": 1}\n')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(PrufedError, match=r"rows\.jsonl:41: a row without the needed fields"):
        partition(PartitionRequest(data_file, "iid", 2, tmp_path / "parts"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_key_that_is_no_plain_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "user": "x"}\n{"text": "b", "user": ["x", "y"]}\n')
    with pytest.raises(PrufedError, match=r"rows\.jsonl:2: 'user' is not one value"):
        partition(PartitionRequest(path, "natural", 1, tmp_path / "parts", {"key": "user"}))


# --- the chart -----------------------------------------------------------------------------------


def parts_of(categories: int, clients: int = 3) -> list[Part]:
    counts = {f"kind-{index:02}": index + 1 for index in range(categories)}
    rows = sum(counts.values())
    return [Part(name, Path(name), rows, counts) for name in client_names(clients)]


@pytest.mark.parametrize("categories", [1, MOST_COLOURS, MOST_COLOURS + 1, 40])
def test_the_chart_names_every_client_and_the_largest_categories(
    categories: int, tmp_path: Path
) -> None:
    path = tmp_path / "chart.svg"
    draw(parts_of(categories), path)
    text = path.read_text()
    assert text.rstrip().endswith("</svg>")
    assert all(f">{name}<" in text for name in client_names(3))
    own = categories if categories <= MOST_COLOURS else MOST_COLOURS - 1
    shown = {f"kind-{index:02}" for index in range(categories - own, categories)}
    assert {f"kind-{i:02}" for i in range(categories) if f">kind-{i:02}<" in text} == shown
    assert (">others<" in text) == (categories > MOST_COLOURS)


def test_the_same_parts_draw_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        draw(parts_of(3), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_odd_names_of_categories_are_drawn_as_they_are(tmp_path: Path) -> None:
    draw([Part("client-01", Path("x"), 3, {"_own": 1, "$x$ & <b>": 2})], tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "_own" in text
    assert "$x$ &amp; &lt;b&gt;" in text


# --- the command ---------------------------------------------------------------------------------


def test_the_command_prints_the_directory_and_shows_the_chart(
    prufed: Prufed, data_file: Path, tmp_path: Path
) -> None:
    out, plot = tmp_path / "parts", tmp_path / "chart.png"
    code, stdout, stderr = prufed(
        *("data", "partition", "--path", data_file, "--by", "dirichlet", "--alpha", "1"),
        *("--clients", "3", "--out", out, "--plot", plot),
    )
    assert (code, stdout) == (0, f"{out}\n")
    lines = stderr.splitlines()
    assert lines[0].split() == ["client", "rows", "art", "code", "qa", "zoo"]
    assert sum(int(text.split()[1]) for text in lines[1:]) == 40
    assert plot.stat().st_size > 1000
    code, stdout, _ = prufed(
        *("data", "partition", "--path", data_file, "--by", "natural", "--key", "user"),
        *("--out", tmp_path / "users", "--json"),
    )
    document = json.loads(stdout)
    assert (code, document["schema"], len(document["clients"])) == (0, 1, 5)


def test_the_command_refuses_in_one_sentence(
    prufed: Prufed, data_file: Path, tmp_path: Path
) -> None:
    common = ("data", "partition", "--path", data_file, "--out", tmp_path / "parts")
    for arguments, code, words in (
        (("--clients", "2", "--by", "diriclet"), 2, "dirichlet"),
        (("--clients", "2", "--by", "iid", "--alpha", "1"), 2, "alpha"),
        (("--clients", "99", "--by", "iid"), 2, "40 rows cannot give each of 99 clients"),
        (("--clients", "2", "--plot", "chart.pdf"), 2, ".svg or .png"),
        (("--clients", "2", "--plot", tmp_path / "no" / "chart.svg"), 3, "no directory"),
        (("--clients", "0"), 2, "--clients"),
    ):
        got, stdout, stderr = prufed(*common, *arguments)
        assert (got, stdout) == (code, ""), stderr
        assert words in stderr
        assert "hint: " in stderr
        assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
