"""Attention of one query per row: a step of decoding, which costs the reading of all keys and values.

torch's fused kernel is made for many queries. In bfloat16 on CPU it rearranges keys and values first, which for a
single query takes several times as long as reading them, so there:

- few keys are converted to float32, in which the fused kernel rearranges nothing;
- many are multiplied head by head, as vector times matrix, at about the speed of memory. Scores are rounded to
  bfloat16 there, as in attention that is written out in bfloat16: a weight is off by up to the score's size / 512.

Shapes: B batch, H heads, K key heads, g heads that share a key head, S keys, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops.precision import product_dtype

# Where multiplying head by head overtakes converting to float32.
MANY_KEYS = 1024


def attend_one_query(q_B1HD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v without gradient: [B,1,H,D]. Keys are read in place, fastest head by head.

    mask: [B,1,1,S] of 0 and -inf, in any floating dtype; None: every key is visible.
    """
    batch, _, heads, width = q_B1HD.shape
    kv_heads = k_BSKD.shape[2]
    # The heads that share a key head stand where a kernel expects tokens, so that nothing repeats the keys.
    q_BKgD = q_B1HD.reshape(batch, kv_heads, heads // kv_heads, width)
    k_BKSD, v_BKSD = k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    if torch.compiler.is_compiling() and q_B1HD.device.type == "cpu":
        out = _written_out(q_BKgD, k_BKSD, v_BKSD, mask)
    elif q_B1HD.device.type != "cpu" or q_B1HD.dtype in (torch.float32, torch.float64):
        out = _fused(q_BKgD, k_BKSD, v_BKSD, mask)
    elif k_BKSD.shape[2] >= MANY_KEYS and product_dtype(q_B1HD.dtype, q_B1HD.device) == q_B1HD.dtype:
        out = _head_by_head(q_BKgD, k_BKSD, v_BKSD, mask)
    else:
        out = _fused(q_BKgD.float(), k_BKSD.float(), v_BKSD.float(), mask).to(q_B1HD.dtype)
    return out.reshape(batch, 1, heads, width)


def _written_out(q_BKgD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None) -> Tensor:
    """In float32 but for what is read: a compiler makes two passes of it, over the keys and over the values."""
    queries = q_BKgD.float() * q_BKgD.shape[-1] ** -0.5
    scores_BKgS = (queries[:, :, :, None] * k_BKSD[:, :, None]).sum(-1)
    if mask is not None:
        scores_BKgS = scores_BKgS + mask.float()
    weights = torch.softmax(scores_BKgS, -1)
    return (weights[..., None] * v_BKSD[:, :, None]).sum(-2).to(q_BKgD.dtype)


def _fused(q_BKgD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None) -> Tensor:
    mask = None if mask is None else mask.to(q_BKgD.dtype)
    return F.scaled_dot_product_attention(q_BKgD, k_BKSD, v_BKSD, attn_mask=mask)


def _head_by_head(q_BKgD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None) -> Tensor:
    _, kv_heads, group, width = q_BKgD.shape
    out = torch.empty(q_BKgD.shape, dtype=q_BKgD.dtype, device=q_BKgD.device)
    # One query at a time: two would have the keys packed instead of streamed.
    queries, outputs = (t.view(-1, 1, width).unbind(0) for t in (q_BKgD.contiguous() * width**-0.5, out))
    keys, values = (t.flatten(0, 1).unbind(0) for t in (k_BKSD, v_BKSD))
    for head, (query, output) in enumerate(zip(queries, outputs, strict=True)):
        scores = F.linear(query, keys[head // group])  # [1,S]
        if mask is not None:
            scores = scores + mask[head // (group * kv_heads), 0].to(scores.dtype)
        torch.mm(torch.softmax(scores, -1), values[head // group], out=output)
    return out
