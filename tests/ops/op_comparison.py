"""Hold a backend to the reference: outputs, final states and every gradient, plus what memory it touches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Largest error allowed, relative to the largest element of the reference's tensor.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def run_with_gradients(op: Callable[..., Any], arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Call op on copies of the arguments; return its outputs and the gradients of a random function of them."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs = op(**(arguments | leaves), **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    draw = torch.Generator().manual_seed(0)
    loss = sum((out * torch.randn(out.shape, generator=draw).to(out)).sum() for out in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} got no gradient"
        results[f"gradient of {name}"] = leaf.grad
    return results


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert got.shape == want.shape, name
        assert torch.isfinite(got).all(), f"{name} is not finite"
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: error {error:.2e} at scale {scale:.2e}"


def assert_agrees_with_reference(
    op: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    backend: str = "torch",
    tolerance: float | None = None,
    **options: Any,
) -> None:
    """The backend = the reference, in the dtype of the arguments; the reference computes in float64."""
    dtype = next(v.dtype for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point())
    in_double = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    expected = run_with_gradients(op, in_double, backend="reference", **options)
    actual = run_with_gradients(op, arguments, backend=backend, **options)
    assert_close(actual, expected, TOLERANCE[dtype] if tolerance is None else tolerance)


@contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """Every tensor whose memory nobody wrote holds NaN (integers: their largest value)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's result has while active, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                # What is in memory: an expanded view has more elements than that.
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def largest_tensor(op: Callable[..., Any], arguments: dict[str, Any], **options: Any) -> int:
    with LargestTensor() as largest:
        run_with_gradients(op, arguments, **options)
    return largest.elements
