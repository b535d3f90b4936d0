"""From settings to batches: the one loader of every data mode."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fusiontree.data.batch import Batch
from fusiontree.data.corpus import Corpus, resolve_paths
from fusiontree.data.lazy import LazyDataset, LazySource
from fusiontree.data.packing import Place, Row, pack
from fusiontree.data.records import BLANK_LINE, BadRecord
from fusiontree.data.report import DataReport
from fusiontree.data.settings import DataSettings
from fusiontree.data.source import DocumentSource
from fusiontree.data.tokenizer import DocumentEncoder, pad_id_of, separator_id_of
from fusiontree.errors import InputError

logger = logging.getLogger(__name__)

Split = Literal["train", "eval"]

_STATE_VERSION = 1

# How a checkpoint's data can differ from the run's, by the names in `DocumentSource.identity`.
_DIFFERENCES = {
    "data": "the files' contents, their order or data.text_key differ",
    "tokenizer": "the tokenizer differs",
    "separator_id": "data.document_separator differs",
    "seed": "seed or data.shuffle differs",
    "rank": "it belongs to another rank",
    "world_size": "the number of processes differs",
}


class Loader:
    """Batches of packed rows.

    A training loader is endless and every `iter()` goes on behind the last batch handed out; an evaluation loader makes
    one pass, from the beginning at every `iter()`, and its last batch may hold fewer rows, the last of them padded.
    Iterate over one at a time, and not through a wrapper that fetches ahead: the state is that after the last batch
    fetched.

    Args:
        source: tokenised records in order.
        batch_size: rows; length: tokens in a row; both may change between batches (`set_shape`) and across a resume.
        pad_id: the token that fills the last row.
        on_bad_record: "skip" counts and leaves out, "error" raises at the first.
    """

    def __init__(
        self,
        source: DocumentSource,
        *,
        batch_size: int,
        length: int,
        pad_id: int,
        on_bad_record: Literal["skip", "error"],
    ) -> None:
        self.set_shape(batch_size, length)
        self._source = source
        self._identity = dict(source.identity())
        self._pad_id = pad_id
        self._on_bad_record = on_bad_record
        self._place = Place()
        self._report = DataReport()
        self._goes_on = source.endless
        self._announced: set[str] = set()

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the last token handed out."""
        return self._place.epoch

    def set_shape(self, batch_size: int, length: int) -> None:
        """Make the next batches of `batch_size` rows of `length` tokens; they go on right behind the last batch.

        Raises:
            InputError: no row, or rows in which nothing can be predicted.
        """
        _check_shape(batch_size, length)
        self.batch_size = batch_size
        self.length = length

    def report(self) -> DataReport:
        """What has been read and skipped up to the last batch; a bad record counts in the first epoch only."""
        return self._report

    def fingerprint(self) -> str:
        """Hexadecimal digest of the data, the tokenizer and the order: equal where the same documents come."""
        identity = {key: value for key, value in self._identity.items() if key not in ("rank", "world_size")}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as plain values for JSON: it is derived anew from there, nothing is stored."""
        return {
            "version": _STATE_VERSION,
            "place": list(self._place),
            "identity": self._identity,
            "report": self._report.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next `iter()` go on where `state` was taken.

        Raises:
            InputError: the state is of another version, or the data, the tokenizer, the order or the number of
                processes are not those it was taken with.
        """
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
        self._place = Place(*state["place"])
        self._report = DataReport.from_state(state["report"])
        self._announced.update(self._report.skipped)
        self._goes_on = True

    def __iter__(self) -> Iterator[Batch]:
        if not self._goes_on:
            self._place, self._report = Place(), DataReport()
        self._goes_on = self._source.endless
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        rows = pack(self._documents(self._place), length=lambda: self.length, pad_id=self._pad_id)
        while batch := list(islice(rows, self.batch_size)):
            self._place = batch[-1].after
            yield _stack(batch)

    def _documents(self, start: Place) -> Iterator[tuple[Place, np.ndarray]]:
        """What there is to pack; counts it, and sees to it that an epoch without a document is no endless loop."""
        whole_epoch_from, found = (start.epoch if start.position == 0 else start.epoch + 1), False
        for place, content, source in self._source.read(start):
            if place.epoch > whole_epoch_from:
                if not found:
                    raise InputError(
                        "not one record of a whole epoch gave this process a document to train on: "
                        f"{self._report.summary()}"
                    )
                whole_epoch_from, found = place.epoch, False
            if isinstance(content, BadRecord):
                self._skip(place, source, content)
                continue
            found = True
            if place[:2] == start[:2]:
                place = start
            if place.offset == 0:
                self._report.documents += 1
            yield place, content

    def _skip(self, place: Place, source: str, bad: BadRecord) -> None:
        if place.epoch > 0:
            return  # the same records as in the first epoch
        self._report.add(source, bad)
        if bad.kind == BLANK_LINE:
            return
        if self._on_bad_record == "error":
            raise InputError(f"{source}: {bad.kind}, {bad.detail} (data.on_bad_record: skip leaves such records out)")
        if bad.kind not in self._announced:
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
        InputError: files that are missing, not JSONL, or without a single text.
    """
    where = f"data.{split}_paths"
    paths = resolve_paths(settings.train_paths if split == "train" else settings.eval_paths, where=where)
    corpus = Corpus(paths, text_key=settings.text_key, cache_dir=settings.cache_dir)
    corpus.require_text(where=where)
    return corpus


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
        split: "train" repeats for ever, each epoch in its own order where `settings.shuffle`; "eval" is one pass in
            file order.
        batch_size: rows of a batch of this rank; max_seq_length: tokens in a row, at least 2.
        seed: of the order.
        rank, world_size: every record goes to one rank, once an epoch. Ranks of an evaluation may differ in the number
            of their batches.

    Raises:
        InputError: impossible sizes, files that cannot be used, a separator that the tokenizer does not have.
    """
    _check_shape(batch_size, max_seq_length)  # before files are read for nothing
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    corpus = open_corpus(settings, split)
    if split == "train" and len(corpus) < world_size:
        raise InputError(f"data.train_paths: {len(corpus)} records are too few for {world_size} processes")
    encoder = DocumentEncoder(tokenizer, separator_id_of(tokenizer, settings.document_separator))
    source = LazySource(
        LazyDataset(corpus, encoder),
        num_workers=settings.num_workers,
        seed=seed if split == "train" and settings.shuffle else None,
        endless=split == "train",
        rank=rank,
        world_size=world_size,
    )
    return Loader(
        source,
        batch_size=batch_size,
        length=max_seq_length,
        pad_id=pad_id_of(tokenizer),
        on_bad_record=settings.on_bad_record,
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
    for source, text in corpus.records():
        if not isinstance(text, BadRecord):
            report.documents += 1
            yield text, source
            continue
        report.add(source, text)
        if on_bad_record == "error" and report.skipped:
            raise InputError(f"{source}: {text.kind}, {text.detail} (data.on_bad_record: skip leaves such records out)")
    if report.skipped:
        logger.warning(report.summary())
