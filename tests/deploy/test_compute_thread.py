"""The thread that runs a scheduler for the server."""

from __future__ import annotations

import logging
import queue
import threading
import time
from pathlib import Path

import pytest

from fusiontree import load
from fusiontree.deploy.engine import ComputeThread, Draining, Engine
from fusiontree.deploy.runtime import InferenceRuntime
from fusiontree.deploy.sampling import SamplingOptions
from fusiontree.deploy.sequences import Delta, Sequence


def test_the_thread_that_loaded_a_model_steps_it(tiny_folder: Path) -> None:
    thread, seen = ComputeThread(), set()
    owner = thread.submit(threading.get_ident).result()
    runtime = thread.submit(lambda: InferenceRuntime(load(tiny_folder, device="cpu"))).result()
    runtime.model.embed_tokens.register_forward_hook(lambda *given: seen.add(threading.get_ident()))
    engine = Engine(runtime.scheduler, 4, thread)
    assert not engine.is_alive
    engine.start()
    deltas: queue.Queue[Delta] = queue.Queue()
    engine.submit([Sequence([5, 6, 7], SamplingOptions(max_new_tokens=4), deltas.put)])
    while deltas.get(timeout=60).finish_reason is None:
        pass
    assert engine.is_alive and seen == {owner} and owner != threading.get_ident()
    engine.stop()
    assert not engine.is_alive
    with pytest.raises(Draining):
        engine.submit([Sequence([5], SamplingOptions(max_new_tokens=1), deltas.put)])


def test_an_engine_that_was_stopped_before_it_began_does_not_begin(tiny_folder: Path) -> None:
    engine = Engine(InferenceRuntime(load(tiny_folder, device="cpu")).scheduler, 4)
    engine.stop()
    engine.start()
    assert not engine.is_alive
    engine.stop()


def test_an_engine_that_fails_says_so(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fusiontree"), "propagate", True)  # a server in this process ends that
    engine = Engine(InferenceRuntime(load(tiny_folder, device="cpu")).scheduler, 4)
    engine.start()

    def deliver(delta: Delta) -> None:
        raise SystemExit("no room to deliver")  # no error of a step, which the engine survives

    engine.submit([Sequence([5], SamplingOptions(max_new_tokens=1), deliver)])
    end = time.monotonic() + 60
    while "the engine ended" not in caplog.messages and time.monotonic() < end:
        time.sleep(0.01)
    assert not engine.is_alive and "no room to deliver" in caplog.text
    assert caplog.messages[-1] == "the engine ended"
    engine.stop()


def test_what_a_job_raises_reaches_who_waits_for_it() -> None:
    thread = ComputeThread()
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 / 0).result(timeout=60)
    assert thread.submit(lambda: 2).result(timeout=60) == 2
    thread.close()
