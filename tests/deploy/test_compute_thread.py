"""The thread that runs a scheduler for the server."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from pathlib import Path

import pytest

from fusiontree import load
from fusiontree.deploy.engine import ComputeThread, Draining, Engine, Handover
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


def test_what_a_thread_delivers_arrives_in_order_and_at_once() -> None:
    async def collect() -> tuple[list[int], list[int], int]:
        loop, ours, theirs = asyncio.get_running_loop(), asyncio.Queue(), asyncio.Queue()
        handover, woken = Handover(loop), []
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *given: woken.append(wake(*given))  # type: ignore[method-assign]

        def deliver() -> None:
            for number in range(20_000):
                handover.put(ours if number % 2 else theirs, number)

        thread = threading.Thread(target=deliver)
        thread.start()
        odd = [await ours.get() for _ in range(10_000)]
        even = [await theirs.get() for _ in range(10_000)]
        thread.join()
        before = len(woken)
        for number in range(3):  # the loop does not run meanwhile
            handover.put(ours, number)
        assert [await ours.get() for _ in range(3)] == [0, 1, 2] and len(woken) == before + 1
        return odd, even, len(woken)

    odd, even, woken = asyncio.run(collect())
    assert odd == list(range(1, 20_000, 2)) and even == list(range(0, 20_000, 2)) and woken < 20_000


def test_what_is_delivered_to_a_loop_that_was_closed_is_dropped() -> None:
    loop = asyncio.new_event_loop()
    events: asyncio.Queue = asyncio.Queue()
    waiting = loop.create_task(events.get())
    loop.run_until_complete(asyncio.sleep(0))
    handover = Handover(loop)
    loop.close()
    handover.put(events, 1)
    handover.put(events, 2)
    assert events.empty() and not handover._delivered and not waiting.done()
