"""The gated RMSNorm against the operations that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusiontree.ops import gated_norm
from fusiontree.ops.gated_norm import gated_rms_norm

EPS = 1e-5


def expected(y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gated = y * F.silu(z).unflatten(-1, y.shape[2:])
    return (gated * (gated.square().mean(-1, keepdim=True) + EPS).rsqrt()).flatten(-2) * weight


def inputs(dtype: torch.dtype, tokens: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(0)
    projected = torch.randn(2, tokens, 20, dtype=dtype)
    tensors = [torch.randn(2, tokens, 3, 4, dtype=dtype), projected[..., 5:17], torch.rand(12, dtype=dtype) + 0.5]
    return [tensor.requires_grad_() for tensor in tensors]  # z is a part of a wider tensor, as in the model


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("block", [12, 36, 2**17])  # elements: one token, three, all
def test_output_and_gradients_are_those_of_the_operations(
    tokens: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_norm, "CPU_BLOCK_ELEMENTS", block)
    given = inputs(torch.float64, tokens)
    found, want = gated_rms_norm(*given, eps=EPS), expected(*given)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    direction = torch.randn(want.shape, dtype=want.dtype)
    for mine, reference in zip(
        torch.autograd.grad(found, given, direction), torch.autograd.grad(want, given, direction), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(gated_rms_norm(*given, eps=EPS), want, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_it_rounds_once() -> None:
    given = inputs(torch.bfloat16)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    found, want = gated_rms_norm(*given, eps=EPS), expected(*wide)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), want, rtol=2**-8, atol=1e-6)
    direction = torch.randn(want.shape, dtype=torch.bfloat16)
    gradients = torch.autograd.grad(found, given, direction)
    for mine, reference in zip(gradients, torch.autograd.grad(want, wide, direction.double()), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), reference, rtol=2**-8, atol=2**-8)


def test_an_idle_head_stays_finite() -> None:
    y, z, weight = inputs(torch.float32)
    still = torch.zeros_like(y, requires_grad=True)
    found = gated_rms_norm(still, z, weight, eps=EPS)
    (gradient,) = torch.autograd.grad(found, still, torch.ones_like(found))
    assert not found.any() and gradient.isfinite().all()
