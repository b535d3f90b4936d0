"""From settings to batches: the one loader of every data mode."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fusiontree.data.augment import LongContextTasks
from fusiontree.data.batch import Batch
from fusiontree.data.corpus import Corpus, resolve_paths
from fusiontree.data.lazy import LazyDataset
from fusiontree.data.order import MixedOrder, Order, Place, PlainOrder
from fusiontree.data.ordered import OrderedSource
from fusiontree.data.packing import Row, pack, pack_best_fit
from fusiontree.data.records import BLANK_LINE, BadRecord
from fusiontree.data.remote import Patience
from fusiontree.data.report import DataReport
from fusiontree.data.settings import STREAMING_PRESETS, DataSettings, StreamSource
from fusiontree.data.source import DocumentSource, RecordSet
from fusiontree.data.static import LongContextDataset
from fusiontree.data.streaming import MixedStreams, StreamEntry, StreamingDataset, StreamingSource, open_streams
from fusiontree.data.tokenizer import DocumentEncoder, pad_id_of, separator_id_of
from fusiontree.errors import InputError

logger = logging.getLogger(__name__)

Split = Literal["train", "eval"]
Packing = Literal["concatenate", "best_fit"]

_STATE_VERSION = 2

_NOTHING = (0, -1)

# How a checkpoint's data can differ from the run's, by the names in `DocumentSource.identity` and `Loader`'s own.
_DIFFERENCES = {
    "data": "the files' contents, their order or data.text_key differ",
    "chat_template": "the tokenizer's chat template differs",
    "shuffle_block": "data.shuffle_block differs",
    "weights": "the weights of data.train_sources differ",
    "sizes": "the sizes of data.train_sources differ",
    "tokenizer": "the tokenizer differs",
    "separator_id": "data.document_separator differs",
    "seed": "seed or data.shuffle differs",
    "augmentation": "data.needle_in_haystack_prob or data.structured_task_prob differs, or the seed of their tasks",
    "packing": "data.packing differs",
    "row_length": "training.max_seq_length differs, and with data.packing: best_fit it decides which rows there are",
}
# Of these, what says who gets which documents, and in which rows: it does not change the documents.
_NOT_IN_FINGERPRINT = ("packing", "row_length")


class Loader:
    """Batches of packed rows.

    A training loader is endless and every `iter()` goes on behind the last batch handed out; an evaluation loader makes
    one pass, from the beginning at every `iter()`, and its last batch may hold fewer rows, the last of them padded.
    Iterate over one at a time, and not through a wrapper that fetches ahead: the state is that after the last batch
    fetched.

    Args:
        source: tokenised records in order.
        batch_size: rows; length: tokens in a row. Both may change between batches (`set_shape`) and across a resume,
            but the length not with best fit.
        pad_id: the token that fills rows.
        on_bad_record: "skip" counts and leaves out, "error" raises at the first.
        packing: "concatenate" = `packing.pack`, "best_fit" = `packing.pack_best_fit`.
        tasks: what to write into the documents before they are packed.
    """

    def __init__(
        self,
        source: DocumentSource,
        *,
        batch_size: int,
        length: int,
        pad_id: int,
        on_bad_record: Literal["skip", "error"],
        packing: Packing = "concatenate",
        tasks: LongContextTasks | None = None,
    ) -> None:
        self._packing = packing
        self.batch_size = self.length = 0
        self.set_shape(batch_size, length)
        self._source = source
        self._identity = dict(source.identity())
        if tasks is not None:
            self._identity["augmentation"] = tasks.identity()
        if packing == "best_fit":
            self._identity |= {"packing": packing, "row_length": length}
        self._pad_id = pad_id
        self._on_bad_record = on_bad_record
        self._tasks = tasks
        self._place = Place()
        self._history: list[list[Place]] = []
        self._counted = _NOTHING  # epoch and position of the last record that the report has
        self._report = DataReport()
        self._goes_on = source.endless
        self._announced: set[str] = set()

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the last token handed out; with best fit, of the first in its window."""
        return self._place.epoch

    def set_shape(self, batch_size: int, length: int) -> None:
        """Make the next batches of `batch_size` rows of `length` tokens; they go on right behind the last batch.

        Raises:
            InputError: no row, rows in which nothing can be predicted, or another length with best fit.
        """
        _check_shape(batch_size, length)
        if self._packing == "best_fit" and self.length not in (0, length):
            raise InputError(
                "data.packing: best_fit makes rows of one length: set it to concatenate, or leave the curriculum out"
            )
        self.batch_size = batch_size
        self.length = length

    def report(self) -> DataReport:
        """What has been read and skipped up to the last batch; a bad record counts in the first epoch only."""
        return self._report

    def fingerprint(self) -> str:
        """Hexadecimal digest of the data, the tokenizer and the order: equal where the same documents come."""
        identity = {key: value for key, value in self._identity.items() if key not in _NOT_IN_FINGERPRINT}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as plain values for JSON: it is derived anew from there, nothing is stored."""
        return {
            "version": _STATE_VERSION,
            "place": list(self._place),
            "rank": self._source.rank,
            "history": [[list(place) for place in places] for places in self._history],
            "counted": list(self._counted),
            "identity": self._identity,
            "report": self._report.state_dict(),
        }

    def load_state_dict(self, states: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Make the next `iter()` go on where all ranks' `states` were taken; one state may stand alone.

        As many ranks as before go on exactly. Another number shares out what the former ranks had left of the epochs
        they were in, so that each document still comes once an epoch, and each of its tokens.

        Raises:
            InputError: a state is of another version, or the data, the tokenizer or the order are not those it was
                taken with.
        """
        states = [states] if isinstance(states, Mapping) else sorted(states, key=lambda state: state["rank"])
        for state in states:
            self._check_state(state)
        history = [[Place(*place) for place in places] for places in states[0]["history"]]
        rank, world_size = self._source.rank, self._source.world_size
        if len(states) == world_size:
            self._history, place = history, Place(*states[rank]["place"])
            if history:
                self._source.hand_over(history)
            self._report = DataReport.from_state(states[rank]["report"])
            self._counted = tuple(states[rank]["counted"])
        else:
            stopped = [Place(*state["place"]) for state in states]
            if any(one.rows for one in stopped):
                raise InputError(
                    f"the checkpoint was written by {len(states)} processes with data.packing: best_fit, whose rows "
                    f"belong to them: resume with as many instead of {world_size}"
                )
            self._history = [*history, stopped]
            place = self._source.hand_over(self._history)
            reports = [DataReport.from_state(state["report"]) for state in states]
            self._report = DataReport.merged(reports) if rank == 0 else DataReport()
            self._announced.update(*(report.skipped for report in reports))
            self._counted = _NOTHING  # positions now count other documents
        self._place = place
        self._announced.update(self._report.skipped)
        self._goes_on = True

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != _STATE_VERSION:
            raise InputError(
                f"the checkpoint's data state has version {state.get('version')}, this program reads {_STATE_VERSION}"
            )
        for key in {**self._identity, **state["identity"]}:
            if self._identity.get(key) != state["identity"].get(key):
                difference = _DIFFERENCES.get(key, f"{key} differs")
                raise InputError(
                    f"the checkpoint's place in the data does not fit this run: {difference}; "
                    "resume with what it was trained on, or start a new run in another output_dir"
                )

    def __iter__(self) -> Iterator[Batch]:
        if not self._goes_on:
            self._place, self._counted, self._report = Place(), _NOTHING, DataReport()
        self._goes_on = self._source.endless
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        documents = self._documents(self._place)
        if self._packing == "best_fit":
            rows = pack_best_fit(documents, length=self.length, pad_id=self._pad_id)
        else:
            rows = pack(documents, length=lambda: self.length, pad_id=self._pad_id)
        while batch := list(islice(rows, self.batch_size)):
            self._place = batch[-1].after
            for row in batch:
                self._report.tokens += row.tokens
                self._report.padding_tokens += self.length - row.tokens
                self._report.cut_documents += row.cut_documents
            yield _stack(batch)

    def _documents(self, start: Place) -> Iterator[tuple[Place, np.ndarray]]:
        """What there is to pack; counts it, and sees to it that an epoch without a document is no endless loop.

        What a former `start` has read and counted already, the rest of a window for one, is not counted again.
        """
        whole_epoch_from = max(start.epoch + (start.position > 0), self._source.first_whole_epoch)
        found = False
        for place, content, source, number, is_first in self._source.read(start):
            is_new = place[:2] > self._counted
            if is_new:
                self._counted = place[:2]
            if place.epoch > whole_epoch_from:
                if not found:
                    raise InputError(
                        "not one record of a whole epoch gave this process a document to train on: "
                        f"{self._report.summary()}"
                    )
                whole_epoch_from, found = place.epoch, False
            if isinstance(content, BadRecord):
                if is_first:
                    self._skip(source, content, is_new)
                continue
            found = True
            self._report.documents += is_new and place.offset == 0
            if self._tasks is not None:
                content = self._tasks(content, place.epoch, number)
            if place[:2] == start[:2]:
                place = max(place, start)
            yield place, content

    def _skip(self, source: str, bad: BadRecord, is_new: bool) -> None:
        if is_new:
            self._report.add(source, bad)
        if bad.kind == BLANK_LINE:
            return
        if self._on_bad_record == "error":
            raise InputError(f"{source}: {bad.kind}, {bad.detail} (data.on_bad_record: skip leaves such records out)")
        if is_new and bad.kind not in self._announced:
            self._announced.add(bad.kind)
            logger.warning("skipped %s: %s, %s; others like it are only counted", source, bad.kind, bad.detail)


def _check_shape(batch_size: int, length: int) -> None:
    if length < 2:
        raise InputError(f"max_seq_length must be at least 2, got {length}: a row of 1 token predicts nothing")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")


def _stack(rows: list[Row]) -> Batch:
    return Batch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in rows])),
        labels=torch.from_numpy(np.stack([row.labels for row in rows])),
        position_ids=torch.from_numpy(np.stack([row.position_ids for row in rows])),
    )


def open_corpus(settings: DataSettings, split: Split) -> Corpus:
    """The indexed files of a split, with at least one usable record in them.

    Raises:
        InputError: files that are missing, not of a kind that is read, or without a single text.
    """
    return Corpus.joined(_open_corpora(settings, split))


def _open_corpora(settings: DataSettings, split: Split) -> list[Corpus]:
    """One for each of `data.train_sources`, or the one of the split's paths."""
    paths = settings.train_paths if split == "train" else settings.eval_paths
    groups: list[tuple[str, tuple[str, ...], str | None]] = [(f"data.{split}_paths", paths, None)]
    if split == "train" and settings.train_sources:
        if settings.train_paths:
            raise InputError("data.train_paths and data.train_sources are both given: keep one of them")
        sources = enumerate(settings.train_sources)
        groups = [(f"data.train_sources[{number}].paths", source.paths, source.text_key) for number, source in sources]
    corpora = []
    for where, patterns, text_key in groups:
        corpus = Corpus(
            resolve_paths(patterns, where=where),
            text_key=text_key or settings.text_key,
            txt_documents=settings.txt_documents,
            cache_dir=settings.cache_dir,
        )
        corpus.require_text(where=where)
        corpora.append(corpus)
    return corpora


def names_files(settings: DataSettings, split: Split) -> bool:
    """Whether the settings say which files a split is made of."""
    return bool(settings.train_paths or settings.train_sources) if split == "train" else bool(settings.eval_paths)


def static_folder(settings: DataSettings, split: Split) -> str:
    """Where the tokens of a split lie.

    Raises:
        InputError: the settings do not say.
    """
    if settings.static_dir is None:
        raise InputError("data.static_dir is not set: name the folder for the tokens of data_mode static")
    return os.path.join(os.path.expanduser(settings.static_dir), split)


def open_records(
    settings: DataSettings, encoder: DocumentEncoder, split: Split, *, seed: int | None
) -> tuple[RecordSet, Order]:
    """The tokenised records of a split, and the order in which they are trained on.

    Args:
        seed: of the shuffle; None = as they stand.

    Raises:
        InputError: files or tokens that cannot be used.
    """
    if settings.data_mode == "static" and not names_files(settings, split):
        tokens = LongContextDataset(static_folder(settings, split), encoder.identity())
        return tokens, PlainOrder(len(tokens), seed)
    corpora = _open_corpora(settings, split)
    records: RecordSet = LazyDataset(Corpus.joined(corpora), encoder)
    if settings.data_mode == "static":
        records = LongContextDataset(static_folder(settings, split), records.identity())
    if len(corpora) == 1:
        return records, PlainOrder(len(records), seed)
    weights = [source.weight for source in settings.train_sources]
    return records, MixedOrder([len(corpus) for corpus in corpora], weights, seed)


def build_loader(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Split = "train",
    batch_size: int,
    max_seq_length: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """The batches of one split for one rank.

    Args:
        split: "train" repeats for ever, each epoch in its own order where `settings.shuffle`, packed and augmented as
            the settings say; "eval" is one pass in file order, of the texts as they are, always concatenated: the
            figures of runs that pack differently compare, and no row is spent on padding.
        batch_size: rows of a batch of this rank; max_seq_length: tokens in a row, at least 2.
        seed: of the order and of the tasks that are written into documents.
        rank, world_size: every record goes to one rank, once an epoch. Ranks of an evaluation may differ in the number
            of their batches.

    Raises:
        InputError: impossible sizes, files that cannot be used, a separator that the tokenizer does not have, tasks
            that it cannot write.
    """
    _check_shape(batch_size, max_seq_length)  # before files are read for nothing
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    encoder = DocumentEncoder(tokenizer, separator_id_of(tokenizer, settings.document_separator))
    order_seed = seed if split == "train" and settings.shuffle else None
    source = _open_source(settings, encoder, split, seed=order_seed, rank=rank, world_size=world_size)
    is_augmented = settings.needle_in_haystack_prob > 0 or settings.structured_task_prob > 0
    return Loader(
        source,
        batch_size=batch_size,
        length=max_seq_length,
        pad_id=pad_id_of(tokenizer),
        on_bad_record=settings.on_bad_record,
        packing=settings.packing if split == "train" else "concatenate",
        tasks=_tasks_of(settings, encoder, seed) if split == "train" and is_augmented else None,
    )


def _open_source(
    settings: DataSettings, encoder: DocumentEncoder, split: Split, *, seed: int | None, rank: int, world_size: int
) -> DocumentSource:
    ranks = {"rank": rank, "world_size": world_size}
    if split == "train" and settings.data_mode == "hf_streaming":
        return StreamingSource(open_training_streams(settings, seed=seed), encoder, endless=True, **ranks)
    records, order = open_records(settings, encoder, split, seed=seed)
    if split == "train" and len(records) < world_size:
        raise InputError(f"data.train_paths: {len(records)} records are too few for {world_size} processes")
    return OrderedSource(records, order, num_workers=settings.num_workers, endless=split == "train", **ranks)


def open_training_streams(settings: DataSettings, *, seed: int | None) -> StreamingDataset | MixedStreams:
    """What `data_mode: hf_streaming` trains on.

    Raises:
        InputError: nothing is named, or more than one of the settings that may; a stream that cannot be opened.
    """
    entries: dict[str, list[StreamEntry]] = {
        "hf_streaming_sources": [_stream(settings, source) for source in settings.hf_streaming_sources],
        "hf_streaming_preset": [
            _stream(settings, source) for source in STREAMING_PRESETS.get(settings.hf_streaming_preset or "", ())
        ],
        "train_sources": [
            _stream(settings, StreamSource(path=path, weight=source.weight, text_key=source.text_key))
            for source in settings.train_sources
            for path in source.paths
        ],
        "train_paths": [_stream(settings, StreamSource(path=path)) for path in settings.train_paths],
    }
    if any(len(source.paths) != 1 for source in settings.train_sources):
        raise InputError("data.train_sources: in data_mode hf_streaming, each source names one path or glob")
    named = [name for name, given in entries.items() if given]
    if len(named) != 1:
        raise InputError(
            f"data.{named[0]} and data.{named[1]} are both given: keep one of them"
            if named
            else "data.hf_streaming_sources is empty: name at least one file, URL or data set, or a hf_streaming_preset"
        )
    return open_streams(
        entries[named[0]],
        seed=seed,
        is_mixed=named[0] != "train_paths",
        shuffle_block=settings.shuffle_block,
        patience=Patience(timeout=settings.stream_timeout, tries=settings.stream_tries),
        where=f"data.{named[0]}",
    )


def _stream(settings: DataSettings, source: StreamSource) -> StreamEntry:
    return StreamEntry(
        source.path,
        source.config,
        source.split,
        source.text_key or settings.text_key,
        settings.txt_documents,
        source.weight,
    )


def _tasks_of(settings: DataSettings, encoder: DocumentEncoder, seed: int) -> LongContextTasks:
    return LongContextTasks.for_encoder(
        encoder,
        needle_in_haystack_prob=settings.needle_in_haystack_prob,
        structured_task_prob=settings.structured_task_prob,
        seed=seed,
    )


def documents(settings: DataSettings, split: Split) -> Iterator[tuple[str, str]]:
    """(text, `file:line`) of every document of a split in file order; what was skipped is logged at the end.

    Raises:
        InputError: files that cannot be used; a bad record where `settings.on_bad_record` is "error".
    """
    corpus = open_corpus(settings, split)
    return _texts(corpus, settings.on_bad_record)


def _texts(corpus: Corpus, on_bad_record: Literal["skip", "error"]) -> Iterator[tuple[str, str]]:
    report = DataReport()
    for source, text in corpus.texts():
        if not isinstance(text, BadRecord):
            report.documents += 1
            yield text, source
            continue
        report.add(source, text)
        if on_bad_record == "error" and report.skipped:
            raise InputError(f"{source}: {text.kind}, {text.detail} (data.on_bad_record: skip leaves such records out)")
    if report.skipped:
        logger.warning(report.summary())
