"""The kernels of optional libraries as backends of the scans and of the convolution.

mamba_ssm (Mamba-1 and Mamba-2), flash-linear-attention (Mamba-2 as its simple GLA) and causal_conv1d. Nothing is
imported before a backend is considered on a machine with CUDA; each backend refuses what its kernel cannot honour.

Shapes: B batch, T tokens, h heads, P head width, G groups, N state, d channels, K taps, S documents.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops.checks import wants_gradient
from fusiontree.ops.precision import without_autocast
from fusiontree.ops.states import first_state, last_inputs
from fusiontree.ops.triton_support import power_of_two, refuse_cpu, refuse_large_state, refuse_other_kernel_dtypes

MAMBA2 = "mamba_ssm.ops.triton.ssd_combined"
MAMBA1 = "mamba_ssm.ops.selective_scan_interface"
SIMPLE_GLA = "fla.ops.simple_gla"
CONV = "causal_conv1d"


def library_unusable(package: str, *modules: str) -> Callable[[], str | None]:
    """A function that says why the kernels in a package's modules cannot run on this machine (None: they can)."""

    def unusable() -> str | None:
        if find_spec(modules[0].partition(".")[0]) is None:
            return f"the package {package} is not installed"
        if not torch.cuda.is_available():
            return "it needs a CUDA device"
        try:
            for module in modules:
                import_module(module)
        # An extension built for another torch, CUDA or Python fails in more ways than ImportError.
        except Exception as error:
            return f"{package} is installed but cannot be imported ({type(error).__name__}: {error})"
        return None

    return unusable


def refuse_full_float32(x: Tensor) -> str | None:
    """The refusal of kernels that multiply float32 in TF32, unless the program allows it."""
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "it multiplies float32 in TF32, which torch.set_float32_matmul_precision('high') allows"
    return None


def ssd_library_refuses(x: Tensor, *tensors: Tensor | None, **arguments: Any) -> str | None:
    return refuse_other_kernel_dtypes(x, *tensors) or refuse_cpu(x, *tensors) or refuse_full_float32(x)


def ssd_mamba(x, dt, A, B, C, D=None, *, reset, initial_state, return_final_state, chunk_size):
    """A reset starts a new sequence in `seq_idx`; the initial state belongs to sequence 0."""
    state = first_state(initial_state, reset)
    with without_autocast(x):
        return import_module(MAMBA2).mamba_chunk_scan_combined(
            x,
            dt.float(),
            A.float(),
            B.to(x.dtype),
            C.to(x.dtype),
            min(256, power_of_two(chunk_size, 16)),
            D=None if D is None else D.float(),
            initial_states=None if state is None else state.float().contiguous(),
            seq_idx=None if reset is None else reset.cumsum(1, dtype=torch.int32),
            return_final_states=return_final_state,
        )


def ssd_fla(x, dt, A, B, C, D=None, *, reset, initial_state, return_final_state, chunk_size):
    """Simple GLA: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t, with g = dt A, k = B, v = dt x, q = C.

    Its chunks are 64 tokens long. With resets the rows are laid end to end and cut into documents.
    """
    del chunk_size
    batch, length, heads, _ = x.shape
    per_group = heads // B.shape[2]
    with without_autocast(x):
        k, q = (t.to(x.dtype).repeat_interleave(per_group, dim=2) for t in (B, C))
        v, g = (x * dt[..., None]).to(x.dtype), dt.float() * A.float()
        state = first_state(initial_state, reset)
        state = None if state is None else state.float().transpose(-1, -2).contiguous()  # [B,h,N,P]
        bounds, last = None, None
        if reset is not None:
            q, k, v, g = (t.reshape(1, batch * length, *t.shape[2:]) for t in (q, k, v, g))
            starts = reset.clone()
            starts[:, 0] = True
            document = starts.flatten().cumsum(0).view(batch, length) - 1
            last = document[:, -1]
            bounds = torch.cat([starts.flatten().nonzero()[:, 0], last.new_tensor([batch * length])])  # [S+1]
            if state is not None:
                documents = state.new_zeros(len(bounds) - 1, *state.shape[1:])
                state = documents.index_copy(0, document[:, 0], state)
        y, final = import_module(SIMPLE_GLA).chunk_simple_gla(
            q, k, v, g, scale=1.0, initial_state=state, output_final_state=return_final_state, cu_seqlens=bounds
        )
        y = y.view(x.shape)
        if D is not None:
            y = (y.float() + x.float() * D.float()[:, None]).to(x.dtype)
    if not return_final_state:
        return y
    return y, (final if last is None else final[last]).transpose(-1, -2).contiguous()


def selective_mamba_refuses(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    *,
    reset: Tensor | None,
    return_final_state: bool,
) -> str | None:
    tensors = (u, delta, A, B, C, D, z)
    if reset is not None:
        return "it cannot reset the state inside a sequence"
    if initial_state is not None:
        return "it cannot start from an initial state"
    if return_final_state and wants_gradient(*tensors):
        return "it gives its final state no gradient"
    return refuse_large_state(A.shape[1]) or refuse_other_kernel_dtypes(*tensors) or refuse_cpu(*tensors)


def selective_mamba(u, delta, A, B, C, D=None, z=None, *, reset, initial_state, return_final_state):
    """It wants time last, and all inputs in one dtype: float32 where they differ, for the step sizes' sake."""
    del reset, initial_state  # refused
    inputs = {"u": u, "delta": delta, "B": B, "C": C} | ({} if z is None else {"z": z})
    dtype = u.dtype if all(t.dtype == u.dtype for t in inputs.values()) else torch.float32
    with without_autocast(u):
        out = import_module(MAMBA1).selective_scan_fn(
            **{name: t.to(dtype).transpose(1, 2) for name, t in inputs.items()},
            A=A.float(),
            D=None if D is None else D.float(),
            return_last_state=return_final_state,
        )
    y, state = out if return_final_state else (out, None)
    y = y.transpose(1, 2).to(u.dtype)
    return (y, state.contiguous()) if state is not None else y


def conv_library_refuses(x: Tensor, weight: Tensor, *tensors: Tensor | None, **arguments: Any) -> str | None:
    if not 2 <= weight.shape[1] <= 4:
        return f"it supports 2 to 4 taps, got {weight.shape[1]}"
    if weight.shape[0] % 8:
        return f"it needs a multiple of 8 channels, got {weight.shape[0]}"
    return refuse_other_kernel_dtypes(x, weight, *tensors) or refuse_cpu(x, weight, *tensors)


def conv_library(x, weight, bias, *, reset, initial_state, return_final_state, activation):
    """It takes no initial state beside resets, so the inputs before x are put before x."""
    taps = weight.shape[1]
    sequence = None if reset is None else reset.cumsum(1, dtype=torch.int32)
    inputs, before = x, first_state(initial_state, reset)
    if before is not None:
        inputs = torch.cat([before.to(x.dtype), x], dim=1)
        sequence = None if sequence is None else F.pad(sequence, (taps - 1, 0))
    # Its vectors of 8 channels may straddle no row.
    if inputs.stride(2) != 1 or inputs.stride(0) % 8 or inputs.stride(1) % 8 or inputs.data_ptr() % 16:
        inputs = inputs.contiguous()
    with without_autocast(x):
        y = import_module(CONV).causal_conv1d_fn(
            inputs.transpose(1, 2),
            weight.contiguous(),
            None if bias is None else bias.to(weight.dtype),
            seq_idx=sequence,
            activation=activation,
        )
    y = y.transpose(1, 2)[:, inputs.shape[1] - x.shape[1] :]
    return (y, last_inputs(x, initial_state, reset, taps)) if return_final_state else y
