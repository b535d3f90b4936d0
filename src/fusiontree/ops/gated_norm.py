"""Mamba-2's gated RMSNorm: the scan's output times silu of its gate, normalised per head.

Written out, because autograd would keep every intermediate of its five operations for the backward pass; on CPU in C++.

Shapes: B batch, T tokens, n = B T, h heads, P head width, d = h P.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fusiontree.ops import cpu_kernels, reference
from fusiontree.ops.backends import register, resolve
from fusiontree.ops.checks import check_shapes
from fusiontree.ops.precision import state_dtype

# Elements taken at once on CPU: what is made of them stays in the processor's cache.
CPU_BLOCK_ELEMENTS = 2**17


class _GatedRMSNorm(torch.autograd.Function):
    """Keeps its inputs alone. With s = y silu(z), r = 1 / sqrt(mean s^2 + eps) and g the gradient of s r,

    ds = r (g - s r^2 mean(g s)).
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.eps = eps
        out = torch.empty(z.shape, dtype=y.dtype, device=y.device)
        weight_hP = weight.to(state_dtype(y)).view(y.shape[2:])
        out_nhP = out.view(-1, *y.shape[2:])
        for rows, y_nhP, z_nhP in _blocks(y, z):
            s = F.silu(z_nhP).mul_(y_nhP)
            out_nhP[rows] = s.mul_(_inverse_rms(s, eps)).mul_(weight_hP)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        weight_hP = weight.to(state_dtype(y)).view(y.shape[2:])
        dy, dz = torch.empty_like(y), torch.empty(z.shape, dtype=z.dtype, device=z.device)
        dy_nhP, dz_nhP, dout_nhP = (t.view(-1, *y.shape[2:]) for t in (dy, dz, dout.contiguous()))
        dweight_hP = torch.zeros_like(weight_hP)
        for rows, y_nhP, z_nhP in _blocks(y, z):
            silu = F.silu(z_nhP)
            s = silu * y_nhP
            r = _inverse_rms(s, ctx.eps)
            dnormed = dout_nhP[rows].to(s.dtype)
            g = dnormed * weight_hP
            # What s r carries of g, and what g has along s.
            dweight_hP += (dnormed * s).mul_(r).sum(0)
            along = (g * s).mean(-1, keepdim=True).mul_(r).mul_(r)
            ds = g.sub_(s.mul_(along)).mul_(r)
            dy_nhP[rows] = silu.mul_(ds)
            dz_nhP[rows] = torch.ops.aten.silu_backward(ds.mul_(y_nhP), z_nhP)
        return dy, dz, dweight_hP.view(weight.shape).to(weight.dtype), None


def _inverse_rms(s_nhP: torch.Tensor, eps: float) -> torch.Tensor:
    """[n,h,1]."""
    return s_nhP.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _blocks(y: torch.Tensor, z: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Runs of tokens, with y and z [n,h,P] of them in the computing dtype."""
    y_nhP, z_nhP = y.flatten(0, 1), z.flatten(0, 1).unflatten(-1, y.shape[2:])
    rows, dtype = len(y_nhP), state_dtype(y)
    step = CPU_BLOCK_ELEMENTS // z.shape[-1] if y.device.type == "cpu" else rows
    for start in range(0, rows, max(1, step)):
        block = slice(start, start + step)
        yield block, y_nhP[block].to(dtype), z_nhP[block].to(dtype)


class _FusedGatedRMSNorm(torch.autograd.Function):
    """The same in one pass over memory in either direction (`cpu_kernels.cpp`)."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.eps = eps
        out = cpu_kernels.empty_like(z)
        cpu_kernels.call("norm_forward", y.dtype, *_norm_inputs(y, z, weight), out, *_sizes(y), eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        dy, dz, dweight = cpu_kernels.empty_like(y), cpu_kernels.empty_like(z), cpu_kernels.floats(*weight.shape)
        gradients = (dout.contiguous(), dy, dz, dweight)
        cpu_kernels.call("norm_backward", y.dtype, *_norm_inputs(y, z, weight), *gradients, *_sizes(y), ctx.eps)
        return dy, dz, dweight.to(weight.dtype), None


def _norm_inputs(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> tuple[Any, ...]:
    z_nd = cpu_kernels.rows(z).flatten(0, 1)  # a copy where the rows of the batch do not follow each other
    return y.contiguous(), z_nd, z_nd.stride(0), weight.float().contiguous()


def _sizes(y: torch.Tensor) -> tuple[int, ...]:
    return y.shape[0] * y.shape[1], *y.shape[2:]


def gated_rms_norm(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, *, eps: float, backend: str = "auto"
) -> torch.Tensor:
    """RMSNorm(y silu(z)) over each head, times `weight` (Dao and Gu 2024, with a group of the norm for every head).

    Args:
        y: [B,T,h,P].
        z: [B,T,d], the gate.
        weight: [d].
        eps: added to the mean square.
        backend: "auto", "cpp", "torch" or "reference".

    Returns:
        [B,T,d] in the dtype of y; carries gradient to y, z and weight.

    Raises:
        ValueError: shapes that do not fit together.
        BackendError: a named backend that is missing or cannot run this call.
    """
    size = y.shape[2] * y.shape[3]
    check_shapes("gated_rms_norm", {"z": (z, (*y.shape[:2], size)), "weight": (weight, (size,))})
    return resolve("gated_rms_norm", backend, y, z, weight)(y, z, weight, eps=eps)


def _norm_cpp(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    return _FusedGatedRMSNorm.apply(y, z, weight, float(eps))


def _norm_torch(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    if torch.is_grad_enabled():
        return _GatedRMSNorm.apply(y, z, weight, eps)
    return reference.gated_rms_norm(y, z, weight, eps=eps)  # fewer operations


def _cpp_refuses(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> str | None:
    return cpu_kernels.refuses(y, z, weight) or (None if z.dtype == y.dtype else "y and z differ in dtype")


cpu_kernels.register_kernel("gated_rms_norm", _norm_cpp, _cpp_refuses)
register("gated_rms_norm", "torch", _norm_torch)
register("gated_rms_norm", "reference", reference.gated_rms_norm)
