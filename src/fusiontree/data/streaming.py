"""The `hf_streaming` mode: records read from their beginning to their end, from files, URLs and data sets of the hub.

Nothing is indexed, so nothing has to be there before training starts, and only the block at hand is in memory. The
order is a function of (seed, epoch, position) all the same: the shards of an epoch are permuted, their records are
counted through and cut into blocks, and each block is permuted. To begin anywhere, what comes before is read over.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch.utils.data import IterableDataset

from fusiontree.data.corpus import resolve_paths
from fusiontree.data.order import Permutation, Place, Turns
from fusiontree.data.records import BadRecord, Content
from fusiontree.data.remote import Patience
from fusiontree.data.shards import SUFFIXES, HubShard, Shard, file_shard, has_file_suffix, is_url
from fusiontree.data.source import SourceRecord
from fusiontree.data.tokenizer import DocumentEncoder
from fusiontree.data.unpack import is_arrow_folder
from fusiontree.errors import InputError, first_line

logger = logging.getLogger(__name__)

# About this much text is tokenised at a time.
_CHUNK_CHARACTERS = 1 << 18
_MAX_CHUNK_RECORDS = 256

_MAX_QUESTIONS = 16  # that servers are asked at once

_PATIENCE = Patience()

_HUB_ADVICE = "check the network, and log in (hf auth login) where the data set is not public"


@dataclass(frozen=True)
class StreamEntry:
    """One thing to stream.

    Attributes:
        path: a file or glob, an http(s) URL, a folder that `datasets` loads, or the hub name of a data set, which may
            end in `@` and a revision. What a file holds is told from its name: .jsonl, .json or .txt, each also with
            .gz or .zst behind it, or .parquet.
        config: configuration of a data set (a folder or a hub name); None = its only one.
        split: of a data set; None = train, or the one that a saved Arrow folder holds. A file has none, and this is
            not looked at.
        text_key: key or column that holds the text or the messages; not looked at where a line is a text.
        txt_documents: what of a .txt file is one document, the "file" or each "line".
        weight: share of the records, where entries are mixed.
    """

    path: str
    config: str | None = None
    split: str | None = None
    text_key: str = "text"
    txt_documents: str = "line"
    weight: float = 1.0


class StreamRecord(NamedTuple):
    """A record that is read and not decoded yet; `number` counts a shard's lines or rows from 1."""

    shard: Shard
    number: int
    content: Any
    is_first: bool  # it has not come in an earlier round

    @property
    def source(self) -> str:
        return f"{self.shard.name}:{self.number}"

    def decode(self) -> Content:
        return self.shard.decode(self.content)


class StreamingDataset(IterableDataset):
    """The records of some entries in an order of their own each epoch; iterating gives the texts of the first epoch.

    A `DataLoader` with worker processes would read all of it in each of them: iterate over it in one.

    Args:
        entries: what to stream; a file that is named twice is read once.
        seed: of the order; None = the order of the entries, and of the records in them.
        shuffle_block: records that are mixed with each other. Each process holds as many in memory.
        patience: with servers.
        where: the setting the entries come from, for messages.

    Raises:
        InputError: no entry, a file or a data set that is not there or cannot be used, a server that does not answer.
    """

    def __init__(
        self,
        entries: Sequence[StreamEntry],
        *,
        seed: int | None = None,
        shuffle_block: int = 1024,
        patience: Patience = _PATIENCE,
        where: str = "streams",
    ) -> None:
        if shuffle_block < 1:
            raise InputError(f"shuffle_block must be at least 1, got {shuffle_block}")
        if not entries:
            raise InputError(f"{where} is empty: name at least one file, URL or data set")
        self.seed = seed
        self.shuffle_block = shuffle_block
        shards: dict[tuple[object, ...], Shard] = {}
        for entry in entries:
            shards.update(_shards_of(entry, patience, where))
        self.shards = list(shards.values())

    def __iter__(self) -> Iterator[Content]:
        return (record.decode() for record in self.records())

    def records(self, epoch: int = 0, start: int = 0) -> Iterator[StreamRecord]:
        """The records of an epoch's order from place `start` on.

        Raises:
            InputError: a shard cannot be read, or is not what it was.
        """
        first_block = start // self.shuffle_block
        records = self._in_shard_order(epoch, first_block * self.shuffle_block)
        for number in itertools.count(first_block):
            block = list(itertools.islice(records, self.shuffle_block))
            if not block:
                return
            places = np.arange(max(0, start - number * self.shuffle_block), len(block))
            if self.seed is not None:
                places = self._permutation("block", number, len(block), epoch)(places)
            for place in places.tolist():
                yield block[place]

    def fingerprint(self) -> str:
        """Hexadecimal digest of what tells the shards' contents, without reading them, and of their order.

        That is, for a file, its name, size and modification time, and for one behind a URL what the server says of it.
        """
        with ThreadPoolExecutor(_MAX_QUESTIONS) as pool:
            versions = list(pool.map(lambda shard: shard.version, self.shards))
        return hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:32]

    def _in_shard_order(self, epoch: int, skip: int) -> Iterator[StreamRecord]:
        order = np.arange(len(self.shards))
        if self.seed is not None:
            order = self._permutation("shards", 0, len(order), epoch)(order)
        if skip:
            logger.info("reading over %d records to where the data goes on", skip)
        for index in order.tolist():
            shard = self.shards[index]
            records = shard.open()
            skipped = records.skip(skip) if skip else 0
            skip -= skipped
            if skip == 0:
                for number, content in enumerate(records, skipped + 1):
                    yield StreamRecord(shard, number, content, epoch == 0)

    def _permutation(self, kind: str, number: int, size: int, epoch: int) -> Permutation:
        digest = hashlib.blake2b(f"{self.seed}/{kind}/{number}".encode(), digest_size=8).digest()
        return Permutation(size, seed=int.from_bytes(digest, "little"), epoch=epoch)


class MixedStreams:
    """Several streams in fixed shares (see `Turns`), each over and over: one epoch without end.

    To begin anywhere, each stream is read over up to there, and more than once where it has come round.
    """

    def __init__(self, streams: Sequence[StreamingDataset], weights: Sequence[float]) -> None:
        self.streams = list(streams)
        self.seed = streams[0].seed
        self.shuffle_block = streams[0].shuffle_block
        self.turns = Turns(weights)

    def records(self, epoch: int = 0, start: int = 0) -> Iterator[StreamRecord]:
        """The records of the only epoch, 0, from place `start` on."""
        running = [_endless(s, skip) for s, skip in zip(self.streams, self.turns.before(start), strict=True)]
        for place in itertools.count(start):
            yield next(running[int(self.turns.source(np.array([place]))[0])])

    def fingerprint(self) -> str:
        """See `StreamingDataset.fingerprint`."""
        parts = [stream.fingerprint() for stream in self.streams]
        return hashlib.sha256(json.dumps([parts, self.turns.counts.tolist()]).encode()).hexdigest()[:32]


def _endless(stream: StreamingDataset, skip: int) -> Iterator[StreamRecord]:
    for epoch in itertools.count():
        count = 0
        for record in stream.records(epoch, skip):
            count += 1
            yield record
        if count == 0:
            length = sum(1 for _ in stream.records(epoch))
            if length == 0:
                raise InputError("a stream that is to be mixed holds no record at all")
            skip -= length
        else:
            skip = 0


def open_streams(
    entries: Sequence[StreamEntry],
    *,
    seed: int | None,
    is_mixed: bool = False,
    shuffle_block: int = 1024,
    patience: Patience = _PATIENCE,
    where: str = "streams",
) -> StreamingDataset | MixedStreams:
    """The entries as one stream: all records of all once an epoch, or (`is_mixed`) by the entries' weights.

    Raises:
        InputError: see `StreamingDataset`.
    """
    if not is_mixed or len(entries) == 1:
        return StreamingDataset(entries, seed=seed, shuffle_block=shuffle_block, patience=patience, where=where)
    streams = [
        StreamingDataset([entry], seed=seed, shuffle_block=shuffle_block, patience=patience, where=f"{where}[{number}]")
        for number, entry in enumerate(entries)
    ]
    return MixedStreams(streams, [entry.weight for entry in entries])


class StreamingSource:
    """A stream in the order of training; a `position` is a place of the dataset's order in an epoch.

    Args:
        dataset: as `open_streams` gives it.
        endless: go on with the next epoch, or stop after one.
    """

    def __init__(self, dataset: StreamingDataset | MixedStreams, encoder: DocumentEncoder, *, endless: bool) -> None:
        self.dataset = dataset
        self.endless = endless
        self._encoder = encoder

    def damage(self) -> list[tuple[str, BadRecord]]:
        """Nothing: reading comes to it."""
        return []

    def read(self, start: Place) -> Iterator[SourceRecord]:
        """Every record from that of `start` on; its offset does not matter here.

        Raises:
            InputError: see `StreamingDataset.records`; or an endless stream holds no record.
        """
        position = start.position
        for epoch in itertools.count(start.epoch):
            first = position
            for record, content in self._encoded(self.dataset.records(epoch, position)):
                source = record.source if isinstance(content, BadRecord) else ""
                yield SourceRecord(Place(epoch, position), content, source, position, record.is_first)
                position += 1
            if not self.endless:
                return
            if position == first == 0:
                raise InputError("the streams hold no record at all")
            position = 0

    def identity(self) -> dict[str, object]:
        seed = self.dataset.seed
        return {
            "data": self.dataset.fingerprint(),
            **self._encoder.identity(),
            "seed": seed,
            "shuffle_block": None if seed is None else self.dataset.shuffle_block,
        }

    def _encoded(self, records: Iterator[StreamRecord]) -> Iterator[tuple[StreamRecord, np.ndarray | BadRecord]]:
        chunk: list[StreamRecord] = []
        contents: list[Content] = []
        characters = 0
        for record in records:
            chunk.append(record)
            contents.append(record.decode())
            characters += len(contents[-1]) if isinstance(contents[-1], str) else 0
            if characters >= _CHUNK_CHARACTERS or len(chunk) == _MAX_CHUNK_RECORDS:
                yield from zip(chunk, self._encoder.records(contents), strict=True)
                chunk, contents, characters = [], [], 0
        yield from zip(chunk, self._encoder.records(contents), strict=True)


def _shards_of(entry: StreamEntry, patience: Patience, where: str) -> dict[tuple[object, ...], Shard]:
    """The shards of an entry, by what makes two of them the same."""
    path = os.path.expanduser(entry.path)
    is_folder = not is_url(path) and os.path.isdir(path)
    is_file = is_url(path) or has_file_suffix(path) or os.path.exists(path) or glob.has_magic(path)
    if is_folder or not is_file:
        return _data_set(entry, path if is_folder else None, patience, where)
    if entry.config is not None:
        raise InputError(f"{where}: config {entry.config} is of no use to the file {entry.path}; leave it out")
    shards: dict[tuple[object, ...], Shard] = {}
    for name in [path] if is_url(path) else resolve_paths([path], where=where):
        if os.path.isdir(name):  # a saved Arrow data set
            shards |= _data_set(replace(entry, path=name), name, patience, where)
        else:
            shards[name if is_url(name) else os.path.realpath(name), entry.text_key] = file_shard(
                name, text_key=entry.text_key, patience=patience, txt_documents=entry.txt_documents
            )
    return shards


def _data_set(
    entry: StreamEntry, folder: str | None, patience: Patience, where: str
) -> dict[tuple[object, ...], Shard]:
    commit: str | None = None
    split: str | None = entry.split or "train"
    version: list[object]
    if folder:
        name, version = folder, [_files_in(folder)]
        advice = f"name the files in it, such as {os.path.join(folder, '*.jsonl')}"
    else:
        name, _, revision = entry.path.partition("@")
        commit = _hub_revision(name, revision or None, patience, where)
        version, advice = [name, commit], _HUB_ADVICE
    is_saved = folder is not None and is_arrow_folder(folder)
    if is_saved and entry.config is not None:
        raise InputError(
            f"{where}: config {entry.config} is of no use to {entry.path}, which is a saved data set: leave it out"
        )
    # Takes a second or two, which streams of files alone need not wait for.
    from datasets import load_dataset, load_from_disk

    try:
        if is_saved:
            saved = load_from_disk(folder)
            split = saved.split and str(saved.split)
            data_set = saved.to_iterable_dataset()
        else:
            data_set = load_dataset(name, entry.config, split=split, streaming=True, revision=commit)
        if data_set.column_names and entry.text_key in data_set.column_names:
            data_set = data_set.select_columns([entry.text_key])
        num_shards = data_set.num_shards
    except Exception as error:  # whatever a data set's format and file system raise
        raise InputError(f"{where}: {entry.path} cannot be streamed: {first_line(error)}") from error
    if is_saved and split is not None and entry.split not in (None, split):
        raise InputError(f"{where}: {entry.path} holds the split {split}, and {entry.split} is asked for")
    label = "/".join(part for part in (entry.path, entry.config, split) if part)
    return {
        (name, commit, entry.config, split, entry.text_key, index): HubShard(
            label if num_shards == 1 else f"{label}[{index}]",
            functools.partial(data_set.shard, num_shards, index),
            version=[*version, entry.config, split, entry.text_key, num_shards, index],
            text_key=entry.text_key,
            patience=None if folder else patience,
            advice=advice,
        )
        for index in range(num_shards)
    }


def _files_in(folder: str) -> str:
    """Hexadecimal digest of the names, sizes and modification times of the files under a folder, hidden ones aside."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("[!.]*")):
        if path.is_file():
            status = path.stat()
            name = path.relative_to(folder).as_posix()
            digest.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    return digest.hexdigest()[:32]


def _hub_revision(name: str, revision: str | None, patience: Patience, where: str) -> str | None:
    """The commit that a data set of the hub is at, by which it is read from then on."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"{where}: {name} is no file or folder here and no hub name; a file's name ends in {SUFFIXES}"
        ) from error
    try:
        # Asked first because loading retries an unreachable hub for the better part of a minute.
        return HfApi().dataset_info(name, revision=revision, timeout=patience.timeout).sha
    except Exception as error:
        raise InputError(
            f"{where}: {name} is no file or folder here, and the hub did not provide a data set of that name "
            f"({first_line(error)}); {_HUB_ADVICE}"
        ) from error
