"""FlexAttention: its mask, what it refuses, and on CPU its compiled forward pass. Gradients: test_gpu_attention.py."""

from __future__ import annotations

import pytest
import torch
from op_comparison import TOLERANCE, assert_close
from test_local_global_attention import arguments, packed_positions
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from fusiontree.ops import BackendError, attention_layout, flex_attention, local_global_attention, reference, resolve

needs_compiler = pytest.mark.skipif(
    flex_attention.find_unusable() is not None, reason="torch.compile does not work here"
)


@pytest.fixture(autouse=True)
def afresh():
    yield
    torch.compiler.reset()


def layout_of(length, packed):
    return attention_layout(packed_positions(length) if packed else None, length)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_global_heads", [0, 1, 3])
@pytest.mark.parametrize(("length", "window_size"), [(1, 1), (9, 1), (30, 4), (30, 100)])
def test_the_mask_function_says_what_the_reference_sees(length, window_size, num_global_heads, packed):
    heads = {"window_size": window_size, "num_global_heads": num_global_heads}
    # Equal scores and the unit vectors as values: the output is above zero where a key is seen.
    q = k = torch.zeros(2, length, 3, length)
    v = torch.eye(length)[None, :, None].expand_as(k)
    seen = reference.local_global_attention(
        q, k, v, **heads, position_ids=packed_positions(length) if packed else None
    ).transpose(1, 2)
    mask = flex_attention.mask_function(layout_of(length, packed), heads=3, **heads)
    assert torch.equal(create_mask(mask, 2, 3, length, length, device="cpu"), seen > 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window_size", [1, 100, 128, 129, 300, 2000])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 700])
def test_the_block_mask_equals_torchs_own(length, window_size, packed):
    layout, heads = layout_of(length, packed), {"window_size": window_size, "num_global_heads": 1, "heads": 2}
    mask = flex_attention.build_block_mask(layout, **heads)
    rows = 1 if layout.starts is None else 2
    expected = create_block_mask(flex_attention.mask_function(layout, **heads), rows, 2, length, length, device="cpu")
    assert mask.shape == expected.shape and mask.BLOCK_SIZE == expected.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        numbers = getattr(mask, f"{kind}_num_blocks")
        assert torch.equal(numbers, getattr(expected, f"{kind}_num_blocks")), kind
        listed = torch.arange(-(-length // 128)) < numbers[..., None]  # what follows is never read
        indices = (getattr(m, f"{kind}_indices").masked_fill(~listed, -1) for m in (mask, expected))
        assert torch.equal(*indices), kind


def test_layers_share_the_mask_of_one_window(monkeypatch):
    masks = []

    def flex(q, k, v, *, block_mask, enable_gqa):
        masks.append(block_mask)
        return q

    monkeypatch.setattr(flex_attention, "_flex_attention", lambda device: flex)
    case, layout = arguments(20, dtype=torch.float32), attention_layout(None, 20)
    for window_size in (5, 5, 7):
        local_global_attention(**case, window_size=window_size, num_global_heads=1, layout=layout, backend="flex")
    assert masks[0] is masks[1] and masks[1] is not masks[2]


@pytest.mark.parametrize("packed", [False, True])
def test_layers_of_other_windows_and_other_batches_share_what_was_compiled(packed, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention as flex

    counter = CompileCounter()  # compiles to the unfused form, in no time
    monkeypatch.setattr(
        flex_attention, "_flex_attention", lambda device: torch.compile(flex, backend=counter, fullgraph=True)
    )
    case = arguments(40, dtype=torch.float32)
    for seed, window_size in enumerate((5, 9, 100)):
        options = {"window_size": window_size, "num_global_heads": 1}
        options["position_ids"] = packed_positions(40, seed=seed) if packed else None
        actual = local_global_attention(**case, **options, backend="flex")
        expected = local_global_attention(**case, **options, backend="reference")
        assert_close({"output": actual}, {"output": expected}, TOLERANCE[torch.float32])
    assert counter.frame_count == 1


def check_forward(length, heads=6, kv_heads=3, *, packed=True, window_size=50, dtype=torch.float32):
    case = {
        name: tensor.to(dtype).requires_grad_()
        for name, tensor in arguments(length, heads, kv_heads, width=16, dtype=torch.float32).items()
    }
    options = {"window_size": window_size, "num_global_heads": 2}
    options["position_ids"] = packed_positions(length) if packed else None
    with torch.no_grad():
        actual = local_global_attention(**case, **options, backend="flex")
        exact = {name: tensor.double() for name, tensor in case.items()}
        expected = local_global_attention(**exact, **options, backend="reference")
    assert actual.dtype == dtype
    assert_close({"output": actual}, {"output": expected}, TOLERANCE[dtype])


@needs_compiler
def test_compiled_on_cpu_it_agrees_with_the_reference():
    check_forward(203)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 7, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_lengths_and_dtypes(length, packed, dtype):
    check_forward(length, packed=packed, dtype=dtype)
    check_forward(length, 4, 4, packed=packed, dtype=dtype, window_size=1000)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "does not support dtype torch.float64"),
        ({"requires_grad": True}, "no backward pass on CPU"),
        ({"device": "meta"}, "runs on CUDA and CPU tensors, not on meta"),
    ],
)
def test_what_it_cannot_honour_is_refused(change, reason, monkeypatch):
    monkeypatch.setattr(flex_attention, "find_unusable", lambda: None)
    qkv = [torch.zeros(1, 3, 2, 16, **change) for _ in range(3)]
    with pytest.raises(BackendError, match=f"'flex' of local_global_attention cannot run this call: .*{reason}"):
        local_global_attention(*qkv, window_size=2, num_global_heads=1, backend="flex")


@pytest.mark.parametrize("width", [8, 264])
def test_heads_too_narrow_or_too_wide_for_the_cuda_kernel_are_refused(width):
    with FakeTensorMode():
        qkv = [torch.empty(1, 3, 2, width, device="cuda") for _ in range(3)]
        with pytest.raises(BackendError, match=f"heads of 16 to 256 channels, not {width}"):
            resolve("local_global_attention", "flex", *qkv)


def test_a_gpu_that_triton_does_not_compile_for_is_refused(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with FakeTensorMode():
        q = torch.empty(1, 3, 2, 16, device="cuda")
    assert flex_attention.refuses(q, q, q) == "it needs a GPU of compute capability 7.0, not 6.1"


def test_without_a_compiler_it_is_not_usable(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert flex_attention.find_unusable() == "torch.compile needs a C++ compiler and finds none"
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert flex_attention.find_unusable() == "torch.compile is switched off in the environment"


@needs_compiler
def test_auto_takes_it_for_training_on_cuda_alone(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    flex, plain = (
        resolve("local_global_attention", name, *[torch.zeros(1, 3, 2, 16)] * 3) for name in ("flex", "torch")
    )
    for device, gradient, expected in (
        ("cpu", True, plain),
        ("cpu", False, plain),
        ("cuda", False, plain),
        ("cuda", True, flex),
    ):
        with FakeTensorMode():
            # float32, which flash_attn refuses where it is installed.
            qkv = [torch.empty(1, 3, 2, 16, device=device, requires_grad=gradient) for _ in range(3)]
            assert resolve("local_global_attention", "auto", *qkv) is expected
