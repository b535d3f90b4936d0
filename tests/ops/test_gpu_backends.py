"""Every optional backend that works on this machine against the reference, on its device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_comparison import assert_agrees_with_reference, nan_in_fresh_memory
from test_causal_conv1d import arguments as conv_arguments
from test_selective_scan import arguments as selective_arguments
from test_ssd import arguments as ssd_arguments

from fusiontree.ops import available_backends, causal_conv1d, selective_scan, ssd_scan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Of the largest element. The libraries round what they multiply to bfloat16 or TF32.
TOLERANCE = {torch.float32: None, torch.bfloat16: 2e-2}
TF32_TOLERANCE = 5e-3

CASES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "ssd_scan": (
        ssd_scan,
        [
            {"length": 1, "heads": 4, "width": 64, "state": 64, "initial": True},
            {"length": 77, "heads": 4, "width": 64, "state": 64, "groups": 2, "initial": True, "resets": True},
            {"length": 300, "heads": 12, "width": 64, "state": 64, "resets": True},
            {"length": 131, "heads": 2, "width": 32, "state": 128, "initial": True},
            {"length": 65, "heads": 2, "width": 128, "state": 256, "initial": True, "resets": True},
        ],
    ),
    "selective_scan": (
        selective_scan,
        [
            {"length": 1, "channels": 96, "state": 16},
            {"length": 77, "channels": 96, "state": 16},
            {"length": 77, "channels": 96, "state": 16, "initial": True, "resets": True},
            {"length": 200, "channels": 300, "state": 8, "resets": True, "gated": False},
            {"length": 40, "channels": 20, "state": 70, "initial": True},
        ],
    ),
    "causal_conv1d": (
        causal_conv1d,
        [
            {"length": 1, "channels": 96, "initial": True},
            {"length": 2, "channels": 96, "resets": True},
            {"length": 77, "channels": 96, "initial": True, "resets": True},
            {"length": 300, "channels": 200, "taps": 3, "bias": False},
        ],
    ),
}
ARGUMENTS = {"ssd_scan": ssd_arguments, "selective_scan": selective_arguments, "causal_conv1d": conv_arguments}
OPTIONAL = [
    (op, backend)
    for op in CASES
    for backend, (usable, _) in available_backends()[op].items()
    if usable and backend not in ("torch", "reference")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op_name", "backend"), OPTIONAL)
def test_agrees_with_reference(op_name: str, backend: str, dtype: torch.dtype) -> None:
    op, cases = CASES[op_name]
    library = backend != "triton"
    for sizes in cases:
        if op_name == "selective_scan" and library and ("initial" in sizes or "resets" in sizes):
            continue  # refused
        case = {
            name: None if value is None else value.to("cuda")
            for name, value in ARGUMENTS[op_name](**sizes, dtype=torch.float32).items()
        }
        for name in ("x", "u", "B", "C", "z"):
            if case.get(name) is not None:
                case[name] = case[name].to(dtype)
        options: dict[str, Any] = {"return_final_state": not (op_name == "selective_scan" and library)}
        tolerance = TOLERANCE[dtype]
        before = torch.get_float32_matmul_precision()
        try:
            if op_name == "ssd_scan" and library and dtype == torch.float32:
                torch.set_float32_matmul_precision("high")
                tolerance = TF32_TOLERANCE
            with nan_in_fresh_memory():
                assert_agrees_with_reference(op, case, backend=backend, tolerance=tolerance, **options)
        finally:
            torch.set_float32_matmul_precision(before)
