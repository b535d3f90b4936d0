"""Naive implementations of every op: loops over tokens and full masks, written to be obviously right.

Same signatures (less `backend`) and meaning as the public functions; slow, and for the attention ops quadratic in
memory. Tests hold every other backend to these.

Shapes: B batch, T tokens, S cached tokens, h heads, P head width, N state, G groups, d channels, K taps, H hidden,
D attention head width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops.precision import state_dtype, without_autocast

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _in_full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Autocast would compute sums and states in its own dtype."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        assert isinstance(args[0], Tensor)
        with without_autocast(args[0]):
            return function(*args, **kwargs)

    return call


@_in_full_precision
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int = 64,
) -> Tensor | tuple[Tensor, Tensor]:
    """state = exp(dt A) state + dt x B^T;  y = state C + D x, one token at a time."""
    del chunk_size  # has no meaning here
    batch, length, heads, width = x.shape
    dtype = state_dtype(x)
    xf, dtf, Af = x.to(dtype), dt.to(dtype), A.to(dtype)
    Bh = B.to(dtype).repeat_interleave(heads // B.shape[2], dim=2)  # [B,T,h,N]
    Ch = C.to(dtype).repeat_interleave(heads // C.shape[2], dim=2)
    state = x.new_zeros(batch, heads, width, B.shape[3], dtype=dtype)
    if initial_state is not None:
        state = state + initial_state.to(dtype)
    outputs = []
    for t in range(length):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], torch.zeros_like(state), state)
        decay = torch.exp(dtf[:, t] * Af)[..., None, None]
        state = state * decay + torch.einsum("bh,bhp,bhn->bhpn", dtf[:, t], xf[:, t], Bh[:, t])
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, Ch[:, t]))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + xf * D.to(dtype)[:, None]
    y = y.to(x.dtype)
    return (y, state) if return_final_state else y


@_in_full_precision
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """state = exp(delta A) state + delta u B;  y = (state C + D u) silu(z), one token at a time."""
    dtype = state_dtype(u)
    uf, deltaf, Af, Bf, Cf = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1], dtype=dtype)
    if initial_state is not None:
        state = state + initial_state.to(dtype)
    outputs = []
    for t in range(u.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None], torch.zeros_like(state), state)
        decay = torch.exp(deltaf[:, t, :, None] * Af)
        state = decay * state + (deltaf[:, t] * uf[:, t])[..., None] * Bf[:, t, None, :]
        outputs.append(torch.einsum("bdn,bn->bd", state, Cf[:, t]))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + uf * D.to(dtype)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, state) if return_final_state else y


@_in_full_precision
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A window of the last K inputs slides over the tokens; a reset empties it first."""
    dtype = state_dtype(x)
    batch, length, channels = x.shape
    taps = weight.shape[1]
    window = x.new_zeros(batch, taps - 1, channels, dtype=dtype)
    if initial_state is not None:
        window = window + initial_state.to(dtype)
    outputs = []
    for t in range(length):
        if reset is not None:
            window = torch.where(reset[:, t, None, None], torch.zeros_like(window), window)
        window_and_token = torch.cat([window, x[:, t : t + 1].to(dtype)], dim=1)  # [B,K,c]
        outputs.append(torch.einsum("bkc,ck->bc", window_and_token, weight.to(dtype)))
        window = window_and_token[:, 1:]
    y = torch.stack(outputs, dim=1)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    y = y.to(x.dtype)
    return (y, window) if return_final_state else y


@_in_full_precision
@_in_full_precision
def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    gated_BTHP = y * F.silu(z).unflatten(-1, y.shape[2:])
    return (F.rms_norm(gated_BTHP, (y.shape[-1],), eps=eps).flatten(-2) * weight).to(y.dtype)


def gated_mix(logits: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(logits)
    logits = logits.to(dtype)
    gate = torch.sigmoid(logits)
    entropy = F.softplus(logits) - logits * gate
    return (gate * a.to(dtype) + (1 - gate) * b.to(dtype)).to(a.dtype), gate.mean(-1), entropy.mean(-1)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.to(state_dtype(x)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    angle_BTD = torch.complex(cos.to(state_dtype(x)), sin.to(state_dtype(x)))[:, :, None]
    halves = x.to(state_dtype(x)).unflatten(-1, (2, -1)).unbind(-2)
    turned = torch.complex(*halves) * angle_BTD
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the visible keys; 0 for a query that sees none.

    q [B,T,Hq,D]; k, v [B,S,Hkv,D]; visible [B,T,S] or [B,Hq,T,S] bool.
    """
    dtype = state_dtype(q)
    group = q.shape[2] // k.shape[2]
    mask = visible if visible.dim() == 4 else visible[:, None]
    seen = mask.any(dim=2).any(dim=1)[:, :, None, None]  # [B,S,1,1]: a key nobody sees may hold anything
    kh = torch.where(seen, k, torch.zeros_like(k)).to(dtype).repeat_interleave(group, dim=2)
    vh = torch.where(seen, v, torch.zeros_like(v)).to(dtype).repeat_interleave(group, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype), kh) * q.shape[-1] ** -0.5
    nothing = ~mask.any(dim=-1, keepdim=True)
    # Rows that see nothing get equal scores first, so that neither the softmax nor its gradient meets a NaN.
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(nothing, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(nothing, 0.0)
    return torch.einsum("bhts,bshd->bthd", weights, vh).to(q.dtype)


def local_global_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window_size: int, num_global_heads: int, position_ids: Tensor | None = None
) -> Tensor:
    """One mask per query head over all pairs of tokens."""
    batch, length, heads, _ = q.shape
    index = torch.arange(length, device=q.device)
    starts = torch.zeros(batch, length, dtype=torch.bool, device=q.device)
    if position_ids is not None:
        starts = position_ids == 0
    document = starts.cumsum(dim=1)  # token 0 is in document 0 or 1, alone or not
    same_document = document[:, :, None] == document[:, None, :]
    distance = index[:, None] - index[None, :]
    in_global = same_document & (distance >= 0)  # [B,T,T]
    in_local = in_global & (distance < window_size)
    is_global = torch.arange(heads, device=q.device) >= heads - num_global_heads
    visible = torch.where(is_global[None, :, None, None], in_global[:, None], in_local[:, None])
    return masked_attention(q, k, v, visible)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_index: Tensor,
    key_index: Tensor,
    window_size: int | Tensor | None = None,
) -> Tensor:
    """One mask over all pairs of query and cached key."""
    distance = query_index[:, :, None] - key_index[:, None, :]  # [B,T,S]
    visible = (key_index >= 0)[:, None, :] & (distance >= 0)
    if isinstance(window_size, Tensor):
        visible = visible & (distance < window_size[:, :, None])
    elif window_size is not None:
        visible = visible & (distance < window_size)
    return masked_attention(q, k, v, visible)


@_in_full_precision
def token_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_size: int = 0, ignore_index: int = -100
) -> Tensor:
    """Per-token losses [B,T] from the whole logits tensor, 0 where the label is ignored."""
    del chunk_size
    dtype = state_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).t()  # [B,T,V]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none").view(
        labels.shape
    )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_size: int = 0, ignore_index: int = -100
) -> Tensor:
    """The mean of the per-token losses over the labels that count, 0 if none."""
    losses = token_cross_entropy(hidden, weight, labels, chunk_size=chunk_size, ignore_index=ignore_index)
    return losses.sum() / (labels != ignore_index).sum().clamp(min=1)
