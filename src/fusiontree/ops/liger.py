"""Backend `liger` of `linear_cross_entropy`: the fused kernels of Liger Kernel (Hsu et al. 2024).

Shapes: B batch, T tokens, H hidden, V vocabulary, M tokens whose label counts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from packaging.version import Version
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops.checks import refuse_older_gpu
from fusiontree.ops.libraries import versioned_unusable
from fusiontree.ops.triton_support import OLDEST_GPU

# The first that sums the weight's gradient in a dtype of the caller's choice.
OLDEST = Version("0.6.2")


def find_unusable() -> str | None:
    nameless = "liger_kernel can be imported, but nothing says which version it is: install the package liger-kernel"
    return versioned_unusable("liger-kernel", OLDEST, _fused_loss, without_version=nameless)


def refuses(hidden: Tensor, weight: Tensor) -> str | None:
    if hidden.device.type != "cuda":
        return f"it runs on CUDA tensors, not on {hidden.device.type}"
    return refuses_dtypes(hidden, weight) or refuse_older_gpu(hidden, OLDEST_GPU)


def refuses_dtypes(hidden: Tensor, weight: Tensor) -> str | None:
    for dtype in (hidden.dtype, weight.dtype):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it does not support dtype {dtype}"
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        return f"it does not multiply {hidden.dtype} with a weight of {weight.dtype} without autocast"
    return None


def _fused_loss() -> Callable[..., Tensor]:
    return importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy


def linear_cross_entropy_liger(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_size: int, ignore_index: int
) -> Tensor:
    del chunk_size  # it chooses its own
    labels = labels.reshape(-1)
    counted = (labels != ignore_index).nonzero().squeeze(1)
    hidden_MH, labels_M = hidden.reshape(-1, hidden.shape[-1]), labels
    if len(counted) < len(labels):
        # Left in, an ignored token that holds NaN would reach the weight's gradient.
        hidden_MH, labels_M = hidden_MH[counted], labels[counted]
    if len(counted) == 0:
        # Liger Kernel does not take an empty batch. Sums over nothing give 0 with gradients of 0.
        return hidden_MH.sum(dtype=torch.float32) + weight[:0].sum(dtype=torch.float32)
    # The sum and not the mean: divided by their number, the gradients of many tokens underflow in half precision.
    return _SumOfLosses.apply(hidden_MH, weight, labels_M, torch.is_grad_enabled()) / len(counted)


class _SumOfLosses(torch.autograd.Function):
    """Takes the gradients along with the loss. Liger Kernel's own backward pass scales them in place, so that a second
    one would scale twice, and it has none for the weight where hidden needs none.
    """

    @staticmethod
    def forward(ctx, hidden_MH, weight, labels_M, with_gradient):
        needed = ctx.needs_input_grad[:2] if with_gradient else (False, False)
        leaves = hidden_MH.detach().requires_grad_(any(needed)), weight.detach().requires_grad_(needed[1])
        with torch.set_grad_enabled(any(needed)):
            loss = _fused_loss()(*leaves, labels_M, reduction="sum", accum_dtype=torch.float32)
        dhidden = dweight = None
        if needed[1]:
            dhidden, dweight = torch.autograd.grad(loss, leaves)
        elif needed[0]:
            (dhidden,) = torch.autograd.grad(loss, leaves[:1])
        ctx.save_for_backward(dhidden if needed[0] else None, dweight)
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        # In float32: 1 / number of tokens, rounded to half precision, would scale every gradient alike.
        scaled = (None if t is None else (t.float() * dloss).to(t.dtype) for t in ctx.saved_tensors)
        return *scaled, None, None
