"""Cross-entropy of a linear head without the [B,T,V] logits: chunks of tokens are projected, scored and dropped.

Shapes: B batch, T tokens, H hidden, V vocabulary, M tokens whose label counts, c tokens of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops import liger, reference
from fusiontree.ops.backends import register, resolve
from fusiontree.ops.precision import autocast_dtype, product_dtype, state_dtype, without_autocast

DEFAULT_CHUNK_SIZE = 1024
# Logits whose softmax is taken at once on CPU: what it makes of them stays in the processor's cache.
CPU_BLOCK_ELEMENTS = 2**18


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Mean cross-entropy of hidden @ weight^T against labels, over the labels that count; 0 if none does.

    The gradients are computed along with the loss, chunk by chunk, as in Liger Kernel (Hsu et al. 2024), so logits
    exist for `chunk_size` tokens at a time. Tokens whose label is ignored are not projected at all.

    Args:
        hidden: [B,T,H].
        weight: [V,H], the head.
        labels: [B,T] int64 aligned with hidden: labels[b,t] is what hidden[b,t] should predict.
        chunk_size: tokens projected at a time; changes speed and memory, not the result.
        ignore_index: the label that does not count.
        backend: "auto", "liger", "torch" or "reference"; "auto" takes the fused kernels of "liger" on CUDA where they
            are installed, whose chunks have a size of their own choice.

    Returns:
        A float32 scalar (float64 for float64 inputs). Under autocast the projections run in its dtype, the softmax
        and all sums in float32.

    Raises:
        ValueError: shapes that do not fit together.
        BackendError: a named backend that is missing or cannot run this call.
    """
    _check_shapes("linear_cross_entropy", hidden, weight, labels, chunk_size)
    run = resolve("linear_cross_entropy", backend, hidden, weight)
    return run(hidden, weight, labels, chunk_size=chunk_size, ignore_index=ignore_index)


@torch.no_grad()
def token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """The loss of each token, [B,T] float32 (float64 for float64 inputs), 0 where the label is ignored.

    For evaluation: carries no gradient. Arguments and errors as `linear_cross_entropy`.
    """
    _check_shapes("token_cross_entropy", hidden, weight, labels, chunk_size)
    run = resolve("token_cross_entropy", backend, hidden, weight)
    return run(hidden, weight, labels, chunk_size=chunk_size, ignore_index=ignore_index)


def _check_shapes(op: str, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> None:
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected [V, {hidden.shape[-1]}]")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"{op}: labels have shape {list(labels.shape)}, expected {list(hidden.shape[:-1])}")
    if chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be at least 1, got {chunk_size}")


def _projection_dtype(hidden: Tensor) -> torch.dtype:
    return product_dtype(autocast_dtype(hidden), hidden.device)


def _counted(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens that count: hidden [M,H], labels [M], and their places among all tokens (None: all count)."""
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    places = (flat_labels != ignore_index).nonzero().squeeze(1)
    if len(places) == len(flat_labels):
        return flat_hidden, flat_labels, None
    return flat_hidden[places], flat_labels[places], places


def _losses(logits_cV: Tensor, target_c1: Tensor, *, differentiate: bool) -> Tensor:
    """Minus the logarithm of each target's share, [c] float32 (float64); the softmax runs in that too.

    Args:
        differentiate: also put the gradient of the sum of losses in the place of the logits.
    """
    losses_c = torch.empty(len(logits_cV), dtype=state_dtype(logits_cV), device=logits_cV.device)
    rows = max(1, CPU_BLOCK_ELEMENTS // logits_cV.shape[1]) if logits_cV.device.type == "cpu" else len(logits_cV)
    for start in range(0, len(logits_cV), rows):
        logits, targets = logits_cV[start : start + rows], target_c1[start : start + rows]
        largest, target = (t.to(losses_c.dtype) for t in (logits.amax(-1, keepdim=True), logits.gather(1, targets)))
        probabilities = torch.softmax(logits, dim=-1, dtype=losses_c.dtype)
        # The largest probability is 1 / sum exp(logit - largest), and unlike the target's never underflows.
        log_sum_1 = largest - probabilities.amax(-1, keepdim=True).log()
        losses_c[start : start + rows] = (log_sum_1 - target).squeeze(1)
        if differentiate:
            probabilities.scatter_add_(1, targets, probabilities.new_full(targets.shape, -1.0))
            logits.copy_(probabilities)
    return losses_c


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, where each chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk_size, ignore_index, dtype, with_gradient):
        sums = state_dtype(hidden)
        counted, targets, places = _counted(hidden, labels, ignore_index)
        projection = weight.to(dtype)
        loss = torch.zeros((), dtype=sums, device=hidden.device)
        dcounted = torch.empty_like(counted) if with_gradient and ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=sums) if with_gradient and ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), chunk_size):
            chunk_cH = counted[start : start + chunk_size].to(dtype)
            target_c1 = targets[start : start + chunk_size, None]
            # Of the sum of losses, once `_losses` has put it there; the mean's factor follows in backward.
            dlogits_cV = chunk_cH @ projection.t()
            loss += _losses(dlogits_cV, target_c1, differentiate=dcounted is not None or dweight is not None).sum()
            if dcounted is not None:
                dcounted[start : start + chunk_size] = dlogits_cV @ projection
            if dweight is not None and dweight.dtype == dtype:
                dweight.addmm_(dlogits_cV.t(), chunk_cH)
            elif dweight is not None:
                dweight += dlogits_cV.t() @ chunk_cH
        ctx.shape, ctx.count = hidden.shape, max(len(targets), 1)
        ctx.save_for_backward(dcounted, None if dweight is None else dweight.to(weight.dtype), places)
        return loss / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dcounted, dweight, places = ctx.saved_tensors
        factor, dhidden = dloss / ctx.count, None
        if dcounted is not None:
            dhidden = dcounted * factor.to(dcounted.dtype)
            if places is not None:
                everywhere = dhidden.new_zeros(ctx.shape.numel() // ctx.shape[-1], ctx.shape[-1])
                dhidden = everywhere.index_copy_(0, places, dhidden)
            dhidden = dhidden.view(ctx.shape)
        if dweight is not None:
            dweight = dweight * factor.to(dweight.dtype)
        return dhidden, dweight, None, None, None, None, None


def _linear_cross_entropy_torch(hidden, weight, labels, *, chunk_size, ignore_index):
    dtype, with_gradient = _projection_dtype(hidden), torch.is_grad_enabled()
    with without_autocast(hidden):
        return _LinearCrossEntropy.apply(hidden, weight, labels, chunk_size, ignore_index, dtype, with_gradient)


def _token_cross_entropy_torch(hidden, weight, labels, *, chunk_size, ignore_index):
    dtype = _projection_dtype(hidden)
    with without_autocast(hidden):
        counted, targets, places = _counted(hidden, labels, ignore_index)
        projection = weight.to(dtype)
        losses = torch.zeros(labels.numel(), dtype=state_dtype(hidden), device=hidden.device)
        for start in range(0, len(targets), chunk_size):
            span = slice(start, start + chunk_size)
            logits_cV = counted[span].to(dtype) @ projection.t()
            losses_c = _losses(logits_cV, targets[span, None], differentiate=False)
            losses[span if places is None else places[span]] = losses_c
    return losses.view(labels.shape)


register(
    "linear_cross_entropy",
    "liger",
    liger.linear_cross_entropy_liger,
    unusable=liger.find_unusable,
    refuses=liger.refuses,
)
register("linear_cross_entropy", "torch", _linear_cross_entropy_torch)
register("linear_cross_entropy", "reference", reference.linear_cross_entropy)
register("token_cross_entropy", "torch", _token_cross_entropy_torch)
register("token_cross_entropy", "reference", reference.token_cross_entropy)
