"""Rotary position embedding (Su et al. 2021, RoFormer): the halves of each head turned by the token's angle."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fusiontree.ops import cpu_kernels, reference
from fusiontree.ops.backends import register, resolve
from fusiontree.ops.checks import check_shapes


def apply_rotary(x_BThD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Rotate the halves of each head by the token's angle.

    Args:
        x_BThD: [B, T, heads, D] queries or keys.
        cos, sin: [B or 1, T, D/2] float32; carry no gradient.
        backend: "auto", "cpp", "torch" or "reference".

    Raises:
        ValueError: shapes that do not fit together, or heads of an odd width.
        BackendError: a named backend that is missing or cannot run this call.
    """
    batch, length, _, width = x_BThD.shape
    if width % 2:
        raise ValueError(f"rotary: heads need an even width, got {width}")
    angles = (1 if len(cos) == 1 else batch, length, width // 2)
    check_shapes("rotary", {"cos": (cos, angles), "sin": (sin, angles)})
    return resolve("rotary", backend, x_BThD, cos, sin)(x_BThD, cos, sin)


def _rotary_torch(x_BThD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos[:, :, None].to(x_BThD.dtype), sin[:, :, None].to(x_BThD.dtype)
    first, second = x_BThD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class _FusedRotary(torch.autograd.Function):
    """In one pass over memory; its gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x_BThD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_BThD, cos, sin, backwards=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _turned(grad, *ctx.saved_tensors, backwards=True), None, None


def _turned(x_BThD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backwards: bool) -> torch.Tensor:
    heads, width = x_BThD.shape[2:]
    x_nd = cpu_kernels.rows(x_BThD.flatten(2)).flatten(0, 1)
    angles = (angle.float().contiguous() for angle in (cos, sin))
    out = cpu_kernels.empty_like(x_BThD)
    sizes = (cos.shape[0] * cos.shape[1], out, len(x_nd), heads, width, backwards)
    cpu_kernels.call("rotary", x_BThD.dtype, x_nd, x_nd.stride(0), *angles, *sizes)
    return out


cpu_kernels.register_kernel("rotary", _FusedRotary.apply)
register("rotary", "torch", _rotary_torch)
register("rotary", "reference", reference.apply_rotary)
