from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prufed_cli.errors import INTEGRITY, PrufedError
from prufed_cli.models.adapters import (
    AdapterSpec,
    adapter_spec,
    attach,
    init_global,
    load_adapter,
    merge,
    save_adapter,
    target_shapes,
)

EVERY = ("all-linear",)
SPEC = adapter_spec("lego-literal", r=4, alpha=6, sparsity=0.75, rescale="density", dropout=0.1)


def _adapter(model: nn.Module, spec: AdapterSpec) -> dict[str, Tensor]:
    tensors = init_global(target_shapes(model, spec.target_modules), spec, 0)
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("targets", [EVERY, None])
def test_peft_computes_the_same_logits(
    model: nn.Module, ids: Tensor, tmp_path: Path, targets: tuple[str, ...] | None
) -> None:
    conv1d = hasattr(model, "transformer")
    some = ("c_attn", "mlp.c_proj") if conv1d else ("q_proj", "mlp.down_proj")
    spec = AdapterSpec.from_dict({**SPEC.to_dict(), "target_modules": targets or some})
    assert spec.scaling == 6.0
    tensors = _adapter(model, spec)
    with attach(model, spec, tensors):
        ours = _logits(model, ids)
    save_adapter(tmp_path, tensors, spec, "base@v1", fan_in_fan_out=conv1d)
    loaded, facts = load_adapter(tmp_path)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert (facts.r, facts.scaling, facts.base) == (4, 6.0, "base@v1")

    peft = PeftModel.from_pretrained(model, tmp_path).eval()
    torch.testing.assert_close(_logits(peft, ids), ours, rtol=1e-5, atol=1e-6)
    model = peft.unload()
    merge(model, loaded, facts.scaling)
    torch.testing.assert_close(_logits(model, ids), ours, rtol=1e-4, atol=1e-5)


def test_the_directory_is_laid_out_as_peft_lays_it_out(llama: nn.Module, tmp_path: Path) -> None:
    tensors = _adapter(llama, SPEC)
    save_adapter(tmp_path / "ours", tensors, SPEC, "base@v1")
    config = LoraConfig(
        r=4,
        lora_alpha=24,
        lora_dropout=0.1,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        base_model_name_or_path="base@v1",
    )
    get_peft_model(llama, config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        json.loads((tmp_path / who / "adapter_config.json").read_text())
        for who in ("ours", "theirs")
    )
    theirs["base_model_name_or_path"] = "base@v1"  # PEFT puts the model's path here
    assert ours == {key: theirs[key] for key in ours}
    shapes = [
        {n: t.shape for n, t in load_file(tmp_path / who / "adapter_model.safetensors").items()}
        for who in ("ours", "theirs")
    ]
    assert shapes[0] == shapes[1]


def test_we_read_what_peft_writes(llama: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    peft = get_peft_model(llama, config).eval()
    expected = _logits(peft, ids)
    peft.save_pretrained(tmp_path)
    llama = peft.unload()
    tensors, facts = load_adapter(tmp_path)
    merge(llama, tensors, facts.scaling)
    torch.testing.assert_close(_logits(llama, ids), expected, rtol=1e-4, atol=1e-5)


def test_the_bytes_depend_on_the_adapter_alone(llama: nn.Module, tmp_path: Path) -> None:
    tensors = _adapter(llama, SPEC)
    save_adapter(tmp_path / "one", tensors, SPEC, "base@v1")
    save_adapter(tmp_path / "two", dict(reversed(tensors.items())), SPEC, "base@v1")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for name in files:
        one, two = ((tmp_path / who / name).read_bytes() for who in ("one", "two"))
        assert one == two
        assert str(tmp_path).encode() not in one


def _rewrite(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "IA3"}, "not a LoRA adapter"),
        ({"r": 0}, "rank 0"),
        ({"r": 8}, "rank 8"),
        ({"r": True}, "rank True"),
        ({"lora_alpha": None}, "lora_alpha None"),
        ({"lora_alpha": "16"}, "lora_alpha '16'"),
        ({"target_modules": 3}, "target_modules 3"),
        ({"base_model_name_or_path": 3}, "base 3"),
        ({"use_dora": True}, "uses use_dora"),
        ({"bias": "all"}, "uses bias"),
        ({"rank_pattern": {"q_proj": 2}}, "uses rank_pattern"),
        ({"a_setting_of_tomorrow": 1}, "uses a_setting_of_tomorrow"),
    ],
)
def test_configurations_that_are_not_plain_lora_are_refused(
    llama: nn.Module, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    save_adapter(tmp_path, _adapter(llama, SPEC), SPEC, "base@v1")
    _rewrite(tmp_path, **changes)
    with pytest.raises(PrufedError, match=match) as caught:
        load_adapter(tmp_path)
    assert caught.value.exit_code == INTEGRITY


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udc80"])
def test_configurations_that_are_no_json_object_are_refused(
    llama: nn.Module, tmp_path: Path, text: str
) -> None:
    save_adapter(tmp_path, _adapter(llama, SPEC), SPEC, "base@v1")
    (tmp_path / "adapter_config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PrufedError):
        load_adapter(tmp_path)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("fault", ["unknown", "prefix", "partner", "shape", "nan", "none"])
def test_tensors_that_do_not_belong_are_refused(
    llama: nn.Module, tmp_path: Path, fault: str
) -> None:
    save_adapter(tmp_path, _adapter(llama, SPEC), SPEC, "base@v1")
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path)
    if fault == "unknown":
        stored["base_model.model.lm_head.weight"] = torch.ones(2, 2)
    elif fault == "prefix":
        stored[KEY.removeprefix("base_model.model.")] = stored.pop(KEY)
    elif fault == "partner":
        del stored[KEY]
    elif fault == "shape":
        stored[KEY] = stored[KEY].flatten()
    elif fault == "nan":
        stored[KEY][0, 0] = float("nan")
    else:
        stored = {}
    save_file(stored, path)
    with pytest.raises(PrufedError) as caught:
        load_adapter(tmp_path)
    assert caught.value.exit_code == INTEGRITY
    if fault in {"partner", "shape", "nan"}:
        assert "layers.1.self_attn.q_proj" in caught.value.message


def test_missing_damaged_and_pickled_files_are_refused(llama: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(PrufedError, match=r"no adapter_config\.json"):
        load_adapter(tmp_path)
    save_adapter(tmp_path, _adapter(llama, SPEC), SPEC, "base@v1")
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(PrufedError, match="unreadable adapter_model"):
        load_adapter(tmp_path)
    path.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(PrufedError, match="pickled"):
        load_adapter(tmp_path)


def test_an_adapter_that_is_not_finite_is_not_written(llama: nn.Module, tmp_path: Path) -> None:
    tensors = _adapter(llama, SPEC)
    tensors["model.layers.1.self_attn.q_proj.lora_A.weight"][0, 0] = float("inf")
    with pytest.raises(PrufedError, match=r"layers\.1\.self_attn\.q_proj\.lora_A"):
        save_adapter(tmp_path / "adapter", tensors, SPEC, "base@v1")
    assert not (tmp_path / "adapter").exists()
