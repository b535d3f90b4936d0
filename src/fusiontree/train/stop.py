"""Ctrl-C, SIGTERM and SLURM's SIGUSR1 as a request that the training loop answers between two steps."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch

from fusiontree.train.launch import is_first_process
from fusiontree.train.watch import default_store

_LEFT = "fusiontree/left"
#: How long the others wait for the first process, which draws and closes the trackers.
_PATIENCE = timedelta(minutes=10)

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# A batch system sends it some time before the job's end (`sbatch --signal=USR1@120`); Windows has none.
if hasattr(signal, "SIGUSR1"):
    EXIT_CODES[signal.SIGUSR1] = 138


class StopRequest:
    """While entered, the first SIGINT, SIGTERM or SIGUSR1 is noted in `signal`; the same again acts as usual, at once.

    Another kind asks for nothing more: Ctrl-C on a terminal reaches `deepspeed` and its processes, to which it then
    sends SIGTERM, and a batch system sends SIGTERM some time after SIGUSR1.

    Outside the main thread, where Python allows no handlers, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._previous.pop(signal.Signals(number)))
        if self.signal is not None:
            return
        self.signal = signal.Signals(number)
        if not is_first_process():
            return
        # To standard error past Python's buffers: a handler may interrupt another write to the same stream.
        with suppress(OSError):
            os.write(2, f"\n{self.signal.name}: saving after this step; once more ends at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def leave_together(stopped_by: signal.Signals) -> None:
    """The last thing that a process does which was stopped by a signal, before it leaves with that signal's exit code.

    A launcher, or `srun --kill-on-bad-exit`, ends all processes as soon as one has ended with another code than 0. So
    none leaves before the first one is done, and none hears the signal by which the others are ended then, which would
    change its code and with it srun's.
    """
    for number in EXIT_CODES.keys() - {stopped_by}:
        signal.signal(number, signal.SIG_IGN)
    if torch.distributed.is_initialized():
        with suppress(RuntimeError):  # the store has gone with the first process
            if is_first_process():
                default_store().set(_LEFT, "1")
            else:
                default_store().wait([_LEFT], _PATIENCE)
