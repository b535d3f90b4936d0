"""Local and global attention with the C++ kernels, in bfloat16 on CPUs with AMX (`cpu_attention.cpp`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops import cpu_kernels
from fusiontree.ops.attention_layouts import AttentionLayout
from fusiontree.ops.backends import BackendError
from fusiontree.ops.precision import autocast_dtype

WIDTH_STEP = 32  # of heads, in numbers: what one product of the tile registers takes


def unusable() -> str | None:
    if (reason := cpu_kernels.unusable()) is not None:
        return reason
    return None if torch.cpu._is_amx_tile_supported() else "it needs a CPU with AMX"


def refuses(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> str | None:
    if (reason := cpu_kernels.refuses(q, k, v)) is not None:
        return reason
    if autocast_dtype(q) != torch.bfloat16:
        return f"it computes in bfloat16 alone, not {autocast_dtype(q)}"
    return None if q.shape[-1] % WIDTH_STEP == 0 else f"it takes heads of {WIDTH_STEP} channels or a multiple of them"


def auto_declines(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> str | None:
    return cpu_kernels.auto_declines(q) or _forbidden()


def _forbidden() -> str | None:
    return None if cpu_kernels.asks("attention_works") else "the compiler or the system knows no AMX"


def local_global_cpp(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, num_global_heads: int, layout: AttentionLayout
) -> Tensor:
    if (reason := _forbidden()) is not None:
        raise BackendError(f"Backend 'cpp' of local_global_attention cannot run this call: {reason}.")
    return _Attention.apply(q, k, v, layout.starts, window_size, q.shape[2] - num_global_heads)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, starts, window, windowed):
        q, k, v = map(cpu_kernels.rows, (q, k, v))
        batch, length, heads, width = q.shape
        starts = None if starts is None else starts.expand(batch, -1).contiguous()
        out, logsumexp = cpu_kernels.empty_like(q), cpu_kernels.floats(batch, heads, length)
        sizes = (batch, length, heads, k.shape[2], width, window, windowed)
        _call("attention_forward", q.dtype, *_strided(q, k, v), starts, out, logsumexp, *sizes)
        ctx.save_for_backward(q, k, v, starts, out, logsumexp)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, starts, out, logsumexp = ctx.saved_tensors
        batch, length, heads, kv_heads, width = ctx.sizes[:5]
        dq = cpu_kernels.empty_like(q)
        shares = [cpu_kernels.floats(batch, heads, length, width) for _ in range(2)]  # of each query head
        strided = _strided(q, k, v, cpu_kernels.rows(dout))
        _call("attention_backward", q.dtype, *strided, starts, out, logsumexp, dq, *shares, *ctx.sizes)
        dk, dv = (share.unflatten(1, (kv_heads, -1)).sum(2).transpose(1, 2).to(q.dtype) for share in shares)
        return dq, dk, dv, None, None, None


def _call(name: str, dtype: torch.dtype, *arguments: Tensor | int | None) -> None:
    if not cpu_kernels.call(name, dtype, *arguments):
        raise MemoryError("attention: there is no memory left for what a head computes with")


def _strided(*tensors: Tensor) -> list[Tensor | int]:
    """Each with the strides of rows, tokens and heads."""
    arguments: list[Tensor | int] = []
    for tensor in tensors:
        arguments += [tensor, *tensor.stride()[:3]]
    return arguments
