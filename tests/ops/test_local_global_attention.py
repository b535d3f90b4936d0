from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_comparison import (
    assert_agrees_with_reference,
    assert_close,
    largest_tensor,
    nan_in_fresh_memory,
    run_with_gradients,
)

from fusiontree.ops import attention_layout, local_global_attention


def arguments(length=20, heads=4, kv_heads=4, batch=2, width=4, *, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads}
    return {name: torch.randn(batch, length, n, width, generator=draw, dtype=dtype) for name, n in shapes.items()}


def packed_positions(length, batch=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, length, generator=draw) < 4 / length
    starts[:, 0] = True
    index = torch.arange(length)
    return index - torch.where(starts, index, 0).cummax(1).values


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Rows of these tests then span several blocks, of unequal length."""
    monkeypatch.setattr("fusiontree.ops.attention_layouts.LOCAL_QUERIES", 16)
    monkeypatch.setattr("fusiontree.ops.attention_layouts.GLOBAL_QUERIES", 24)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window_size", [1, 5, 16, 40, 100])
@pytest.mark.parametrize("length", [1, 7, 16, 77])
def test_agrees_with_reference(length, window_size, packed):
    positions = packed_positions(length) if packed else None
    options = {"window_size": window_size, "num_global_heads": 1, "position_ids": positions}
    assert_agrees_with_reference(local_global_attention, arguments(length), **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "num_global_heads"),
    [(4, 4, 0), (4, 4, 4), (6, 3, 2), (6, 3, 4), (6, 1, 0), (6, 1, 6), (8, 2, 4)],
)
def test_head_counts_and_groups(heads, kv_heads, num_global_heads, packed):
    positions = packed_positions(50) if packed else None
    options = {"window_size": 9, "num_global_heads": num_global_heads, "position_ids": positions}
    assert_agrees_with_reference(local_global_attention, arguments(50, heads, kv_heads), **options)


@pytest.mark.parametrize("change", ["_takes_cpu_kernel", "_CPU_KERNEL_GROUPS_HEADS"])
@pytest.mark.parametrize("packed", [False, True])
def test_other_devices_and_older_versions_of_torch_take_another_path(packed, change, monkeypatch):
    no = False if change.isupper() else lambda q: False
    monkeypatch.setattr(f"fusiontree.ops.block_attention.{change}", no)
    options = {"window_size": 9, "num_global_heads": 3, "position_ids": packed_positions(50) if packed else None}
    assert_agrees_with_reference(local_global_attention, arguments(50, 6, 2), **options)


def test_agrees_with_reference_in_float32():
    options = {"window_size": 9, "num_global_heads": 1, "position_ids": packed_positions(70)}
    assert_agrees_with_reference(local_global_attention, arguments(70, dtype=torch.float32), **options)


def test_equals_torch_attention_with_an_explicit_mask():
    case, window, length = arguments(60), 7, 60
    out = local_global_attention(**case, window_size=window, num_global_heads=2)
    q, k, v = (tensor.transpose(1, 2) for tensor in case.values())
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for heads, seen in ((slice(0, 2), (distance >= 0) & (distance < window)), (slice(2, 4), distance >= 0)):
        expected = F.scaled_dot_product_attention(q[:, heads], k[:, heads], v[:, heads], attn_mask=seen)
        torch.testing.assert_close(out[:, :, heads].transpose(1, 2), expected, rtol=0, atol=1e-12)


def test_gradcheck():
    case = arguments(7, heads=2, kv_heads=1, batch=1, width=2)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])

    def attend(q, k, v):
        return local_global_attention(q, k, v, window_size=2, num_global_heads=0, position_ids=positions)

    assert torch.autograd.gradcheck(attend, [tensor.requires_grad_() for tensor in case.values()])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 60), window_size=st.integers(1, 30))
def test_documents_in_one_row_equal_documents_alone(seed, length, window_size):
    case, positions = arguments(length, batch=1, seed=seed), packed_positions(length, batch=1, seed=seed)
    options = {"window_size": window_size, "num_global_heads": 2}
    packed = local_global_attention(**case, **options, position_ids=positions)
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), length]
    for start, stop in zip(starts, starts[1:], strict=False):
        alone = local_global_attention(**{name: t[:, start:stop] for name, t in case.items()}, **options)
        torch.testing.assert_close(packed[:, start:stop], alone, rtol=0, atol=1e-12)


def test_a_row_may_begin_inside_a_document():
    case = arguments(30)
    positions = torch.arange(30).expand(2, 30) + 1000
    options = {"window_size": 9, "num_global_heads": 2}
    out = local_global_attention(**case, **options, position_ids=positions)
    assert torch.equal(out, local_global_attention(**case, **options))


@pytest.mark.parametrize("packed", [False, True])
def test_a_layout_is_shared_by_layers_of_any_window_and_dtype(packed):
    positions = packed_positions(50) if packed else None
    layout = attention_layout(positions, 50)
    for dtype in (torch.float32, torch.float64):
        for window_size in (3, 20, 64):
            case = arguments(50, dtype=dtype)
            options = {"window_size": window_size, "num_global_heads": 2}
            with_layout = run_with_gradients(local_global_attention, case, layout=layout, **options)
            without = run_with_gradients(local_global_attention, case, position_ids=positions, **options)
            assert_close(with_layout, without, 0.0)


def test_masks_too_many_to_keep_are_built_again(monkeypatch):
    monkeypatch.setattr("fusiontree.ops.attention_layouts.KEPT_MASK_ELEMENTS", 500)
    options = {"window_size": 9, "num_global_heads": 2, "position_ids": packed_positions(90)}
    assert_agrees_with_reference(local_global_attention, arguments(90), **options)


def test_strided_inputs_and_fresh_memory():
    qkv = torch.randn(2, 40, 12, 4, dtype=torch.float64)
    case = dict(zip("qkv", qkv.split(4, dim=2), strict=True))
    with nan_in_fresh_memory():
        for positions in (None, packed_positions(40)):
            options = {"window_size": 9, "num_global_heads": 2, "position_ids": positions}
            assert_agrees_with_reference(local_global_attention, case, **options)


def test_no_tensor_holds_all_pairs_of_tokens():
    length = 512
    for positions in (None, packed_positions(length, batch=1)):
        case = arguments(length, batch=1, dtype=torch.float32)
        options = {"window_size": 16, "num_global_heads": 1, "position_ids": positions}
        assert largest_tensor(local_global_attention, case, backend="torch", **options) < length * length // 4


def test_cost_of_local_heads_is_linear_in_length():
    """Pairs of query and key that the blocks of a layout cover."""
    pairs = [
        sum(
            (b.query_stop - b.query_start) * (b.key_stop - b.key_start)
            for b in attention_layout(None, n).local_blocks(32)
        )
        for n in (512, 1024, 2048)
    ]
    assert pairs[2] - pairs[1] == 2 * (pairs[1] - pairs[0])
    assert pairs[2] < 2048 * (32 + 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    case = {name: tensor.to(dtype) for name, tensor in arguments(60, dtype=torch.float32).items()}
    options = {"window_size": 9, "num_global_heads": 2, "position_ids": packed_positions(60)}
    actual = run_with_gradients(local_global_attention, case, **options)
    exact = {name: tensor.float() for name, tensor in case.items()}
    expected = run_with_gradients(local_global_attention, exact, backend="reference", **options)
    assert all(tensor.dtype == dtype for tensor in actual.values())
    assert_close(actual, expected, 2**-6)


def test_autocast_casts_as_torch_attention_does():
    case = arguments(30, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = local_global_attention(**case, window_size=5, num_global_heads=1)
        assert out.dtype == torch.bfloat16
        mixed = local_global_attention(case["q"], case["k"].bfloat16(), case["v"], window_size=5, num_global_heads=1)
    assert torch.equal(out, mixed)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "change", "message"),
    [
        (6, 3, {"num_global_heads": 1}, "num_global_heads must be a multiple of 2"),
        (4, 4, {"num_global_heads": 5}, "up to 4, got 5"),
        (4, 3, {}, "4 query heads cannot share 3 key heads"),
        (4, 4, {"window_size": 0}, "window_size must be at least 1"),
        (4, 4, {"position_ids": torch.zeros(2, 19, dtype=torch.int64)}, "position_ids have shape"),
        (4, 4, {"layout": attention_layout(None, 19)}, "layout is for 19 tokens, not 20"),
        (4, 4, {"backend": "flash"}, "no backend 'flash'"),
    ],
)
def test_bad_arguments_are_refused(heads, kv_heads, change, message):
    options = {"window_size": 4, "num_global_heads": 0} | change
    with pytest.raises(ValueError, match=message):
        local_global_attention(**arguments(20, heads, kv_heads), **options)
