"""Short causal depthwise convolution whose taps stop at document boundaries.

Shapes: B batch, T tokens, c channels, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops import reference
from fusiontree.ops.backends import register, resolve
from fusiontree.ops.reference import state_dtype


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = activation(bias + sum over k of weight[:, K-1-k] x_{t-k}), over the inputs since the last reset.

    Args:
        x: [B,T,c], T >= 1.
        weight: [c,K]; weight[:, K-1] multiplies the current token.
        bias: [c] or None.
        reset: [B,T] bool: that token and later ones do not see what came before it.
        initial_state: [B,K-1,c], the inputs before x, oldest first; zeros if None.
        return_final_state: also return the last K-1 inputs.
        activation: None or "silu".
        backend: "auto", "torch" or "reference".

    Returns:
        y [B,T,c] in the dtype of x; with `return_final_state` also [B,K-1,c] in float32 (float64 for float64 x): the
        last K-1 inputs, initial state included, with zeros for those before a reset.

    Raises:
        ValueError: shapes that do not fit together, or another activation.
        BackendError: a named backend that is missing or cannot run this call.
    """
    batch, length, channels = x.shape
    taps = weight.shape[1]
    expected = {
        "weight": (weight, (channels, taps)),
        "bias": (bias, (channels,)),
        "reset": (reset, (batch, length)),
        "initial_state": (initial_state, (batch, taps - 1, channels)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"causal_conv1d: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if length < 1:
        raise ValueError("causal_conv1d: needs at least one token")
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
    run = resolve("causal_conv1d", backend, x, weight, bias, initial_state)
    return run(
        x,
        weight,
        bias,
        reset=reset,
        initial_state=initial_state,
        return_final_state=return_final_state,
        activation=activation,
    )


def _conv_torch(x, weight, bias, *, reset, initial_state, return_final_state, activation):
    window_BLC = _window(x, reset, initial_state, weight.shape[1])
    with torch.autocast(device_type=x.device.type, enabled=False):
        y = _conv(window_BLC, weight, bias, reset, x.shape[1])
    if activation == "silu":
        y = F.silu(y)
    y = y.to(x.dtype)
    if not return_final_state:
        return y
    return y, _final_state(window_BLC, reset, weight.shape[1])


def _window(x: Tensor, reset: Tensor | None, initial_state: Tensor | None, taps: int) -> Tensor:
    """The K-1 inputs before x, then x: [B,K-1+T,c]."""
    dtype = state_dtype(x)
    if initial_state is None:
        before = x.new_zeros(x.shape[0], taps - 1, x.shape[2], dtype=dtype)
    else:
        before = initial_state.to(dtype)
        if reset is not None:
            before = before.masked_fill(reset[:, :1, None], 0.0)
    return torch.cat([before, x.to(dtype)], dim=1)


def _conv(window_BLC: Tensor, weight: Tensor, bias: Tensor | None, reset: Tensor | None, length: int) -> Tensor:
    taps = weight.shape[1]
    weight_KC = weight.to(window_BLC.dtype).t()
    y = window_BLC[:, taps - 1 :] * weight_KC[taps - 1]
    for back in range(1, taps):
        tap = window_BLC[:, taps - 1 - back : taps - 1 - back + length]
        if reset is not None:
            tap = tap.masked_fill(_crosses_reset(reset, back)[..., None], 0.0)
        y = y + tap * weight_KC[taps - 1 - back]
    return y if bias is None else y + bias.to(y.dtype)


def _crosses_reset(reset: Tensor, back: int) -> Tensor:
    """[B,T] bool: whether one of the `back` latest tokens, the current one included, starts anew."""
    crosses = reset.clone()
    for shift in range(1, min(back, reset.shape[1])):
        crosses[:, shift:] |= reset[:, :-shift]
    return crosses


def _final_state(window_BLC: Tensor, reset: Tensor | None, taps: int) -> Tensor:
    state = window_BLC[:, window_BLC.shape[1] - (taps - 1) :]
    if reset is None or taps == 1:
        return state.clone()
    length = reset.shape[1]
    segment = F.pad(reset.cumsum(1), (taps - 1, 0))  # inputs before x belong to segment 0
    return state.masked_fill((segment[:, length:] != segment[:, -1:])[..., None], 0.0)


register("causal_conv1d", "torch", _conv_torch)
register("causal_conv1d", "reference", reference.causal_conv1d)
