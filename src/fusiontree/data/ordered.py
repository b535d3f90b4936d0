"""Records of a set that can be read in any order, in the order of training, in this process or in worker processes."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fusiontree.data.order import Order, Place
from fusiontree.data.records import BadRecord
from fusiontree.data.source import RecordSet, SourceRecord
from fusiontree.errors import InputError

# A worker hands over about this much text at a time: enough to keep the tokenizer busy, little enough to start quickly.
_CHUNK_BYTES = 1 << 18
_MAX_CHUNK_RECORDS = 256

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True)
class Failure:
    """An `InputError` on its way out of a worker process, which would wrap it into a traceback."""

    message: str


class _Chunks(Dataset):
    """What runs in a worker: a failure travels back as a value."""

    def __init__(self, records: RecordSet) -> None:
        self.records = records

    def __getitems__(self, numbers: Sequence[int]) -> list[np.ndarray | BadRecord] | Failure:
        try:
            return self.records.__getitems__(numbers)
        except InputError as error:
            return Failure(str(error))


class OrderedSource:
    """A set of records in the order of training; a `position` is a place of `order` in an epoch.

    Args:
        num_workers: processes that read and tokenise; what comes out does not depend on it.
        endless: go on with the next epoch, or stop after one.
    """

    def __init__(self, records: RecordSet, order: Order, *, num_workers: int, endless: bool) -> None:
        self.endless = endless
        self.num_workers = num_workers
        self._records = records
        self._order = order
        mean_bytes = max(1, records.num_bytes // max(1, len(records)))
        self._chunk_records = min(_MAX_CHUNK_RECORDS, max(1, _CHUNK_BYTES // mean_bytes))

    def damage(self) -> Sequence[tuple[str, BadRecord]]:
        return self._records.damage()

    def read(self, start: Place) -> Iterator[SourceRecord]:
        """Every record from that of `start` on; its offset does not matter here.

        Raises:
            InputError: a file cannot be read any more or has changed.
        """
        loader = DataLoader(
            _Chunks(self._records),
            batch_sampler=(records for _, records in self._chunks(start)),
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            worker_init_fn=_start_worker,
            # Drawing the workers' seeds from torch's own generator would change what the training loop draws from it.
            generator=torch.Generator(),
        )
        with _quiet_fork(self.num_workers):
            chunks = iter(loader)
        for (first, records), chunk in zip(self._chunks(start), chunks, strict=True):
            if isinstance(chunk, Failure):
                raise InputError(chunk.message)
            positions = first.position + np.arange(len(records))
            firsts = self._order.is_first(first.epoch, positions).tolist()
            for position, record, content, is_first in zip(positions.tolist(), records, chunk, firsts, strict=True):
                source = self._records.source(record) if isinstance(content, BadRecord) else ""
                yield SourceRecord(Place(first.epoch, position), content, source, record, is_first)

    def identity(self) -> dict[str, object]:
        return {**self._records.identity(), **self._order.identity()}

    def _chunks(self, start: Place) -> Iterator[tuple[Place, list[int]]]:
        """Successive pieces of the order: where each begins, and its records."""
        position = start.position
        for epoch in itertools.count(start.epoch):
            while position < self._order.size:
                stop = min(position + self._chunk_records, self._order.size)
                yield Place(epoch, position), self._order(epoch, np.arange(position, stop)).tolist()
                position = stop
            position = 0
            if not self.endless:
                return


def _as_it_is(chunk: object) -> object:
    return chunk


def _start_worker(_: int) -> None:
    # Ctrl-C reaches the terminal's whole process group, and `timeout` and its like send SIGTERM to all of theirs: the
    # process that trains decides what either means and ends its workers, which it does with SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):  # which a batch system may send to every process of a job
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        # If the trainer is killed, a worker that waits for room in its pipe would never hear of it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    # A tokenizer that used its threads before the fork would wait for them here for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@contextmanager
def _quiet_fork(num_workers: int) -> Iterator[None]:
    """Without the variable that `_start_worker` sets, tokenizers 0.22 warns in each worker as it forks."""
    name = "TOKENIZERS_PARALLELISM"
    if num_workers == 0 or name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
