"""What the backends do alike with the states that an op takes and gives back."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops.precision import state_dtype


@overload
def first_state(initial_state: Tensor, reset: Tensor | None) -> Tensor: ...
@overload
def first_state(initial_state: None, reset: Tensor | None) -> None: ...
def first_state(initial_state: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """`initial_state` [B,...] with zeros in the rows that start anew, by a mask: theirs may hold anything."""
    if initial_state is None or reset is None:
        return initial_state
    return initial_state.masked_fill(reset[:, 0].view(-1, *[1] * (initial_state.dim() - 1)), 0.0)


def last_inputs(x: Tensor, initial_state: Tensor | None, reset: Tensor | None, taps: int) -> Tensor:
    """The final state of `causal_conv1d`: x [B,T,c], initial_state and result [B,K-1,c]."""
    kept = taps - 1
    tail = x[:, max(0, x.shape[1] - kept) :].to(state_dtype(x))
    missing = kept - tail.shape[1]
    if missing > 0:
        before = tail.new_zeros(x.shape[0], missing, x.shape[2])
        if initial_state is not None:
            before = initial_state[:, kept - missing :].to(tail.dtype)
        tail = torch.cat([before, tail], dim=1)
    if reset is None or kept == 0:
        return tail[:, tail.shape[1] - kept :]
    starts = F.pad(reset, (kept, 0))[:, -kept:].int()
    starts_after = starts.flip(1).cumsum(1).flip(1) - starts
    return tail.masked_fill((starts_after > 0)[..., None], 0.0)
