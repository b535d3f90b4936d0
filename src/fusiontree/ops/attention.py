"""Attention over documents: local and global heads in one pass, and queries against cached keys.

On CUDA, `"auto"` takes for `local_global_attention` the kernels of `flash_attn` where they are installed and honour the
dtype: nothing is compiled at run time, and they skip what a window hides. Then `flex` where a gradient is wanted: one
kernel for all heads, in any dtype but float64, compiled at the first call. Then `torch`: many small kernels, but no
compilation, so it also reads the prompts of generation, each of another length. On CPU, `cpp` for large calls in
bfloat16 where there is AMX, else `torch`.

`cached_attention` has no backend but `torch`. On CUDA a decoding step is one fused kernel over a handful of queries.
What a library could do faster, it does for keys that lie in order from slot 0, and the index tensors of this op promise
no order; a FlexAttention mask over them would have to be built anew, in more kernels than the step itself takes.

Shapes: B batch, T queries, S cached keys, Hq query heads, Hkv key heads, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusiontree.ops import attention_libraries, cpu_attention, flex_attention, reference
from fusiontree.ops.attention_layouts import AttentionLayout, CachedLayout, attention_layout, cached_layout
from fusiontree.ops.backends import register, resolve
from fusiontree.ops.block_attention import HeadSpan, block_attention
from fusiontree.ops.checks import check_shapes, wants_gradient
from fusiontree.ops.one_query import attend_one_query
from fusiontree.ops.precision import autocast_dtype, without_autocast


def local_global_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    num_global_heads: int,
    position_ids: Tensor | None = None,
    layout: AttentionLayout | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention in which the last `num_global_heads` query heads see all of their document, the rest a window.

    Query i of a local head sees the keys of its document at i - window_size + 1 ... i; scores are scaled by
    1 / sqrt(D). Memory is linear in T, and local heads cost O(T window_size).

    Args:
        q: [B,T,Hq,D].
        k, v: [B,T,Hkv,D]; Hq is a multiple of Hkv, query head i reads key head i // (Hq // Hkv).
        window_size: keys a local query sees, itself included.
        num_global_heads: 0 ... Hq, a multiple of Hq // Hkv, so that no key head serves both kinds.
        position_ids: [B,T]; a document starts where it is 0, and at index 0. None: each row is one document.
        layout: `attention_layout(position_ids, T)`, to be built once and shared by the layers of a model, in place of
            `position_ids`.
        backend: "auto", "flash_attn", "flex", "cpp", "torch" or "reference".

    Returns:
        [B,T,Hq,D] in the dtype of q; under autocast q, k, v are cast to autocast's dtype, as torch's own attention
        does, and the output has it.

    Raises:
        ValueError: shapes, window or head counts that do not fit together.
        BackendError: a named backend that is missing or cannot run this call.
    """
    group = _check_heads("local_global_attention", q, k, v)
    batch, length, heads, _ = q.shape
    if k.shape[1] != length:
        raise ValueError(f"local_global_attention: {length} queries but {k.shape[1]} keys; see cached_attention")
    if window_size < 1:
        raise ValueError(f"local_global_attention: window_size must be at least 1, got {window_size}")
    if not 0 <= num_global_heads <= heads or num_global_heads % group:
        raise ValueError(
            f"local_global_attention: num_global_heads must be a multiple of {group} (query heads per key head) "
            f"up to {heads}, got {num_global_heads}"
        )
    if layout is None:
        if position_ids is not None and position_ids.shape != (batch, length):
            raise ValueError(
                f"local_global_attention: position_ids have shape {list(position_ids.shape)}, "
                f"expected {[batch, length]}"
            )
        layout = attention_layout(position_ids, length, device=q.device)
    elif position_ids is not None:
        raise ValueError("local_global_attention: give position_ids or layout, not both")
    elif layout.length != length:
        raise ValueError(f"local_global_attention: the layout is for {layout.length} tokens, not {length}")
    run = resolve("local_global_attention", backend, q, k, v, layout=layout)
    q, k, v = _autocast(q, k, v)
    with without_autocast(q):
        return run(q, k, v, window_size=window_size, num_global_heads=num_global_heads, layout=layout)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_index: Tensor | None = None,
    key_index: Tensor | None = None,
    window_size: int | Tensor | None = None,
    layout: CachedLayout | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of new queries over cached keys that say where they stand, in any order.

    A key is visible iff key_index >= 0 and 0 <= query_index - key_index (< window_size). A query that sees no key
    gets 0. What invisible keys and values hold does not matter, be it NaN. Memory is linear in S.

    Args:
        q: [B,T,Hq,D].
        k, v: [B,S,Hkv,D]; query head i reads key head i // (Hq // Hkv).
        query_index: [B,T] int64, place in the row's current document; -1 for a query that is to see nothing.
        key_index: [B,S] int64, likewise; -1 for a key that nobody sees.
        window_size: keys a query sees, itself included: one number, [B,T] int64 for a span of each query's own, or
            None for no bound.
        layout: `cached_layout(query_index, key_index, window_size=window_size)`, to be built once and shared by the
            layers of a model, in place of the three.
        backend: "auto", "torch" or "reference".

    Returns:
        [B,T,Hq,D]; dtypes as `local_global_attention`.

    Raises:
        ValueError: shapes that do not fit together, or a window below 1.
        BackendError: a named backend that is missing or cannot run this call.
    """
    _check_heads("cached_attention", q, k, v)
    if layout is None:
        if query_index is None or key_index is None:
            raise ValueError("cached_attention: needs query_index and key_index, or a layout")
        expected = {"query_index": (query_index, q.shape[:2]), "key_index": (key_index, k.shape[:2])}
        if isinstance(window_size, Tensor):
            expected["window_size"] = (window_size, q.shape[:2])
        elif window_size is not None and window_size < 1:
            raise ValueError(f"cached_attention: window_size must be at least 1, got {window_size}")
        check_shapes("cached_attention", expected)
        layout = cached_layout(query_index, key_index, window_size=window_size)
    elif query_index is not None or key_index is not None or window_size is not None:
        raise ValueError("cached_attention: give indices and window, or a layout, not both")
    elif layout.shape != (q.shape[0], q.shape[1], k.shape[1]):
        raise ValueError(
            f"cached_attention: the layout is for [B,T,S] = {list(layout.shape)}, not "
            f"{[q.shape[0], q.shape[1], k.shape[1]]}"
        )
    run = resolve("cached_attention", backend, q, k, v, layout=layout)
    q, k, v = _autocast(q, k, v)
    with without_autocast(q):
        return run(q, k, v, layout=layout)


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> int:
    """The number of query heads per key head."""
    if k.shape != v.shape:
        raise ValueError(f"{op}: k has shape {list(k.shape)} but v {list(v.shape)}")
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{op}: q {list(q.shape)} and k {list(k.shape)} must be [B,T,Hq,D] and [B,S,Hkv,D]")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{op}: {q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly")
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise ValueError(f"{op}: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    return q.shape[2] // k.shape[2]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = autocast_dtype(tensors[0])
    return tensors if all(t.dtype == dtype for t in tensors) else tuple(t.to(dtype) for t in tensors)


def _local_global_torch(q, k, v, *, window_size, num_global_heads, layout):
    heads, kv_heads = q.shape[2], k.shape[2]
    local_heads = heads - num_global_heads
    local_kv = local_heads * kv_heads // heads
    spans = []
    if local_heads:
        spans.append(HeadSpan(slice(0, local_heads), slice(0, local_kv), layout.local_blocks(window_size)))
    if num_global_heads:
        spans.append(HeadSpan(slice(local_heads, heads), slice(local_kv, kv_heads), layout.global_blocks()))
    return block_attention(q, k, v, spans)


def _local_global_reference(q, k, v, *, window_size, num_global_heads, layout):
    position_ids = None
    if layout.starts is not None:
        position_ids = torch.arange(layout.length, device=layout.starts.device) - layout.starts
    return reference.local_global_attention(
        q, k, v, window_size=window_size, num_global_heads=num_global_heads, position_ids=position_ids
    )


def _cached_torch(q, k, v, *, layout):
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    if layout.is_safe:
        return _cached_pass(q, k, v, layout)
    # Invisible slots may hold NaN, which a mask does not stop. Where looking at the result is cheap, look at it and
    # blank the slots only if need be: blanking reads and writes the whole cache.
    if q.device.type == "cpu" and not wants_gradient(q, k, v):
        out = _cached_pass(q, k, v, layout)
        if math.isfinite(out.sum()):
            return out
    unused = (layout.key_index < 0)[:, :, None, None]
    return _cached_pass(q, k.masked_fill(unused, 0.0), v.masked_fill(unused, 0.0), layout)


def _cached_pass(q: Tensor, k: Tensor, v: Tensor, layout: CachedLayout) -> Tensor:
    if q.shape[1] == 1 and not torch.is_grad_enabled():
        (block,) = layout.blocks
        out = attend_one_query(q, k, v, None if block.mask is None else block.mask(q.dtype))
    else:
        out = block_attention(q, k, v, [HeadSpan(slice(0, q.shape[2]), slice(0, k.shape[2]), layout.blocks)])
    nothing = layout.sees_nothing()
    return out if nothing is None else out.masked_fill(nothing[:, :, None, None], 0.0)


def _cached_reference(q, k, v, *, layout):
    return reference.cached_attention(
        q, k, v, query_index=layout.query_index, key_index=layout.key_index, window_size=layout.window_size
    )


register(
    "local_global_attention",
    "flash_attn",
    attention_libraries.local_global_flash,
    unusable=attention_libraries.find_unusable,
    refuses=attention_libraries.refuses,
)
register(
    "local_global_attention",
    "flex",
    flex_attention.local_global_flex,
    unusable=flex_attention.find_unusable,
    refuses=flex_attention.refuses,
    auto_declines=flex_attention.auto_declines,
)
register(
    "local_global_attention",
    "cpp",
    cpu_attention.local_global_cpp,
    unusable=cpu_attention.unusable,
    refuses=cpu_attention.refuses,
    auto_declines=cpu_attention.auto_declines,
)
register("local_global_attention", "torch", _local_global_torch)
register("local_global_attention", "reference", _local_global_reference)
register("cached_attention", "torch", _cached_torch)
register("cached_attention", "reference", _cached_reference)
