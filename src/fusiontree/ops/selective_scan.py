"""Mamba-1's selective scan: a diagonal state per channel.

Shapes: B batch, T tokens, d channels, N state, L tokens of one chunk.
"""

from __future__ import annotations

from torch import Tensor

from fusiontree.ops import reference
from fusiontree.ops.backends import register, resolve


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """state_t = exp(delta_t A) state_{t-1} + delta_t u_t B_t;  y_t = (state_t . C_t + D u_t) silu(z_t) (Mamba-1).

    Gu and Dao 2023, "Mamba: linear-time sequence modeling with selective state spaces", algorithm 2.

    Args:
        u: [B,T,d], T >= 1.
        delta: [B,T,d], step sizes after softplus, >= 0; a token with delta = 0 leaves the state exactly as it was.
        A: [d,N], negative.
        B, C: [B,T,N].
        D: [d] skip weights, or None.
        z: [B,T,d], the gate before its silu, or None for no gate.
        reset: [B,T] bool, the state is zeroed before that token.
        initial_state: [B,d,N], the state before token 0; zeros if None.
        return_final_state: also return the state after the last token.
        backend: "auto", "torch" or "reference".

    Returns:
        y [B,T,d] in the dtype of u; with `return_final_state` also the state [B,d,N] in float32 (float64 for float64
        u), whatever autocast says.

    Raises:
        ValueError: shapes that do not fit together.
        BackendError: a named backend that is missing or cannot run this call.
    """
    batch, length, channels = u.shape
    state_size = A.shape[-1]
    expected = {
        "delta": (delta, (batch, length, channels)),
        "A": (A, (channels, state_size)),
        "B": (B, (batch, length, state_size)),
        "C": (C, (batch, length, state_size)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "reset": (reset, (batch, length)),
        "initial_state": (initial_state, (batch, channels, state_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"selective_scan: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if length < 1:
        raise ValueError("selective_scan: needs at least one token")
    run = resolve("selective_scan", backend, u, delta, A, B, C, D, z, initial_state)
    return run(
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        reset=reset,
        initial_state=initial_state,
        return_final_state=return_final_state,
    )


register("selective_scan", "torch", reference.selective_scan)
register("selective_scan", "reference", reference.selective_scan)
