"""From ``--set key=value`` to validated parameters, and what a person reads when it fails."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prufed_plugins.discover import build, catalog
from prufed_plugins.errors import MethodError
from prufed_plugins.settings import check_settings, parameters, parse_settings, validate

some = budget(max_examples=60, deadline=None)


class Example(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float = Field(default=0.5, gt=0, le=1, description="how much")
    mode: Literal["fast", "exact"] = "fast"
    choice: Literal["auto"] | bool = "auto"
    steps: int | None = Field(default=None, ge=1)
    layers: tuple[int, ...] = Field(default_factory=tuple)
    label: str = Field(default="", pattern="[a-z]*")

    @model_validator(mode="after")
    def _check(self) -> Example:
        if self.mode == "exact" and self.ratio < 0.1:
            raise ValueError("mode exact needs a ratio of at least 0.1")
        return self


class Demanding(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    alpha: float = Field(gt=0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("3e-4", 3e-4),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("-7", -7),
        ("true", True),
        ("null", None),
        ("", None),
        ("2:4", "2:4"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("0x10", "0x10"),
        ("'5'", "5"),
        ("[1, 2, q_proj]", [1, 2, "q_proj"]),
        ("a=b", "a=b"),
    ],
)
def test_values_are_plain_scalars_and_lists(text: str, value: Any) -> None:
    parsed = parse_settings([f"key={text}"])["key"]
    assert parsed == value
    assert type(parsed) is type(value)


@some
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers())
def test_numbers_survive(real: float, whole: int) -> None:
    assert parse_settings([f"a={real!r}", f"b={whole}"]) == {"a": real, "b": whole}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["fraction"], "cannot read the setting 'fraction'"),
        (["=1"], "cannot read the setting '=1'"),
        (["a=1", "a=2"], "the setting a is given twice"),
        (["a={b: 1}"], "the value of a is a mapping"),
        (["a=[1, 2"], "cannot read the value of a"),
        (["a=!!python/object/apply:os.getcwd []"], "cannot read the value of a"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_hint(assignments: list[str], message: str) -> None:
    with pytest.raises(MethodError) as caught:
        parse_settings(assignments)
    assert caught.value.message.startswith(message)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"raito": 1}, "raito", "no such setting; did you mean ratio?"),
        (
            {"zzz": 1},
            "zzz",
            "no such setting; there is ratio, mode, choice, steps, layers, label",
        ),
        ({"ratio": 3}, "ratio", "must be > 0, <= 1, not 3"),
        ({"ratio": 0}, "ratio", "must be > 0, <= 1, not 0"),
        ({"mode": "slow"}, "mode", "must be fast | exact, not 'slow'"),
        ({"choice": "never"}, "choice", "must be auto or true | false, not 'never'"),
        ({"ratio": True}, "ratio", "must be > 0, <= 1, not True"),
        ({"steps": True}, "steps", "must be >= 1 or null, not True"),
        ({"steps": 0}, "steps", "must be >= 1 or null, not 0"),
        ({"mode": "exact", "ratio": 0.01}, "", "mode exact needs a ratio of at least 0.1"),
    ],
)
def test_each_problem_names_its_key_and_what_is_accepted(
    settings: dict[str, Any], key: str, message: str
) -> None:
    [problem] = check_settings(Example, settings)
    assert (problem.key, problem.message) == (key, message)


def test_true_stays_true_where_it_is_meant() -> None:
    assert check_settings(Example, {"choice": True}) == []


def test_an_item_of_a_list_is_named_by_its_place() -> None:
    [problem] = check_settings(Example, {"layers": [1, "x"]})
    assert problem.key == "layers.1"
    assert problem.message.endswith("not 'x'")


def test_what_must_be_given_says_so() -> None:
    [problem] = check_settings(Demanding, {})
    assert (problem.key, problem.message) == ("alpha", "must be given (> 0)")


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(MethodError) as caught:
        validate("tuner example", Example, {"ratio": 2, "mod": "fast"})
    assert caught.value.message == (
        "tuner example: ratio: must be > 0, <= 1, not 2; mod: no such setting; did you mean mode?"
    )
    assert caught.value.hint == "prufed plugins show tuner:example"


def test_good_settings_become_immutable_parameters() -> None:
    params = validate("tuner example", Example, {"ratio": 0.25, "layers": [1, 2]})
    assert params == Example(ratio=0.25, layers=(1, 2))
    with pytest.raises(ValidationError):
        params.ratio = 1  # type: ignore[attr-defined]


def test_parameters_are_described() -> None:
    ratio, mode, choice, steps, layers, _ = parameters(Example)
    assert (ratio.type, ratio.default, ratio.accepts) == ("float", 0.5, "> 0, <= 1")
    assert ratio.description == "how much"
    assert (mode.type, mode.accepts) == ("str", "fast | exact")
    assert (choice.type, choice.accepts) == ("str | bool", "auto or true | false")
    assert (steps.type, steps.default) == ("int | null", None)
    assert (layers.type, layers.default, layers.required) == ("tuple[int, ...]", (), False)
    [alpha] = parameters(Demanding)
    assert alpha.required


@pytest.mark.parametrize("entry", catalog().entries.values(), ids=lambda e: f"{e.kind}:{e.name}")
def test_every_built_in_describes_every_parameter(entry: Any) -> None:
    assert entry.method.summary
    for parameter in parameters(entry.method.params):
        assert parameter.description, parameter.name
        assert parameter.type


def test_unknown_methods_are_refused_with_near_names() -> None:
    with pytest.raises(MethodError, match="no sampler is called 'sequental'") as caught:
        build("sampler", "sequental", {})
    assert caught.value.hint == "did you mean sequential?"
    with pytest.raises(MethodError) as caught:
        build("partitioner", "qqqq", {})
    assert str(caught.value.hint).startswith("there is iid, stratified-iid, ")


def test_underscores_stand_for_hyphens() -> None:
    assert catalog().get("partitioner", "by_category").name == "by-category"
    assert catalog().get("sampler", "prufed:by_depth").name == "by-depth"


def test_discovery_is_light() -> None:
    code = (
        "import sys, prufed_plugins.discover as d\n"
        "assert not {'torch', 'pydantic', 'yaml', 'numpy'} & set(sys.modules)\n"
        "d.catalog()\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "d.build('sampler', 'uniform', {'fraction': 0.5})\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
