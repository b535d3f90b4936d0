"""Mamba-1's selective scan: a diagonal state per channel.

The state of every token, [T,B,N,d], is what makes this scan expensive, so it exists for one chunk at a time; the
backward pass recomputes it from the states between chunks. Within a chunk the recurrence is one fused multiply-add per
token on contiguous memory: on CPU faster than a logarithmic-depth scan, which moves the chunk log2(L) times.

Shapes: B batch, T tokens, d channels, N state, L tokens of one chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops import reference, scan_libraries
from fusiontree.ops.backends import register, resolve
from fusiontree.ops.checks import check_sequence, check_shapes
from fusiontree.ops.precision import smallest_log_decay, state_dtype, without_autocast
from fusiontree.ops.states import first_state
from fusiontree.ops.triton_support import kernel, refuse_large_state, triton_refuses, triton_unusable

# Tokens whose states are held at once: more would leave the cache, fewer would keep more states for backward.
CHUNK = 32


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
        backend: "auto", "mamba_ssm", "triton", "torch" or "reference".

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
    check_shapes("selective_scan", expected)
    check_sequence("selective_scan", length, reset)
    tensors = (u, delta, A, B, C, D, z, initial_state)
    run = resolve("selective_scan", backend, *tensors, reset=reset, return_final_state=return_final_state)
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


def _selective_torch(u, delta, A, B, C, D=None, z=None, *, reset, initial_state, return_final_state):
    dtype = state_dtype(u)
    with without_autocast(u):
        scan = _one_token if u.shape[1] == 1 else _Scan.apply
        y, state = scan(u, delta, A, B, C, reset, initial_state)
        if D is not None:
            y = torch.addcmul(y, u.to(dtype), D.to(dtype))
        if z is not None:
            y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, state) if return_final_state else y


def _one_token(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    reset: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Decoding: the recurrence itself, in as few operations as it takes."""
    dtype = state_dtype(u)
    u_Bd, delta_Bd, B_BN, C_BN = (tensor[:, 0].to(dtype) for tensor in (u, delta, B, C))
    decay_BdN = torch.exp(delta_Bd[..., None] * A.to(dtype))
    added_BdN = (delta_Bd * u_Bd)[..., None] * B_BN[:, None]
    state_BdN = torch.addcmul(added_BdN, _first_state(u, A, reset, initial_state), decay_BdN)
    return torch.matmul(state_BdN, C_BN[..., None]).transpose(1, 2), state_BdN


def _first_state(u: Tensor, A: Tensor, reset: Tensor | None, initial_state: Tensor | None) -> Tensor:
    """[B,d,N]."""
    if initial_state is None:
        return torch.zeros(u.shape[0], *A.shape, dtype=state_dtype(u), device=u.device)
    return first_state(initial_state, reset).to(state_dtype(u))


class _Scan(torch.autograd.Function):
    """(u, delta, A, B, C) -> y without skip and gate [B,T,d], final state [B,d,N]; both in the computing dtype."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, reset, initial_state):
        dtype = state_dtype(u)
        scan = _Chunks(u, delta, A, B, C, reset)
        state_BNd = _first_state(u, A, reset, initial_state).transpose(1, 2).contiguous()
        y_BTd = torch.empty(u.shape, dtype=dtype, device=u.device)
        before = []
        for start in range(0, u.shape[1], CHUNK):
            before.append(state_BNd)
            _, states_LBNd = scan.states(start, state_BNd)
            state_BNd = states_LBNd[-1].clone()
            C_LB1N = scan.tokens(C, start)[:, :, None]
            y_BTd[:, start : start + CHUNK] = torch.matmul(C_LB1N, states_LBNd).squeeze(2).transpose(0, 1)
        ctx.save_for_backward(u, delta, A, B, C, reset, initial_state, *before)
        return y_BTd, state_BNd.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        u, delta, A, B, C, reset, initial_state, *before = ctx.saved_tensors
        du, ddelta, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, delta, B, C))
        with without_autocast(u):
            scan = _Chunks(u, delta, A, B, C, reset)
            dA_Nd = torch.zeros_like(scan.A_Nd)
            dstate_BNd = dstate.to(dA_Nd.dtype).transpose(1, 2)
            for start, before_BNd in reversed(list(zip(range(0, u.shape[1], CHUNK), before, strict=True))):
                grads, dA_chunk, dstate_BNd = scan.gradients(start, before_BNd, dy, dstate_BNd)
                for whole, chunk_LB in zip((du, ddelta, dB, dC), grads, strict=True):
                    whole[:, start : start + CHUNK] = chunk_LB.transpose(0, 1)
                dA_Nd += dA_chunk
        dinitial = None if initial_state is None else dstate_BNd.transpose(1, 2).to(initial_state.dtype)
        return du, ddelta, dA_Nd.t().to(A.dtype), dB, dC, None, dinitial


class _Chunks:
    """The scan's inputs, and what is computed from them for the chunk of tokens at `start`."""

    def __init__(self, u, delta, A, B, C, reset):
        self.u, self.delta, self.B, self.C, self.reset = u, delta, B, C, reset
        self.dtype = state_dtype(u)
        self.floor = smallest_log_decay(self.dtype)
        self.A_Nd = A.to(self.dtype).t().contiguous()

    def tokens(self, tensor: Tensor, start: int) -> Tensor:
        """The chunk's part of a [B,T,...] tensor as [L,B,...] in the computing dtype.

        Contiguous, because what is computed from it takes over its layout, and one token is to be one run of memory.
        """
        return tensor[:, start : start + CHUNK].transpose(0, 1).to(self.dtype).contiguous()

    def states(self, start: int, before_BNd: Tensor) -> tuple[Tensor, Tensor]:
        """Decay of the state into each token, and the state after each token: [L,B,N,d] both."""
        delta_LBd, u_LBd = self.tokens(self.delta, start), self.tokens(self.u, start)
        decay_LBNd = (delta_LBd[:, :, None] * self.A_Nd).clamp_(min=self.floor).exp_()
        if self.reset is not None:
            decay_LBNd.masked_fill_(self.tokens(self.reset, start).bool()[..., None, None], 0.0)
        states_LBNd = self.tokens(self.B, start)[..., None] * (delta_LBd * u_LBd)[:, :, None]
        state = before_BNd
        for token, decay in zip(states_LBNd.unbind(0), decay_LBNd.unbind(0), strict=True):
            state = token.addcmul_(decay, state)
        return decay_LBNd, states_LBNd

    def gradients(
        self, start: int, before_BNd: Tensor, dy: Tensor, dstate_BNd: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
        """Gradients of (u, delta, B, C) [L,B,...], of A [N,d], and of the state before the chunk [B,N,d].

        dstate_BNd is the gradient of the state after the chunk.
        """
        decay_LBNd, states_LBNd = self.states(start, before_BNd)
        u_LBd, delta_LBd, dy_LBd = (self.tokens(t, start) for t in (self.u, self.delta, dy))
        B_LBN, C_LBN = self.tokens(self.B, start), self.tokens(self.C, start)

        dC_LBN = torch.matmul(states_LBNd, dy_LBd[..., None]).squeeze(-1)
        dstates_LBNd = C_LBN[..., None] * dy_LBd[:, :, None]
        dstates, decays = dstates_LBNd.unbind(0), decay_LBNd.unbind(0)
        dstates[-1].add_(dstate_BNd)
        for i in reversed(range(len(dstates) - 1)):
            dstates[i].addcmul_(decays[i + 1], dstates[i + 1])
        dstate_BNd = decays[0] * dstates[0]

        dinput_LBd = torch.matmul(B_LBN[:, :, None], dstates_LBNd).squeeze(2)  # of delta u
        dB_LBN = torch.matmul(dstates_LBNd, (delta_LBd * u_LBd)[..., None]).squeeze(-1)
        # dlog: of delta A, the logarithm of the decay. It takes the place of the decay.
        dlog_LBNd = decay_LBNd.mul_(dstates_LBNd)
        dlog_LBNd[0].mul_(before_BNd)
        dlog_LBNd[1:].mul_(states_LBNd[:-1])
        dA_Nd = (dlog_LBNd * delta_LBd[:, :, None]).sum((0, 1))
        ddelta_LBd = torch.addcmul(dlog_LBNd.mul_(self.A_Nd).sum(2), dinput_LBd, u_LBd)
        return (dinput_LBd * delta_LBd, ddelta_LBd, dB_LBN, dC_LBN), dA_Nd, dstate_BNd


def _triton_refuses(u, delta, A, *tensors, **arguments):
    return refuse_large_state(A.shape[1]) or triton_refuses(u, delta, A, *tensors)


register(
    "selective_scan",
    "mamba_ssm",
    scan_libraries.selective_mamba,
    unusable=scan_libraries.library_unusable("mamba-ssm", scan_libraries.MAMBA1, "selective_scan_cuda"),
    refuses=scan_libraries.selective_mamba_refuses,
)
register(
    "selective_scan",
    "triton",
    kernel("selective_scan_triton", "selective_triton"),
    unusable=triton_unusable,
    refuses=_triton_refuses,
)
register("selective_scan", "torch", _selective_torch)
register("selective_scan", "reference", reference.selective_scan)
