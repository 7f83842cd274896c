from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prufed_cli.errors import PrufedError
from prufed_cli.models.layer_names import layer_number, to_global, to_local

kept = st.sets(st.integers(0, 200), min_size=1).map(lambda layers: tuple(sorted(layers)))


@given(kept, st.data())
def test_there_and_back(layers: tuple[int, ...], data: st.DataObject) -> None:
    local = f"model.layers.{data.draw(st.integers(0, len(layers) - 1))}.mlp.up_proj.lora_A.weight"
    assert to_local(to_global(local, layers), layers) == local


def test_layers_move_and_the_rest_of_the_name_stays() -> None:
    assert to_global("transformer.h.1.attn.c_attn", (0, 5)) == "transformer.h.5.attn.c_attn"
    assert to_local("model.layers.7.experts.3.w1", (2, 7)) == "model.layers.1.experts.3.w1"
    assert to_global("lm_head.weight", (0, 5)) == "lm_head.weight"
    assert layer_number("model.layers.12.mlp") == 12
    assert layer_number("model.norm") is None


def test_a_layer_the_sub_model_lacks() -> None:
    assert to_local("model.layers.3.mlp", (0, 5)) is None
    with pytest.raises(PrufedError, match="layer 2, the sub-model has 2 layers"):
        to_global("model.layers.2.mlp", (0, 5))
