"""What a user can set on the aggregators, as typed."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from prufed_plugins.aggregators.fedavg import FedAvg
from prufed_plugins.aggregators.heteagg import HeteAgg
from prufed_plugins.aggregators.heteagg_layer import HeteAggLayer
from prufed_plugins.discover import build
from prufed_plugins.params import HeteAggParams


def test_the_methods_are_found_by_name() -> None:
    assert isinstance(build("aggregator", "fedavg", {}), FedAvg)
    assert isinstance(build("aggregator", "heteagg", {"include_global": "true"}), HeteAgg)
    assert isinstance(
        build("aggregator", "heteagg-layer", {"group_weighting": "group"}), HeteAggLayer
    )


@pytest.mark.parametrize(
    ("typed", "value"), [("auto", "auto"), ("true", True), ("false", False), (True, True)]
)
def test_the_global_adapter_joins_as_typed(typed: str | bool, value: str | bool) -> None:
    settings = HeteAggParams.model_validate({"include_global": typed})
    assert settings.include_global is value or settings.include_global == value == "auto"


def test_the_letter_of_the_paper_sets_what_it_stands_for() -> None:
    settings = HeteAggParams(compat="lego-alg2")
    assert (settings.fallback, settings.mask) == ("zero", "nonzero")
    assert HeteAggParams(compat="lego-alg2", mask="nonzero") == settings


@pytest.mark.parametrize("contradiction", [{"fallback": "keep"}, {"mask": "explicit"}])
def test_the_letter_of_the_paper_cannot_be_contradicted(contradiction: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="compat lego-alg2 means"):
        HeteAggParams.model_validate({"compat": "lego-alg2", **contradiction})


@pytest.mark.parametrize(
    "wrong", [{"beta": -1}, {"global_weight": 0}, {"min_count": 0}, {"mask": "zeros"}, {"bta": 1}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        HeteAggParams.model_validate(wrong)
