"""The kernels of AdamP: their arithmetic in Triton's interpreter, their code without a device."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HANG_S

triton = pytest.importorskip("triton")


def test_in_the_interpreter_the_kernels_follow_the_reference():
    """Float64 without kernels: see `kernels_against_reference.py`."""
    script = Path(__file__).with_name("kernels_against_reference.py")
    result = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )

    if "only 0-dimensional arrays can be converted" in result.stderr:
        pytest.skip("the interpreter of this version of Triton (3.6) is older than numpy 2.5")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_are_built_without_a_device_and_move_16_bytes_at_once(
    capability, tmp_path, monkeypatch
):
    """Machine code for an A100, an RTX 4090 and an H100; in the rows of aligned tensors every
    weight, gradient, moment and average is read and written in fours."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wds_convnext.training import adamp_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"ints": "*i64", "floats": "*fp64"}
    wide = {"ld.global.v4": 0, "st.global.v4": 0}
    for name in ("_moments", "_apply"):
        kernel = getattr(adamp_triton, name)
        names = kernel.arg_names
        signature = {arg: types.get(arg, "*fp32") for arg in names} | {"BLOCK": "constexpr"}
        source = ASTSource(kernel, signature, {(names.index("BLOCK"),): adamp_triton.BLOCK})
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(built.asm["cubin"]) > 0
        for kind in wide:
            wide[kind] += len(re.findall(re.escape(kind), built.asm["ptx"]))

    # Of `_apply` the last of each is the average's.
    assert wide == {"ld.global.v4": 4 + 4, "st.global.v4": 2 + 2}


def test_a_cpu_and_other_kinds_of_adamp_are_left_to_the_operations():
    """Which are those that follow timm bit for bit there."""
    from wds_convnext.training import adamp, adamp_triton

    plain = {"nesterov": False, "caution": False}
    weight = torch.zeros(6, 4)

    def takes(param=weight, exp_avg=None, **options) -> bool:
        moments = torch.zeros_like(param) if exp_avg is None else exp_avg, torch.zeros_like(param)
        step = torch.tensor(0)
        row = adamp_triton.Row(plain | options, param, torch.zeros_like(param), *moments, step)
        return adamp_triton.takes(row)

    assert adamp._kernels(torch.device("cpu")) is None
    assert takes()
    assert not takes(nesterov=True)
    assert not takes(caution=True)
    assert not takes(weight.double())
    assert not takes(weight.T)
    assert not takes(weight[:, :2])
    assert not takes(exp_avg=torch.zeros(4, 6).T)
    assert not takes(exp_avg=torch.zeros(6, 4).double())
