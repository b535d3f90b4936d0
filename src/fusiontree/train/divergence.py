"""Distillation at a linear head without the [n,V] logits: chunks of tokens are projected, compared and dropped.

Shapes: n tokens, c tokens of one chunk, H student width, V rows of the student's head, S tokens of the vocabulary that
teacher and student share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fusiontree.ops.precision import autocast_dtype, product_dtype, state_dtype, without_autocast

#: Tokens whose logits exist at a time.
CHUNK = 512


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_logits: Callable[[slice], torch.Tensor],
    *,
    vocabulary: int,
    temperature: float,
) -> torch.Tensor:
    """T^2 KL(teacher || student) at temperature T, summed over tokens: Hinton et al. 2015, arXiv 1503.02531, section 2.

    The gradients are computed along with it, so the backward pass neither projects again nor reads the weight, which a
    sharded engine need not hold by then.

    Args:
        hidden: [n,H], the student's last hidden states.
        weight: [V,H], its head.
        teacher_logits: [c,S] of the tokens in a slice of n.
        vocabulary: S.
        temperature: T.

    Returns:
        A float32 scalar (float64 for float64 inputs). Under autocast the projections run in its dtype, softmax and sums
        in float32.
    """
    dtype = product_dtype(autocast_dtype(hidden), hidden.device)
    with_gradient = torch.is_grad_enabled()
    return _LinearDivergence.apply(hidden, weight, teacher_logits, vocabulary, temperature, dtype, with_gradient)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_nH: torch.Tensor,
        weight_VH: torch.Tensor,
        teacher_logits: Callable[[slice], torch.Tensor],
        vocabulary: int,
        temperature: float,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> torch.Tensor:
        sums = state_dtype(hidden_nH)
        projection_SH = weight_VH[:vocabulary].to(dtype)
        total = torch.zeros((), dtype=sums, device=hidden_nH.device)
        dhidden = torch.empty_like(hidden_nH) if with_gradient and ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight_VH, dtype=sums) if with_gradient and ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden_nH), CHUNK):
            part = slice(start, start + CHUNK)
            teacher_cS = F.log_softmax(teacher_logits(part).to(sums) / temperature, dim=-1)
            with without_autocast(hidden_nH):
                hidden_cH = hidden_nH[part].to(dtype)
                student_cS = F.log_softmax((hidden_cH @ projection_SH.t()).to(sums) / temperature, dim=-1)
                total += F.kl_div(student_cS, teacher_cS, reduction="sum", log_target=True)
                # Of KL, times T, with respect to the logits.
                dlogits_cS = (student_cS.exp_() - teacher_cS.exp_()).to(dtype)
                if dhidden is not None:
                    dhidden[part] = dlogits_cS @ projection_SH
                if dweight is not None:
                    dweight[:vocabulary] += dlogits_cS.t() @ hidden_cH
        ctx.temperature = temperature
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight_VH.dtype))
        return temperature**2 * total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = ctx.temperature * dtotal
        dhidden, dweight = (None if d is None else d * factor.to(d.dtype) for d in ctx.saved_tensors)
        return dhidden, dweight, None, None, None, None, None
