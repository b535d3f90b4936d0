"""Backend `flex` of `local_global_attention`: one call of torch's FlexAttention for all heads.

FlexAttention (Dong et al. 2024) compiles a kernel for a mask that is given as a function, and skips the blocks of keys
that a `BlockMask` calls empty. Here the mask holds a window per head, so that local and global heads share the call.

Compiling takes seconds to a minute at the first call and again for another kind of shape. That pays in training, which
repeats one shape; on CPU, where there is no backward pass either, it does not.

Shapes: B batch, T tokens, H query heads, n blocks of BLOCK tokens, D head width.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fusiontree.ops.attention_layouts import AttentionLayout
from fusiontree.ops.checks import refuse_older_gpu, wants_gradient
from fusiontree.ops.precision import autocast_dtype
from fusiontree.ops.triton_support import OLDEST_GPU

# Queries and keys of one block of the mask; what FlexAttention takes unless told otherwise.
BLOCK = 128


def find_unusable() -> str | None:
    """Why torch cannot compile FlexAttention on this machine."""
    if any(os.environ.get(switch) == "1" for switch in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")):
        return "torch.compile is switched off in the environment"
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")))):
        return "torch.compile needs a C++ compiler and finds none"
    return None


def refuses(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> str | None:
    device, width = q.device.type, q.shape[-1]
    if device not in ("cpu", "cuda"):
        return f"it runs on CUDA and CPU tensors, not on {device}"
    if autocast_dtype(q) not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not support dtype {q.dtype}"
    if device == "cpu" and wants_gradient(q, k, v):
        return "FlexAttention has no backward pass on CPU"
    if device == "cpu" and not torch.cpu._is_avx2_supported():
        return "on CPU, FlexAttention needs AVX2"
    if device == "cuda" and not 16 <= width <= 256:
        return f"on CUDA it takes heads of 16 to 256 channels, not {width}"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "on CUDA it needs triton, which is not installed"
    return refuse_older_gpu(q, OLDEST_GPU) if device == "cuda" else None


def auto_declines(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> str | None:
    if q.device.type == "cpu":
        return "compiling does not pay on CPU"
    if not wants_gradient(q, k, v):
        return "compiling pays in training alone"
    return None


def local_global_flex(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, num_global_heads: int, layout: AttentionLayout
) -> Tensor:
    heads = q.shape[2]
    mask = layout.share(
        ("flex", window_size, num_global_heads, heads),
        lambda: build_block_mask(layout, window_size=window_size, num_global_heads=num_global_heads, heads=heads),
    )
    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()  # on CPU, FlexAttention refuses leaves even without gradients
    out = _flex_attention(q.device.type)(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, enable_gqa=heads != k.shape[2]
    )
    return out.transpose(1, 2)


@lru_cache
def _flex_attention(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: where it cannot compile it must not fall back to the unfused form, which holds all pairs of tokens.
    # On CPU, torch 2.13 writes C++ that does not compile for some dynamic shapes.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False if device == "cpu" else None)


def mask_function(
    layout: AttentionLayout, *, window_size: int, num_global_heads: int, heads: int
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether query `q` of row `b` and head `h` sees key `k`, as FlexAttention's `mask_mod` asks.

    The windows stand in a tensor and not in the function, so that layers of other windows share its compiled form.
    """
    starts = layout.starts
    spans = torch.full((heads,), layout.length, device=layout.index.device)
    spans[: heads - num_global_heads] = window_size

    def in_one_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q - k < spans[h])

    def in_packed_documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q - k < spans[h]) & (k >= starts[b, q])  # type: ignore[index]

    return in_one_document if starts is None else in_packed_documents


def build_block_mask(layout: AttentionLayout, *, window_size: int, num_global_heads: int, heads: int) -> Any:
    """The `BlockMask` of these heads, without the mask of all pairs of tokens that `create_block_mask` would hold."""
    from torch.nn.attention.flex_attention import BlockMask

    length, index = layout.length, layout.index
    starts = torch.zeros_like(index)[None] if layout.starts is None else layout.starts
    # Each query sees the keys from `first` to itself. Both grow along the row, so a block of queries sees the keys from
    # its first query's `first` to its last query, and all of it sees those from its last query's `first` to its first.
    first_BkT = torch.stack((torch.maximum(starts, index - window_size + 1), starts), dim=1)  # k kinds: local, global
    begins = index[::BLOCK]
    stops = (begins + BLOCK).clamp(max=length)
    some_from, all_from = (first_BkT[:, :, at, None] for at in (begins, stops - 1))  # [B,k,n,1]
    key_begins, key_stops = begins, begins + BLOCK
    some = (key_begins < stops[:, None]) & (key_stops > some_from)  # [B,k,n,n]
    # A block that the row's end cuts off is masked, as `create_block_mask` has it.
    whole = (key_stops <= begins[:, None] + 1) & (key_begins >= all_from) & (begins + BLOCK <= length)[:, None]
    kind_of_head = (torch.arange(heads, device=index.device) >= heads - num_global_heads).long()
    return BlockMask.from_kv_blocks(
        *_in_order((some & ~whole)[:, kind_of_head]),
        *_in_order(whole[:, kind_of_head]),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_function(layout, window_size=window_size, num_global_heads=num_global_heads, heads=heads),
        seq_lengths=(length, length),
    )


def _in_order(blocks_BHnn: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries reads [B,H,n], and a list that begins with them [B,H,n,n]."""
    order = torch.argsort(blocks_BHnn.int(), dim=-1, descending=True, stable=True)
    return blocks_BHnn.sum(-1, dtype=torch.int32), order.int()
