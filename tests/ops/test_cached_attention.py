from __future__ import annotations

import pytest
import torch
from op_comparison import assert_agrees_with_reference, assert_close, nan_in_fresh_memory, run_with_gradients

from fusiontree.ops import cached_attention, cached_layout, local_global_attention, whole_layout


def arguments(length=5, slots=12, heads=4, kv_heads=2, batch=2, width=4, *, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    case = {
        name: torch.randn(batch, n, h, width, generator=draw, dtype=dtype)
        for name, n, h in (("q", length, heads), ("k", slots, kv_heads), ("v", slots, kv_heads))
    }
    return case | {
        "query_index": torch.randint(-1, slots, (batch, length), generator=draw),
        "key_index": torch.randint(-1, slots, (batch, slots), generator=draw),
    }


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("fusiontree.ops.attention_layouts.GLOBAL_QUERIES", 16)


@pytest.mark.parametrize("window", [None, 1, 5, "per query"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("length", "slots"), [(1, 1), (1, 30), (7, 9), (16, 40), (50, 50)])
def test_agrees_with_reference(length, slots, heads, kv_heads, window):
    case = arguments(length, slots, heads, kv_heads)
    if window == "per query":
        window = torch.randint(1, 9, (2, length), generator=torch.Generator().manual_seed(1))
    assert_agrees_with_reference(cached_attention, case, window_size=window)


@pytest.mark.parametrize("length", [1, 20])
def test_without_gradient_as_with(length):
    case = arguments(length, 30, 6, 2)
    expected = run_with_gradients(cached_attention, case, window_size=6, backend="reference")["output 0"]
    with torch.no_grad():
        out = cached_attention(**case, window_size=6)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 20])
def test_agrees_with_reference_in_lower_precision(length, dtype):
    case = arguments(length, 300, 6, 2, width=16, dtype=torch.float32)
    case = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.items()}
    exact = {name: t.double() if t.is_floating_point() else t for name, t in case.items()}
    out = cached_attention(**case)
    assert out.dtype == dtype
    expected = cached_attention(**exact, backend="reference")
    assert (out - expected).abs().max() <= (2e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("slots", [5, 1100])
def test_one_query_over_few_and_many_keys(slots, heads_first, dtype):
    case = arguments(1, slots, 6, 2, width=16, dtype=dtype)
    if heads_first:  # as a cache keeps them
        for name in ("k", "v"):
            case[name] = case[name].transpose(1, 2).contiguous().transpose(1, 2)
    indices = {name: case.pop(name) for name in ("query_index", "key_index")}
    everything = {"query_index": torch.full((2, 1), slots - 1), "key_index": torch.arange(slots).expand(2, -1)}
    exact = {name: tensor.double() for name, tensor in case.items()}
    with torch.no_grad():
        for given, layout in ((indices, cached_layout(**indices)), (everything, whole_layout(2, slots, "cpu"))):
            expected = cached_attention(**exact, **given, backend="reference")
            out = cached_attention(**case, layout=layout)
            assert out.dtype == dtype
            bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
            assert (out - expected).abs().max() <= bound
            by_reference = cached_attention(**exact, layout=layout, backend="reference")
            torch.testing.assert_close(by_reference, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("length", [1, 20])
def test_a_query_that_sees_nothing_gets_zero(length, gradients):
    case = arguments(length, 9)
    case["query_index"][0] = -1
    case["key_index"][1] = -1
    if gradients:
        results = run_with_gradients(cached_attention, case, backend="torch")
        assert all(tensor.eq(0).all() for tensor in results.values())
    else:
        assert cached_attention(**case).eq(0).all()
    assert cached_attention(**case, backend="reference").eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("length", [1, 20])
def test_unused_slots_may_hold_anything(length, bad, dtype):
    case = arguments(length, 40, 4, 2, dtype=torch.float32)
    case = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.items()}
    unused = case["key_index"] < 0
    assert unused.any()
    clean, clean_without = run_with_gradients(cached_attention, case, backend="torch"), cached_attention(**case)
    for names in ("k", "v", "kv"):
        dirty = dict(case)
        for name in names:
            dirty[name] = case[name].masked_fill(unused[:, :, None, None], bad)
        assert torch.equal(cached_attention(**dirty), clean_without)
        results = run_with_gradients(cached_attention, dirty, backend="torch")
        assert_close({n: t.float() for n, t in results.items()}, {n: t.float() for n, t in clean.items()}, 0.0)


def test_ring_of_the_last_keys_in_any_order_equals_a_window():
    whole, window = arguments(30, 30, 4, 4, batch=1), 8
    q, k, v = whole["q"], whole["k"], whole["v"]
    expected = local_global_attention(q, k, v, window_size=window, num_global_heads=0)
    ring_k, ring_v = torch.full((2, 1, window, 4, 4), float("nan"), dtype=q.dtype)
    ring_index = torch.full((1, window), -1)
    for t in range(30):
        ring_k[:, t % window], ring_v[:, t % window], ring_index[:, t % window] = k[:, t], v[:, t], t
        query_index = torch.tensor([[t]])
        out = cached_attention(q[:, t : t + 1], ring_k, ring_v, query_index=query_index, key_index=ring_index)
        torch.testing.assert_close(out, expected[:, t : t + 1], rtol=0, atol=1e-12)


def test_a_piece_over_past_and_own_keys_equals_one_pass():
    whole = arguments(60, 60, 6, 3, batch=1)
    index = torch.arange(60)[None]
    for window, num_global_heads in ((9, 0), (None, 6)):
        options = {"window_size": window or 1, "num_global_heads": num_global_heads}
        expected = local_global_attention(whole["q"], whole["k"], whole["v"], **options)
        piece = cached_attention(
            whole["q"][:, 23:], whole["k"], whole["v"], query_index=index[:, 23:], key_index=index, window_size=window
        )
        torch.testing.assert_close(piece, expected[:, 23:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 20])
def test_a_layout_is_shared_by_layers_of_any_heads_and_dtype(length):
    indices = {name: arguments(length, 30)[name] for name in ("query_index", "key_index")}
    layout = cached_layout(**indices, window_size=9)
    for dtype in (torch.float32, torch.float64):
        for seed in range(2):
            case = arguments(length, 30, 6, 3, dtype=dtype, seed=seed) | indices
            expected = cached_attention(**case, window_size=9)
            out = cached_attention(case["q"], case["k"], case["v"], layout=layout)
            assert torch.equal(out, expected)


def test_blocks_of_queries_read_only_the_keys_they_may_see():
    index = torch.arange(64)[None]
    layout = cached_layout(index, index, window_size=10)
    assert [(b.query_start, b.key_start, b.key_stop) for b in layout.blocks] == [
        (0, 0, 16),
        (16, 7, 32),
        (32, 23, 48),
        (48, 39, 64),
    ]


def test_no_slots_at_all():
    case = arguments(3, 5)
    out = cached_attention(
        case["q"],
        case["k"][:, :0],
        case["v"][:, :0],
        query_index=case["query_index"],
        key_index=case["key_index"][:, :0],
    )
    assert out.eq(0).all()


def test_strided_caches_and_fresh_memory():
    case = arguments(6, 20)
    for name in ("k", "v"):  # heads before slots in memory, and room for more
        room = torch.full((2, 2, 32, 4), float("nan"), dtype=torch.float64)
        room[:, :, :20] = case[name].transpose(1, 2)
        case[name] = room[:, :, :20].transpose(1, 2)
    one = case | {"q": case["q"][:, :1], "query_index": case["query_index"][:, :1]}
    with nan_in_fresh_memory():
        assert_agrees_with_reference(cached_attention, case, window_size=7)
        assert_agrees_with_reference(cached_attention, one, window_size=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_index": torch.zeros(2, 4, dtype=torch.int64)}, "query_index has shape"),
        ({"key_index": torch.zeros(1, 12, dtype=torch.int64)}, "key_index has shape"),
        ({"window_size": torch.ones(5, dtype=torch.int64)}, "window_size has shape"),
        ({"window_size": 0}, "window_size must be at least 1"),
        ({"key_index": None}, "needs query_index and key_index"),
        ({"v": torch.zeros(2, 12, 4, 4, dtype=torch.float64)}, "k has shape"),
        ({"q": torch.zeros(2, 5, 3, 4, dtype=torch.float64)}, "3 query heads cannot share 2 key heads"),
        ({"backend": "paged"}, "no backend 'paged'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        cached_attention(**(arguments() | change))
