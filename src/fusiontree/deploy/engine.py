"""A thread that runs a scheduler, and the limits on what may wait for it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Sequences
from concurrent.futures import Future, wait
from typing import Any

from fusiontree.deploy.scheduler import Scheduler
from fusiontree.deploy.sequences import Sequence
from fusiontree.errors import InputError

logger = logging.getLogger(__name__)

_WINDOW_S = 10.0
_IDLE_S = 1.0


class QueueFull(Exception):
    """No more sequences can wait; `retry_after` says after how many seconds it is worth another try."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} seconds")
        self.retry_after = retry_after


class Draining(Exception):
    """Nothing new is taken any more."""


class ComputeThread:
    """A daemon thread that runs what it is given, one after the other; an executor's would hold up a forced exit.

    A model should be loaded by the thread that steps it. OpenMP keeps a team of workers for every thread that computed,
    and when all teams together outnumber the cores, each waits for work asleep instead of spinning: the hundreds of
    small parallel regions of a step then take two to four times as long.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="fusiontree-compute", daemon=True).start()

    def submit(self, job: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._jobs.put((future, job))
        return future

    def close(self) -> None:
        """End it when it has run what it was given."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (given := self._jobs.get()) is not None:
            future, job = given
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)


class Handover:
    """Puts what another thread delivers into queues of `loop`, all that came by then at once: to wake a loop is a
    system call, and a running one keeps the other thread waiting for Python's lock.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._delivered: deque[tuple[asyncio.Queue, Any]] = deque()
        self._is_woken = False

    def put(self, events: asyncio.Queue, event: Any) -> None:
        """From the one thread that delivers; what is for a loop that was closed is dropped."""
        self._delivered.append((events, event))
        if not self._is_woken:
            self._is_woken = True
            try:
                self.loop.call_soon_threadsafe(self._take)
            except RuntimeError:  # closed
                self._delivered.clear()
                self._is_woken = False

    def _take(self) -> None:
        self._is_woken = False  # first: what is delivered from here on wakes the loop again
        while self._delivered:
            events, event = self._delivered.popleft()
            events.put_nowait(event)


class Engine:
    """Runs `scheduler` in a thread while there is anything to run.

    Args:
        scheduler: which nobody else steps.
        max_queue: sequences that may wait beside those that run.
        thread: that has loaded the model, and does nothing else from now on; one of its own if None.
    """

    def __init__(self, scheduler: Scheduler, max_queue: int, thread: ComputeThread | None = None) -> None:
        self.scheduler = scheduler
        self.max_queue = max_queue
        self.draining = False
        self._work = threading.Event()
        self._stopped = False
        self._thread = thread
        self._running: Future | None = None
        self._rates: deque[tuple[float, int]] = deque()
        self._durations: deque[float] = deque(maxlen=32)

    def start(self) -> None:
        if self._stopped:  # before it began
            return
        self._thread = self._thread or ComputeThread()
        self._running = self._thread.submit(self._run)
        self._running.add_done_callback(_log_failure)

    @property
    def is_alive(self) -> bool:
        return self._running is not None and not self._running.done()

    def submit(self, sequences: Sequences[Sequence]) -> None:
        """Queue all of them, or none.

        Raises:
            QueueFull: too many wait already.
            Draining: `drain` was called.
            InputError: as `Scheduler.submit`.
        """
        if self.draining:
            raise Draining
        scheduler = self.scheduler
        places = scheduler.settings.max_rows + self.max_queue
        if len(sequences) > places:
            raise InputError(f"{len(sequences)} texts are asked for, but no more than {places} may run and wait here")
        if scheduler.waiting + scheduler.running + len(sequences) > places:
            raise QueueFull(self._retry_after())
        try:
            for sequence in sequences:
                scheduler.submit(sequence)
        except BaseException:
            for sequence in sequences:
                sequence.cancel()
            raise
        self._work.set()

    def wake(self) -> None:
        """Have the thread look at what was cancelled."""
        self._work.set()

    def note_duration(self, seconds: float) -> None:
        """How long a request took, for what `QueueFull` advises."""
        self._durations.append(seconds)

    def stop(self) -> None:
        """End what still runs, and the thread."""
        self.draining = self._stopped = True
        self._work.set()
        if self._running is not None:
            wait([self._running])
        if self._thread is not None:
            self._thread.close()

    def tokens_per_second(self) -> float:
        """Tokens generated in the last seconds, per second."""
        recent = [entry for entry in list(self._rates) if entry[0] > time.monotonic() - _WINDOW_S]
        return sum(tokens for _, tokens in recent) / _WINDOW_S

    def _retry_after(self) -> int:
        """About the time until a place in the queue is free: by how long requests took, and how many run at once."""
        typical = sorted(self._durations)[len(self._durations) // 2] if self._durations else 1.0
        return min(60, max(1, round(typical / max(1, self.scheduler.running))))

    def _run(self) -> None:
        scheduler = self.scheduler
        while not self._stopped:
            if scheduler.is_idle:
                self._work.wait(_IDLE_S)
                self._work.clear()
                continue
            before = scheduler.counts.generated_tokens
            try:
                scheduler.step()
            except Exception as error:
                # Whatever it was, the requests after these may well run.
                logger.exception("a step failed; what ran was ended")
                scheduler.fail(error)
            now = time.monotonic()
            self._rates.append((now, scheduler.counts.generated_tokens - before))
            while self._rates[0][0] < now - _WINDOW_S:
                self._rates.popleft()
        scheduler.fail(Draining())


def _log_failure(running: Future) -> None:
    if (error := running.exception()) is not None:
        logger.error("the engine ended", exc_info=error)
