"""The Triton kernel takes the steps that torch takes; it is run by Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from prufed_plugins.pruners import fused_block

needs_triton = pytest.mark.skipif(
    fused_block.find_spec("triton") is None, reason="needs triton, which comes with CUDA's torch"
)


@needs_triton
def test_the_kernel_takes_the_same_steps() -> None:
    import triton

    if Version(triton.__version__) < Version("3.7"):
        pytest.skip("Triton's interpreter before 3.7 cannot count with today's numpy")
    program = Path(__file__).with_name("fused_block_interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=True
    )
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 6
    for case in cases:
        assert case["agreement"] == 1.0
        assert case["current"] < 1e-4
        assert case["removed"] < 1e-4


@needs_triton
@pytest.mark.parametrize("m", [0, 4])
def test_the_kernel_compiles_for_a_device_that_is_not_here(m: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arrays = ("current", "gone", "removed", "pushes", "squares")
    signature = dict.fromkeys(arrays, "*fp32") | {"special": "*u8"}
    signature |= dict.fromkeys(("rows", "width", "n"), "i32")
    constants = {"M": m, "WIDTH": 128, "ROWS": fused_block.ROWS}
    source = ASTSource(
        fn=fused_block._kernel(),
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert "ptx" in compiled.asm


def test_where_the_kernel_is_used() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    there = fused_block.find_spec("triton") is not None
    assert fused_block.can_fuse(128, None, cuda) is there
    assert not fused_block.can_fuse(fused_block.WIDEST + 1, None, cuda)
    assert not fused_block.can_fuse(128, (2, 4), cpu)
