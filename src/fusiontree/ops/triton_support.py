"""What the Triton kernels share on the host: when they can run, for which arguments, and with which precision.

Neither this module nor any that registers a backend imports triton; the modules with kernels, `*_triton`, do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from torch import Tensor

from fusiontree.ops.checks import refuse_older_gpu

# The oldest compute capability that Triton compiles for.
OLDEST_GPU = (7, 0)
LARGEST_STATE = 256
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors too (where `auto` then takes them).

    It does so when TRITON_INTERPRET=1 is set before the program starts.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def triton_unusable() -> str | None:
    """Why Triton kernels cannot run on this machine (None: they can)."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "it needs a CUDA device (or TRITON_INTERPRET=1, which interprets its kernels on CPU, slowly)"
    if not any(map(which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))):
        return "triton needs a C compiler and finds none"
    try:
        import_module("triton")
    except Exception as error:  # a version for another Python or system fails in many ways
        return f"triton is installed but cannot be imported: {error}"
    return None


def triton_refuses(*tensors: Tensor | None, **arguments: Any) -> str | None:
    """Why Triton kernels cannot honour these arguments: their dtype, or the device they lie on and its age."""
    reason = refuse_other_kernel_dtypes(*tensors)
    if reason or interpreting():
        return reason
    return refuse_cpu(*tensors) or next((refuse_older_gpu(t, OLDEST_GPU) for t in tensors if t is not None), None)


def refuse_other_kernel_dtypes(*tensors: Tensor | None) -> str | None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return f"it does not support dtype {tensor.dtype}"
    return None


def refuse_large_state(size: int) -> str | None:
    """The refusal of kernels that hold a head's or a channel's state in registers."""
    return f"it cannot hold a state of more than {LARGEST_STATE}, got {size}" if size > LARGEST_STATE else None


def refuse_cpu(*tensors: Tensor | None) -> str | None:
    for tensor in tensors:
        if tensor is not None and not tensor.is_cuda:
            return f"it needs CUDA tensors, got one on {tensor.device}"
    return None


def kernel(module: str, name: str) -> Callable[..., Any]:
    """A function of a module with kernels in `fusiontree.ops`, which is imported when it is first called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(f"fusiontree.ops.{module}"), name)(*args, **kwargs)

    return call


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device; within it that is x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def dot_precision(x: Tensor) -> str:
    """How kernels multiply matrices of float32: in TF32 for 16-bit inputs, whose rounding is coarser than its own.

    For float32 inputs as `torch.set_float32_matmul_precision` says; torch's own default is full precision.
    """
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())


def last_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, with its last dimension in one run of memory; kernels take the other strides."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
