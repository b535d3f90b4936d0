"""Where a step stops being finite: the step once more, looked at module by module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from fusiontree.train.parallel import Parallel


def first_not_finite(parallel: Parallel, run_step: Callable[[], Any]) -> str | None:
    """The first module whose output is not finite in a forward pass; else the parameter whose gradient is not.

    Args:
        run_step: forward and backward of a step's micro-batches, without the update. All processes call it.

    Returns:
        Such as "the output of layers.3.mamba"; None when all is finite in this process.
    """
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            if not found and not all(_is_finite(tensor) for tensor in tensors):
                found.append(f"the output of {name}")

        return hook

    hooks = [
        module.register_forward_hook(look(name))
        for name, module in parallel.module.named_modules()
        # A block's parts finish before the block, and the parts' own parts before them: the first is the narrowest.
        if name
    ]
    try:
        run_step()
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    # Gradients come from the end of the model: the last one that is not finite was the first.
    wrong = [name for name, gradient in parallel.gradients() if not _is_finite(gradient)]
    return f"the gradient of {wrong[-1]}" if wrong else None


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
