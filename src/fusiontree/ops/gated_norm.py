"""Mamba-2's gated RMSNorm: the scan's output times silu of its gate, normalised per head.

Written out, because autograd would keep every intermediate of its five operations for the backward pass.

Shapes: B batch, T tokens, n = B T, h heads, P head width, d = h P.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

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


def gated_rms_norm(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """RMSNorm(y silu(z)) over each head, times `weight` (Dao and Gu 2024, with a group of the norm for every head).

    Args:
        y: [B,T,h,P].
        z: [B,T,d], the gate.
        weight: [d].
        eps: added to the mean square.

    Returns:
        [B,T,d] in the dtype of y; carries gradient to y, z and weight.
    """
    if torch.is_grad_enabled():
        return _GatedRMSNorm.apply(y, z, weight, eps)
    gated = y * F.silu(z).unflatten(-1, y.shape[2:])
    return (F.rms_norm(gated, (y.shape[-1],), eps=eps).flatten(-2) * weight).to(y.dtype)
