"""The gate's mix of two branches, with the reductions that the gate losses need.

Shapes: B batch, T tokens, H channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fusiontree.ops import cpu_kernels, reference
from fusiontree.ops.backends import register, resolve
from fusiontree.ops.checks import check_shapes
from fusiontree.ops.precision import state_dtype


class _GatedMix(torch.autograd.Function):
    """Keeps the gate's logits and the branches alone; sigmoid and entropy terms are recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(logits, a, b)
        # In float32: in bfloat16 every gate near one half would count with an entropy that is 0.0017 too low.
        s = logits.to(state_dtype(logits))
        gate = torch.sigmoid(s)
        # H(g) = softplus(s) - s g for g = sigmoid(s): exact at both ends, where -g log g would be 0 * inf.
        entropy = F.softplus(s).sub_(s * gate)
        return torch.lerp(b, a, gate.to(b.dtype)), gate.mean(-1), entropy.mean(-1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grad_mix, grad_mean, grad_entropy = grads
        logits, a, b = ctx.saved_tensors
        gate = torch.sigmoid(logits)
        channels = logits.shape[-1]
        grad_a = grad_mix * gate
        grad_b = grad_mix - grad_a
        # dH/ds = -s g (1-g), dg/ds = g (1-g).
        grad_gate = torch.sub(a, b).mul_(grad_mix)
        grad_gate += (grad_mean / channels).unsqueeze(-1).to(grad_gate.dtype)
        grad_gate -= logits * (grad_entropy / channels).unsqueeze(-1).to(logits.dtype)
        grad_logits = gate.mul_(1 - gate).mul_(grad_gate)
        return grad_logits, grad_a, grad_b


class _FusedGatedMix(torch.autograd.Function):
    """The same in one pass over memory in either direction (`cpu_kernels.cpp`)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, a, b = (tensor.contiguous() for tensor in (logits, a, b))
        ctx.save_for_backward(logits, a, b)
        mix = cpu_kernels.empty_like(a)
        mean, entropy = cpu_kernels.floats(*a.shape[:-1]), cpu_kernels.floats(*a.shape[:-1])
        cpu_kernels.call("mix_forward", a.dtype, logits, a, b, mix, mean, entropy, *_sizes(a))
        return mix, mean, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, a, b = ctx.saved_tensors
        found = tuple(cpu_kernels.empty_like(a) for _ in range(3))
        grads = tuple(grad.contiguous() for grad in grads)
        cpu_kernels.call("mix_backward", a.dtype, logits, a, b, *grads, *found, *_sizes(a))
        return found


def _sizes(a: torch.Tensor) -> tuple[int, int]:
    return a.numel() // a.shape[-1], a.shape[-1]


def gated_mix(
    logits: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """f = g*a + (1-g)*b with g = sigmoid(logits).

    Args:
        logits, a, b: [B, T, H] of one dtype.
        backend: "auto", "cpp", "torch" or "reference".

    Returns:
        f [B, T, H]; the gate's mean over channels [B, T]; its mean binary entropy over channels [B, T], in nats. The
        last two are float32 (float64 for float64 inputs). All three carry gradient.

    Raises:
        ValueError: shapes that differ.
        BackendError: a named backend that is missing or cannot run this call.
    """
    check_shapes("gated_mix", {"a": (a, logits.shape), "b": (b, logits.shape)})
    return resolve("gated_mix", backend, logits, a, b)(logits, a, b)


def _cpp_refuses(logits: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> str | None:
    one_dtype = logits.dtype == a.dtype == b.dtype
    return cpu_kernels.refuses(logits, a, b) or (None if one_dtype else "its arguments differ in dtype")


cpu_kernels.register_kernel("gated_mix", _FusedGatedMix.apply, _cpp_refuses)
register("gated_mix", "torch", _GatedMix.apply)
register("gated_mix", "reference", reference.gated_mix)


def mix_alone(logits: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f of `gated_mix`, without gradient, and the logits, from which `gate_reductions` gives the rest."""
    return torch.lerp(b, a, torch.sigmoid(logits.to(state_dtype(logits))).to(b.dtype)), logits


@torch.no_grad()
def gate_reductions(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last two of `gated_mix`, from its logits alone."""
    _, mean, entropy = gated_mix(logits, logits, logits)
    return mean, entropy
