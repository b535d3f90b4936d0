from __future__ import annotations

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

from fusiontree.ops import ssd_scan, ssd_step


def arguments(
    length=11,
    batch=2,
    heads=4,
    width=3,
    groups=1,
    state=5,
    *,
    resets=False,
    initial=False,
    skip=True,
    dtype=torch.float64,
    seed=0,
):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=dtype)

    return {
        "x": normal(batch, length, heads, width),
        "dt": torch.rand(batch, length, heads, generator=draw, dtype=dtype),
        "A": -4 * torch.rand(heads, generator=draw, dtype=dtype),
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
        "D": normal(heads) if skip else None,
        "reset": torch.rand(batch, length, generator=draw) < 0.25 if resets else None,
        "initial_state": normal(batch, heads, width, state) if initial else None,
    }


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 24, 29])
def test_agrees_with_reference(length, initial, resets):
    case = arguments(length, groups=2, resets=resets, initial=initial)
    assert_agrees_with_reference(ssd_scan, case, return_final_state=True, chunk_size=8)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 64])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 1), (6, 3), (4, 4)])
def test_chunk_size_and_groups_change_nothing(chunk_size, heads, groups):
    case = arguments(13, heads=heads, groups=groups, resets=True, initial=True, skip=False)
    assert_agrees_with_reference(ssd_scan, case, return_final_state=True, chunk_size=chunk_size)


@pytest.mark.parametrize("length", [1, 70, 128])
def test_agrees_with_reference_in_float32(length):
    case = arguments(length, heads=2, width=16, state=16, resets=True, initial=True, dtype=torch.float32)
    assert_agrees_with_reference(ssd_scan, case, return_final_state=True)


def test_many_chunks_are_worked_off_in_slabs(monkeypatch):
    monkeypatch.setattr("fusiontree.ops.ssd_chunks.CPU_SLAB_ELEMENTS", 40)  # two chunks of one head at a time
    case = arguments(27, heads=6, groups=2, resets=True, initial=True)
    assert_agrees_with_reference(ssd_scan, case, return_final_state=True, chunk_size=4)


def test_gradcheck():
    case = arguments(6, batch=1, heads=2, width=2, state=2, resets=True, initial=True)
    reset = case.pop("reset")

    def scan(*tensors):
        return ssd_scan(**dict(zip(case, tensors, strict=True)), reset=reset, return_final_state=True, chunk_size=4)

    assert torch.autograd.gradcheck(scan, [tensor.requires_grad_() for tensor in case.values()])


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(1, 39), max_size=6), seed=st.integers(0, 1000))
def test_pieces_with_states_equal_one_pass(cuts, seed):
    case = arguments(40, resets=True, initial=True, seed=seed)
    options = {"return_final_state": True, "chunk_size": 8}
    whole, last = ssd_scan(**case, **options)
    bounds = [0, *sorted(set(cuts)), 40]
    state, outputs = case.pop("initial_state"), []
    shared = {name: case.pop(name) for name in ("A", "D")}
    for start, stop in zip(bounds, bounds[1:], strict=False):
        piece = {name: tensor[:, start:stop] for name, tensor in case.items()}
        y, state = ssd_scan(**piece, **shared, initial_state=state, **options)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


def test_one_pass_equals_token_by_token_in_float32():
    # Step sizes and decays as at initialisation (dt in [1e-3, 1e-1], A in [-16, -1]) and fifty times as large.
    for factor in (1.0, 50.0):
        case = arguments(512, batch=1, heads=8, width=8, state=16, dtype=torch.float32)
        case["dt"] = (0.001 + 0.1 * case["dt"]) * factor
        case["A"] = torch.linspace(-16, -1, 8)
        whole, last = ssd_scan(**case, return_final_state=True)
        token_by_token, state = ssd_scan(**case, return_final_state=True, chunk_size=1)
        scale = token_by_token.abs().max()
        assert (whole - token_by_token).abs().max() <= 2e-6 * scale
        assert (last - state).abs().max() <= 2e-6 * state.abs().max()


@pytest.mark.parametrize("length", [1, 5, 30])
def test_zero_step_leaves_the_state_exactly_as_it_was(length):
    case = arguments(length, initial=True, dtype=torch.float32)
    case["dt"].zero_()
    _, state = ssd_scan(**case, return_final_state=True, chunk_size=8)
    assert torch.equal(state, case["initial_state"])


@pytest.mark.parametrize("length", [1, 20])
def test_a_row_that_starts_anew_ignores_its_initial_state(length):
    case = arguments(length, resets=True, initial=True)
    case["reset"][:, 0] = torch.tensor([True, False])
    dirty = case | {"initial_state": case["initial_state"].clone()}
    dirty["initial_state"][0] = float("nan")
    case["initial_state"][0] = 0
    options = {"return_final_state": True, "chunk_size": 8, "backend": "torch"}
    assert_close(run_with_gradients(ssd_scan, dirty, **options), run_with_gradients(ssd_scan, case, **options), 1e-12)
    assert run_with_gradients(ssd_scan, dirty, **options)["gradient of initial_state"][0].eq(0).all()


def test_documents_in_one_row_equal_documents_alone():
    case = arguments(24, batch=1, heads=2)
    case["reset"] = torch.zeros(1, 24, dtype=torch.bool)
    case["reset"][0, [0, 5, 6, 17]] = True
    packed = ssd_scan(**case, chunk_size=8)
    del case["reset"]
    shared = {name: case.pop(name) for name in ("A", "D", "initial_state")}
    for start, stop in ((0, 5), (5, 6), (6, 17), (17, 24)):
        alone = ssd_scan(**{name: tensor[:, start:stop] for name, tensor in case.items()}, **shared)
        torch.testing.assert_close(packed[:, start:stop], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_decays_stay_finite(dtype):
    case = arguments(100, initial=True, resets=True, dtype=dtype)
    case["dt"] = case["dt"] * torch.tensor([1e-8, 1.0, 10.0, 100.0], dtype=dtype)  # per head
    assert_agrees_with_reference(ssd_scan, case, return_final_state=True, chunk_size=32)


def test_strided_inputs():
    case = arguments(19, resets=True, initial=True)
    case = {
        name: t.transpose(0, 1).contiguous().transpose(0, 1) if t is not None and t.dim() > 1 else t
        for name, t in case.items()
    }
    assert not case["x"].is_contiguous()
    assert_agrees_with_reference(ssd_scan, case, return_final_state=True, chunk_size=8)


@pytest.mark.parametrize("length", [1, 21])
def test_fresh_memory_may_hold_anything(length):
    case = arguments(length, resets=True, initial=True)
    with nan_in_fresh_memory():
        assert_agrees_with_reference(ssd_scan, case, return_final_state=True, chunk_size=8)


def test_bfloat16_inputs_keep_float32_states_whatever_autocast_says():
    case = arguments(40, resets=True, initial=True, dtype=torch.float32)
    for name in ("x", "B", "C"):
        case[name] = case[name].bfloat16()
    y, state = ssd_scan(**case, return_final_state=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    exact_y, exact_state = ssd_scan(**case | {"x": case["x"].float()}, return_final_state=True, backend="reference")
    assert (y - exact_y).abs().max() <= 2**-8 * exact_y.abs().max()
    torch.testing.assert_close(state, exact_state, rtol=1e-5, atol=1e-5)
    expected = run_with_gradients(ssd_scan, case, return_final_state=True, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_with_gradients(ssd_scan, case, return_final_state=True, backend="torch")
    assert_close(actual, expected, 0.0)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_is_a_scan_of_one_token_that_writes_over_its_state(dtype, resets):
    case = arguments(1, batch=5, groups=2, resets=resets, initial=True, dtype=dtype)
    state = case.pop("initial_state").to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected, after = ssd_scan(**case, initial_state=state, return_final_state=True, backend="reference")
    memory = state.data_ptr()
    y = ssd_step(**case, state=state)
    assert y.dtype == dtype and state.data_ptr() == memory
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state, after, rtol=1e-6, atol=1e-6)


def test_a_step_of_several_tokens_is_refused():
    case = arguments(2, initial=True)
    state = case.pop("initial_state")
    with pytest.raises(ValueError, match="one token per row, got 2"):
        ssd_step(**case, state=state)


def test_memory_is_linear_in_length():
    sizes = []
    for length in (256, 512):
        case = arguments(length, batch=1, heads=2, width=8, state=8, dtype=torch.float32)
        sizes.append(largest_tensor(ssd_scan, case, backend="torch", chunk_size=16))
    assert sizes[1] <= 2 * sizes[0]
    assert sizes[1] < 512 * 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.rand(2, 11, 3)}, "dt has shape"),
        ({"B": torch.rand(2, 11, 3, 5), "C": torch.rand(2, 11, 3, 5)}, "4 heads cannot share 3 groups"),
        ({"initial_state": torch.rand(2, 4, 5, 3)}, "initial_state has shape"),
        ({"reset": torch.zeros(2, 11, dtype=torch.int64)}, "reset must be bool"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"backend": "cuda"}, "no backend 'cuda'"),
        ({"x": torch.ones(2, 11, 4, 3, dtype=torch.int64), "backend": "torch"}, "dtype torch.int64"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ssd_scan(**(arguments() | change))
