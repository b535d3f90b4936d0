"""The gradients of one block of attention as bfloat16 matrix products, for CPUs that multiply bfloat16 fast.

torch's fused CPU kernel reaches a third of the speed of its matrix products in the backward pass. Here a tile of
scores is five products and two passes over it:

    P = exp(Q K^T - l)      dV = P^T dO      dS = P o (dO V^T - delta)      dQ = dS K      dK = dS^T Q

with l the log-sum-exp of a query's scores and delta = dO . O (Dao et al. 2022, "FlashAttention", appendix B). l and
delta are subtracted inside the products, as further columns of Q and dO against ones in K and V, and so before the
result is rounded to bfloat16: what is rounded is small where a key matters.

Shapes: B batch, t queries, s keys, H heads, Hkv key heads, D head width, n = B Hkv, g = H / Hkv heads that share a key
head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Scores of one tile: large enough for the products, small enough for the cache between them.
TILE_QUERIES = 512
TILE_KEYS = 512


def block_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [B,H,t,D] (bfloat16), k and v [B,Hkv,s,D] (float32).

    Args:
        dout, out: [B,H,t,D] bfloat16, as q, k and v.
        logsumexp: [B,H,t] float32, of the scaled and masked scores.
        mask: additive, [B or 1,1,t,s]; None: all pairs are visible, or with `causal` those with s <= t.
    """
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    scale = width**-0.5
    # P is computed times a power of two and dO divided by it: then the largest weights and those of a flat row, about
    # 1 / s, are equally near to exp(0), where rounding the exponent costs least.
    doublings = round(math.log2(keys) / 2)
    q, dout, out = (_group(t, kv_heads) for t in (q, dout, out))  # [n,g,t,D]
    k_nSD, v_nSD = k.reshape(-1, keys, width), v.reshape(-1, keys, width)
    k_nDS, v_nDS = (_with_columns(t, None).transpose(1, 2) for t in (k_nSD, v_nSD))
    shift_nGT = (doublings * math.log(2) - logsumexp.reshape(-1, heads // kv_heads, queries)) / scale

    dq, unread = torch.empty_like(q), q.new_empty(())
    dk, dv = (torch.zeros_like(k_nSD, dtype=torch.float32) for _ in range(2))
    for begin in range(0, queries, TILE_QUERIES):
        rows = slice(begin, min(begin + TILE_QUERIES, queries))
        q_nRD = q[:, :, rows].flatten(1, 2)  # R = g x the tile's queries
        dout_nRD = dout[:, :, rows].flatten(1, 2) * 2.0**-doublings
        delta_nR1 = (dout_nRD * out[:, :, rows].flatten(1, 2).float()).sum(-1, keepdim=True)
        scores_nRD = _with_columns(q_nRD, shift_nGT[:, :, rows].flatten(1, 2)[..., None])
        dweights_nRD = _with_columns(dout_nRD, -delta_nR1)
        dq_nRD = torch.zeros_like(q_nRD, dtype=torch.float32)
        for start in range(0, min(rows.stop, keys) if causal else keys, TILE_KEYS):
            tile = slice(start, min(start + TILE_KEYS, rows.stop if causal else keys, keys))
            # Scaled within the product: q * scale would be rounded first, and leave l behind where scores are large.
            weights_nRS = torch.baddbmm(unread, scores_nRD, k_nDS[:, :, tile], beta=0, alpha=scale)
            if mask is not None:
                weights_nRS.view(batch, heads, -1, tile.stop - start).add_(mask[:, :, rows, tile])
            weights_nRS.exp_()
            if causal and tile.stop > begin + 1:
                weights_nRS.view(batch * heads, -1, tile.stop - start).tril_(begin - start)
            dv[:, tile] += torch.bmm(weights_nRS.transpose(1, 2), dout_nRD)
            dscores_nRS = weights_nRS.mul_(torch.bmm(dweights_nRD, v_nDS[:, :, tile]))
            dq_nRD += torch.bmm(dscores_nRS, k_nSD[:, tile])
            dk[:, tile] += torch.bmm(dscores_nRS.transpose(1, 2), q_nRD)
        dq[:, :, rows] = dq_nRD.mul_(scale).view(dq[:, :, rows].shape)
    return dq.view(batch, heads, queries, width), dk.mul_(scale).view(k.shape), dv.view(v.shape)


def _group(tensor: Tensor, kv_heads: int) -> Tensor:
    """[B,H,t,D] -> [n,g,t,D]."""
    batch, heads, tokens, width = tensor.shape
    return tensor.reshape(batch * kv_heads, heads // kv_heads, tokens, width)


def _with_columns(tensor: Tensor, added: Tensor | None) -> Tensor:
    """[n,R,D] -> [n,R,D+2]: with `added` [n,R,1], float32, as a bfloat16 and its remainder, or with ones (None)."""
    width = tensor.shape[-1]
    out = tensor.new_ones(*tensor.shape[:-1], width + 2)
    out[..., :width] = tensor
    if added is not None:
        out[..., width : width + 1] = added
        out[..., width + 1 :] = added - out[..., width : width + 1]
    return out
