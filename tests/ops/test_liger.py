"""The adapter of Liger Kernel; on CPU its kernels run in Triton's interpreter. On a GPU: test_gpu_attention.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from op_comparison import TOLERANCE, assert_close, run_with_gradients
from test_cross_entropy import arguments
from torch._subclasses.fake_tensor import FakeTensorMode

from fusiontree.ops import BackendError, liger, linear_cross_entropy, resolve

# Triton decides between compiler and interpreter when it is first imported, so the tests that want the latter start a
# process of their own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MISSING = [name for name in ("liger_kernel", "triton") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING) or INTERPRETED, reason=f"needs {' and '.join(MISSING) or 'no second process'}")
def test_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout
    assert "19 passed" in shown.stdout, shown.stdout


@pytest.fixture
def interpreted():
    """`linear_cross_entropy` through the adapter."""
    if MISSING or not INTERPRETED:
        pytest.skip("runs under TRITON_INTERPRET=1, with liger-kernel and triton")

    def loss(hidden, weight, labels, *, ignore_index=-100):
        assert liger.refuses_dtypes(hidden, weight) is None
        return liger.linear_cross_entropy_liger(hidden, weight, labels, chunk_size=1, ignore_index=ignore_index)

    return loss


@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.95, 1.1])
@pytest.mark.parametrize("length", [1, 9])
def test_agrees_with_reference(interpreted, length, ignored):
    case = arguments(length, ignored=ignored, dtype=torch.float32)
    in_double = case | {name: case[name].double() for name in ("hidden", "weight")}
    expected = run_with_gradients(linear_cross_entropy, in_double, backend="reference")
    actual = run_with_gradients(interpreted, case)
    assert_close(actual, expected, TOLERANCE[torch.float32])
    assert all(tensor.dtype == torch.float32 for tensor in actual.values())


def test_hidden_states_of_ignored_labels_do_not_matter(interpreted):
    case = arguments(dtype=torch.float32)
    expected = run_with_gradients(interpreted, case)
    case["hidden"][case["labels"] == -100] = float("nan")
    actual = run_with_gradients(interpreted, case)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_another_ignore_index(interpreted):
    case = arguments(ignored=0.0, dtype=torch.float32)
    changed = case | {"labels": case["labels"].masked_fill(case["labels"] == 3, -100)}
    assert torch.equal(interpreted(**case, ignore_index=3), interpreted(**changed))


def test_backward_scales_with_the_gradient_of_the_loss_and_may_run_twice(interpreted):
    case = arguments(dtype=torch.float32)
    leaves = [case[name].requires_grad_() for name in ("hidden", "weight")]
    loss = interpreted(*leaves, case["labels"])
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    half = torch.autograd.grad(loss * 0.5, leaves)
    for a, b in zip(once, half, strict=True):
        torch.testing.assert_close(a * 0.5, b, rtol=1e-6, atol=0)


def test_only_one_of_the_two_needs_a_gradient(interpreted):
    case = arguments(dtype=torch.float32)
    leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight")]
    expected = torch.autograd.grad(interpreted(*leaves, case["labels"]), leaves)
    for name, gradient in zip(("hidden", "weight"), expected, strict=True):
        leaf = case[name].clone().requires_grad_()
        interpreted(**case | {name: leaf}).backward()
        assert torch.equal(leaf.grad, gradient)
    with torch.no_grad():
        assert interpreted(*leaves, case["labels"]) == interpreted(**case)


def test_autocast_projects_in_its_dtype_and_sums_in_float32(interpreted):
    case = arguments(length=200, hidden=32, vocabulary=100, dtype=torch.float32)
    exact = run_with_gradients(linear_cross_entropy, case, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_with_gradients(interpreted, case)
    assert all(tensor.dtype == torch.float32 for tensor in actual.values())
    for name, want in exact.items():
        assert 0 < (actual[name] - want).abs().max() <= 2**-6 * want.abs().max(), name


@pytest.mark.parametrize(
    ("hidden", "weight", "reason"),
    [
        (torch.float64, torch.float64, "does not support dtype torch.float64"),
        (torch.bfloat16, torch.float32, "does not multiply torch.bfloat16 with a weight of torch.float32"),
        (torch.bfloat16, torch.bfloat16, None),
    ],
)
def test_what_it_cannot_honour_is_refused(hidden, weight, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with FakeTensorMode():
        found = liger.refuses(*(torch.empty(3, 3, dtype=dtype, device="cuda") for dtype in (hidden, weight)))
    assert found is None if reason is None else reason in found
    assert liger.refuses(torch.empty(3, 3), torch.empty(3, 3)) == "it runs on CUDA tensors, not on cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_it_is_refused_and_never_imported(tmp_path, monkeypatch):
    (tmp_path / "liger_kernel.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        BackendError, match="'liger' of linear_cross_entropy cannot run this call: it needs a CUDA device"
    ):
        linear_cross_entropy(**arguments(), backend="liger")
    hidden_and_weight = torch.zeros(2, 3, 3)
    torch_backend = resolve("linear_cross_entropy", "torch", *hidden_and_weight)
    assert resolve("linear_cross_entropy", "auto", *hidden_and_weight) is torch_backend


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.6.1", "liger-kernel 0.6.1 is installed, 0.6.2 or newer is needed"),
        ("0.8.0", "liger-kernel 0.8.0 is installed but cannot be imported: for another triton"),
    ],
)
def test_an_installation_that_does_not_work_is_named(version, reason, tmp_path, monkeypatch):
    (tmp_path / "liger_kernel.py").write_text("raise RuntimeError('for another triton')")
    information = tmp_path / f"liger_kernel-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: liger-kernel\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    assert liger.find_unusable() == reason
