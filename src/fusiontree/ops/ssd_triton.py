"""Mamba-2's chunked scan as Triton kernels, with the mathematics and the notation of `ssd_chunks`.

Forward: what each chunk adds to the state; the recurrence over the states between chunks; the outputs. Backward: the
states again, the same two steps backwards in time for their gradients, then everything else in one kernel. All sums are
float32; the running sum of dt A is taken in float64 and kept as two float32, since the difference of two large sums
would lose the digits that tell neighbours apart.

Shapes: B batch, T tokens, n chunks of L tokens, h heads, P head width, G groups, N state.
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
from fusiontree.ops.triton_support import dot_precision, last_contiguous, on_device, power_of_two

SMALLEST_DOT = 16  # of each side of a matrix product
FEWEST_ELEMENTS = 2048  # of a tile of tokens x state
MOST_HEADS = 4  # whose gradients of B and C one program adds up


def ssd_triton(x, dt, A, B, C, D=None, *, reset, initial_state, return_final_state, chunk_size):
    with without_autocast(x):
        y, state = _TritonScan.apply(x, dt, A, B, C, D, reset, initial_state, chunk_size)
    return (y, state) if return_final_state else y


class _TritonScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, reset, initial_state, chunk_size):
        ctx.save_for_backward(x, dt, A, B, C, D, reset, initial_state)
        ctx.chunk_size = chunk_size
        scan = _Launch(x, dt, A, B, C, D, reset, chunk_size)
        states, through = scan.chunk_sums(scan.x, scan.B)
        last = pass_states(states, through, first_state(initial_state, reset))
        return scan.outputs(states), last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dlast):
        x, dt, A, B, C, D, reset, initial_state = ctx.saved_tensors
        with without_autocast(x):
            scan = _Launch(x, dt, A, B, C, D, reset, ctx.chunk_size, backward=True)
            dy = last_contiguous(dy)
            states, through = scan.chunk_sums(scan.x, scan.B)
            pass_states(states, through, first_state(initial_state, reset))
            dstates, _ = scan.chunk_sums(dy, scan.C, backward=True)
            dfirst = pass_states(dstates, through, dlast, reverse=True)
            dx, ddt, dA, dB, dC, dD = scan.gradients(dy, states, dstates)
        return (
            dx,
            ddt,
            dA.to(A.dtype),
            dB.to(B.dtype),
            dC.to(C.dtype),
            None if D is None else dD.to(D.dtype),
            None,
            None if initial_state is None else dfirst.to(initial_state.dtype),
            None,
        )


class _Launch:
    """The arguments of one scan, and the grids and block sizes of its kernels."""

    def __init__(self, x, dt, A, B, C, D, reset, chunk_size, *, backward=False):
        self.x, self.B, self.C = last_contiguous(x), last_contiguous(B), last_contiguous(C)
        self.dt, self.A = dt, A.contiguous()
        self.D = None if D is None else D.contiguous()
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)
        self.batch, self.length, self.heads, self.width = x.shape
        self.groups, self.state_size = B.shape[2:]
        state_block = power_of_two(self.state_size, SMALLEST_DOT)
        # Tokens of a chunk, and the part of a head's width taken at once: the kernel of the gradients holds twice the
        # tiles of the others, and float32 is multiplied in registers.
        elements = FEWEST_ELEMENTS if backward or x.dtype == torch.float32 else 2 * FEWEST_ELEMENTS
        block = max(SMALLEST_DOT, elements // max(64, state_block))
        chunk = min(block, power_of_two(min(chunk_size, self.length), SMALLEST_DOT))
        self.n = triton.cdiv(self.length, chunk)
        self.sizes = {
            "WIDTH": self.width,
            "STATE": self.state_size,
            "L": chunk,
            "P": min(block, power_of_two(self.width, SMALLEST_DOT)),
            "N": state_block,
            "PRECISION": dot_precision(x),
            "num_warps": 4,
            "num_stages": 1,  # loads of the next block beside those of this one would share too much memory
        }
        self.common = (self.dt, *self.dt.stride(), self.A, self.reset, self.length, self.heads, self.n)
        self.head_grid = (self.n * self.batch, self.heads, triton.cdiv(self.width, self.sizes["P"]))

    def _float32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def chunk_sums(self, rows: Tensor, columns: Tensor, *, backward: bool = False) -> tuple[Tensor, Tensor]:
        """What each chunk adds to the state after it (backward: to the gradient of the state before it) [B,n,h,P,N],
        and the decay of a state over each chunk [B,n,h]."""
        sums = self._float32(self.batch, self.n, self.heads, self.width, self.state_size)
        through = self._float32(self.batch, self.n, self.heads)
        with on_device(self.x):
            _chunk_sums[self.head_grid](
                rows,
                *rows.stride()[:3],
                columns,
                *columns.stride()[:3],
                *self.common,
                self.heads // self.groups,
                sums,
                through,
                BACKWARD=backward,
                **self.sizes,
            )
        return sums, through

    def outputs(self, states: Tensor) -> Tensor:
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        with on_device(self.x):
            _outputs[self.head_grid](
                self.x,
                *self.x.stride()[:3],
                self.B,
                *self.B.stride()[:3],
                self.C,
                *self.C.stride()[:3],
                *self.common,
                self.heads // self.groups,
                self.D,
                states,
                y,
                **self.sizes,
            )
        return y

    def gradients(self, dy: Tensor, states: Tensor, dstates: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, dt, A, B, C and D (None without it); those of A, B, C and D in float32."""
        per_group = self.heads // self.groups
        heads = next(k for k in range(min(MOST_HEADS, per_group), 0, -1) if per_group % k == 0)
        programs = self.heads // heads
        dx = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        ddt = torch.empty(self.dt.shape, dtype=self.dt.dtype, device=self.dt.device)
        dB, dC = (self._float32(self.batch, self.length, programs, self.state_size) for _ in range(2))
        dA = self._float32(self.batch, self.n, self.heads)
        dD = None if self.D is None else torch.empty_like(dA)
        with on_device(self.x):
            _gradients[(self.n * self.batch, programs)](
                self.x,
                *self.x.stride()[:3],
                self.B,
                *self.B.stride()[:3],
                self.C,
                *self.C.stride()[:3],
                *self.common,
                per_group,
                self.D,
                self.width,
                heads,
                states,
                dstates,
                dy,
                *dy.stride()[:3],
                dx,
                ddt,
                dA,
                dB,
                dC,
                dD,
                **self.sizes,
            )
        per_program = (self.batch, self.length, self.groups, -1, self.state_size)
        dB, dC = dB.view(per_program).sum(3), dC.view(per_program).sum(3)
        return dx, ddt, dA.sum((0, 1)), dB, dC, None if dD is None else dD.sum((0, 1))


@triton.jit
def _chunk_decays(dt_ptr, stride_dt, A, reset_ptr, tokens, L: tl.constexpr):
    """Of one head in one chunk: dt; the running sum of dt A in two parts; the segment of each token; the decay of the
    chunk's first state until each token, of each token until the chunk's end, and over the whole chunk."""
    token = tl.arange(0, L)
    dt = tl.load(dt_ptr + token * stride_dt, mask=token < tokens, other=0.0).to(tl.float32)
    exact = tl.cumsum(dt.to(tl.float64) * A.to(tl.float64), 0)
    last = tl.sum(tl.where(token == L - 1, exact, 0.0), 0)
    cum = exact.to(tl.float32)
    cum_rest = (exact - cum.to(tl.float64)).to(tl.float32)
    segment = tl.zeros([L], tl.int32)
    if reset_ptr is not None:
        segment = tl.cumsum(tl.load(reset_ptr + token, mask=token < tokens, other=0).to(tl.int32), 0)
    last_segment = tl.max(segment, 0)
    from_start = tl.where(segment == 0, tl.exp(cum), 0.0)
    to_end = tl.where(segment == last_segment, tl.exp((last - exact).to(tl.float32)), 0.0)
    through = tl.where(last_segment == 0, tl.exp(last.to(tl.float32)), 0.0)
    return dt, cum, cum_rest, segment, from_start, to_end, through


@triton.jit
def _pair_decays(cum, cum_rest, segment, L: tl.constexpr):
    """exp(cum_t - cum_s), 0 where t does not see s: [L,L]."""
    log_decay = (cum[:, None] - cum[None, :]) + (cum_rest[:, None] - cum_rest[None, :])
    token = tl.arange(0, L)
    visible = (token[:, None] >= token[None, :]) & (segment[:, None] == segment[None, :])
    return tl.where(visible, tl.exp(tl.minimum(log_decay, 0.0)), 0.0)


@triton.jit
def _chunk_sums(
    rows_ptr, stride_rows_b, stride_rows_t, stride_rows_h,
    columns_ptr, stride_columns_b, stride_columns_t, stride_columns_g,
    dt_ptr, stride_dt_b, stride_dt_t, stride_dt_h,
    A_ptr, reset_ptr, length, heads, n, per_group,
    sums_ptr, through_ptr,
    BACKWARD: tl.constexpr,
    WIDTH: tl.constexpr, STATE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, head, p = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * P
    b, start = chunk // n, chunk % n * L
    tokens = length - start
    dt_ptr += b * stride_dt_b + start * stride_dt_t + head * stride_dt_h
    if reset_ptr is not None:
        reset_ptr += b * length + start
    A = tl.load(A_ptr + head).to(tl.float32)
    dt, _, _, _, from_start, to_end, through = _chunk_decays(dt_ptr, stride_dt_t, A, reset_ptr, tokens, L)
    rows_ptr += b * stride_rows_b + start * stride_rows_t + head * stride_rows_h + p
    columns_ptr += b * stride_columns_b + start * stride_columns_t + head // per_group * stride_columns_g
    weight = from_start if BACKWARD else dt * to_end
    rows = load_tile(rows_ptr, stride_rows_t, 0, tokens, WIDTH - p, L, P) * weight[:, None]
    columns = load_tile(columns_ptr, stride_columns_t, 0, tokens, STATE, L, N)
    sums = tl.dot(tl.trans(rows), columns, input_precision=PRECISION)
    sums_ptr += ((chunk * heads + head) * WIDTH + p) * STATE
    store_tile(sums_ptr, STATE, sums, WIDTH - p, STATE, P, N)
    tl.store(through_ptr + chunk * heads + head, through, mask=p == 0)


@triton.jit
def _outputs(
    x_ptr, stride_x_b, stride_x_t, stride_x_h,
    B_ptr, stride_B_b, stride_B_t, stride_B_g,
    C_ptr, stride_C_b, stride_C_t, stride_C_g,
    dt_ptr, stride_dt_b, stride_dt_t, stride_dt_h,
    A_ptr, reset_ptr, length, heads, n, per_group,
    D_ptr, states_ptr, y_ptr,
    WIDTH: tl.constexpr, STATE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, head, p = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * P
    b, start, group = chunk // n, chunk % n * L, head // per_group
    tokens = length - start
    dt_ptr += b * stride_dt_b + start * stride_dt_t + head * stride_dt_h
    if reset_ptr is not None:
        reset_ptr += b * length + start
    A = tl.load(A_ptr + head).to(tl.float32)
    dt, cum, cum_rest, segment, from_start, _, _ = _chunk_decays(dt_ptr, stride_dt_t, A, reset_ptr, tokens, L)
    x_ptr += b * stride_x_b + start * stride_x_t + head * stride_x_h + p
    x = load_tile(x_ptr, stride_x_t, 0, tokens, WIDTH - p, L, P)
    B = load_tile(B_ptr + b * stride_B_b + start * stride_B_t + group * stride_B_g, stride_B_t, 0, tokens, STATE, L, N)
    C = load_tile(C_ptr + b * stride_C_b + start * stride_C_t + group * stride_C_g, stride_C_t, 0, tokens, STATE, L, N)
    state = load_tile(states_ptr + ((chunk * heads + head) * WIDTH + p) * STATE, STATE, 0, WIDTH - p, STATE, P, N)
    y = tl.dot(C, tl.trans(state), input_precision=PRECISION) * from_start[:, None]
    mixing = tl.dot(C, tl.trans(B), input_precision=PRECISION) * _pair_decays(cum, cum_rest, segment, L)
    y += tl.dot(mixing, x * dt[:, None], input_precision=PRECISION)
    if D_ptr is not None:
        y += x * tl.load(D_ptr + head).to(tl.float32)
    y_ptr += ((b * length + start) * heads + head) * WIDTH + p
    store_tile(y_ptr, heads * WIDTH, y, tokens, WIDTH - p, L, P)


@triton.jit
def _gradients(
    x_ptr, stride_x_b, stride_x_t, stride_x_h,
    B_ptr, stride_B_b, stride_B_t, stride_B_g,
    C_ptr, stride_C_b, stride_C_t, stride_C_g,
    dt_ptr, stride_dt_b, stride_dt_t, stride_dt_h,
    A_ptr, reset_ptr, length, heads, n, per_group,
    D_ptr, width, heads_here, states_ptr, dstates_ptr,
    dy_ptr, stride_dy_b, stride_dy_t, stride_dy_h,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr,
    WIDTH: tl.constexpr, STATE: tl.constexpr, L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of dt A is gathered as in `ssd_chunks.Chunks.gradients`.

    `width` is WIDTH, `heads_here` the heads of one program: loops of a constant length would be unrolled, and overflow
    the registers.
    """
    chunk, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, start, group = chunk // n, chunk % n * L, program * heads_here // per_group
    tokens = length - start
    token = tl.arange(0, L)
    earlier = token[:, None] > token[None, :]
    dt_ptr += b * stride_dt_b + start * stride_dt_t
    x_ptr += b * stride_x_b + start * stride_x_t
    dy_ptr += b * stride_dy_b + start * stride_dy_t
    if reset_ptr is not None:
        reset_ptr += b * length + start
    B = load_tile(B_ptr + b * stride_B_b + start * stride_B_t + group * stride_B_g, stride_B_t, 0, tokens, STATE, L, N)
    C = load_tile(C_ptr + b * stride_C_b + start * stride_C_t + group * stride_C_g, stride_C_t, 0, tokens, STATE, L, N)
    products = tl.dot(C, tl.trans(B), input_precision=PRECISION)
    dB = tl.zeros([L, N], tl.float32)
    dC = tl.zeros([L, N], tl.float32)
    for k in range(heads_here):
        head = program * heads_here + k
        A = tl.load(A_ptr + head).to(tl.float32)
        dt, cum, cum_rest, segment, from_start, to_end, through = _chunk_decays(
            dt_ptr + head * stride_dt_h, stride_dt_t, A, reset_ptr, tokens, L
        )
        decays = _pair_decays(cum, cum_rest, segment, L)
        mixing = decays * products
        dproducts = tl.zeros([L, L], tl.float32)
        net = tl.zeros([L], tl.float32)  # of pairs of tokens and of the first state: ending at t less starting at it
        into_last = tl.zeros([L], tl.float32)
        ddt = tl.zeros([L], tl.float32)
        carried = 0.0
        dD = 0.0
        for p in range(0, width, P):
            x = load_tile(x_ptr + head * stride_x_h + p, stride_x_t, 0, tokens, WIDTH - p, L, P)
            dy = load_tile(dy_ptr + head * stride_dy_h + p, stride_dy_t, 0, tokens, WIDTH - p, L, P)
            at_state = ((chunk * heads + head) * WIDTH + p) * STATE
            state = load_tile(states_ptr + at_state, STATE, 0, WIDTH - p, STATE, P, N)
            dstate = load_tile(dstates_ptr + at_state, STATE, 0, WIDTH - p, STATE, P, N)
            dtx = x * dt[:, None]
            dC_head = tl.dot(dy * from_start[:, None], state, input_precision=PRECISION)
            dC += dC_head
            net += tl.sum(dC_head * C, 1)
            dB += tl.dot(dtx * to_end[:, None], dstate, input_precision=PRECISION)
            ddtx = tl.dot(B, tl.trans(dstate), input_precision=PRECISION) * to_end[:, None]
            into_last += tl.sum(ddtx * dtx, 1)
            carried += tl.sum(state * dstate)
            ddtx += tl.dot(tl.trans(mixing), dy, input_precision=PRECISION)
            ddt += tl.sum(ddtx * x, 1)
            dproducts += tl.dot(dy, tl.trans(dtx), input_precision=PRECISION)
            dx = ddtx * dt[:, None]
            if D_ptr is not None:
                dx += dy * tl.load(D_ptr + head).to(tl.float32)
                dD += tl.sum(dy * x)
            at_token = (b * length + start) * heads + head
            store_tile(dx_ptr + at_token * WIDTH + p, heads * WIDTH, dx, tokens, WIDTH - p, L, P)
        dproducts *= decays
        dC += tl.dot(dproducts, B, input_precision=PRECISION)
        dB += tl.dot(tl.trans(dproducts), C, input_precision=PRECISION)
        between = tl.where(earlier, dproducts * products, 0.0)
        net += tl.sum(between, 1) - tl.sum(between, 0)
        dlog = tl.cumsum(net, 0, reverse=True) + through * carried
        dlog += tl.sum(tl.where(earlier, into_last[None, :], 0.0), 1)
        ddt += dlog * A
        at_token = (b * length + start) * heads + head
        tl.store(ddt_ptr + at_token + token * heads, ddt.to(ddt_ptr.dtype.element_ty), mask=token < tokens)
        tl.store(dA_ptr + chunk * heads + head, tl.sum(dlog * dt))
        if dD_ptr is not None:
            tl.store(dD_ptr + chunk * heads + head, dD)
    programs = heads // heads_here
    at = ((b * length + start) * programs + program) * STATE
    store_tile(dB_ptr + at, programs * STATE, dB, tokens, STATE, L, N)
    store_tile(dC_ptr + at, programs * STATE, dC, tokens, STATE, L, N)
