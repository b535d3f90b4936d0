"""Every backend of attention and of the loss that works on this machine's GPU, held to the reference there."""

from __future__ import annotations

import pytest
import test_cross_entropy
import torch
from op_comparison import (
    TOLERANCE,
    assert_agrees_with_reference,
    assert_close,
    fill_freed_memory_with_nan,
    run_with_gradients,
)
from test_cached_attention import arguments as cached_arguments
from test_local_global_attention import arguments, packed_positions

from fusiontree.ops import (
    BackendError,
    attention_layout,
    available_backends,
    cached_attention,
    linear_cross_entropy,
    local_global_attention,
    resolve,
    token_cross_entropy,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def backends_of(op):
    return [name for name, (usable, _) in available_backends()[op].items() if usable and name != "reference"]


@pytest.fixture(autouse=True)
def afresh():
    """Each test compiles what it needs, and its outputs are allocated where NaN stood."""
    fill_freed_memory_with_nan(torch.device("cuda"))
    yield
    torch.compiler.reset()


def on_gpu(case, dtype):
    return {name: t.to("cuda", dtype if t.is_floating_point() else t.dtype) for name, t in case.items()}


def skip_if_refused(op, backend, *tensors, **arguments):
    try:
        resolve(op, backend, *tensors, **arguments)
    except BackendError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("backend", backends_of("local_global_attention"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "num_global_heads", "window_size"),
    [
        (1, 4, 4, 1, 5),
        (77, 4, 4, 2, 9),
        (128, 4, 4, 0, 128),
        (300, 6, 3, 2, 50),
        (300, 8, 2, 8, 1),
        (515, 4, 4, 2, 900),
    ],
)
def test_local_global_attention(backend, dtype, packed, length, heads, kv_heads, num_global_heads, window_size):
    case = on_gpu(arguments(length, heads, kv_heads, width=32), dtype)
    skip_if_refused("local_global_attention", backend, *case.values())
    options = {"window_size": window_size, "num_global_heads": num_global_heads}
    options["position_ids"] = packed_positions(length).cuda() if packed else None
    assert_agrees_with_reference(local_global_attention, case, backend=backend, **options)


@pytest.mark.parametrize("backend", backends_of("local_global_attention"))
@pytest.mark.parametrize("packed", [False, True])
def test_heads_of_a_projection_and_layers_of_other_windows_under_autocast(backend, packed):
    """As the model calls it: strided views of one tensor, one layout for all layers, float32 cast by autocast."""
    length = 200
    qkv = torch.randn(2, length, 12, 64, generator=torch.Generator().manual_seed(0)).cuda()
    case = dict(zip("qkv", qkv.split(4, dim=2), strict=True))
    layout = attention_layout(packed_positions(length).cuda() if packed else None, length, device="cuda")
    for window_size in (16, 32, 16):
        options = {"window_size": window_size, "num_global_heads": 2, "layout": layout}
        expected = run_with_gradients(local_global_attention, case, backend="reference", **options)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            actual = run_with_gradients(local_global_attention, case, backend=backend, **options)
        assert actual["output 0"].dtype == torch.bfloat16
        assert_close(actual, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_auto_takes_for_attention(dtype, gradient):
    qkv = [torch.zeros(1, 3, 2, 64, dtype=dtype, device="cuda", requires_grad=gradient) for _ in range(3)]
    usable = backends_of("local_global_attention")
    order = [name for name in ("flash_attn", "flex", "torch") if name in usable]
    if dtype == torch.float32 or torch.cuda.get_device_capability() < (8, 0):
        order = [name for name in order if name != "flash_attn"]
    if not gradient:
        order = [name for name in order if name != "flex"]
    with torch.set_grad_enabled(gradient):
        expected = resolve("local_global_attention", order[0], *qkv)
        assert resolve("local_global_attention", "auto", *qkv) is expected


@pytest.mark.parametrize("backend", backends_of("cached_attention"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "slots", "heads", "kv_heads"), [(1, 1, 4, 4), (1, 300, 6, 2), (20, 77, 4, 4)])
def test_cached_attention(backend, dtype, length, slots, heads, kv_heads):
    case = on_gpu(cached_arguments(length, slots, heads, kv_heads, width=32), dtype)
    assert_agrees_with_reference(cached_attention, case, backend=backend, window_size=50)
    invisible = case["key_index"] < 0
    expected = cached_attention(**case, backend=backend)
    case |= {name: case[name].masked_fill(invisible[:, :, None, None], float("nan")) for name in ("k", "v")}
    with torch.no_grad():
        actual = cached_attention(**case, backend=backend)
    assert_close({"output": actual}, {"output": expected}, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", backends_of("linear_cross_entropy"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.1])
@pytest.mark.parametrize("length", [1, 300])
def test_linear_cross_entropy(backend, dtype, ignored, length):
    case = test_cross_entropy.arguments(length, 64, 517, ignored=ignored, scale=0.1)
    case = on_gpu(case, dtype)
    skip_if_refused("linear_cross_entropy", backend, case["hidden"], case["weight"])
    assert_agrees_with_reference(linear_cross_entropy, case, backend=backend)
    assert linear_cross_entropy(**case, backend=backend).dtype == torch.float32
    case["hidden"][case["labels"] == -100] = float("nan")
    assert all(t.isfinite().all() for t in run_with_gradients(linear_cross_entropy, case, backend=backend).values())


@pytest.mark.parametrize("backend", backends_of("linear_cross_entropy"))
def test_linear_cross_entropy_under_autocast(backend):
    case = on_gpu(test_cross_entropy.arguments(300, 64, 517), torch.float32)
    expected = run_with_gradients(linear_cross_entropy, case, backend="reference")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = run_with_gradients(linear_cross_entropy, case, backend=backend)
    assert all(tensor.dtype == torch.float32 for tensor in actual.values())
    for name, want in expected.items():
        assert 0 < (actual[name] - want).abs().max() <= 2**-6 * want.abs().max(), name


@pytest.mark.parametrize("backend", backends_of("linear_cross_entropy"))
def test_two_backward_passes_through_the_loss(backend):
    case = on_gpu(test_cross_entropy.arguments(), torch.float32)
    leaves = [case[name].requires_grad_() for name in ("hidden", "weight")]
    loss = linear_cross_entropy(*leaves, case["labels"], backend=backend)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    half = torch.autograd.grad(loss * 0.5, leaves)
    for a, b in zip(once, half, strict=True):
        torch.testing.assert_close(a * 0.5, b)


@pytest.mark.parametrize("backend", backends_of("token_cross_entropy"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_cross_entropy(backend, dtype):
    case = on_gpu(test_cross_entropy.arguments(300, 64, 517, scale=0.1), dtype)
    expected = token_cross_entropy(
        **{n: t.double() if t.is_floating_point() else t for n, t in case.items()}, backend="reference"
    )
    assert_close({"losses": token_cross_entropy(**case, backend=backend)}, {"losses": expected}, TOLERANCE[dtype])
