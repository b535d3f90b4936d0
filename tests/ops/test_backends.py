from __future__ import annotations

import logging

import pytest
import torch

from fusiontree.ops import BackendError, available_backends, backends, resolve, ssd_scan

OPS = {
    "ssd_scan",
    "selective_scan",
    "causal_conv1d",
    "gated_mix",
    "gated_rms_norm",
    "swiglu",
    "rotary",
    "local_global_attention",
    "cached_attention",
    "linear_cross_entropy",
    "token_cross_entropy",
}


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(backends, "_REGISTRY", {})
    monkeypatch.setattr(backends, "_announced", set())


def test_every_op_has_a_reference_and_a_torch_backend_that_work_here():
    table = available_backends()
    assert table.keys() >= OPS
    for op in OPS:
        assert table[op]["reference"][0] and table[op]["torch"][0]


def test_auto_takes_the_first_that_can_and_never_the_reference(registry):
    backends.register("op", "reference", "slow")
    backends.register("op", "kernel", "kernel", unusable=lambda: "needs CUDA")
    backends.register(
        "op", "picky", "picky", refuses=lambda *tensors, reset=None: "it has no reset" if reset is not None else None
    )
    backends.register("op", "torch", "torch")
    assert resolve("op", "auto") == "picky"
    assert resolve("op", "auto", reset=torch.zeros(1)) == "torch"
    assert resolve("op", "reference") == "slow"
    assert available_backends()["op"]["kernel"] == (False, "needs CUDA")


def test_a_named_backend_is_never_replaced(registry):
    backends.register("op", "kernel", "kernel", unusable=lambda: "needs CUDA")
    backends.register("op", "picky", "picky", refuses=lambda *tensors: "it has no reset")
    backends.register("op", "torch", "torch")
    with pytest.raises(BackendError, match="'kernel' of op cannot run this call: needs CUDA"):
        resolve("op", "kernel")
    with pytest.raises(BackendError, match="'picky' of op cannot run this call: it has no reset"):
        resolve("op", "picky")
    with pytest.raises(BackendError, match="choose one of kernel, picky, torch or auto"):
        resolve("op", "triton")


def test_a_library_is_looked_for_once_and_only_when_it_is_considered(registry):
    looks = []
    backends.register("op", "torch", "torch")
    backends.register("op", "kernel", "kernel", unusable=lambda: looks.append(1))
    resolve("op", "auto")
    assert looks == []
    assert resolve("op", "kernel") == resolve("op", "kernel") == "kernel"
    assert looks == [1]


def test_auto_says_why_nothing_can_run(registry):
    backends.register("op", "reference", "slow")
    backends.register("op", "kernel", "kernel", unusable=lambda: "needs CUDA")
    with pytest.raises(BackendError, match="No backend of op can run this call .kernel: needs CUDA"):
        resolve("op", "auto")


def test_the_choice_is_logged_once(registry, caplog):
    backends.register("op", "torch", "torch")
    with caplog.at_level(logging.INFO, logger="fusiontree.ops"):
        for _ in range(3):
            resolve("op", "auto")
    assert [record.getMessage() for record in caplog.records] == ["op: backend torch (auto)"]


def test_unsupported_dtypes_are_refused_by_name_and_by_auto():
    tensors = torch.ones(1, 2, 1, 1, dtype=torch.int32), torch.ones(1, 2, 1), -torch.ones(1)
    for backend in ("auto", "torch", "reference"):
        with pytest.raises(BackendError, match="dtype torch.int32"):
            ssd_scan(*tensors, torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_reaches_no_state(backend):
    draw = torch.Generator().manual_seed(0)
    x, dt = torch.randn(1, 9, 2, 4, generator=draw), torch.rand(1, 9, 2, generator=draw)
    B, C = torch.randn(2, 1, 9, 1, 8, generator=draw)
    options = {"return_final_state": True, "backend": backend}
    expected = ssd_scan(x, dt, -torch.ones(2), B, C, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ssd_scan(x, dt, -torch.ones(2), B, C, **options)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
