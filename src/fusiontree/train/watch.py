"""Where each process of a run stands, told to the others, so that those that hold them up can be named.

The training loop notes in memory what it is about to do. A thread of each process writes that to the key-value store by
which the processes found each other, with the number of collective operations that it has begun: in the backward pass,
where gradients are exchanged, that alone tells who waits from who is waited for.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Any

import torch

from fusiontree.errors import BAD_INPUT

#: Seconds that a store may take to answer: the machine that holds it may be what hangs.
_STORE_PATIENCE_S = 10.0

_OVER = "fusiontree/over"


def default_store() -> Any:
    """The key-value store by which the processes found each other."""
    return torch.distributed.distributed_c10d._get_default_store()


def collectives_begun() -> int:
    """Collective operations that this process has begun in all its groups; 0 where a backend does not count them."""
    begun = 0
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        with suppress(RuntimeError):
            begun += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return begun


@dataclass(frozen=True)
class Place:
    """Where a process stands."""

    step: int | None = None
    """Its optimizer step; None before the first."""
    phase: str = "not heard of"
    collectives: int = -1
    """Collective operations begun since the process started."""

    def __str__(self) -> str:
        return self.phase if self.step is None else f"step {self.step}, {self.phase}"

    @property
    def progress(self) -> tuple[int, int]:
        """Grows; steps may go back to a checkpoint, collectives never."""
        return self.collectives, self.step or 0


class Watch:
    """Tells the others where this process stands, and looks where they do when it waits for them in vain.

    Args:
        index: this process's, of `count`.
        timeout: seconds without any progress, waiting for others, after which the run is given up.
    """

    def __init__(self, index: int, count: int, timeout: float):
        self.index = index
        self._count = count
        self._timeout = timeout
        self._noted: tuple[int | None, str] = (None, "opening the run")
        self._closed = threading.Event()
        if count > 1:
            # A connection of its own: the main thread's is locked for as long as it waits.
            self._store = default_store().clone()
            threading.Thread(target=self._run, name="fusiontree-watch", daemon=True).start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Note what the main thread does from now on: it costs an assignment."""
        self._noted = step, phase

    def close(self) -> None:
        """Neither tell nor look any more."""
        self._closed.set()

    def give_up(self) -> None:
        """Let those that hang know that the run is over, for which a launcher would wait and then kill them."""
        _within_patience(lambda: self._store.set(_OVER, "1"))

    def waits_for(self) -> tuple[str, bool]:
        """The processes that have begun less than this one, in words, and whether it falls to this one to name them.

        The words are empty where none is known.
        """
        everyones = self._everyones()
        if not everyones:
            # Without a launcher's agent the store is a thread of the first process.
            is_held_by_first = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") != "True"
            return ("process 0 (which does not answer)" if is_held_by_first and self.index > 0 else ""), True
        everyones[self.index] = self._here()
        farthest = max(place.progress for place in everyones)
        behind: dict[str, list[str]] = {}
        waiting = []
        for index, place in enumerate(everyones):
            if place.progress < farthest:
                behind.setdefault(str(place), []).append(str(index))
            else:
                waiting.append(index)
        words = [f"process {_listed(indices)} ({place})" for place, indices in behind.items()]
        return " and ".join(words), not words or self.index == waiting[0]

    def _here(self) -> Place:
        step, phase = self._noted
        return Place(step, phase, collectives_begun())

    def _everyones(self) -> list[Place]:
        """What the processes told last, in their order; empty where the store does not answer."""
        found: list[Place] = []

        def read() -> None:
            keys = [_key(index) for index in range(self._count)]
            # `get` would wait for what has not been set.
            told = [self._store.get(key) if self._store.check([key]) else b"[]" for key in keys]
            found.extend(Place(*json.loads(text)) for text in told)

        _within_patience(read)
        return list(found)

    def _run(self) -> None:
        told, since = None, time.monotonic()
        while not self._closed.wait(min(1.0, self._timeout / 10)):
            here, now = self._here(), time.monotonic()
            try:
                if here != told:
                    self._store.set(_key(self.index), json.dumps(astuple(here)))
                    told, since = here, now
                is_over = now - since > self._timeout and self._store.check([_OVER])
            except RuntimeError:  # the store has gone with the process that held it
                if now - since <= self._timeout:
                    return
                is_over = True
            if is_over and not self._closed.is_set():
                os._exit(BAD_INPUT)
            # A collective operation that times out by itself tells it better, from the main thread. NCCL's do not
            # return: it would end the process without a word.
            if now - since > self._timeout + min(10.0, self._timeout / 2):
                self._end()

    def _end(self) -> None:
        """End this process, whose main thread does not return, if it waits for others: name them."""
        behind, falls_to_this = self.waits_for()
        if behind and falls_to_this and not self._closed.is_set():
            print(f"error: {self.sentence(behind)}", file=sys.stderr, flush=True)
            self.give_up()
            os._exit(BAD_INPUT)

    def sentence(self, behind: str) -> str:
        """What to tell of processes that were waited for in vain."""
        return (
            f"process {self.index} waited longer than system.timeout for {behind or 'a process'} of {self._count}: "
            "look at what holds it up, then go on with --resume auto"
        )


def _within_patience(ask: Callable[[], Any]) -> None:
    """Ask the store for as long as it may take to answer; what does not answer is asked in vain."""

    def run() -> None:
        with suppress(RuntimeError):
            ask()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_STORE_PATIENCE_S)


def _key(index: int) -> str:
    return f"fusiontree/{index}"


def _listed(indices: list[str]) -> str:
    """1, 2 and 3; of many the first ones and their number."""
    if len(indices) > 8:
        indices = [*indices[:7], f"{len(indices) - 7} more"]
    return " and ".join([", ".join(indices[:-1]), indices[-1]] if len(indices) > 1 else indices)
