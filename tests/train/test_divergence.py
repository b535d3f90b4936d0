"""Distillation at the head: its gradients are those of the formula, in whatever pieces and dtype it is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusiontree.train import divergence
from fusiontree.train.divergence import linear_divergence

VOCABULARY, TEMPERATURE = 5, 3.0


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of 7 tokens, a head of more rows than the shared vocabulary, the teacher's logits."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((7, 4), (VOCABULARY + 2, 4), (7, VOCABULARY))
    hidden, weight, taught = (torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return hidden.requires_grad_(), weight.requires_grad_(), taught


def of_formula(hidden: torch.Tensor, weight: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    student = F.log_softmax(hidden @ weight[:VOCABULARY].T / TEMPERATURE, -1)
    return TEMPERATURE**2 * F.kl_div(student, F.log_softmax(taught / TEMPERATURE, -1), reduction="sum", log_target=True)


def found_of(hidden: torch.Tensor, weight: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    return linear_divergence(hidden, weight, lambda part: taught[part], vocabulary=VOCABULARY, temperature=TEMPERATURE)


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_value_and_gradients_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(divergence, "CHUNK", chunk)
    found, wanted = found_of(*inputs()), of_formula(*inputs())
    torch.testing.assert_close(found, wanted)
    gradients = []
    for compute in (found_of, of_formula):
        hidden, weight, taught = inputs()
        (0.3 * compute(hidden, weight, taught)).backward()
        gradients.append((hidden.grad, weight.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert not gradients[0][1][VOCABULARY:].any()


def test_autocast_multiplies_in_bf16_and_sums_in_float32() -> None:
    hidden, weight, taught = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = found_of(hidden, weight, taught)
    assert found.dtype == torch.float32
    found.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    exact = of_formula(*inputs(torch.float32))
    assert found.item() == pytest.approx(exact.item(), rel=0.02) and found.item() != exact.item()


def test_the_weight_is_not_read_again_in_the_backward_pass() -> None:
    hidden, weight, taught = inputs()
    found = found_of(hidden, weight, taught)
    with torch.no_grad():
        kept = weight.clone()
        weight.zero_()
    found.backward()
    other_hidden, _, _ = inputs()
    of_formula(other_hidden, kept, taught).backward()
    torch.testing.assert_close(hidden.grad, other_hidden.grad)


def test_without_gradients_it_is_a_number() -> None:
    with torch.no_grad():
        found = found_of(*inputs())
    assert not found.requires_grad
    torch.testing.assert_close(found, of_formula(*inputs()).detach())
