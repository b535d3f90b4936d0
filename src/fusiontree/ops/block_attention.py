"""Attention in blocks: runs of queries against runs of keys, each through torch's fused attention kernels.

No score matrix is kept: the backward pass goes block by block as the forward pass did, and adds up the gradients of
keys that several blocks read. On CPU the fused kernels are called directly, forward and backward, on strided views of
q, k and v; on other devices through `scaled_dot_product_attention`, which the backward pass runs a second time.

Shapes: B batch, T queries, S keys, H heads, Hkv key heads, D head width, t and s the queries and keys of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops.attention_gradients import block_gradients
from fusiontree.ops.precision import product_dtype, state_dtype

_FORWARD_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# Before 2.9 the CPU kernel reads past the end of k and v when they have fewer heads than q.
_CPU_KERNEL_GROUPS_HEADS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


class Block(NamedTuple):
    """In the given rows, queries [query_start, query_stop) read keys [key_start, key_stop).

    mask gives the additive mask, [B or 1,1,t,s] of 0 and -inf in the given dtype; None: all pairs are visible, or with
    `causal` those with s <= t counted from the block's start. Every query must see at least one key.
    """

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int
    mask: Callable[[torch.dtype], Tensor] | None = None
    causal: bool = False
    rows: slice = slice(None)


class HeadSpan(NamedTuple):
    """Query heads and the key heads they read, with the blocks that cover every query once."""

    heads: slice
    kv_heads: slice
    blocks: list[Block]


def block_attention(q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, spans: list[HeadSpan]) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v over the given head spans: [B,T,H,D]. The spans cover every head once."""
    return _BlockAttention.apply(q_BTHD, k_BSHD, v_BSHD, spans)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spans):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        logsumexps = []
        for span, block in _all_blocks(spans):
            q_block, k_block, v_block = _views(q, k, v, span, block)
            mask = block.mask(q_block.dtype) if block.mask else None
            out_block, logsumexp = _forward(q_block, k_block, v_block, mask, block.causal)
            out[block.rows, block.query_start : block.query_stop, span.heads] = out_block.transpose(1, 2)
            logsumexps.append(logsumexp)
        ctx.spans = spans
        ctx.save_for_backward(q, k, v, out, *logsumexps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, *logsumexps = ctx.saved_tensors
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(t.shape, dtype=state_dtype(t), device=t.device) for t in (k, v))
        for (span, block), logsumexp in zip(_all_blocks(ctx.spans), logsumexps, strict=True):
            q_block, k_block, v_block = _views(q, k, v, span, block)
            queries = (block.rows, slice(block.query_start, block.query_stop), span.heads)
            keys = (block.rows, slice(block.key_start, block.key_stop), span.kv_heads)
            dout_block, out_block = (t[queries].transpose(1, 2).to(q_block.dtype) for t in (dout, out))
            dq_block, dk_block, dv_block = _backward(
                dout_block,
                q_block,
                k_block,
                v_block,
                out_block,
                logsumexp,
                block.mask(q_block.dtype) if block.mask else None,
                block.causal,
            )
            dq[queries] = dq_block.transpose(1, 2)
            dk[keys] += dk_block.transpose(1, 2)
            dv[keys] += dv_block.transpose(1, 2)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _all_blocks(spans: list[HeadSpan]) -> list[tuple[HeadSpan, Block]]:
    return [(span, block) for span in spans for block in span.blocks]


def _views(q: Tensor, k: Tensor, v: Tensor, span: HeadSpan, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """The block's queries, keys and values as [B,heads,tokens,D], in the dtype that the kernel is to work in."""
    dtype = product_dtype(q.dtype, q.device)
    keys = (block.rows, slice(block.key_start, block.key_stop), span.kv_heads)
    return (
        q[block.rows, block.query_start : block.query_stop, span.heads].transpose(1, 2).to(dtype),
        k[keys].transpose(1, 2).to(dtype),
        v[keys].transpose(1, 2).to(dtype),
    )


def _takes_cpu_kernel(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor | None]:
    """The block's output [B,H,t,D] and, where the backward kernel wants it, the log-sum-exp of its scores."""
    if _takes_cpu_kernel(q):
        group = q.shape[1] // k.shape[1]
        if group > 1 and not _CPU_KERNEL_GROUPS_HEADS:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return _FORWARD_CPU(q, k, v, 0.0, causal, attn_mask=mask)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped), None


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if logsumexp is None:
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            again, _ = _forward(q, k, v, mask, causal)
        dq, dk, dv = torch.autograd.grad(again, (q, k, v), dout)
        return dq, dk, dv
    if q.dtype == torch.bfloat16:  # then this CPU multiplies it fast (`product_dtype`)
        return block_gradients(dout, q, k, v, out, logsumexp, mask, causal)
    group = q.shape[1] // k.shape[1]
    if group > 1 and not _CPU_KERNEL_GROUPS_HEADS:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        dq, dk, dv = _BACKWARD_CPU(dout, q, k, v, out, logsumexp, 0.0, causal, attn_mask=mask)
        return dq, dk.unflatten(1, (-1, group)).sum(2), dv.unflatten(1, (-1, group)).sum(2)
    return _BACKWARD_CPU(dout, q, k, v, out, logsumexp, 0.0, causal, attn_mask=mask)
