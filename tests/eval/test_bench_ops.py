"""Times and bytes of the ops' backends against the least possible."""

from __future__ import annotations

import pytest
import torch

from fusiontree.eval.bench_ops import Rates, Work, _Traffic, time_ops
from fusiontree.ops import backends
from fusiontree.ops.backends import available_backends


def test_the_floor_is_the_slower_of_computing_and_moving() -> None:
    rates = Rates(operations=100.0, bytes=10.0)
    assert rates.floor(Work(200.0, 10.0)) == 2.0
    assert rates.floor(Work(200.0, 50.0)) == 5.0
    assert Work(200.0, 50.0).with_backward() == Work(600.0, 100.0)


def test_traffic_counts_what_is_read_and_written_and_no_views() -> None:
    a = torch.ones(10, 4)
    with _Traffic() as traffic:
        torch.empty(100)
        a[:1].expand(10, 4)
    assert traffic.bytes == 0
    with _Traffic() as traffic:
        a[:1].expand(10, 4) + a
    assert traffic.bytes == (4 + 40 + 40) * 4
    with _Traffic() as traffic:
        a.view(40)[::2].unsqueeze(0)
    assert traffic.bytes == 0
    with _Traffic() as traffic:
        a.t() @ torch.ones(10, 3)
    assert traffic.bytes == (40 + 30 + 12 + 30) * 4  # both factors and the product, and the ones when they were made
    with _Traffic() as traffic:
        a.add_(a)
    assert traffic.bytes == 40 * 4


def test_long_inputs_leave_the_naive_backends_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusiontree.eval.bench_ops.NAIVE_TOKENS", 8)
    timings, _ = time_ops(torch.device("cpu"), tokens=16, rounds=1)
    for timing in timings:
        if timing.backend == "reference":
            assert timing.forward is None and timing.reason == "not measured beyond 8 tokens"
        elif timing.backend == "torch":
            assert timing.forward is not None and timing.reason == ""


def test_what_a_backend_refuses_or_fails_at_leaves_the_others_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        if q.requires_grad:
            raise AttributeError("no such kernel\nwith details")
        return q

    table = dict.fromkeys(["reference", "torch"], backends._REGISTRY["local_global_attention"]["torch"])
    monkeypatch.setattr(backends, "_REGISTRY", {"local_global_attention": table})
    backends.register("local_global_attention", "breaks", fail)
    backends.register("local_global_attention", "picky", fail, refuses=lambda *_, **__: "it has no window")
    backends.register("local_global_attention", "missing", fail, unusable=lambda: "it needs a CUDA device")
    timings, _ = time_ops(torch.device("cpu"), tokens=16, rounds=1)
    found = {timing.backend: (timing.forward is None, timing.training is None, timing.reason) for timing in timings}
    assert found == {
        "torch": (False, False, ""),
        "reference": (False, False, ""),
        "breaks": (False, True, "with backward: AttributeError: no such kernel"),
        "picky": (True, True, "refused: it has no window"),
        "missing": (True, True, "not usable: it needs a CUDA device"),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_memory_is_what_a_call_holds() -> None:
    timings, _ = time_ops(torch.device("cuda"), torch.bfloat16, tokens=300, rounds=1)
    for timing in timings:
        for measured in (timing.forward, timing.training):
            if measured is not None:
                assert measured.seconds > 0
                # All gradients but that of the output itself are there at the end.
                assert measured.bytes is not None and measured.bytes > 0.7 * measured.floor_bytes
        if timing.backend == "torch":
            assert timing.reason == "" and timing.forward is not None


def test_every_backend_moves_at_least_what_the_op_must() -> None:
    torch.set_num_threads(1)
    timings, _ = time_ops(torch.device("cpu"), tokens=80, rounds=1)
    found = {(timing.op, timing.backend): timing for timing in timings}
    assert set(found) == {(op, name) for op, names in available_backends().items() for name in names}
    for timing in timings:
        assert timing.forward is not None or timing.reason
        if not timing.usable:
            assert timing.reason.startswith("not usable: ")
        elif timing.backend in ("torch", "reference"):
            assert timing.forward is not None
        for measured in (timing.forward, timing.training):
            if measured is not None:
                assert measured.seconds > 0 and measured.floor_seconds > 0
                assert measured.bytes is None or measured.bytes > 0.9 * measured.floor_bytes
    for op in ("ssd_scan", "selective_scan", "local_global_attention"):
        fast, naive = found[op, "torch"].training, found[op, "reference"].training
        assert fast is not None and naive is not None
        assert fast.bytes is not None and naive.bytes is not None and fast.bytes < naive.bytes
