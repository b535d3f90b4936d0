"""The gated product inside a SwiGLU MLP (Shazeer 2020, arXiv 2002.05202).

Written out, because autograd would keep silu(gate) and make the gradients of the two halves apart, to copy them side by
side after.

Shapes: d width, n rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fusiontree.ops import cpu_kernels, reference
from fusiontree.ops.backends import register, resolve


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dgate, dup = dx.chunk(2, dim=-1)
        dup.copy_(F.silu(gate).mul_(dout))
        dgate.copy_(torch.ops.aten.silu_backward(up * dout, gate))
        return dx


class _FusedSwiGLU(torch.autograd.Function):
    """The same in one pass over memory in either direction (`cpu_kernels.cpp`)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        width = x.shape[-1] // 2
        out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
        cpu_kernels.call("swiglu_forward", x.dtype, x, out, out.numel() // width, width)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        dx, width = cpu_kernels.empty_like(x), x.shape[-1] // 2
        cpu_kernels.call("swiglu_backward", x.dtype, x, dout.contiguous(), dx, dout.numel() // width, width)
        return dx


def swiglu(x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """silu(gate) * up.

    Args:
        x: [..., 2 d], gate and up side by side.
        backend: "auto", "cpp", "torch" or "reference".

    Returns:
        [..., d] in the dtype of x; carries gradient.

    Raises:
        ValueError: a last dimension that is odd.
        BackendError: a named backend that is missing or cannot run this call.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu: x needs an even last dimension, got {x.shape[-1]}")
    return resolve("swiglu", backend, x)(x)


def _swiglu_torch(x: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _SwiGLU.apply(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


cpu_kernels.register_kernel("swiglu", _FusedSwiGLU.apply)
register("swiglu", "torch", _swiglu_torch)
register("swiglu", "reference", reference.swiglu)
