"""Mamba-1's selective scan as Triton kernels: all chunks of tokens at once, the tokens of a chunk by a parallel scan.

Forward: what each chunk adds to the state; the recurrence over the states between chunks; the outputs. Backward: the
states again, the same two steps backwards in time for their gradients, then everything else in one kernel. The states
of all tokens, [T,d,N], exist only in registers, for one tile of [L,d,N] at a time; all of it is float32.

Shapes: B batch, T tokens, n chunks of L tokens, d channels, N state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops.chunk_passing_triton import pass_states
from fusiontree.ops.precision import without_autocast
from fusiontree.ops.states import first_state
from fusiontree.ops.tiles_triton import load_tile, store_tile
from fusiontree.ops.triton_support import last_contiguous, on_device, power_of_two

LONGEST_CHUNK = 32
TILE_ELEMENTS = 4096  # of [L,d,N]: what a program's registers hold a few of
MOST_BLOCKS = 8  # of channels, whose gradients of B and C one program adds up


def selective_triton(u, delta, A, B, C, D=None, z=None, *, reset, initial_state, return_final_state):
    with without_autocast(u):
        y, state = _TritonScan.apply(u, delta, A, B, C, D, z, reset, initial_state)
    return (y, state) if return_final_state else y


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, reset, initial_state):
        ctx.save_for_backward(u, delta, A, B, C, D, z, reset, initial_state)
        scan = _Launch(u, delta, A, B, C, D, z, reset)
        states, through = scan.chunk_sums()
        last = pass_states(states, through, first_state(initial_state, reset))
        return scan.outputs(states), last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        u, delta, A, B, C, D, z, reset, initial_state = ctx.saved_tensors
        with without_autocast(u):
            scan = _Launch(u, delta, A, B, C, D, z, reset)
            dy = dy.contiguous()
            states, through = scan.chunk_sums()
            pass_states(states, through, first_state(initial_state, reset))
            dstates = scan.chunk_gradient_sums(dy)
            dfirst = pass_states(dstates, through, dlast, reverse=True)
            du, ddelta, dA, dB, dC, dD, dz = scan.gradients(dy, states, dstates)
        return (
            du,
            ddelta,
            dA.to(A.dtype),
            dB.to(B.dtype),
            dC.to(C.dtype),
            None if D is None else dD.to(D.dtype),
            dz,
            None,
            None if initial_state is None else dfirst.to(initial_state.dtype),
        )


class _Launch:
    """The arguments of one scan, and the grids and block sizes of its kernels."""

    def __init__(self, u, delta, A, B, C, D, z, reset):
        self.u, self.delta, self.B, self.C = (last_contiguous(tensor) for tensor in (u, delta, B, C))
        self.A, self.D = A.contiguous(), None if D is None else D.contiguous()
        self.z = None if z is None else last_contiguous(z)
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)
        self.batch, self.length, self.channels = u.shape
        self.state_size = A.shape[1]
        chunk = min(LONGEST_CHUNK, power_of_two(self.length))
        state_block = power_of_two(self.state_size)
        self.block = min(power_of_two(self.channels), max(1, TILE_ELEMENTS // (chunk * state_block)))
        self.n = triton.cdiv(self.length, chunk)
        self.sizes = {"STATE": self.state_size, "L": chunk, "d": self.block, "N": state_block}
        self.grid = (self.n * self.batch, triton.cdiv(self.channels, self.block))
        gate_strides = (0, 0) if self.z is None else self.z.stride()[:2]
        self.inputs = (
            self.u,
            *self.u.stride()[:2],
            self.delta,
            *self.delta.stride()[:2],
            self.B,
            *self.B.stride()[:2],
            self.C,
            *self.C.stride()[:2],
            self.z,
            *gate_strides,
            self.A,
            self.D,
            self.reset,
            self.length,
            self.channels,
            self.n,
        )

    def _states(self) -> Tensor:
        shape = (self.batch, self.n, self.channels, self.state_size)
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

    def chunk_sums(self) -> tuple[Tensor, Tensor]:
        """What each chunk adds to the state after it, and the decay of a state over each chunk: [B,n,d,N] both."""
        sums, through = self._states(), self._states()
        with on_device(self.u):
            _chunk_sums[self.grid](*self.inputs, sums, through, **self.sizes)
        return sums, through

    def chunk_gradient_sums(self, dy: Tensor) -> Tensor:
        """What each chunk's outputs add to the gradient of the state before it: [B,n,d,N]."""
        sums = self._states()
        with on_device(self.u):
            _chunk_gradient_sums[self.grid](*self.inputs, dy, sums, **self.sizes)
        return sums

    def outputs(self, states: Tensor) -> Tensor:
        y = torch.empty(self.u.shape, dtype=self.u.dtype, device=self.u.device)
        with on_device(self.u):
            _outputs[self.grid](*self.inputs, states, y, **self.sizes)
        return y

    def gradients(self, dy: Tensor, states: Tensor, dstates: Tensor) -> tuple[Tensor | None, ...]:
        """Of u, delta, A, B, C, D and z (None without them); those of A, B, C and D in float32."""
        device = self.u.device
        programs = triton.cdiv(self.grid[1], MOST_BLOCKS)
        du, ddelta, dz = (
            None if t is None else torch.empty(t.shape, dtype=t.dtype, device=device)
            for t in (self.u, self.delta, self.z)
        )
        dA = self._states()
        dB, dC = (
            torch.empty(self.batch, self.length, programs, self.state_size, dtype=torch.float32, device=device)
            for _ in range(2)
        )
        dD = None if self.D is None else torch.empty(dA.shape[:3], dtype=torch.float32, device=device)
        with on_device(self.u):
            _gradients[(self.grid[0], programs)](
                *self.inputs,
                states,
                dstates,
                dy,
                du,
                ddelta,
                dA,
                dB,
                dC,
                dD,
                dz,
                BLOCKS=min(MOST_BLOCKS, self.grid[1]),
                **self.sizes,
                num_warps=8,  # with half of them its tiles overflow the registers
            )
        return du, ddelta, dA.sum((0, 1)), dB.sum(2), dC.sum(2), None if dD is None else dD.sum((0, 1)), dz


@triton.jit
def _state_tile(ptr, channels, STATE: tl.constexpr, d: tl.constexpr, N: tl.constexpr):
    """[d,N] in float32 of [channels,STATE], zeros elsewhere."""
    channel, n = tl.arange(0, d)[:, None], tl.arange(0, N)[None, :]
    return tl.load(ptr + channel * STATE + n, mask=(channel < channels) & (n < STATE), other=0.0).to(tl.float32)


@triton.jit
def _store_state_tile(ptr, value, channels, STATE: tl.constexpr, d: tl.constexpr, N: tl.constexpr):
    channel, n = tl.arange(0, d)[:, None], tl.arange(0, N)[None, :]
    tl.store(ptr + channel * STATE + n, value, mask=(channel < channels) & (n < STATE))


@triton.jit
def _decays(delta_ptr, stride, reset_ptr, A, first, tokens, channels, L: tl.constexpr, d: tl.constexpr):
    """delta [L,d], and the decay of the state into each token [L,d,N], 0 where a reset precedes it."""
    delta = load_tile(delta_ptr, stride, first, tokens, channels, L, d)
    decays = tl.exp(delta[:, :, None] * A[None, :, :])
    if reset_ptr is not None:
        token = first + tl.arange(0, L)
        reset = tl.load(reset_ptr + token, mask=(token >= 0) & (token < tokens), other=0)
        decays = tl.where(reset[:, None, None] != 0, 0.0, decays)
    return delta, decays


@triton.jit
def _then(decay, value, next_decay, next_value):
    """One step of the recurrence after another."""
    return decay * next_decay, next_decay * value + next_value


@triton.jit
def _scan(
    u_ptr, stride_u, delta_ptr, stride_delta, B_ptr, stride_B, reset_ptr, A, first, tokens, channels,
    STATE: tl.constexpr, L: tl.constexpr, d: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Decay of the chunk's first state over the tokens first ... first + i, and what these add to it: [L,d,N] both."""
    delta, decays = _decays(delta_ptr, stride_delta, reset_ptr, A, first, tokens, channels, L, d)
    u = load_tile(u_ptr, stride_u, first, tokens, channels, L, d)
    B = load_tile(B_ptr, stride_B, first, tokens, STATE, L, N)
    return tl.associative_scan((decays, (delta * u)[:, :, None] * B[:, None, :]), 0, _then)


@triton.jit
def _scan_back(
    delta_ptr, stride_delta, reset_ptr, A, C, dy, tokens, channels, L: tl.constexpr, d: tl.constexpr
):  # fmt: skip
    """Decay from after each token until the chunk's end, and the gradient of the state after each token through the
    chunk's outputs: [L,d,N] both."""
    _, decays = _decays(delta_ptr, stride_delta, reset_ptr, A, 1, tl.minimum(tokens, L), channels, L, d)
    return tl.associative_scan((decays, dy[:, :, None] * C[:, None, :]), 0, _then, reverse=True)


@triton.jit
def _row(tile, row, L: tl.constexpr):
    """[d,N] of [L,d,N]."""
    return tl.sum(tl.where(tl.arange(0, L)[:, None, None] == row, tile, 0.0), 0)


@triton.jit
def _chunk_sums(
    u_ptr, stride_u_b, stride_u_t, delta_ptr, stride_delta_b, stride_delta_t,
    B_ptr, stride_B_b, stride_B_t, C_ptr, stride_C_b, stride_C_t, z_ptr, stride_z_b, stride_z_t,
    A_ptr, D_ptr, reset_ptr, length, all_channels, n,
    sums_ptr, through_ptr,
    STATE: tl.constexpr, L: tl.constexpr, d: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    chunk, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * d
    b, start = chunk // n, chunk % n * L
    tokens, channels = length - start, all_channels - channel
    if reset_ptr is not None:
        reset_ptr += b * length + start
    A = _state_tile(A_ptr + channel * STATE, channels, STATE, d, N)
    through, sums = _scan(
        u_ptr + b * stride_u_b + start * stride_u_t + channel, stride_u_t,
        delta_ptr + b * stride_delta_b + start * stride_delta_t + channel, stride_delta_t,
        B_ptr + b * stride_B_b + start * stride_B_t, stride_B_t,
        reset_ptr, A, 0, tokens, channels, STATE, L, d, N,
    )  # fmt: skip
    at = (chunk * all_channels + channel) * STATE
    _store_state_tile(sums_ptr + at, _row(sums, L - 1, L), channels, STATE, d, N)
    _store_state_tile(through_ptr + at, _row(through, L - 1, L), channels, STATE, d, N)


@triton.jit
def _outputs(
    u_ptr, stride_u_b, stride_u_t, delta_ptr, stride_delta_b, stride_delta_t,
    B_ptr, stride_B_b, stride_B_t, C_ptr, stride_C_b, stride_C_t, z_ptr, stride_z_b, stride_z_t,
    A_ptr, D_ptr, reset_ptr, length, all_channels, n,
    states_ptr, y_ptr,
    STATE: tl.constexpr, L: tl.constexpr, d: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    chunk, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * d
    b, start = chunk // n, chunk % n * L
    tokens, channels = length - start, all_channels - channel
    u_ptr += b * stride_u_b + start * stride_u_t + channel
    if reset_ptr is not None:
        reset_ptr += b * length + start
    A = _state_tile(A_ptr + channel * STATE, channels, STATE, d, N)
    through, added = _scan(
        u_ptr, stride_u_t, delta_ptr + b * stride_delta_b + start * stride_delta_t + channel, stride_delta_t,
        B_ptr + b * stride_B_b + start * stride_B_t, stride_B_t,
        reset_ptr, A, 0, tokens, channels, STATE, L, d, N,
    )  # fmt: skip
    first = _state_tile(states_ptr + (chunk * all_channels + channel) * STATE, channels, STATE, d, N)
    C = load_tile(C_ptr + b * stride_C_b + start * stride_C_t, stride_C_t, 0, tokens, STATE, L, N)
    y = tl.sum((through * first[None, :, :] + added) * C[:, None, :], 2)
    if D_ptr is not None:
        column = tl.arange(0, d)
        D = tl.load(D_ptr + channel + column, mask=column < channels, other=0.0).to(tl.float32)
        y += load_tile(u_ptr, stride_u_t, 0, tokens, channels, L, d) * D[None, :]
    if z_ptr is not None:
        z = load_tile(z_ptr + b * stride_z_b + start * stride_z_t + channel, stride_z_t, 0, tokens, channels, L, d)
        y *= z * tl.sigmoid(z)
    store_tile(y_ptr + (b * length + start) * all_channels + channel, all_channels, y, tokens, channels, L, d)


@triton.jit
def _chunk_gradient_sums(
    u_ptr, stride_u_b, stride_u_t, delta_ptr, stride_delta_b, stride_delta_t,
    B_ptr, stride_B_b, stride_B_t, C_ptr, stride_C_b, stride_C_t, z_ptr, stride_z_b, stride_z_t,
    A_ptr, D_ptr, reset_ptr, length, all_channels, n,
    dy_ptr, sums_ptr,
    STATE: tl.constexpr, L: tl.constexpr, d: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    chunk, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * d
    b, start = chunk // n, chunk % n * L
    tokens, channels = length - start, all_channels - channel
    delta_ptr += b * stride_delta_b + start * stride_delta_t + channel
    if reset_ptr is not None:
        reset_ptr += b * length + start
    A = _state_tile(A_ptr + channel * STATE, channels, STATE, d, N)
    C = load_tile(C_ptr + b * stride_C_b + start * stride_C_t, stride_C_t, 0, tokens, STATE, L, N)
    at_token = (b * length + start) * all_channels + channel
    dy = load_tile(dy_ptr + at_token, all_channels, 0, tokens, channels, L, d)
    if z_ptr is not None:
        z = load_tile(z_ptr + b * stride_z_b + start * stride_z_t + channel, stride_z_t, 0, tokens, channels, L, d)
        dy *= z * tl.sigmoid(z)
    _, dstates = _scan_back(delta_ptr, stride_delta_t, reset_ptr, A, C, dy, tokens, channels, L, d)
    _, decays = _decays(delta_ptr, stride_delta_t, reset_ptr, A, 0, tokens, channels, L, d)
    at = (chunk * all_channels + channel) * STATE
    _store_state_tile(sums_ptr + at, _row(decays * dstates, 0, L), channels, STATE, d, N)


@triton.jit
def _gradients(
    u_ptr, stride_u_b, stride_u_t, delta_ptr, stride_delta_b, stride_delta_t,
    B_ptr, stride_B_b, stride_B_t, C_ptr, stride_C_b, stride_C_t, z_ptr, stride_z_b, stride_z_t,
    A_ptr, D_ptr, reset_ptr, length, all_channels, n,
    states_ptr, dstates_ptr, dy_ptr, du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr,
    BLOCKS: tl.constexpr,
    STATE: tl.constexpr, L: tl.constexpr, d: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    chunk, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, start = chunk // n, chunk % n * L
    tokens = length - start
    u_ptr += b * stride_u_b + start * stride_u_t
    delta_ptr += b * stride_delta_b + start * stride_delta_t
    B_ptr += b * stride_B_b + start * stride_B_t
    if reset_ptr is not None:
        reset_ptr += b * length + start
    B = load_tile(B_ptr, stride_B_t, 0, tokens, STATE, L, N)
    C = load_tile(C_ptr + b * stride_C_b + start * stride_C_t, stride_C_t, 0, tokens, STATE, L, N)
    dB = tl.zeros([L, N], tl.float32)
    dC = tl.zeros([L, N], tl.float32)
    for block in range(BLOCKS):
        channel = (program * BLOCKS + block) * d
        channels = all_channels - channel  # none are left: all is zero, and nothing is stored
        at_token = (b * length + start) * all_channels + channel
        at_state = (chunk * all_channels + channel) * STATE
        A = _state_tile(A_ptr + channel * STATE, channels, STATE, d, N)
        delta, decays = _decays(delta_ptr + channel, stride_delta_t, reset_ptr, A, 0, tokens, channels, L, d)
        u = load_tile(u_ptr + channel, stride_u_t, 0, tokens, channels, L, d)
        # The states before each token, and from them those after it: taking them from the latter would cancel.
        through, added = _scan(
            u_ptr + channel, stride_u_t, delta_ptr + channel, stride_delta_t, B_ptr, stride_B_t,
            reset_ptr, A, -1, tokens, channels, STATE, L, d, N,
        )  # fmt: skip
        first = _state_tile(states_ptr + at_state, channels, STATE, d, N)
        decayed = decays * (through * first[None, :, :] + added)
        state = decayed + (delta * u)[:, :, None] * B[:, None, :]
        dy = load_tile(dy_ptr + at_token, all_channels, 0, tokens, channels, L, d)
        column = tl.arange(0, d)
        D = tl.zeros([d], tl.float32)
        if D_ptr is not None:
            D = tl.load(D_ptr + channel + column, mask=column < channels, other=0.0).to(tl.float32)
        if z_ptr is not None:
            z_at = b * stride_z_b + start * stride_z_t + channel
            z = load_tile(z_ptr + z_at, stride_z_t, 0, tokens, channels, L, d)
            y = tl.sum(state * C[:, None, :], 2) + u * D[None, :]
            sigmoid = tl.sigmoid(z)
            dz = dy * y * sigmoid * (1 + z * (1 - sigmoid))
            store_tile(dz_ptr + at_token, all_channels, dz, tokens, channels, L, d)
            dy *= z * sigmoid
        until_end, dstates = _scan_back(
            delta_ptr + channel, stride_delta_t, reset_ptr, A, C, dy, tokens, channels, L, d
        )
        last = _state_tile(dstates_ptr + at_state, channels, STATE, d, N)
        dstates += until_end * last[None, :, :]
        dB += tl.sum(dstates * (delta * u)[:, :, None], 1)
        dC += tl.sum(state * dy[:, :, None], 1)
        dinput = tl.sum(dstates * B[:, None, :], 2)
        dlog = decayed * dstates
        ddelta = tl.sum(dlog * A[None, :, :], 2) + dinput * u
        store_tile(ddelta_ptr + at_token, all_channels, ddelta, tokens, channels, L, d)
        du = dinput * delta + dy * D[None, :]
        store_tile(du_ptr + at_token, all_channels, du, tokens, channels, L, d)
        _store_state_tile(dA_ptr + at_state, tl.sum(dlog * delta[:, :, None], 0), channels, STATE, d, N)
        if dD_ptr is not None:
            tl.store(dD_ptr + chunk * all_channels + channel + column, tl.sum(dy * u, 0), mask=column < channels)
    programs = tl.num_programs(1)
    at = ((b * length + start) * programs + program) * STATE
    store_tile(dB_ptr + at, programs * STATE, dB, tokens, STATE, L, N)
    store_tile(dC_ptr + at, programs * STATE, dC, tokens, STATE, L, N)
