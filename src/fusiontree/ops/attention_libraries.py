"""Backend `flash_attn` of `local_global_attention`: the kernels of FlashAttention-2 (package flash-attn; Dao 2023).

Local and global heads are two calls, the first with a sliding window. Packed documents are handed over as sequences of
their own lengths, which costs one wait for the device per layout.

Shapes: B batch, T tokens, H query heads, D head width, N documents of all rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from fusiontree.ops.attention_layouts import AttentionLayout
from fusiontree.ops.checks import refuse_older_gpu
from fusiontree.ops.libraries import versioned_unusable
from fusiontree.ops.precision import autocast_dtype

# The first with a sliding window (2.3), a deterministic backward pass (2.4) and heads of 256 on every GPU (2.5.5).
OLDEST = Version("2.5.5")
WIDEST_HEAD = 256


def find_unusable() -> str | None:
    # FlashAttention-4 shares its folder.
    other = "flash_attn can be imported but is not FlashAttention-2"
    return versioned_unusable("flash-attn", OLDEST, _library, without_version=other)


def refuses(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> str | None:
    if q.device.type != "cuda":
        return f"it runs on CUDA tensors, not on {q.device.type}"
    if autocast_dtype(q) not in (torch.bfloat16, torch.float16):
        return f"it does not support dtype {autocast_dtype(q)}"
    if q.shape[-1] > WIDEST_HEAD:
        return f"it takes heads of up to {WIDEST_HEAD} channels, not {q.shape[-1]}"
    return refuse_older_gpu(q, (8, 0))


def _library() -> ModuleType:
    return importlib.import_module("flash_attn")


def local_global_flash(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, num_global_heads: int, layout: AttentionLayout
) -> Tensor:
    local = q.shape[2] - num_global_heads
    local_kv = local * k.shape[2] // q.shape[2]
    attend = _attend(layout)
    outputs = []
    if local:
        # (W-1, 0): the query itself and the W-1 tokens before it. No window reaches past the row.
        window = (min(window_size, layout.length) - 1, 0)
        outputs.append(attend(q[:, :, :local], k[:, :, :local_kv], v[:, :, :local_kv], window_size=window))
    if num_global_heads:
        outputs.append(attend(q[:, :, local:], k[:, :, local_kv:], v[:, :, local_kv:], window_size=(-1, -1)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _attend(layout: AttentionLayout) -> Callable[..., Tensor]:
    library = _library()
    options: dict[str, Any] = {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if layout.starts is None:
        return lambda q, k, v, window_size: library.flash_attn_func(q, k, v, window_size=window_size, **options)
    ends, longest = layout.share("cumulative lengths", lambda: cumulative_lengths(layout))

    def attend(q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int]) -> Tensor:
        out = library.flash_attn_varlen_func(
            *(t.flatten(0, 1) for t in (q, k, v)), ends, ends, longest, longest, window_size=window_size, **options
        )
        return out.unflatten(0, q.shape[:2])

    return attend


def cumulative_lengths(layout: AttentionLayout) -> tuple[Tensor, int]:
    """Where the documents of all rows, laid end to end, begin and end [N+1] int32, and the longest one's length."""
    assert layout.starts is not None
    begins = (layout.starts == layout.index).flatten().nonzero().squeeze(1)
    ends = torch.cat((begins, begins.new_tensor([layout.starts.numel()])))
    return ends.int(), int(ends.diff().max())
