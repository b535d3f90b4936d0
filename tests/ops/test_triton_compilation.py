"""The Triton kernels compile for CUDA devices: the interpreter accepts more than the compiler, and needs no device."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")]

# What the smallest recent devices (compute capability 8.6 and 8.9) let one program share.
SHARED_BYTES = 99 * 1024
HALF = {"x", "u", "B", "C", "z", "y", "dy", "rows", "columns", "dx", "du", "dz"}
SSD = {"WIDTH": 64, "STATE": 64, "N": 64, "PRECISION": "tf32", "BACKWARD": True}
SELECTIVE = {"STATE": 16, "N": 16, "L": 32, "d": 8, "BLOCKS": 8}
CONV = {"SILU": True, "K": 4, "T": 32, "C": 64}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("module", "name", "constants"),
    [
        ("chunk_passing_triton", "_pass_states", {"SHARED": 4096, "REVERSE": True, "BLOCK": 256}),
        ("ssd_triton", "_chunk_sums", SSD | {"L": 64, "P": 64}),
        ("ssd_triton", "_outputs", SSD | {"L": 64, "P": 64}),
        ("ssd_triton", "_gradients", SSD | {"L": 32, "P": 32}),
        ("selective_scan_triton", "_chunk_sums", SELECTIVE),
        ("selective_scan_triton", "_outputs", SELECTIVE),
        ("selective_scan_triton", "_chunk_gradient_sums", SELECTIVE),
        ("selective_scan_triton", "_gradients", SELECTIVE),
        ("causal_conv1d_triton", "_convolve", CONV | {"dy_ptr": None, "dsum_ptr": None, "dweight_ptr": None}),
        ("causal_conv1d_triton", "_convolve", CONV | {"y_ptr": None}),
        ("causal_conv1d_triton", "_input_gradients", CONV),
    ],
)
def test_compiles(module: str, name: str, constants: dict[str, Any], capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(import_module(f"fusiontree.ops.{module}"), name)
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}

    def kind(argument: str) -> str:
        tensor = argument.removesuffix("_ptr")
        if argument in constants:
            return "constexpr"
        if tensor == argument:
            return "i32"
        return "*u8" if tensor == "reset" else "*bf16" if tensor in HALF else "*fp32"

    source = ASTSource(kernel, {argument: kind(argument) for argument in kernel.arg_names}, constants)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 1})
    assert compiled.metadata.shared <= SHARED_BYTES
