from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import assert_agrees_with_reference, assert_close, nan_in_fresh_memory, run_with_gradients

from fusiontree.ops import causal_conv1d


def arguments(
    length=11, taps=4, batch=2, channels=6, *, resets=False, initial=False, bias=True, dtype=torch.float64, seed=0
):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=dtype)

    return {
        "x": normal(batch, length, channels),
        "weight": normal(channels, taps),
        "bias": normal(channels) if bias else None,
        "reset": torch.rand(batch, length, generator=draw) < 0.3 if resets else None,
        "initial_state": normal(batch, taps - 1, channels) if initial else None,
    }


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 19])
@pytest.mark.parametrize(("taps", "activation"), [(4, "silu"), (3, None), (2, "silu")])
def test_agrees_with_reference(length, taps, activation, initial, resets):
    case = arguments(length, taps, resets=resets, initial=initial, bias=activation is not None)
    assert_agrees_with_reference(causal_conv1d, case, return_final_state=True, activation=activation)


def test_one_tap_reads_the_current_token_alone():
    case = arguments(5, taps=1, resets=True)
    y, state = causal_conv1d(**case, return_final_state=True)
    torch.testing.assert_close(y, case["x"] * case["weight"][:, 0] + case["bias"])
    assert state.shape == (2, 0, 6)


def test_last_tap_multiplies_the_current_token():
    x = torch.arange(1.0, 6.0).view(1, 5, 1)
    y = causal_conv1d(x, torch.tensor([[1000.0, 100.0, 10.0, 1.0]]))
    assert y.flatten().tolist() == [1, 12, 123, 1234, 2345]


def test_agrees_with_reference_in_float32():
    case = arguments(70, resets=True, initial=True, dtype=torch.float32)
    assert_agrees_with_reference(causal_conv1d, case, return_final_state=True, activation="silu")


def test_long_rows_are_summed_in_blocks(monkeypatch):
    monkeypatch.setattr(sys.modules["fusiontree.ops.causal_conv1d"], "CPU_BLOCK_ELEMENTS", 40)
    case = arguments(29, resets=True, initial=True)
    assert_agrees_with_reference(causal_conv1d, case, return_final_state=True)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(activation):
    case = arguments(6, batch=1, channels=2, resets=True, initial=True)
    reset = case.pop("reset")

    def conv(*tensors):
        options = {"reset": reset, "return_final_state": True, "activation": activation}
        return causal_conv1d(**dict(zip(case, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(conv, [tensor.requires_grad_() for tensor in case.values()])


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(1, 19), max_size=8), seed=st.integers(0, 1000))
def test_pieces_with_states_equal_one_pass(cuts, seed):
    case = arguments(20, resets=True, initial=True, seed=seed)
    options = {"return_final_state": True, "activation": "silu"}
    whole, last = causal_conv1d(**case, **options)
    bounds = [0, *sorted(set(cuts)), 20]
    state, outputs = case["initial_state"], []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        y, state = causal_conv1d(
            case["x"][:, start:stop],
            case["weight"],
            case["bias"],
            reset=case["reset"][:, start:stop],
            initial_state=state,
            **options,
        )
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


def test_final_state_holds_zeros_for_an_earlier_document():
    case = arguments(6, batch=1, initial=True)
    reset = torch.zeros(1, 6, dtype=torch.bool)
    reset[0, 4] = True
    _, state = causal_conv1d(**case | {"reset": reset}, return_final_state=True)
    assert state[:, 0].eq(0).all()
    assert torch.equal(state[:, 1:], case["x"][:, 4:])


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_row_that_starts_anew_ignores_its_initial_state(length):
    case = arguments(length, initial=True)
    case["reset"] = torch.zeros(2, length, dtype=torch.bool)
    case["reset"][0, 0] = True
    dirty = case | {"initial_state": case["initial_state"].clone()}
    dirty["initial_state"][0] = float("nan")
    case["initial_state"][0] = 0
    options = {"return_final_state": True, "activation": "silu", "backend": "torch"}
    actual = run_with_gradients(causal_conv1d, dirty, **options)
    assert_close(actual, run_with_gradients(causal_conv1d, case, **options), 1e-12)
    assert actual["gradient of initial_state"][0].eq(0).all()


def test_strided_inputs_and_fresh_memory():
    case = arguments(13, resets=True, initial=True)
    wide = torch.randn(2, 13, 20, dtype=torch.float64)
    wide[..., 5:11] = case["x"]
    case["x"] = wide[..., 5:11]
    with nan_in_fresh_memory():
        assert_agrees_with_reference(causal_conv1d, case, return_final_state=True, activation="silu")


@pytest.mark.parametrize("length", [1, 30])
def test_bfloat16_inputs_keep_float32_states_whatever_autocast_says(length):
    case = arguments(length, resets=True, initial=True, dtype=torch.float32)
    case["x"] = case["x"].bfloat16()
    options = {"return_final_state": True, "activation": "silu"}
    y, state = causal_conv1d(**case, **options)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    exact = causal_conv1d(**case | {"x": case["x"].float()}, activation="silu", backend="reference")
    assert (y - exact).abs().max() <= 2**-8 * exact.abs().max()
    expected = run_with_gradients(causal_conv1d, case, backend="torch", **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_with_gradients(causal_conv1d, case, backend="torch", **options)
    assert_close(actual, expected, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.rand(5)}, "bias has shape"),
        ({"initial_state": torch.rand(2, 4, 6)}, "initial_state has shape"),
        ({"reset": torch.zeros(2, 10, dtype=torch.bool)}, "reset has shape"),
        ({"activation": "gelu"}, "activation must be None or 'silu'"),
        ({"reset": torch.zeros(2, 11, dtype=torch.int64)}, "reset must be bool"),
        ({"backend": "cuda"}, "no backend 'cuda'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**(arguments() | change))
