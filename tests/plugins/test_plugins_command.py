"""``prufed plugins``, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from prufed_cli.main import main
from prufed_plugins.discover import catalog

DOCS: Final = Path(__file__).resolve().parents[2] / "docs"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plugins", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    assert found["schema"] == 1
    return found


def test_the_list_has_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    for entry in catalog().entries.values():
        assert any(line.split()[:2] == [entry.kind, entry.name] for line in out.splitlines()), (
            entry.name
        )
    listed = document(capsys)["methods"]
    assert [(one["kind"], one["name"]) for one in listed] == list(catalog().entries)


def test_show_says_what_a_method_needs_of_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs rows of the server's own: server_data" in run(capsys, "show", "fltrust")[1]
    assert "server_data" not in run(capsys, "show", "fedavg")[1]


def test_show_describes_the_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show", "dirichlet")
    assert code == 0
    assert "partitioner dirichlet: " in out
    assert "paper: Yurochkin et al. 2019, https://arxiv.org/abs/1905.12022" in out
    [row] = [line for line in out.splitlines() if line.split()[:1] == ["alpha"]]
    assert row.split()[1:7] == ["float", "0.5", ">=", "0.001,", "<=", "1000000"]
    assert "concentration" in row


def test_show_gives_the_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    [method] = document(capsys, "show", "partitioner:dirichlet")["methods"]
    assert method["parameters"]["properties"]["alpha"]["default"] == 0.5
    assert method["parameters"]["additionalProperties"] is False


def test_show_of_a_method_without_parameters_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to set" in run(capsys, "show", "sampler:all")[1]


def test_show_shows_all_kinds_that_have_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    for entry in catalog().entries.values():
        kinds = {one.kind for one in catalog().entries.values() if one.name == entry.name}
        assert {one["kind"] for one in document(capsys, "show", entry.name)["methods"]} == kinds


@pytest.mark.parametrize("name", ["dirichlte", "partitioner:dirichlte"])
def test_an_unknown_name_is_not_found(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "show", name)
    assert (code, out) == (3, "")
    assert f"no method is called '{name}'" in err
    assert "did you mean dirichlet?" in err


def test_check_prints_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "uniform", "iid", "--quiet")
    assert code == 0
    assert "16 of 16 checks passed" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if " ok " in line}
    assert rows["uniform"] == rows["iid"] == ["ok"] * 8


def test_check_of_one_method_prints_what_must_hold(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "uniform", "--quiet")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith(" sampler uniform")]
    assert [row[3] for row in rows] == ["pass"] * 8
    assert "Somebody trains in at least one of many rounds" in out


def test_check_says_what_is_broken_by_design_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "fedavg", "heteagg-layer", "--quiet")
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if " ok " in line}
    assert rows["fedavg"] == ["d", *["ok"] * 3, "d", *["ok"] * 10]
    assert rows["heteagg-layer"] == ["ok"] * 15
    assert all(len(line) <= 80 for line in out.splitlines() if " ok " in line)
    assert "design  aggregator fedavg, C1: absent entries are averaged as zeros" in out
    assert "28 of 30 checks passed, 2 broken by design" in out


def test_what_aggregators_break_by_design_stands_on_its_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [entry.name for entry in catalog().methods("aggregator")]
    code, out, _ = run(capsys, "check", *(f"aggregator:{name}" for name in names), "--json")
    found = json.loads(out)
    assert (code, found["passed"], found["left_out"]) == (0, True, [])
    assert [one["name"] for one in found["methods"]] == names
    page = (DOCS / "reference" / "contracts.md").read_text()
    for method in found["methods"]:
        for check in method["checks"]:
            if check["verdict"] == "broken by design":
                row = f"| `{method['name']}` |  | "
                assert any(
                    line.startswith(row)
                    and line.endswith(f" | {check['by_design']} |")
                    and check["contract"] in line.removeprefix(row).partition(" |")[0].split(", ")
                    for line in page.splitlines()
                ), (method["name"], check["contract"])


def test_check_takes_settings(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("check", "dirichlet", "--set", "alpha=0.001", "--set", "retries=1", "--json")
    code, out, _ = run(capsys, *arguments)
    assert code == 1
    found = json.loads(out)
    assert not found["passed"]
    failed = {one["name"] for one in found["methods"][0]["checks"] if not one["passed"]}
    assert "gives_every_client_rows" in failed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check"], "give methods to check, or --all"),
        (["check", "uniform", "--all"], "give methods to check, or --all"),
        (["check", "--all", "--set", "a=1"], "--set is for one kind of method"),
    ],
)
def test_usage_errors(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_wrong_settings_fail_the_check_before_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "uniform", "--set", "fraction=2", "--json")
    assert code == 1
    [check] = json.loads(out)["methods"][0]["checks"]
    assert check["failure"] == "sampler uniform: fraction: must be > 0, <= 1, not 2"


def test_a_method_without_defaults_is_checked_with_its_example_until_it_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, "check", "explicit", "--json")
    assert code == 0
    assert json.loads(out)["methods"][0]["settings"] == {"layers": [0, 2]}
    code, out, _ = run(capsys, "check", "explicit", "--set", "layers=[0, 2, 5]", "--json")
    assert code == 0
    assert json.loads(out)["methods"][0]["settings"] == {"layers": [0, 2, 5]}
    assert json.loads(out)["methods"][0]["checks"]
