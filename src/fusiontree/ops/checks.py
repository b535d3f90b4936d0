"""What the ops check about their arguments before any backend sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_shapes(op: str, expected: Mapping[str, tuple[Tensor | None, Sequence[int]]]) -> None:
    """Raise ValueError, naming op and argument, unless each tensor that is given has the shape beside it."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")


def check_sequence(op: str, length: int, reset: Tensor | None) -> None:
    """Raise ValueError unless there is a token to work on and `reset` is a mask."""
    if length < 1:
        raise ValueError(f"{op}: needs at least one token")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"{op}: reset must be bool, got {reset.dtype}")


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_older_gpu(x: Tensor, least: tuple[int, int]) -> str | None:
    """The refusal of kernels that need a compute capability which x's GPU lacks; AMD's GPUs have none."""
    found = torch.cuda.get_device_capability(x.device)
    if torch.version.hip is None and found < least:
        return "it needs a GPU of compute capability {}.{}, not {}.{}".format(*least, *found)
    return None
