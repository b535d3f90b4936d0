"""The C++ attention in bfloat16, on CPUs with AMX, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from op_comparison import assert_agrees_with_reference, nan_in_fresh_memory, run_with_gradients

from fusiontree.ops import BackendError, cpu_attention, cpu_kernels, local_global_attention

pytestmark = pytest.mark.skipif(cpu_attention.unusable() is not None, reason="needs a CPU with AMX and a C++ compiler")


def arguments(
    length: int, heads: int = 4, kv_heads: int = 2, width: int = 64, batch: int = 2
) -> dict[str, torch.Tensor]:
    """Parts of one wider tensor, as in the model."""
    draw = torch.Generator().manual_seed(length)
    parts = torch.randn(2, length, heads + 2 * kv_heads, width, generator=draw).bfloat16()
    return dict(zip(("q", "k", "v"), parts.split([heads, kv_heads, kv_heads], dim=2), strict=True))


def documents(length: int) -> torch.Tensor:
    """Positions in documents of some 60 tokens, other ones in each row."""
    begins = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 1 / 60
    begins[:, 0] = True
    index = torch.arange(length)
    return index - torch.where(begins, index, 0).cummax(1).values


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [1, 31, 100, 128, 1000])
@pytest.mark.parametrize("length", [1, 31, 64, 129, 300, 512])
def test_agrees_with_reference(length: int, window: int, packed: bool) -> None:
    options = {"window_size": window, "num_global_heads": 2, "position_ids": documents(length) if packed else None}
    assert_agrees_with_reference(local_global_attention, arguments(length), backend="cpp", **options)


@pytest.mark.parametrize("width", [32, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads", "num_global_heads"), [(3, 3, 0), (6, 2, 6), (8, 1, 0), (6, 3, 2)])
def test_heads(heads: int, kv_heads: int, num_global_heads: int, width: int) -> None:
    options = {"window_size": 70, "num_global_heads": num_global_heads, "position_ids": documents(260)}
    assert_agrees_with_reference(
        local_global_attention, arguments(260, heads, kv_heads, width), backend="cpp", **options
    )


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_flat_and_sharp_weights(scale: float) -> None:
    case = arguments(300)
    case["q"] = case["q"] * scale
    # Rounded scores of up to 300 stand in both; what differs is how a sharp softmax answers to rounding.
    assert_agrees_with_reference(
        local_global_attention, case, backend="cpp", tolerance=2**-5, window_size=90, num_global_heads=2
    )


def test_no_memory_is_read_that_nobody_wrote() -> None:
    with nan_in_fresh_memory():
        options = {"window_size": 50, "num_global_heads": 2, "position_ids": documents(200)}
        assert_agrees_with_reference(local_global_attention, arguments(200), backend="cpp", **options)


def test_results_do_not_depend_on_threads_or_on_who_used_the_registers_before() -> None:
    case, options = arguments(300), {"window_size": 90, "num_global_heads": 2, "backend": "cpp"}
    left, right = torch.randn(300, 300).bfloat16(), torch.randn(300, 300).bfloat16()
    product = left @ right
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(run_with_gradients(local_global_attention, case, **options))
            assert torch.equal(left @ right, product)
    finally:
        torch.set_num_threads(before)
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_what_is_not_a_number_stays_so() -> None:
    case = arguments(200)
    case["q"] = case["q"].clone()
    case["q"][1, 77] = torch.nan
    out = local_global_attention(**case, window_size=50, num_global_heads=2, backend="cpp")
    expected = torch.zeros(2, 200, dtype=torch.bool)
    expected[1, 77] = True
    assert torch.equal(out.isnan().all(-1).all(-1), expected)
    assert torch.equal(out.isnan().any(-1).any(-1), expected)


def test_autocast_gives_it_float32() -> None:
    case = {name: tensor.float() for name, tensor in arguments(300).items()}
    options = {"window_size": 50, "num_global_heads": 2, "backend": "cpp"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = local_global_attention(**case, **options)
    assert torch.equal(out, local_global_attention(**arguments(300), **options))


def test_auto_takes_it_for_large_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    case, options = arguments(300), {"window_size": 50, "num_global_heads": 2}
    expected = {name: local_global_attention(**case, **options, backend=name) for name in ("cpp", "torch")}
    assert not torch.equal(*expected.values()), "rounded alike, they cannot be told apart"
    assert torch.equal(local_global_attention(**case, **options), expected["torch"])
    monkeypatch.setattr(cpu_kernels, "FEWEST_ELEMENTS", 2**16)
    assert torch.equal(local_global_attention(**case, **options), expected["cpp"])


@pytest.mark.parametrize(("width", "dtype"), [(48, torch.bfloat16), (64, torch.float32), (64, torch.float64)])
def test_what_it_cannot_do_is_refused(width: int, dtype: torch.dtype) -> None:
    case = {name: tensor.to(dtype) for name, tensor in arguments(40, width=width).items()}
    with pytest.raises(BackendError, match="channels|dtype|bfloat16 alone"):
        local_global_attention(**case, window_size=50, num_global_heads=2, backend="cpp")
