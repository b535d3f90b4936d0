"""The recurrence over the states between chunks, for both scans and in both directions of time (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.triton_support import on_device

BLOCK = 256


def pass_states(sums: Tensor, through: Tensor, first: Tensor | None, *, reverse: bool = False) -> Tensor:
    """state' = through state + sums, chunk by chunk: each chunk's sums are replaced by the state that it starts from.

    Args:
        sums: [B,n,...] float32, contiguous, what each of n chunks adds to the state; overwritten.
        through: [B,n,...] float32, contiguous, the decay over each chunk, exactly 0 where it drops the state whatever
            that holds; each of its elements belongs to an equal share of the state's, in order.
        first: [B,...], the state before the first chunk; zeros if None.
        reverse: from the last chunk to the first.

    Returns:
        The state after the last chunk that was passed, [B,...] float32.
    """
    batch, chunks = sums.shape[:2]
    last = torch.empty(sums[:, 0].shape, dtype=torch.float32, device=sums.device)
    elements = last[0].numel()
    shared = elements // through[0, 0].numel()
    first = None if first is None else first.contiguous()
    with on_device(sums):
        _pass_states[(triton.cdiv(elements, BLOCK), batch)](
            sums, through, first, last, chunks, elements, shared, reverse, BLOCK, num_warps=2
        )
    return last


@triton.jit
def _pass_states(
    sums_ptr,
    through_ptr,
    first_ptr,
    last_ptr,
    chunks,
    elements,
    SHARED: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = element < elements
    state = tl.zeros([BLOCK], tl.float32)
    if first_ptr is not None:
        state = tl.load(first_ptr + row * elements + element, mask=here, other=0.0).to(tl.float32)
    for i in range(chunks):
        chunk = row * chunks + (chunks - 1 - i if REVERSE else i)
        through = tl.load(through_ptr + chunk * (elements // SHARED) + element // SHARED, mask=here, other=0.0)
        sums = tl.load(sums_ptr + chunk * elements + element, mask=here, other=0.0)
        tl.store(sums_ptr + chunk * elements + element, state, mask=here)
        state = tl.where(through > 0, through * state, 0.0) + sums
    tl.store(last_ptr + row * elements + element, state, mask=here)
