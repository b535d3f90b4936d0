from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import (
    assert_agrees_with_reference,
    assert_close,
    largest_tensor,
    nan_in_fresh_memory,
    run_with_gradients,
)

from fusiontree.ops import selective_scan
from fusiontree.ops.selective_scan import CHUNK


def arguments(
    length=11, batch=2, channels=6, state=3, *, resets=False, initial=False, gated=True, dtype=torch.float64, seed=0
):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=dtype)

    return {
        "u": normal(batch, length, channels),
        "delta": torch.rand(batch, length, channels, generator=draw, dtype=dtype),
        "A": -4 * torch.rand(channels, state, generator=draw, dtype=dtype),
        "B": normal(batch, length, state),
        "C": normal(batch, length, state),
        "D": normal(channels) if gated else None,
        "z": normal(batch, length, channels) if gated else None,
        "reset": torch.rand(batch, length, generator=draw) < 0.25 if resets else None,
        "initial_state": normal(batch, channels, state) if initial else None,
    }


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
def test_agrees_with_reference(length, initial, resets):
    case = arguments(length, resets=resets, initial=initial, gated=resets)
    assert_agrees_with_reference(selective_scan, case, return_final_state=True)


@pytest.mark.parametrize("length", [1, 100])
def test_agrees_with_reference_in_float32(length):
    case = arguments(length, channels=16, state=8, resets=True, initial=True, dtype=torch.float32)
    assert_agrees_with_reference(selective_scan, case, return_final_state=True)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(sys.modules["fusiontree.ops.selective_scan"], "CHUNK", 4)
    case = arguments(6, batch=1, channels=2, state=2, resets=True, initial=True)
    reset = case.pop("reset")

    def scan(*tensors):
        return selective_scan(**dict(zip(case, tensors, strict=True)), reset=reset, return_final_state=True)

    assert torch.autograd.gradcheck(scan, [tensor.requires_grad_() for tensor in case.values()])


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(1, 39), max_size=6), seed=st.integers(0, 1000))
def test_pieces_with_states_equal_one_pass(cuts, seed):
    case = arguments(40, resets=True, initial=True, seed=seed)
    whole, last = selective_scan(**case, return_final_state=True)
    bounds = [0, *sorted(set(cuts)), 40]
    state, outputs = case.pop("initial_state"), []
    shared = {name: case.pop(name) for name in ("A", "D")}
    for start, stop in zip(bounds, bounds[1:], strict=False):
        piece = {name: tensor[:, start:stop] for name, tensor in case.items()}
        y, state = selective_scan(**piece, **shared, initial_state=state, return_final_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 40])
def test_zero_step_leaves_the_state_exactly_as_it_was(length):
    case = arguments(length, initial=True, dtype=torch.float32)
    case["delta"].zero_()
    _, state = selective_scan(**case, return_final_state=True)
    assert torch.equal(state, case["initial_state"])


@pytest.mark.parametrize("length", [1, 40])
def test_a_row_that_starts_anew_ignores_its_initial_state(length):
    case = arguments(length, resets=True, initial=True)
    case["reset"][:, 0] = torch.tensor([True, False])
    dirty = case | {"initial_state": case["initial_state"].clone()}
    dirty["initial_state"][0] = float("nan")
    case["initial_state"][0] = 0
    options = {"return_final_state": True, "backend": "torch"}
    actual = run_with_gradients(selective_scan, dirty, **options)
    assert_close(actual, run_with_gradients(selective_scan, case, **options), 1e-12)
    assert actual["gradient of initial_state"][0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decays_stay_finite(dtype):
    case = arguments(50, channels=4, initial=True, resets=True, dtype=dtype)
    case["delta"] = case["delta"] * torch.tensor([1e-8, 1.0, 30.0, 1e3], dtype=dtype)  # per channel
    assert_agrees_with_reference(selective_scan, case, return_final_state=True)


def test_strided_inputs_and_fresh_memory():
    case = arguments(CHUNK + 5, resets=True, initial=True)
    case = {
        name: t.transpose(0, 1).contiguous().transpose(0, 1) if t is not None and t.dim() > 1 else t
        for name, t in case.items()
    }
    assert not case["u"].is_contiguous()
    with nan_in_fresh_memory():
        assert_agrees_with_reference(selective_scan, case, return_final_state=True)


def test_bfloat16_inputs_keep_float32_states_whatever_autocast_says():
    case = arguments(40, resets=True, initial=True, dtype=torch.float32)
    for name in ("u", "B", "C", "z"):
        case[name] = case[name].bfloat16()
    y, state = selective_scan(**case, return_final_state=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    exact_y, exact_state = selective_scan(**case, return_final_state=True, backend="reference")
    assert (y.float() - exact_y.float()).abs().max() <= 2**-7 * exact_y.abs().max()
    torch.testing.assert_close(state, exact_state, rtol=1e-5, atol=1e-5)
    expected = run_with_gradients(selective_scan, case, return_final_state=True, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_with_gradients(selective_scan, case, return_final_state=True, backend="torch")
    assert_close(actual, expected, 0.0)


def test_states_of_all_tokens_never_exist():
    length, channels, state = 16 * CHUNK, 64, 16
    case = arguments(length, batch=1, channels=channels, state=state, dtype=torch.float32)
    assert largest_tensor(selective_scan, case, backend="torch") <= CHUNK * channels * state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.rand(2, 11, 4)}, "B has shape"),
        ({"initial_state": torch.rand(2, 3, 6)}, "initial_state has shape"),
        ({"reset": torch.zeros(2, 11, dtype=torch.int64)}, "reset must be bool"),
        ({"backend": "cuda"}, "no backend 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**(arguments() | change))
