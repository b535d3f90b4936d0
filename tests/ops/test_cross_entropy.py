from __future__ import annotations

import pytest
import torch
from op_comparison import assert_agrees_with_reference, largest_tensor, nan_in_fresh_memory, run_with_gradients

from fusiontree.ops import linear_cross_entropy, token_cross_entropy


def arguments(length=9, hidden=4, vocabulary=11, batch=2, *, ignored=0.3, scale=1.0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocabulary, (batch, length), generator=draw)
    return {
        "hidden": torch.randn(batch, length, hidden, generator=draw, dtype=dtype) * scale,
        "weight": torch.randn(vocabulary, hidden, generator=draw, dtype=dtype),
        "labels": labels.masked_fill(torch.rand(batch, length, generator=draw) < ignored, -100),
    }


@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.95])
@pytest.mark.parametrize("chunk_size", [1, 4, 18, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_reference(chunk_size, ignored, dtype):
    case = arguments(ignored=ignored, dtype=dtype)
    assert_agrees_with_reference(linear_cross_entropy, case, chunk_size=chunk_size)


def test_gradcheck():
    case = arguments()

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, case["labels"], chunk_size=4)

    assert torch.autograd.gradcheck(loss, [case["hidden"].requires_grad_(), case["weight"].requires_grad_()])


def test_no_label_that_counts_gives_zero_and_zero_gradients():
    case = arguments(ignored=1.1)
    results = run_with_gradients(linear_cross_entropy, case, backend="torch")
    assert all(tensor.eq(0).all() for tensor in results.values())


def test_hidden_states_of_ignored_labels_do_not_matter():
    case = arguments()
    expected = run_with_gradients(linear_cross_entropy, case, backend="torch")
    case["hidden"][case["labels"] == -100] = float("nan")
    actual = run_with_gradients(linear_cross_entropy, case, backend="torch")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_another_ignore_index():
    case = arguments(ignored=0.0)
    changed = case | {"labels": case["labels"].masked_fill(case["labels"] == 3, -100)}
    assert torch.equal(linear_cross_entropy(**case, ignore_index=3), linear_cross_entropy(**changed))


@pytest.mark.parametrize("scale", [1e-6, 300.0])
def test_flat_and_certain_predictions(scale):
    case = arguments(scale=scale, dtype=torch.float32)
    assert_agrees_with_reference(linear_cross_entropy, case)


def test_backward_scales_with_the_gradient_of_the_loss_and_may_run_twice():
    case = arguments()
    hidden, weight = case["hidden"].requires_grad_(), case["weight"].requires_grad_()
    loss = linear_cross_entropy(hidden, weight, case["labels"])
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    half = torch.autograd.grad(loss * 0.5, (hidden, weight))
    for a, b in zip(once, half, strict=True):
        torch.testing.assert_close(a * 0.5, b, rtol=1e-14, atol=0)


def test_only_one_of_the_two_needs_a_gradient():
    case = arguments()
    leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight")]
    expected = torch.autograd.grad(linear_cross_entropy(*leaves, case["labels"]), leaves)
    for name, gradient in zip(("hidden", "weight"), expected, strict=True):
        leaf = case[name].clone().requires_grad_()
        linear_cross_entropy(**case | {name: leaf}).backward()
        assert torch.equal(leaf.grad, gradient)


def test_logits_of_all_tokens_never_exist():
    case = arguments(length=400, vocabulary=50, dtype=torch.float32)
    assert largest_tensor(linear_cross_entropy, case, backend="torch", chunk_size=32) <= 2 * 400 * 4
    with torch.no_grad():
        assert linear_cross_entropy(**case, chunk_size=32) > 0


def test_autocast_projects_in_its_dtype_and_sums_in_float32():
    case = arguments(length=200, hidden=32, vocabulary=100, dtype=torch.float32)
    exact = run_with_gradients(linear_cross_entropy, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_with_gradients(linear_cross_entropy, case)
    assert all(tensor.dtype == torch.float32 for tensor in actual.values())
    for name, want in exact.items():
        assert (actual[name] - want).abs().max() <= 2**-6 * want.abs().max(), name
    case["hidden"] = case["hidden"].bfloat16()
    assert linear_cross_entropy(**case).dtype == torch.float32


def test_fresh_memory_may_hold_anything():
    with nan_in_fresh_memory():
        assert_agrees_with_reference(linear_cross_entropy, arguments(), chunk_size=4)


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_token_losses(chunk_size):
    case = arguments()
    losses = token_cross_entropy(**case, chunk_size=chunk_size)
    torch.testing.assert_close(losses, token_cross_entropy(**case, backend="reference"), rtol=0, atol=1e-12)
    ignored = case["labels"] == -100
    assert losses[ignored].eq(0).all() and losses[~ignored].gt(0).all()
    torch.testing.assert_close(losses.sum() / (~ignored).sum(), linear_cross_entropy(**case))
    assert (
        token_cross_entropy(**{n: t.bfloat16() if t.is_floating_point() else t for n, t in case.items()}).dtype
        == torch.float32
    )


@pytest.mark.parametrize("op", [linear_cross_entropy, token_cross_entropy])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.rand(11, 5)}, "weight has shape"),
        ({"labels": torch.zeros(2, 8, dtype=torch.int64)}, "labels have shape"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"backend": "quack"}, "no backend 'quack'"),
    ],
)
def test_bad_arguments_are_refused(op, change, message):
    with pytest.raises(ValueError, match=message):
        op(**(arguments() | change))
