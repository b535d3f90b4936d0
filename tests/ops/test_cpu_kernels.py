"""The C++ kernels of six ops against their references, and when `auto` takes them."""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from op_comparison import assert_agrees_with_reference, nan_in_fresh_memory, run_with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode

from fusiontree.ops import (
    BackendError,
    apply_rotary,
    backends,
    causal_conv1d,
    cpu_kernels,
    gated_mix,
    gated_rms_norm,
    resolve,
    ssd_scan,
    swiglu,
)

pytestmark = pytest.mark.skipif(cpu_kernels.unusable() is not None, reason="needs a C++ compiler")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not looked for the kernels yet."""
    cpu_kernels._outcome.cache_clear()
    monkeypatch.setattr(backends, "_announced", set())
    yield
    cpu_kernels._outcome.cache_clear()


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def conv_case(
    length: int, taps: int = 4, *, dtype: torch.dtype = torch.float32, **given: bool
) -> dict[str, torch.Tensor | None]:
    """x is a part of a wider tensor, as in the model."""
    draw = torch.Generator().manual_seed(length)
    case: dict[str, torch.Tensor | None] = {
        "x": normal(2, length, 40, dtype=dtype)[..., 3:24],
        "weight": normal(21, taps),
    }
    if given.get("bias"):
        case["bias"] = normal(21)
    if given.get("resets"):
        case["reset"] = torch.rand(2, length, generator=draw) < 0.3
    if given.get("initial"):
        case["initial_state"] = normal(2, taps - 1, 21)
    return case


def norm_case(tokens: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    z = normal(2, tokens, 90, dtype=dtype)[..., 11:71]
    return {"y": normal(2, tokens, 3, 20, dtype=dtype), "z": z, "weight": normal(60)}


def mix_case(tokens: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    logits, a, b = (scale * normal(2, tokens, 37 + i, dtype=dtype)[..., i:] for i, scale in enumerate((3, 1, 1)))
    return {"logits": logits, "a": a, "b": b}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 3, 19, 150])
@pytest.mark.parametrize(("taps", "activation"), [(4, "silu"), (4, None), (3, "silu"), (1, None), (5, "silu")])
def test_convolution(length: int, taps: int, activation: str | None, dtype: torch.dtype) -> None:
    for bias, resets, initial in itertools.product((False, True), repeat=3):
        case = conv_case(length, taps, dtype=dtype, bias=bias, resets=resets, initial=initial)
        options: dict[str, Any] = {"return_final_state": True, "activation": activation}
        with nan_in_fresh_memory():
            assert_agrees_with_reference(causal_conv1d, case, backend="cpp", **options)


def test_a_row_that_starts_anew_ignores_its_initial_state() -> None:
    case = conv_case(9, initial=True)
    case["reset"] = torch.zeros(2, 9, dtype=torch.bool)
    case["reset"][0, 0] = True
    case["initial_state"][0] = float("nan")
    found = run_with_gradients(causal_conv1d, case, backend="cpp", return_final_state=True)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert found["gradient of initial_state"][0].eq(0).all()


def scan_case(
    length: int, *, dtype: torch.dtype = torch.float32, groups: int = 1, strength: float = 1.0, **given: bool
) -> dict[str, torch.Tensor]:
    """x, B and C are parts of one wider tensor, as in the model; states and heads of no round width."""
    draw = torch.Generator().manual_seed(length)
    wide = normal(2, length, 32 + 36 * groups, dtype=dtype)
    x, B, C = wide.split((32, 18 * groups, 18 * groups), dim=-1)
    case = {
        "x": x.unflatten(-1, (4, 8)),
        "dt": strength * torch.rand(2, length, 4, generator=draw),
        "A": -strength * torch.rand(4, generator=draw),
        "B": B.unflatten(-1, (groups, 18)),
        "C": C.unflatten(-1, (groups, 18)),
    }
    if given.get("skip"):
        case["D"] = normal(4)
    if given.get("resets"):
        case["reset"] = torch.rand(2, length, generator=draw) < 0.1
    if given.get("initial"):
        case["initial_state"] = normal(2, 4, 8, 18)
    return case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2, 16, 40, 67])
@pytest.mark.parametrize(("groups", "strength"), [(1, 1.0), (2, 10.0)])
def test_scan(length: int, groups: int, strength: float, dtype: torch.dtype) -> None:
    for skip, resets, initial in itertools.product((False, True), repeat=3):
        given = {"skip": skip, "resets": resets, "initial": initial}
        case = scan_case(length, dtype=dtype, groups=groups, strength=strength, **given)
        with nan_in_fresh_memory():
            assert_agrees_with_reference(ssd_scan, case, backend="cpp", chunk_size=16, return_final_state=True)


def test_a_scan_without_its_state_and_in_one_chunk() -> None:
    case = scan_case(40, skip=True)
    for chunk_size in (1, 17, 64):
        assert_agrees_with_reference(ssd_scan, case, backend="cpp", chunk_size=chunk_size)


def test_a_scan_that_starts_anew_ignores_its_initial_state() -> None:
    case = scan_case(20, initial=True)
    case["reset"] = torch.zeros(2, 20, dtype=torch.bool)
    case["reset"][0, 0] = True
    case["initial_state"][0] = float("nan")
    found = run_with_gradients(ssd_scan, case, backend="cpp", return_final_state=True)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert found["gradient of initial_state"][0].eq(0).all()


def test_a_token_without_time_leaves_the_state_as_it_is() -> None:
    case = scan_case(30, initial=True)
    case["dt"][:, 10:] = 0
    _, state = ssd_scan(**case, backend="cpp", return_final_state=True, chunk_size=8)
    start = {name: case[name][:, :10] for name in ("x", "dt", "B", "C")}
    _, before = ssd_scan(**case | start, backend="cpp", return_final_state=True, chunk_size=8)
    assert torch.equal(state, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_gated_norm(tokens: int, dtype: torch.dtype) -> None:
    with nan_in_fresh_memory():
        assert_agrees_with_reference(gated_rms_norm, norm_case(tokens, dtype), backend="cpp", eps=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize(("tokens", "angle_rows"), [(1, 1), (7, 2), (200, 1)])
def test_rotary(tokens: int, angle_rows: int, backend: str, dtype: torch.dtype) -> None:
    angle = 6 * torch.rand(angle_rows, tokens, 16, generator=torch.Generator().manual_seed(0))

    def turned(x: torch.Tensor, backend: str) -> torch.Tensor:
        return apply_rotary(x, angle.cos(), angle.sin(), backend=backend)

    x = normal(2, tokens, 105, dtype=dtype)[..., 4:100].unflatten(-1, (3, 32))
    with nan_in_fresh_memory():
        assert_agrees_with_reference(turned, {"x": x}, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_gated_mix(tokens: int, backend: str, dtype: torch.dtype) -> None:
    with nan_in_fresh_memory():
        assert_agrees_with_reference(gated_mix, mix_case(tokens, dtype), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_swiglu(tokens: int, backend: str, dtype: torch.dtype) -> None:
    x = 3 * normal(2, tokens, 90, dtype=dtype)[..., 11:85]
    with nan_in_fresh_memory():
        assert_agrees_with_reference(swiglu, {"x": x}, backend=backend)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_swiglu_of_a_part_of_a_wider_tensor(backend: str) -> None:
    whole, dout = normal(2, 30, 90).requires_grad_(), normal(2, 37, 30).mT
    part = whole[..., 11:85]
    found = swiglu(part, backend=backend)
    (gradient,) = torch.autograd.grad(found, part, dout)
    copy = part.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(swiglu(copy, backend="reference"), copy, dout)
    torch.testing.assert_close(found, swiglu(copy, backend="reference"))
    torch.testing.assert_close(gradient, expected)


def test_swiglu_with_a_gate_far_open_or_shut() -> None:
    x = torch.tensor([[-200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0] + 7 * [1.5]])
    assert_agrees_with_reference(swiglu, {"x": x[None]}, backend="cpp", tolerance=1e-6)


def test_gates_that_are_open_or_shut() -> None:
    logits = torch.tensor([[-200.0, -90.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 200.0]])
    case = {"logits": logits[None], "a": torch.ones(1, 1, 9), "b": torch.zeros(1, 1, 9)}
    assert_agrees_with_reference(gated_mix, case, backend="cpp", tolerance=1e-6)


def test_what_is_not_a_number_stays_so() -> None:
    x = normal(1, 8, 20)
    x[0, 2, 5] = float("nan")
    y = causal_conv1d(x, normal(20, 4), activation="silu", backend="cpp")
    assert y.isnan().nonzero().tolist() == [[0, token, 5] for token in (2, 3, 4, 5)]
    assert causal_conv1d(x.bfloat16(), normal(20, 4), backend="cpp").isnan().sum() == 4


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            conv = conv_case(700, bias=True, resets=True, initial=True)
            results = run_with_gradients(causal_conv1d, conv, backend="cpp", activation="silu")
            norm = run_with_gradients(gated_rms_norm, norm_case(700, torch.float32), backend="cpp", eps=1e-5)
            scan = run_with_gradients(ssd_scan, scan_case(200, resets=True, skip=True), backend="cpp")
            found.append([*results.values(), *norm.values(), *scan.values()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_auto_takes_them_for_large_calls_alone(unbuilt: None) -> None:
    def taken(shape: tuple[int, ...], **options: Any) -> str:
        x = torch.zeros(shape, **options)
        chosen = resolve("causal_conv1d", "auto", x, torch.zeros(shape[2], 4), None, None, reset=None)
        return next(name for name, one in backends._REGISTRY["causal_conv1d"].items() if one.function is chosen)

    large = (1, 1024, cpu_kernels.FEWEST_ELEMENTS // 1024)
    assert taken((1, 16, 16)) == "torch" and cpu_kernels._outcome.cache_info().misses == 0
    assert taken(large) == taken(large, dtype=torch.bfloat16) == "cpp"
    assert taken(large, dtype=torch.float64) == "torch"
    with FakeTensorMode():
        assert taken(large) == "torch"
    with pytest.raises(
        BackendError, match=r"'cpp' of gated_mix cannot run this call: it does not support dtype torch.float64"
    ):
        gated_mix(*(torch.zeros(1, 1, 2, dtype=torch.float64) for _ in range(3)), backend="cpp")
    with pytest.raises(BackendError, match="y and z differ in dtype"):
        gated_rms_norm(normal(1, 1, 1, 4), normal(1, 1, 4).bfloat16(), normal(4), eps=1e-5, backend="cpp")


def test_they_are_compiled_once_for_all_processes(tmp_path: Path) -> None:
    """Also: without a cache folder of its own, and with a compiler that cannot, torch's operations do."""
    program = (
        "import logging, torch; logging.basicConfig(level='INFO')\n"
        "from fusiontree.ops import causal_conv1d\n"
        "y = causal_conv1d(torch.ones(1, 1024, 256), torch.ones(256, 4)); print(y.sum().item())\n"
    )

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        given = os.environ | {"FUSIONTREE_CACHE": str(tmp_path / "cache"), **environment}
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=given, check=True)

    first, (kernels,) = run(), list((tmp_path / "cache" / "kernels").iterdir())
    made = kernels.stat().st_mtime_ns
    assert "causal_conv1d: backend cpp (auto)" in first.stderr
    again = run()
    assert again.stdout == first.stdout and kernels.stat().st_mtime_ns == made
    kernels.write_bytes(b"")  # damaged
    again = run()
    assert again.stdout == first.stdout and "backend cpp (auto)" in again.stderr and kernels.stat().st_size > 0
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'no such processor' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "file").touch()
    for environment in ({"CXX": str(broken)}, {"FUSIONTREE_CACHE": str(tmp_path / "file")}):
        other = run(**environment)
        assert "causal_conv1d: backend torch (auto)" in other.stderr and other.stdout == first.stdout


def test_a_compiler_that_fails_is_run_once_and_quoted(
    unbuilt: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "c++"
    broken.write_text(
        f"#!/bin/sh\necho . >> {tmp_path}/calls\necho 'In function' >&2\necho 'fatal error: x' >&2\nexit 1\n"
    )
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("FUSIONTREE_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(BackendError, match=r"c\+\+ cannot compile the kernels: fatal error: x"):
            causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4), backend="cpp")
    assert (tmp_path / "calls").read_text() == ".\n"


def test_without_a_home_folder_they_say_so(unbuilt: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FUSIONTREE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(BackendError, match="cannot be compiled and kept: Could not determine home"):
        causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 4), backend="cpp")


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_what_torch_takes_by_default_does_not_matter(default: torch.dtype) -> None:
    calls: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = [
        (causal_conv1d, conv_case(30, bias=True, initial=True), {"activation": "silu"}),
        (ssd_scan, scan_case(30, skip=True, initial=True), {}),
        (gated_rms_norm, norm_case(30, torch.float32), {"eps": 1}),
        (gated_mix, mix_case(30, torch.float32), {}),
        (swiglu, {"x": normal(2, 30, 74)}, {}),
    ]

    def results() -> list[torch.Tensor]:
        found = []
        for op, case, options in calls:
            leaves = {
                name: tensor.clone().requires_grad_() for name, tensor in case.items() if tensor.is_floating_point()
            }
            outputs = op(**case | leaves, backend="cpp", **options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(output.sum() for output in outputs).backward()
            found += [*outputs, *(leaf.grad for leaf in leaves.values())]
        return found

    expected = results()
    torch.set_default_dtype(default)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for want, got in zip(expected, found, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)
    case = conv_case(30)
    with torch.device("meta"):
        assert causal_conv1d(**case, backend="cpp").device.type == "cpu"


def test_shapes_that_do_not_fit_are_named() -> None:
    x, angle = normal(2, 6, 3, 4), torch.zeros(1, 6, 2)
    a = normal(2, 6, 12)
    for call, sentence in (
        (lambda: gated_mix(a[..., :1], a, a), "gated_mix: a has shape"),
        (lambda: gated_mix(a, a, a[:, :3]), "gated_mix: b has shape"),
        (lambda: gated_rms_norm(x, a[:, :5], normal(12), eps=1e-5), "gated_rms_norm: z has shape"),
        (lambda: gated_rms_norm(x, a, normal(4), eps=1e-5), "gated_rms_norm: weight has shape"),
        (lambda: apply_rotary(x, angle[:, :5], angle[:, :5]), "rotary: cos has shape"),
        (lambda: apply_rotary(x, angle, angle[..., :1]), "rotary: sin has shape"),
        (lambda: apply_rotary(x[..., :3], angle, angle), "rotary: heads need an even width, got 3"),
        (lambda: swiglu(a[..., :3]), "swiglu: x needs an even last dimension, got 3"),
        (lambda: causal_conv1d(a, normal(12, 0)), "causal_conv1d: needs at least one tap"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    with pytest.raises(BackendError, match="it takes no empty tensors"):
        causal_conv1d(a[:0], normal(12, 4), backend="cpp")


def test_the_mix_and_its_means_are_tensors_of_their_own() -> None:
    case = {name: tensor.requires_grad_() for name, tensor in mix_case(3, torch.float32).items()}
    _, mean, entropy = gated_mix(**case, backend="cpp")
    mean.mul_(2)
    assert mean._base is None and entropy._base is None


def test_tracing_sees_torchs_operations() -> None:
    angle, x = torch.rand(1, 1024, 32), normal(1, 1024, 4, 64)
    expected = apply_rotary(x, angle.cos(), angle.sin())
    traced = torch.jit.trace(lambda t: apply_rotary(t, angle.cos(), angle.sin()), x)
    torch.testing.assert_close(traced(x), expected)


@pytest.mark.parametrize("op", [causal_conv1d, gated_rms_norm, gated_mix, swiglu])
def test_compilers_see_torchs_operations(op: Callable[..., Any]) -> None:
    large = torch.ones(1, 1024, cpu_kernels.FEWEST_ELEMENTS // 1024, requires_grad=True)
    arguments: dict[Any, tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = {
        causal_conv1d: ((large, torch.ones(large.shape[2], 4)), {}),
        gated_rms_norm: ((large[:, :, None], large, torch.ones(large.shape[2])), {"eps": 1e-5}),
        gated_mix: ((large, large, large), {}),
        swiglu: ((large,), {}),
    }
    tensors, options = arguments[op]
    explained = torch._dynamo.explain(lambda *given: op(*given, **options))(*tensors)
    assert explained.graph_break_count == 0
