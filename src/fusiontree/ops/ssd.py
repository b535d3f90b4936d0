"""Mamba-2's selective scan with one scalar decay per head, in chunked matrix form.

Within a chunk the scan is a masked matrix product, between chunks a short recurrence over states (Dao and Gu 2024,
"Transformers are SSMs", section 6). Two things are particular to this implementation:

- Resets are exact. A pair of tokens interacts only inside one segment, so its decay is exp of a difference of
  cumulative sums that is never positive; everything else is masked before the exp.
- The backward pass recomputes decays and chunk states, so nothing of size T x chunk is kept.

Shapes: B batch, T tokens, h heads, P head width, G groups, N state, n chunks of L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops import reference
from fusiontree.ops.backends import register, resolve
from fusiontree.ops.reference import state_dtype


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
        backend: "auto", "torch" or "reference".

    Returns:
        y [B,T,h,P] in the dtype of x; with `return_final_state` also the state [B,h,P,N] in float32 (float64 for
        float64 x), whatever autocast says.

    Raises:
        ValueError: shapes that do not fit together.
        BackendError: a named backend that is missing or cannot run this call.
    """
    _check_shapes(x, dt, A, B, C, D, reset, initial_state, chunk_size)
    run = resolve("ssd_scan", backend, x, dt, A, B, C, D, initial_state)
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


def _check_shapes(x, dt, A, B, C, D, reset, initial_state, chunk_size) -> None:
    batch, length, heads, width = x.shape
    groups, state = B.shape[-2:]
    expected = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, state)),
        "C": (C, (batch, length, groups, state)),
        "D": (D, (heads,)),
        "reset": (reset, (batch, length)),
        "initial_state": (initial_state, (batch, heads, width, state)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"ssd_scan: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if length < 1 or chunk_size < 1:
        raise ValueError(f"ssd_scan: needs at least one token and chunk_size >= 1, got {length} and {chunk_size}")
    if heads % groups:
        raise ValueError(f"ssd_scan: {heads} heads cannot share {groups} groups of B and C evenly")


def _ssd_torch(x, dt, A, B, C, D=None, *, reset, initial_state, return_final_state, chunk_size):
    with torch.autocast(device_type=x.device.type, enabled=False):
        if x.shape[1] == 1:
            y, state = _one_token(x, dt, A, B, C, D, reset, initial_state)
        else:
            y, state = _ChunkedScan.apply(x, dt, A, B, C, D, reset, initial_state, chunk_size)
    return (y, state) if return_final_state else y


def _one_token(x, dt, A, B, C, D, reset, initial_state) -> tuple[Tensor, Tensor]:
    """Decoding: the recurrence itself, in as few operations as it takes."""
    batch, _, heads, width = x.shape
    groups, state_size = B.shape[2:]
    dtype = state_dtype(x)
    x_BHP, dt_BH = x[:, 0].to(dtype), dt[:, 0].to(dtype)
    B_BG1N, C_BGN1 = B[:, 0, :, None].to(dtype), C[:, 0, :, :, None].to(dtype)
    dtx_BGQ1 = (x_BHP * dt_BH[..., None]).view(batch, groups, -1, 1)  # Q = heads of a group x width
    state = dtx_BGQ1 * B_BG1N
    if initial_state is not None:
        carried = initial_state.to(dtype)
        if reset is not None:
            carried = carried.masked_fill(reset[:, 0, None, None, None], 0.0)
        decay_BH = torch.exp(dt_BH * A.to(dtype))
        state = torch.addcmul(state.view(batch, heads, width, state_size), carried, decay_BH[..., None, None]).view(
            batch, groups, -1, state_size
        )
    y_BHP = torch.matmul(state, C_BGN1).view(batch, heads, width)
    if D is not None:
        y_BHP = torch.addcmul(y_BHP, x_BHP, D.to(dtype)[:, None])
    return y_BHP[:, None].to(x.dtype), state.view(batch, heads, width, state_size)


class _ChunkedScan(torch.autograd.Function):
    """The whole sequence: full chunks first, then one shorter chunk, so that nothing is padded."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, reset, initial_state, chunk_size):
        ctx.save_for_backward(x, dt, A, B, C, D, reset, initial_state)
        ctx.chunk_size = chunk_size
        state = _first_state(x, B, reset, initial_state)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for start, stop, chunk in _pieces(x.shape[1], chunk_size):
            piece = _Piece(x, dt, A, B, C, reset, start, stop, chunk)
            state = piece.fill_states(state)
            y_BnLHP = piece.outputs()
            if D is not None:
                y_BnLHP.addcmul_(piece.x, D.to(y_BnLHP.dtype)[:, None])
            y[:, start:stop] = y_BnLHP.flatten(1, 2)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, dt, A, B, C, D, reset, initial_state = ctx.saved_tensors
        dtype = state_dtype(x)
        D_or_zero = torch.zeros_like(A) if D is None else D
        dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
        dA, dD = (torch.zeros(A.shape, dtype=dtype, device=A.device) for _ in range(2))
        with torch.autocast(device_type=x.device.type, enabled=False):
            pieces = [_Piece(x, dt, A, B, C, reset, *bounds) for bounds in _pieces(x.shape[1], ctx.chunk_size)]
            state = _first_state(x, B, reset, initial_state)
            for piece in pieces:
                state = piece.fill_states(state)
            dstate = dstate.to(dtype)
            for piece in reversed(pieces):
                span = slice(piece.start, piece.stop)
                (dx[:, span], ddt[:, span], dB[:, span], dC[:, span]), dA_piece, dD_piece, dstate = piece.gradients(
                    dy, dstate, D_or_zero
                )
                dA += dA_piece
                dD += dD_piece
        return (
            dx,
            ddt,
            dA.to(A.dtype),
            dB,
            dC,
            None if D is None else dD.to(D.dtype),
            None,
            None if initial_state is None else dstate.to(initial_state.dtype),
            None,
        )


def _first_state(x: Tensor, B: Tensor, reset: Tensor | None, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return torch.zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=state_dtype(x), device=x.device)
    state = initial_state.to(state_dtype(x))
    # Dropped by a mask, not by a decay of zero: the state of a row that starts anew may hold anything.
    return state if reset is None else state.masked_fill(reset[:, 0, None, None, None], 0.0)


def _pieces(length: int, chunk: int) -> list[tuple[int, int, int]]:
    """(start, stop, chunk length) of the full chunks together and of the rest."""
    whole = length // chunk * chunk
    pieces = [(0, whole, chunk)] if whole else []
    return pieces + ([(whole, length, length - whole)] if whole < length else [])


class _Piece:
    """n equal chunks of L tokens: their inputs in the computing dtype, and the decays between their tokens.

    Matrix shapes: Q = the heads of a group side by side (h/G x P).
    """

    def __init__(self, x, dt, A, B, C, reset, start, stop, chunk):
        self.start, self.stop = start, stop
        batch, n = x.shape[0], (stop - start) // chunk
        dtype = state_dtype(x)

        def chunked(tensor: Tensor) -> Tensor:
            return tensor[:, start:stop].to(dtype).reshape(batch, n, chunk, *tensor.shape[2:])

        self.chunked = chunked
        self.A = A.to(dtype)
        self.x, self.dt = chunked(x), chunked(dt)  # [B,n,L,h,P], [B,n,L,h]
        self.B, self.C = chunked(B).transpose(2, 3), chunked(C).transpose(2, 3)  # [B,n,G,L,N]
        self.batch, self.n, self.chunk, self.heads, self.width = self.x.shape
        self.groups, self.state_size = B.shape[2:]

        cum_BnHL = (self.dt * self.A).transpose(2, 3).contiguous().cumsum(-1)
        from_start_BnHL = cum_BnHL.exp()
        to_end_BnHL = (cum_BnHL[..., -1:] - cum_BnHL).exp()
        # bias: 0 where two tokens of the chunk interact, else -inf; added before the exp.
        bias = torch.full((chunk, chunk), float("-inf"), dtype=dtype, device=x.device).triu_(1)
        if reset is not None:
            segment = reset[:, start:stop].reshape(batch, n, chunk).cumsum(-1)
            same = segment[..., :, None] == segment[..., None, :]
            bias = torch.where(same, bias, float("-inf"))[:, :, None]  # [B,n,1,L,L]
            from_start_BnHL = from_start_BnHL * (segment == 0)[:, :, None]
            to_end_BnHL = to_end_BnHL * (segment == segment[..., -1:])[:, :, None]
        self.cum_BnHL, self.bias = cum_BnHL, bias
        self.from_start = from_start_BnHL.transpose(2, 3)[..., None]  # [B,n,L,h,1], of the chunk's initial state
        self.to_end = to_end_BnHL.transpose(2, 3)[..., None]  # [B,n,L,h,1], of a token until the chunk's last
        self.through = from_start_BnHL[..., -1, None, None]  # [B,n,h,1,1], of the initial state over the chunk

    def by_group(self, tensor_BnLHP: Tensor) -> Tensor:
        """[B,n,L,h,P] -> [B,n,G,L,Q]."""
        return tensor_BnLHP.reshape(self.batch, self.n, self.chunk, self.groups, -1).transpose(2, 3)

    def by_head(self, tensor_BnGLQ: Tensor) -> Tensor:
        """[B,n,G,L,Q] -> [B,n,L,h,P]."""
        return tensor_BnGLQ.transpose(2, 3).reshape(self.x.shape)

    def states_by_group(self, states_BnHPN: Tensor) -> Tensor:
        """[B,n,h,P,N] -> [B,n,G,Q,N]."""
        return states_BnHPN.reshape(self.batch, self.n, self.groups, -1, self.state_size)

    def decays(self) -> Tensor:
        """exp(sum of dt A over the tokens after s up to t) for s <= t of one segment, else 0: [B,n,h,L,L]."""
        return (self.cum_BnHL[..., :, None] - self.cum_BnHL[..., None, :]).add_(self.bias).exp_()

    def products(self) -> Tensor:
        """C_t . B_s: [B,n,G,1,L,L], to be broadcast over the heads of a group."""
        return torch.matmul(self.C, self.B.transpose(-1, -2))[:, :, :, None]

    def per_group(self, tensor_BnHLL: Tensor) -> Tensor:
        """[B,n,h,...] -> [B,n,G,h/G,...]."""
        return tensor_BnHLL.unflatten(2, (self.groups, -1))

    def fill_states(self, state: Tensor) -> Tensor:
        """Compute the state before each chunk and after the last (states, [B,n+1,h,P,N]); return the last."""
        weighted = self.by_group(self.x * (self.dt[..., None] * self.to_end))
        added = torch.matmul(weighted.transpose(-1, -2), self.B)
        added_BnHPN = added.view(self.batch, self.n, *state.shape[1:])
        self.states = added_BnHPN.new_empty(self.batch, self.n + 1, *state.shape[1:])
        self.states[:, 0] = state
        for i in range(self.n):
            state = torch.addcmul(added_BnHPN[:, i], state, self.through[:, i])
            self.states[:, i + 1] = state
        return state

    def carried_outputs(self) -> Tensor:
        """C_t applied to the state before the chunk, not yet decayed: [B,n,L,h,P]."""
        return self.by_head(torch.matmul(self.C, self.states_by_group(self.states[:, :-1]).transpose(-1, -2)))

    def outputs(self) -> Tensor:
        """y without the skip term: [B,n,L,h,P]."""
        mixing_BnHLL = self.per_group(self.decays()).mul_(self.products()).flatten(2, 3)
        dtx_BnHLP = (self.x * self.dt[..., None]).transpose(2, 3)
        return (self.carried_outputs() * self.from_start).add_(torch.matmul(mixing_BnHLL, dtx_BnHLP).transpose(2, 3))

    def gradients(self, dy: Tensor, dstate: Tensor, D: Tensor):
        """Gradients of (x, dt, B, C) [B,n*L,...], of A and D [h], and of the state before the piece.

        dstate is the gradient of the state after the piece.
        """
        dy_BnLHP = self.chunked(dy)
        dt = self.dt[..., None]

        # Through the states: dstates[i] is the gradient of the state after chunk i.
        dy_decayed = dy_BnLHP * self.from_start
        dy_BnGLQ = self.by_group(dy_decayed)
        dread_BnHPN = torch.matmul(dy_BnGLQ.transpose(-1, -2), self.C).view(self.batch, self.n, *dstate.shape[1:])
        dstates = torch.empty_like(dread_BnHPN)
        for i in reversed(range(self.n)):
            dstates[:, i] = dstate
            dstate = torch.addcmul(dread_BnHPN[:, i], dstate, self.through[:, i])
        dstates_BnGQN = self.states_by_group(dstates)
        dC_BnGLN = torch.matmul(dy_BnGLQ, self.states_by_group(self.states[:, :-1]))
        dB_BnGLN = torch.matmul(self.by_group(self.x * (dt * self.to_end)), dstates_BnGQN)
        ddtx = self.by_head(torch.matmul(self.B, dstates_BnGQN.transpose(-1, -2))) * self.to_end  # [B,n,L,h,P]

        # Within the chunks: y = (decay o C B^T) (dt x).
        decay, products = self.decays(), self.products()
        dy_BnHLP = dy_BnLHP.transpose(2, 3).contiguous()
        dtx_BnHLP = (self.x * dt).transpose(2, 3)
        dproducts = torch.matmul(dy_BnHLP, dtx_BnHLP.transpose(-1, -2)).mul_(decay)  # [B,n,h,L,L], one per head
        mixing = self.per_group(decay).mul_(products).flatten(2, 3)
        ddtx += torch.matmul(mixing.transpose(-1, -2), dy_BnHLP).transpose(2, 3)
        dproducts = self.per_group(dproducts)
        dproducts_BnGLL = dproducts.sum(3)
        dC_BnGLN += torch.matmul(dproducts_BnGLL, self.B)
        dB_BnGLN += torch.matmul(dproducts_BnGLL.transpose(-1, -2), self.C)

        # Through the decays. With S = sum over pairs of gradient x value, the cumulative sum at t gets what t reads
        # (as t of the pair) less what is read of t (as s of the pair); the chunk's last also carries the state.
        x_ddtx = (self.x * ddtx).sum(-1)  # [B,n,L,h]
        dcum_BnLH = (dproducts.mul_(products)).sum(-1).flatten(2, 3).transpose(2, 3)
        dcum_BnLH = dcum_BnLH + (dy_decayed * self.carried_outputs()).sum(-1) - self.dt * x_ddtx
        dcum_BnLH[:, :, -1] += (dstates * self.states[:, 1:]).sum((-1, -2))
        dlog_decay = dcum_BnLH.flip(2).cumsum(2).flip(2)
        ddt = torch.addcmul(x_ddtx, dlog_decay, self.A)
        dA = (dlog_decay * self.dt).sum((0, 1, 2))

        dD = (dy_BnLHP * self.x).sum((0, 1, 2, 4))
        dx = (ddtx * dt).addcmul_(dy_BnLHP, D.to(dt.dtype)[:, None])
        per_token = (dx, ddt, dB_BnGLN.transpose(2, 3), dC_BnGLN.transpose(2, 3))
        return tuple(grad.flatten(1, 2) for grad in per_token), dA, dD, dstate


register("ssd_scan", "torch", _ssd_torch)
register("ssd_scan", "reference", reference.ssd_scan)
