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
        assert (timing.forward is None) == (timing.backend == "reference" or not timing.usable)
        if timing.usable:
            assert timing.reason == ("not measured beyond 8 tokens" if timing.backend == "reference" else "")


def test_a_backend_that_refuses_the_call_says_so_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = {"ssd_scan": dict(backends._REGISTRY["ssd_scan"])}
    monkeypatch.setattr(backends, "_REGISTRY", registry)
    backends.register("ssd_scan", "picky", print, refuses=lambda *tensors, **arguments: "it is Monday")
    timings, _ = time_ops(torch.device("cpu"), tokens=16, rounds=1)
    (picky,) = [timing for timing in timings if timing.backend == "picky"]
    assert picky.usable and picky.forward is None and picky.training is None
    assert picky.reason == "Backend 'picky' of ssd_scan cannot run this call: it is Monday."


def test_every_backend_moves_at_least_what_the_op_must() -> None:
    torch.set_num_threads(1)
    timings, _ = time_ops(torch.device("cpu"), tokens=80, rounds=1)
    found = {(timing.op, timing.backend): timing for timing in timings}
    assert set(found) == {(op, name) for op, backends in available_backends().items() for name in backends}
    for timing in timings:
        assert (timing.forward is not None) == timing.usable
        for measured in (timing.forward, timing.training):
            if measured is not None:
                assert measured.seconds > 0 and measured.floor_seconds > 0
                assert measured.bytes is None or measured.bytes > 0.9 * measured.floor_bytes
    for op in ("ssd_scan", "selective_scan", "local_global_attention"):
        fast, naive = found[op, "torch"].training, found[op, "reference"].training
        assert fast is not None and naive is not None
        assert fast.bytes is not None and naive.bytes is not None and fast.bytes < naive.bytes
