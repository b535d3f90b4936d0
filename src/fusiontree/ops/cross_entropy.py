"""Cross-entropy of a linear head without the [B,T,V] logits: chunks of tokens are projected, scored and dropped.

Shapes: B batch, T tokens, H hidden, V vocabulary, M tokens whose label counts, c tokens of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops import reference
from fusiontree.ops.backends import register, resolve
from fusiontree.ops.reference import state_dtype

DEFAULT_CHUNK_SIZE = 1024


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
        backend: "auto", "torch" or "reference".

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


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """What the projections run in: autocast's dtype where autocast is on, else that of hidden."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _counted(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tokens that count: hidden [M,H], labels [M], and their places among all tokens (None: all count)."""
    flat_hidden, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    places = (flat_labels != ignore_index).nonzero().squeeze(1)
    if len(places) == len(flat_labels):
        return flat_hidden, flat_labels, None
    return flat_hidden[places], flat_labels[places], places


def _log_probabilities(hidden: Tensor, weight: Tensor) -> Tensor:
    """log softmax(hidden weight^T) in float32 (float64): [c,V]."""
    return torch.log_softmax(hidden @ weight.t(), dim=-1, dtype=state_dtype(hidden))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, where each chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk_size, ignore_index, compute_dtype):
        sums = state_dtype(hidden)
        counted, targets, places = _counted(hidden, labels, ignore_index)
        projection = weight.to(compute_dtype)
        count = max(len(targets), 1)
        loss = torch.zeros((), dtype=sums, device=hidden.device)
        dcounted = torch.empty_like(counted) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros(weight.shape, dtype=sums, device=weight.device) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), chunk_size):
            chunk_cH = counted[start : start + chunk_size].to(compute_dtype)
            target_c1 = targets[start : start + chunk_size, None]
            logp_cV = _log_probabilities(chunk_cH, projection)
            loss -= logp_cV.gather(1, target_c1).sum()
            if dcounted is None and dweight is None:
                continue
            dlogits_cV = logp_cV.exp_().scatter_add_(1, target_c1, torch.full_like(target_c1, -1.0, dtype=sums))
            dlogits_cV = dlogits_cV.mul_(1.0 / count).to(compute_dtype)
            if dcounted is not None:
                dcounted[start : start + chunk_size] = dlogits_cV @ projection
            if dweight is not None:
                dweight += dlogits_cV.t() @ chunk_cH
        ctx.shape = hidden.shape
        ctx.save_for_backward(dcounted, dweight.to(weight.dtype) if dweight is not None else None, places)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dcounted, dweight, places = ctx.saved_tensors
        dhidden = None
        if dcounted is not None:
            dhidden = dcounted * dloss.to(dcounted.dtype)
            if places is not None:
                everywhere = dhidden.new_zeros(ctx.shape.numel() // ctx.shape[-1], ctx.shape[-1])
                dhidden = everywhere.index_copy_(0, places, dhidden)
            dhidden = dhidden.view(ctx.shape)
        return dhidden, None if dweight is None else dweight * dloss.to(dweight.dtype), None, None, None, None


def _linear_cross_entropy_torch(hidden, weight, labels, *, chunk_size, ignore_index):
    compute_dtype = _compute_dtype(hidden)
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, labels, chunk_size, ignore_index, compute_dtype)


def _token_cross_entropy_torch(hidden, weight, labels, *, chunk_size, ignore_index):
    compute_dtype = _compute_dtype(hidden)
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        counted, targets, places = _counted(hidden, labels, ignore_index)
        projection = weight.to(compute_dtype)
        losses = torch.zeros(labels.numel(), dtype=state_dtype(hidden), device=hidden.device)
        for start in range(0, len(targets), chunk_size):
            logp_cV = _log_probabilities(counted[start : start + chunk_size].to(compute_dtype), projection)
            chunk_losses = -logp_cV.gather(1, targets[start : start + chunk_size, None]).squeeze(1)
            if places is None:
                losses[start : start + chunk_size] = chunk_losses
            else:
                losses[places[start : start + chunk_size]] = chunk_losses
    return losses.view(labels.shape)


register("linear_cross_entropy", "torch", _linear_cross_entropy_torch)
register("linear_cross_entropy", "reference", reference.linear_cross_entropy)
register("token_cross_entropy", "torch", _token_cross_entropy_torch)
register("token_cross_entropy", "reference", reference.token_cross_entropy)
