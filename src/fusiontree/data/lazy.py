"""The `lazy` mode: records read and tokenised when their turn comes, in this process or in worker processes."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fusiontree.data.corpus import Corpus
from fusiontree.data.order import Permutation
from fusiontree.data.packing import Place
from fusiontree.data.records import NO_TOKENS, BadRecord
from fusiontree.data.source import SourceRecord
from fusiontree.data.tokenizer import DocumentEncoder, tokenizer_fingerprint
from fusiontree.errors import InputError

# A worker hands over about this much text at a time: enough to keep the tokenizer busy, little enough to start quickly.
_CHUNK_BYTES = 1 << 18
_MAX_CHUNK_RECORDS = 256


@dataclass(frozen=True)
class Failure:
    """An `InputError` on its way out of a worker process, which would wrap it into a traceback."""

    message: str


class LazyDataset(Dataset):
    """Tokenised records by number: `dataset[i]` is the int32 ids of record i, or why there are none.

    Nothing but the open files is held in memory. `__getitems__` reads and tokenises many records at once, which is what
    a `DataLoader` calls.
    """

    def __init__(self, corpus: Corpus, encoder: DocumentEncoder) -> None:
        self.corpus = corpus
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, record: int) -> np.ndarray | BadRecord:
        return self.__getitems__([record])[0]

    def __getitems__(self, records: Sequence[int]) -> list[np.ndarray | BadRecord]:
        texts = [self.corpus.read(record) for record in records]
        encoded = iter(self.encoder([text for text in texts if not isinstance(text, BadRecord)]))
        return [text if isinstance(text, BadRecord) else _or_no_tokens(next(encoded)) for text in texts]


def _or_no_tokens(ids: np.ndarray) -> np.ndarray | BadRecord:
    return ids if len(ids) else BadRecord(NO_TOKENS, "the tokenizer finds no token in the text")


class _ChunkDataset(LazyDataset):
    """What runs in a worker: a failure travels back as a value."""

    def __getitems__(self, records: Sequence[int]) -> list[np.ndarray | BadRecord] | Failure:  # type: ignore[override]
        try:
            return super().__getitems__(records)
        except InputError as error:
            return Failure(str(error))


class LazySource:
    """A corpus in the order in which one rank trains on it.

    Of an epoch's order, rank r of w takes the places r, r + w, r + 2w, …: every record falls to one rank, once. A
    `position` counts this rank's records within an epoch.

    Args:
        num_workers: processes that read and tokenise; what comes out does not depend on it.
        seed: of the shuffle; None = file order.
        endless: go on with the next epoch, or stop after one.
    """

    def __init__(
        self,
        dataset: LazyDataset,
        *,
        num_workers: int,
        seed: int | None,
        endless: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.corpus = dataset.corpus
        self.seed = seed
        self.endless = endless
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self._dataset = _ChunkDataset(dataset.corpus, dataset.encoder)
        records = len(dataset)
        self.records_per_epoch = len(range(rank, records, world_size))
        mean_bytes = max(1, self.corpus.num_bytes // max(1, records))
        self._chunk_records = min(_MAX_CHUNK_RECORDS, max(1, _CHUNK_BYTES // mean_bytes))

    def read(self, start: Place) -> Iterator[SourceRecord]:
        """Every record from that of `start` on; its offset does not matter here.

        Raises:
            InputError: a file cannot be read any more or has changed.
        """
        loader = DataLoader(
            self._dataset,
            batch_sampler=(records for _, records in self._chunks(start)),
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            worker_init_fn=_start_worker,
            # Drawing the workers' seeds from torch's own generator would change what the training loop draws from it.
            generator=torch.Generator(),
        )
        with _quiet_fork(self.num_workers):
            chunks = iter(loader)
        for (place, records), chunk in zip(self._chunks(start), chunks, strict=True):
            if isinstance(chunk, Failure):
                raise InputError(chunk.message)
            for index, (record, content) in enumerate(zip(records, chunk, strict=True)):
                source = self.corpus.source(record) if isinstance(content, BadRecord) else ""
                yield SourceRecord(place._replace(position=place.position + index), content, source, record)

    def identity(self) -> dict[str, object]:
        encoder = self._dataset.encoder
        return {
            "data": self.corpus.fingerprint(),
            "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
            "separator_id": encoder.separator_id,
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def _chunks(self, start: Place) -> Iterator[tuple[Place, list[int]]]:
        """Successive pieces of the order: the place of the first record of each, and the records."""
        position = start.position
        for epoch in itertools.count(start.epoch):
            while position < self.records_per_epoch:
                stop = min(position + self._chunk_records, self.records_per_epoch)
                places = np.arange(position, stop) * self.world_size + self.rank
                if self.seed is not None:
                    places = Permutation(len(self.corpus), seed=self.seed, epoch=epoch)(places)
                yield Place(epoch, position), places.tolist()
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
