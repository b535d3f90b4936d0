"""Mamba-2's selective scan with one scalar decay per head, in chunked matrix form.

Within a chunk the scan is a masked matrix product, between chunks a short recurrence over states (Dao and Gu 2024,
"Transformers are SSMs", section 6). Two things are particular to this implementation:

- Resets are exact. A pair of tokens interacts only inside one segment, so its decay is exp of a difference of
  cumulative sums that is never positive; everything else is masked before the exp.
- The backward pass recomputes decays and chunk states from a state for every piece of some chunks, so nothing of size
  T x chunk is kept.

The chunked mathematics, forward and backward, is in `ssd_chunks`; on CPU the `cpp` backend does the same one head after
the other (`cpu_scan.cpp`).

Shapes: B batch, T tokens, h heads, P head width, G groups, N state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops import cpu_kernels, reference, scan_libraries
from fusiontree.ops.backends import register, resolve
from fusiontree.ops.checks import check_sequence, check_shapes
from fusiontree.ops.precision import smallest_log_decay, state_dtype, without_autocast
from fusiontree.ops.ssd_chunks import Chunks, pieces
from fusiontree.ops.states import first_state
from fusiontree.ops.triton_support import kernel, refuse_large_state, triton_refuses, triton_unusable


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T;  y_t = state_t C_t + D x_t (Mamba-2).

    Args:
        x: [B,T,h,P], T >= 1.
        dt: [B,T,h], step sizes after softplus, >= 0; a token with dt = 0 leaves the state exactly as it was.
        A: [h], negative.
        B, C: [B,T,G,N]; head i reads group i // (h // G).
        D: [h] skip weights, or None.
        reset: [B,T] bool, the state is zeroed before that token.
        initial_state: [B,h,P,N], the state before token 0; zeros if None.
        return_final_state: also return the state after the last token.
        chunk_size: tokens per chunk; changes speed and memory, not the result.
        backend: "auto", "mamba_ssm", "fla", "triton", "cpp", "torch" or "reference".

    Returns:
        y [B,T,h,P] in the dtype of x; with `return_final_state` also the state [B,h,P,N] in float32 (float64 for
        float64 x), whatever autocast says.

    Raises:
        ValueError: shapes that do not fit together.
        BackendError: a named backend that is missing or cannot run this call.
    """
    _check_shapes("ssd_scan", x, dt, A, B, C, D, reset, initial_state)
    if chunk_size < 1:
        raise ValueError(f"ssd_scan: chunk_size must be at least 1, got {chunk_size}")
    run = resolve("ssd_scan", backend, x, dt, A, B, C, D, initial_state, reset=reset)
    return run(
        x,
        dt,
        A,
        B,
        C,
        D,
        reset=reset,
        initial_state=initial_state,
        return_final_state=return_final_state,
        chunk_size=chunk_size,
    )


def _check_shapes(
    op: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    reset: Tensor | None,
    state_before: Tensor | None,
) -> None:
    batch, length, heads, width = x.shape
    groups, state = B.shape[-2:]
    expected = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, state)),
        "C": (C, (batch, length, groups, state)),
        "D": (D, (heads,)),
        "reset": (reset, (batch, length)),
        "state" if op == "ssd_step" else "initial_state": (state_before, (batch, heads, width, state)),
    }
    check_shapes(op, expected)
    check_sequence(op, length, reset)
    if heads % groups:
        raise ValueError(f"{op}: {heads} heads cannot share {groups} groups of B and C evenly")


def _ssd_torch(x, dt, A, B, C, D=None, *, reset, initial_state, return_final_state, chunk_size):
    with without_autocast(x):
        if x.shape[1] == 1:
            y, state = _one_token(x, dt, A, B, C, D, _first_state(x, B, reset, initial_state), torch.mul)
        else:
            y, state = _ChunkedScan.apply(x, dt, A, B, C, D, reset, initial_state, chunk_size)
    return (y, state) if return_final_state else y


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor,
    reset: Tensor | None = None,
) -> Tensor:
    """`ssd_scan` of one token per row, which writes over the state: a step of decoding moves little else than states,
    and a second tensor of their size costs several times what the arithmetic does. It has no gradients.

    Args:
        x, dt, A, B, C, D: as of `ssd_scan`, with T = 1.
        state: [B,h,P,N] contiguous, float32 (float64 for float64 x): before the token, and after it.
        reset: [B,1] bool, the state is zeroed before the token.

    Returns:
        y [B,1,h,P] in the dtype of x.

    Raises:
        ValueError: shapes that do not fit together, or a state of another dtype.
    """
    _check_shapes("ssd_step", x, dt, A, B, C, D, reset, state)
    if x.shape[1] != 1:
        raise ValueError(f"ssd_step: a step has one token per row, got {x.shape[1]}")
    if state.dtype != state_dtype(x):
        raise ValueError(f"ssd_step: state is {state.dtype}, expected {state_dtype(x)}")
    with torch.no_grad(), without_autocast(x):
        if reset is not None:
            state.masked_fill_(reset.view(-1, 1, 1, 1), 0.0)
        return _one_token(x, dt, A, B, C, D, state, torch.Tensor.mul_)[0]


def _one_token(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor,
    decayed: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, in as few operations as it takes; `decayed` multiplies, in place or not."""
    batch, _, heads, width = x.shape
    groups, size = B.shape[2:]
    dtype = state_dtype(x)
    x_B1HP, dt_B1H = x.to(dtype), dt.to(dtype)
    decay_B1H1 = torch.exp(dt_B1H * A.to(dtype)).unsqueeze(-1)
    dtx_BGQ1 = (x_B1HP * dt_B1H.unsqueeze(-1)).reshape(batch, groups, -1, 1)  # side by side, a group's heads are Q rows
    B_BG1N, C_BG1N = (t.to(dtype).reshape(batch, groups, 1, size) for t in (B, C))
    # state_t C_t = exp(dt_t A) state_{t-1} C_t + dt_t x_t (B_t C_t): a compiler can then do it all in one pass.
    # In this order: libraries take twice as long for a matrix times a column.
    read_B1HP = torch.matmul(C_BG1N, state.view(batch, groups, -1, size).mT).view(x.shape)
    kept_BGQ1 = (read_B1HP * decay_B1H1).view(dtx_BGQ1.shape)
    y_B1HP = torch.addcmul(kept_BGQ1, dtx_BGQ1, torch.matmul(B_BG1N, C_BG1N.mT)).view(x.shape)
    state_BHPN = decayed(state, decay_B1H1.view(batch, heads, 1, 1))
    state_BHPN.view(batch, groups, -1, size).addcmul_(dtx_BGQ1, B_BG1N)
    if D is not None:
        y_B1HP = torch.addcmul(y_B1HP, x_B1HP, D.to(dtype).unsqueeze(-1))
    return y_B1HP.to(x.dtype), state_BHPN


class _ChunkedScan(torch.autograd.Function):
    """The whole sequence: pieces of full chunks, then one shorter chunk, so that nothing is padded."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, reset, initial_state, chunk_size):
        states = [_first_state(x, B, reset, initial_state)]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for start, stop, chunk in pieces(x, chunk_size):
            chunks = Chunks(x, dt, A, B, C, D, reset, start, stop, chunk)
            states.append(chunks.fill_states(states[-1]))
            y[:, start:stop] = chunks.outputs()
        ctx.save_for_backward(x, dt, A, B, C, D, reset, *states[:-1])
        ctx.chunk_size = chunk_size
        ctx.state_grad_dtype = None if initial_state is None else initial_state.dtype
        return y, states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, dt, A, B, C, D, reset, *states = ctx.saved_tensors
        with without_autocast(x):
            dstate = dstate.to(states[0].dtype)
            dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
            dA, dD = (torch.zeros(A.shape, dtype=dstate.dtype, device=A.device) for _ in range(2))
            bounds = pieces(x, ctx.chunk_size)
            for (start, stop, chunk), state in zip(reversed(bounds), reversed(states), strict=True):
                part = Chunks(x, dt, A, B, C, D, reset, start, stop, chunk)
                part.fill_states(state)
                grads, dstate = part.gradients(dy, dstate)
                span = slice(start, stop)
                dx[:, span], ddt[:, span], dB[:, span], dC[:, span] = grads.x, grads.dt, grads.B, grads.C
                dA += grads.A
                if grads.D is not None:
                    dD += grads.D
        return (
            dx,
            ddt,
            dA.to(A.dtype),
            dB,
            dC,
            None if D is None else dD.to(D.dtype),
            None,
            None if ctx.state_grad_dtype is None else dstate.to(ctx.state_grad_dtype),
            None,
        )


def _ssd_cpp(x, dt, A, B, C, D=None, **options):
    if x.shape[1] == 1:
        return _ssd_torch(x, dt, A, B, C, D, **options)
    with without_autocast(x):
        inputs = (options[name] for name in ("reset", "initial_state", "chunk_size"))
        y, state = _FusedScan.apply(x, dt, A, B, C, D, *inputs)
    return (y, state) if options["return_final_state"] else y


class _FusedScan(torch.autograd.Function):
    """Keeps its inputs alone."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, reset, initial_state, chunk_size):
        ctx.save_for_backward(x, dt, A, B, C, D, reset, initial_state)
        ctx.chunk_size = chunk_size
        ctx.set_materialize_grads(False)
        y, state = cpu_kernels.empty_like(x), cpu_kernels.floats(x.shape[0], *x.shape[2:], B.shape[3])
        inputs = _scan_inputs(x, dt, A, B, C, D, reset, initial_state, chunk_size)
        cpu_kernels.call("scan_forward", x.dtype, *inputs, y, state)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, dt, A, B, C, D, reset, initial_state = ctx.saved_tensors
        (rows, length, heads, _), (groups, size) = x.shape, B.shape[2:]
        dy = _tokens(torch.zeros_like(x) if dy is None else dy)
        dstate = None if dstate is None else dstate.contiguous()
        dx, ddt = cpu_kernels.empty_like(x), cpu_kernels.floats(*dt.shape)
        dA, dD = cpu_kernels.floats(2, rows, heads)
        dB, dC = cpu_kernels.floats(2, rows, heads, length, size)  # of each head
        dfirst = cpu_kernels.floats(rows, *x.shape[2:], size)
        inputs = _scan_inputs(x, dt, A, B, C, D, reset, initial_state, ctx.chunk_size)
        gradients = (dx, ddt, dA, dB, dC, dD, dfirst)
        cpu_kernels.call("scan_backward", x.dtype, *inputs, dy, *dy.stride()[:2], dstate, *gradients)
        dB, dC = (part.unflatten(1, (groups, -1)).sum(2).transpose(1, 2) for part in (dB, dC))
        return (
            dx,
            ddt.to(dt.dtype),
            dA.sum(0).to(A.dtype),
            dB.to(B.dtype),
            dC.to(C.dtype),
            None if D is None else dD.sum(0).to(D.dtype),
            None,
            None if initial_state is None else dfirst.to(initial_state.dtype),
            None,
        )


def _tokens(tensor: Tensor) -> Tensor:
    """[B,T,h,P], copied where a token's entries do not lie side by side."""
    return tensor if tensor.stride()[2:] == (tensor.shape[3], 1) else tensor.contiguous()


def _scan_inputs(x, dt, A, B, C, D, reset, initial_state, chunk_size):
    x, B, C = (_tokens(tensor) for tensor in (x, B, C))
    strided = (argument for tensor in (x, B, C) for argument in (tensor, *tensor.stride()[:2]))
    first = None if initial_state is None else first_state(initial_state, reset).float().contiguous()
    return (
        *strided,
        dt.float().contiguous(),
        A.float().contiguous(),
        None if D is None else D.float().contiguous(),
        None if reset is None else reset.contiguous(),
        first,
        smallest_log_decay(torch.float32),
        *x.shape,
        *B.shape[2:],
        min(chunk_size, x.shape[1]),
    )


def _cpp_refuses(x, dt, A, B, C, *tensors, **arguments):
    of_one = None if x.dtype == B.dtype == C.dtype else "x, B and C differ in dtype"
    return cpu_kernels.refuses(x, dt, A, B, C, *tensors) or of_one


def _first_state(x: Tensor, B: Tensor, reset: Tensor | None, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return torch.zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=state_dtype(x), device=x.device)
    return first_state(initial_state, reset).to(state_dtype(x)).contiguous()


def _triton_refuses(x, dt, A, B, *tensors, **arguments):
    return refuse_large_state(B.shape[-1]) or triton_refuses(x, dt, A, B, *tensors)


register(
    "ssd_scan",
    "mamba_ssm",
    scan_libraries.ssd_mamba,
    unusable=scan_libraries.library_unusable("mamba-ssm", scan_libraries.MAMBA2),
    refuses=scan_libraries.ssd_library_refuses,
)
register(
    "ssd_scan",
    "fla",
    scan_libraries.ssd_fla,
    unusable=scan_libraries.library_unusable("flash-linear-attention", scan_libraries.SIMPLE_GLA),
    refuses=scan_libraries.ssd_library_refuses,
)
register("ssd_scan", "triton", kernel("ssd_triton", "ssd_triton"), unusable=triton_unusable, refuses=_triton_refuses)
cpu_kernels.register_kernel("ssd_scan", _ssd_cpp, _cpp_refuses)
register("ssd_scan", "torch", _ssd_torch)
register("ssd_scan", "reference", reference.ssd_scan)
