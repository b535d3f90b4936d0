"""The short causal convolution as Triton kernels: taps that stop at resets and read the inputs before x.

Shapes: B batch, T tokens, c channels, K taps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops.precision import without_autocast
from fusiontree.ops.states import first_state, last_inputs
from fusiontree.ops.triton_support import last_contiguous, on_device, power_of_two

TOKENS, CHANNELS = 32, 64  # of one program


def conv_triton(x, weight, bias, *, reset, initial_state, return_final_state, activation):
    with without_autocast(x):
        y = _TritonConv.apply(x, weight, bias, reset, first_state(initial_state, reset), activation)
        if not return_final_state:
            return y
        return y, last_inputs(x, initial_state, reset, weight.shape[1])


class _TritonConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, reset, initial_state, activation):
        ctx.save_for_backward(x, weight, bias, reset, initial_state)
        ctx.activation = activation
        return _Launch(x, weight, bias, reset, initial_state, activation).outputs()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, reset, initial_state = ctx.saved_tensors
        with without_autocast(x):
            launch = _Launch(x, weight, bias, reset, initial_state, ctx.activation)
            dx, dweight, dbias, dinitial = launch.gradients(dy.contiguous())
        return (
            dx,
            dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None,
            dinitial,
            None,
        )


class _Launch:
    """The arguments of one convolution, and the grids and block sizes of its kernels."""

    def __init__(self, x, weight, bias, reset, initial_state, activation):
        self.x, self.weight = last_contiguous(x), weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)
        self.initial_state = None if initial_state is None else initial_state.contiguous()
        self.batch, self.length, self.channels = x.shape
        self.taps = weight.shape[1]
        self.sizes = {
            "K": self.taps,
            "T": min(TOKENS, power_of_two(self.length)),
            "C": min(CHANNELS, power_of_two(self.channels)),
        }
        self.inputs = (
            self.x,
            *self.x.stride()[:2],
            self.weight,
            self.bias,
            self.reset,
            self.initial_state,
            self.length,
            self.channels,
        )
        self.silu = activation == "silu"

    def _grid(self, tokens: int) -> tuple[int, int, int]:
        return triton.cdiv(tokens, self.sizes["T"]), triton.cdiv(self.channels, self.sizes["C"]), self.batch

    def outputs(self) -> Tensor:
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        with on_device(self.x):
            _convolve[self._grid(self.length)](*self.inputs, y, None, None, None, SILU=self.silu, **self.sizes)
        return y

    def gradients(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Of x, weight (float32), bias (float32) and initial_state."""
        grid = self._grid(self.length)
        device = self.x.device
        dsum = torch.empty(self.x.shape, dtype=torch.float32, device=device)
        dweight = torch.empty(self.batch, grid[0], self.taps, self.channels, dtype=torch.float32, device=device)
        dx = torch.empty(self.x.shape, dtype=self.x.dtype, device=device)
        dinitial = None if self.initial_state is None else torch.empty_like(self.initial_state)
        with on_device(self.x):
            _convolve[grid](*self.inputs, None, dy, dsum, dweight, SILU=self.silu, **self.sizes)
            _input_gradients[self._grid(self.length + self.taps - 1)](
                dsum, self.weight, self.reset, self.length, self.channels, dx, dinitial, **self.sizes
            )
        dbias = None if self.bias is None else dsum.sum((0, 1))
        return dx, dweight.sum((0, 1)).t(), dbias, dinitial


@triton.jit
def _convolve(
    x_ptr, stride_b, stride_t, weight_ptr, bias_ptr, reset_ptr, initial_ptr, length, channels,
    y_ptr, dy_ptr, dsum_ptr, dweight_ptr,
    SILU: tl.constexpr, K: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y; or, given dy, the gradients of the sum before the activation [B,T,c] and, per program, of the weight."""
    b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * T + tl.arange(0, T)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    has_channel = channel < channels
    here = (token < length)[:, None] & has_channel[None, :]
    at = (b * length + token[:, None]) * channels + channel[None, :]
    total = tl.zeros([T, C], tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=has_channel, other=0.0).to(tl.float32)[None, :]
    readable = token < length
    for k in tl.static_range(K):
        if k > 0 and reset_ptr is not None:
            readable &= _starts(reset_ptr + b * length, token - k + 1, length) == 0
        x = _input(x_ptr, stride_b, stride_t, initial_ptr, b, token - k, readable, channel, channels, K)
        total += x * tl.load(weight_ptr + channel * K + (K - 1 - k), mask=has_channel, other=0.0).to(tl.float32)
    if dy_ptr is None:
        y = total * tl.sigmoid(total) if SILU else total
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=here)
    else:
        dsum = tl.load(dy_ptr + at, mask=here, other=0.0).to(tl.float32)
        if SILU:
            sigmoid = tl.sigmoid(total)
            dsum *= sigmoid * (1 + total * (1 - sigmoid))
        tl.store(dsum_ptr + at, dsum, mask=here)
        dweight_ptr += (b * tl.num_programs(0) + tl.program_id(0)) * K * channels
        readable = token < length
        for k in tl.static_range(K):
            if k > 0 and reset_ptr is not None:
                readable &= _starts(reset_ptr + b * length, token - k + 1, length) == 0
            x = _input(x_ptr, stride_b, stride_t, initial_ptr, b, token - k, readable, channel, channels, K)
            tl.store(dweight_ptr + (K - 1 - k) * channels + channel, tl.sum(x * dsum, 0), mask=has_channel)


@triton.jit
def _starts(reset_ptr, token, length):
    """Whether a document starts at each token, 0 for tokens that do not exist."""
    return tl.load(reset_ptr + token, mask=(token >= 0) & (token < length), other=0)


@triton.jit
def _input(x_ptr, stride_b, stride_t, initial_ptr, b, token, readable, channel, channels, K: tl.constexpr):
    """The inputs of these tokens, those before x from the initial state, 0 where not readable."""
    has_channel = (channel < channels)[None, :]
    in_x = (readable & (token >= 0))[:, None] & has_channel
    at = x_ptr + b * stride_b + token.to(tl.int64)[:, None] * stride_t + channel[None, :]
    x = tl.load(at, mask=in_x, other=0.0).to(tl.float32)
    if initial_ptr is not None:
        before = (readable & (token < 0))[:, None] & has_channel
        row = b * (K - 1) + K - 1 + token[:, None]
        x += tl.load(initial_ptr + row * channels + channel[None, :], mask=before, other=0.0).to(tl.float32)
    return x


@triton.jit
def _input_gradients(
    dsum_ptr, weight_ptr, reset_ptr, length, channels, dx_ptr, dinitial_ptr,
    K: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of the inputs from K-1 tokens before x on: what the tokens give back that read them."""
    b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * T + tl.arange(0, T) - (K - 1)
    channel = tl.program_id(1) * C + tl.arange(0, C)
    has_channel = channel < channels
    dx = tl.zeros([T, C], tl.float32)
    reads = token < length
    for k in tl.static_range(K):
        reader = token + k
        if k > 0 and reset_ptr is not None:
            reads &= _starts(reset_ptr + b * length, reader, length) == 0
        here = (reads & (reader >= 0) & (reader < length))[:, None] & has_channel[None, :]
        dsum = tl.load(dsum_ptr + (b * length + reader[:, None]) * channels + channel[None, :], mask=here, other=0.0)
        dx += dsum * tl.load(weight_ptr + channel * K + (K - 1 - k), mask=has_channel, other=0.0).to(tl.float32)
    here = ((token >= 0) & (token < length))[:, None] & has_channel[None, :]
    at = (b * length + token[:, None]) * channels + channel[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=here)
    if dinitial_ptr is not None:
        here = (token < 0)[:, None] & has_channel[None, :]
        at = (b * (K - 1) + K - 1 + token[:, None]) * channels + channel[None, :]
        tl.store(dinitial_ptr + at, dx.to(dinitial_ptr.dtype.element_ty), mask=here)
