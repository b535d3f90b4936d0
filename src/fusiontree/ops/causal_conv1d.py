"""Short causal depthwise convolution whose taps stop at document boundaries.

The `torch` backend convolves as if there were no boundaries, then computes the few tokens just behind one again. The
`cpp` backend (`cpu_kernels.cpp`) reads x once in either direction, and writes nothing else than what is asked for.

Shapes: B batch, T tokens, c channels, K taps, n tokens with a boundary within their taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops import cpu_kernels, reference, scan_libraries
from fusiontree.ops.backends import register, resolve
from fusiontree.ops.checks import check_sequence, check_shapes
from fusiontree.ops.precision import state_dtype, without_autocast
from fusiontree.ops.states import first_state, last_inputs
from fusiontree.ops.triton_support import kernel, triton_refuses, triton_unusable

# A product of dy and window this large stays in the processor's cache until it is summed.
CPU_BLOCK_ELEMENTS = 2**17


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
        backend: "auto", "causal_conv1d", "triton", "cpp", "torch" or "reference".

    Returns:
        y [B,T,c] in the dtype of x; with `return_final_state` also [B,K-1,c] in float32 (float64 for float64 x): the
        last K-1 inputs, initial state included, with zeros for those before a reset.

    Raises:
        ValueError: shapes that do not fit together, no taps, or another activation.
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
    check_shapes("causal_conv1d", expected)
    check_sequence("causal_conv1d", length, reset)
    if taps < 1:
        raise ValueError("causal_conv1d: needs at least one tap")
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
    run = resolve("causal_conv1d", backend, x, weight, bias, initial_state, reset=reset)
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
    with without_autocast(x):
        if x.shape[1] == 1:
            y, state = _one_token(x, weight, bias, reset, initial_state, activation)
        else:
            y, state = _CausalConv.apply(x, weight, bias, reset, initial_state, activation)
    return (y, state) if return_final_state else y


def _one_token(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None,
    initial_state: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Decoding, in as few operations as it takes."""
    window_BKC = _window(x, reset, initial_state, weight.shape[1])
    weight_KC = weight.to(window_BKC.dtype).t().contiguous()  # strided, it would be multiplied one by one
    y_BC = (window_BKC * weight_KC).sum(1)
    if bias is not None:
        y_BC = y_BC + bias.to(y_BC.dtype)
    if activation == "silu":
        y_BC = F.silu(y_BC)
    return y_BC[:, None].to(x.dtype), window_BKC[:, 1:]


def _window(x: Tensor, reset: Tensor | None, initial_state: Tensor | None, taps: int) -> Tensor:
    """The K-1 inputs before x, then x, in the computing dtype: [B,K-1+T,c]."""
    dtype = state_dtype(x)
    if initial_state is None:
        before = x.new_zeros(x.shape[0], taps - 1, x.shape[2], dtype=dtype)
    else:
        before = first_state(initial_state, reset).to(dtype)
    return torch.cat([before, x.to(dtype)], dim=1)


class _CausalConv(torch.autograd.Function):
    """(x, weight, bias) -> y, final state. Backward recomputes what comes before the activation."""

    @staticmethod
    def forward(ctx, x, weight, bias, reset, initial_state, activation):
        ctx.save_for_backward(x, weight, bias, reset, initial_state)
        ctx.activation = activation
        conv = _Conv(x, weight, bias, reset, initial_state)
        y = conv.outputs()
        if activation == "silu":
            y = F.silu(y, inplace=True)
        return y.to(x.dtype), conv.final_state()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        x, weight, bias, reset, initial_state = ctx.saved_tensors
        with without_autocast(x):
            conv = _Conv(x, weight, bias, reset, initial_state)
            dy = dy.to(conv.window.dtype)
            if ctx.activation == "silu":
                dy = torch.ops.aten.silu_backward(dy, conv.outputs())
            dwindow, dweight, dbias = conv.gradients(dy, dstate)
        taps = weight.shape[1]
        return (
            dwindow[:, taps - 1 :].to(x.dtype),
            dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None,
            None if initial_state is None else dwindow[:, : taps - 1].to(initial_state.dtype),
            None,
        )


class _Conv:
    """The convolution before its activation: token t reads the window's entries t ... t+K-1."""

    def __init__(self, x, weight, bias, reset, initial_state):
        self.taps, self.length = weight.shape[1], x.shape[1]
        self.reset = reset
        self.window = _window(x, reset, initial_state, self.taps)  # [B,K-1+T,c]
        self.weight = weight.to(self.window.dtype)
        self.bias = None if bias is None else bias.to(self.window.dtype)
        if reset is not None and self.taps > 1:
            # Documents of the window's entries; what lies before x belongs to the first.
            document = F.pad(reset.cumsum(1), (self.taps - 1, 0))
            readable = document.unfold(1, self.taps, 1) == document[:, self.taps - 1 :, None]  # [B,T,K]
            self.row, self.token = (~readable[..., 0]).nonzero(as_tuple=True)  # [n]: the oldest tap is another's
            self.entry = self.token[:, None] + torch.arange(self.taps, device=x.device)  # [n,K]
            self.readable = readable[self.row, self.token][..., None]  # [n,K,1]
            self.kept = (document[:, self.length :] == document[:, -1:])[..., None]  # [B,K-1,1], of the final state

    def outputs(self) -> Tensor:
        """[B,T,c]."""
        y = _depthwise(self.window, self.weight, self.bias, padding=0)
        if self.reset is not None and self.taps > 1:
            again = (self._windows_behind_resets() * self.weight.t()).sum(1)  # [n,c]
            y[self.row, self.token] = again if self.bias is None else again + self.bias
        return y

    def _windows_behind_resets(self) -> Tensor:
        """What the n tokens may read, zeros elsewhere: [n,K,c]."""
        return self.window[self.row[:, None], self.entry].masked_fill(~self.readable, 0.0)

    def final_state(self) -> Tensor:
        """The last K-1 inputs of the last document: [B,K-1,c]."""
        state = self.window[:, self.length :].clone()
        return state if self.reset is None or self.taps == 1 else state.masked_fill_(~self.kept, 0.0)

    def gradients(self, dy: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the window [B,K-1+T,c], the weight [c,K] and the bias [c]."""
        dbias = dy.sum((0, 1))
        if self.reset is not None and self.taps > 1:
            dy_again = dy[self.row, self.token]  # [n,c]
            dy = dy.index_put((self.row, self.token), dy.new_zeros(()))
        dwindow = _depthwise(dy, self.weight.flip(1), None, padding=self.taps - 1)
        dweight_KC = self._dense_weight_gradient(dy)
        if self.reset is not None and self.taps > 1:
            dweight_KC += (self._windows_behind_resets() * dy_again[:, None]).sum(0)
            dread = (dy_again[:, None] * self.weight.t()).masked_fill_(~self.readable, 0.0)  # [n,K,c]
            dwindow.index_put_((self.row[:, None].expand_as(self.entry), self.entry), dread, accumulate=True)
            dstate = dstate.masked_fill(~self.kept, 0.0)
        dwindow[:, self.length :] += dstate
        return dwindow, dweight_KC.t(), dbias

    def _dense_weight_gradient(self, dy: Tensor) -> Tensor:
        """[K,c]: the sum over tokens of dy_t times the window's entry t + k."""
        step = self.length if dy.device.type != "cpu" else max(1, CPU_BLOCK_ELEMENTS // dy[:, 0].numel())
        dweight = dy.new_zeros(self.taps, dy.shape[2])
        for start in range(0, self.length, step):
            dy_block = dy[:, start : start + step]
            for k in range(self.taps):
                entries = self.window[:, start + k : start + k + dy_block.shape[1]]
                dweight[k] += (dy_block * entries).sum((0, 1))
        return dweight


def _depthwise(window: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int) -> Tensor:
    """[B,S,c] and [c,K] -> [B,S+2 padding-K+1,c].

    As a channels-last image of height 1, for which torch has a fast depthwise kernel where it has none for [B,c,T].
    """
    image = window.transpose(1, 2)[:, :, None]
    y = F.conv2d(image, weight[:, None, None], bias, padding=(0, padding), groups=weight.shape[0])
    return y[:, :, 0].transpose(1, 2)


def _conv_cpp(x, weight, bias, **options):
    if x.shape[1] == 1:
        return _conv_torch(x, weight, bias, **options)
    reset, initial_state = options["reset"], options["initial_state"]
    with without_autocast(x):
        y = _FusedConv.apply(x, weight, bias, reset, initial_state, options["activation"])
        return (y, last_inputs(x, initial_state, reset, weight.shape[1])) if options["return_final_state"] else y


class _FusedConv(torch.autograd.Function):
    """(x, weight, bias) -> y. Backward recomputes what comes before the activation."""

    @staticmethod
    def forward(ctx, x, weight, bias, reset, initial_state, activation):
        ctx.save_for_backward(x, weight, bias, reset, initial_state)
        ctx.is_silu = activation == "silu"
        y = cpu_kernels.empty_like(x)
        sizes = (*x.shape, weight.shape[1], ctx.is_silu)
        cpu_kernels.call("conv_forward", x.dtype, *_conv_inputs(x, weight, bias, reset, initial_state), y, *sizes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, reset, initial_state = ctx.saved_tensors
        (channels, taps), dy = weight.shape, cpu_kernels.rows(dy)
        dx = cpu_kernels.empty_like(x)
        dweight_KC, dbias = cpu_kernels.floats(taps, channels), cpu_kernels.floats(channels)
        dinitial = None if initial_state is None else cpu_kernels.floats(*initial_state.shape)
        inputs = _conv_inputs(x, weight, bias, reset, initial_state)
        gradients = (dy, *dy.stride()[:2], dx, dinitial, dweight_KC, dbias)
        cpu_kernels.call("conv_backward", x.dtype, *inputs, *gradients, *x.shape, taps, ctx.is_silu)
        return (
            dx,
            dweight_KC.t().to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None,
            None if dinitial is None else dinitial.to(initial_state.dtype),
            None,
        )


def _conv_inputs(x, weight, bias, reset, initial_state):
    x = cpu_kernels.rows(x)
    return (
        x,
        *x.stride()[:2],
        None if initial_state is None else initial_state.float().contiguous(),
        None if reset is None else reset.contiguous(),
        weight.float().t().contiguous(),
        None if bias is None else bias.float().contiguous(),
    )


register(
    "causal_conv1d",
    "causal_conv1d",
    scan_libraries.conv_library,
    unusable=scan_libraries.library_unusable("causal-conv1d", scan_libraries.CONV),
    refuses=scan_libraries.conv_library_refuses,
)
register(
    "causal_conv1d",
    "triton",
    kernel("causal_conv1d_triton", "conv_triton"),
    unusable=triton_unusable,
    refuses=triton_refuses,
)
cpu_kernels.register_kernel("causal_conv1d", _conv_cpp)
register("causal_conv1d", "torch", _conv_torch)
register("causal_conv1d", "reference", reference.causal_conv1d)
