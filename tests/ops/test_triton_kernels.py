"""The Triton kernels, under Triton's interpreter, and when they are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_causal_conv1d import arguments as conv_arguments
from test_selective_scan import arguments as selective_arguments
from test_ssd import arguments as ssd_arguments

from fusiontree.ops import BackendError, available_backends, causal_conv1d, selective_scan, ssd_scan

CASES = [(ssd_scan, ssd_arguments), (selective_scan, selective_arguments), (causal_conv1d, conv_arguments)]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_agree_with_the_reference_under_the_interpreter() -> None:
    """In a process of its own, since the interpreter is chosen when triton is imported."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "tests/ops/interpreted_kernels.py",
        ],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("op", "arguments"), CASES)
def test_without_a_device_the_kernels_are_refused_and_auto_takes_torch(op, arguments) -> None:
    case = arguments(5, dtype=torch.float32)
    usable, reason = available_backends()[op.__name__]["triton"]
    assert not usable and ("needs a CUDA device" in reason or "not installed" in reason)
    with pytest.raises(BackendError, match="'triton' of .* cannot run this call: (it needs a CUDA|the package triton)"):
        op(**case, backend="triton")
    assert torch.equal(op(**case), op(**case, backend="torch"))


def test_kernels_and_libraries_are_not_imported_before_they_are_needed() -> None:
    code = """if True:
        import sys, torch, fusiontree, fusiontree.models
        from fusiontree.ops import available_backends, causal_conv1d
        causal_conv1d(torch.ones(1, 5, 8), torch.ones(8, 4))
        available_backends()
        ours = [m for m in sys.modules if m.startswith("fusiontree.") and m.endswith("_triton")]
        print(ours + [m for m in sys.modules if m in ("fla", "mamba_ssm", "causal_conv1d")])
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        assert done.stdout.strip() == "[]"
