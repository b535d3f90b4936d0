"""From settings to batches: the one loader of every data mode."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fusiontree.data.augment import LongContextTasks
from fusiontree.data.batch import IGNORED_LABEL, Batch
from fusiontree.data.opening import Split, open_source
from fusiontree.data.order import Place
from fusiontree.data.packing import Row, pack, pack_best_fit
from fusiontree.data.records import BLANK_LINE, BadRecord
from fusiontree.data.report import DataReport, refusal
from fusiontree.data.settings import DataSettings
from fusiontree.data.source import DocumentSource
from fusiontree.data.tokenizer import DocumentEncoder, pad_id_of, separator_id_of
from fusiontree.errors import InputError

logger = logging.getLogger(__name__)

Packing = Literal["concatenate", "best_fit"]

_STATE_VERSION = 3

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
# Of these, what says which rows the documents lie in: it does not change the documents.
_NOT_IN_FINGERPRINT = ("packing", "row_length")


class Loader:
    """Batches of packed rows, of which several processes take turns.

    Every process reads and packs all of the data. Of each `world_size * batch_size` rows in order, process `rank` hands
    out the `batch_size` from `rank * batch_size` on: together they have the rows, the counts and the state of one
    process with batches of that many rows.

    A training loader is endless and every `iter()` goes on behind the last batch handed out; an evaluation loader makes
    one pass, from the beginning at every `iter()`, and its last batch may hold fewer rows, the last of them padded. All
    processes have as many batches: one that is left without a row gets one in which nothing is predicted. Iterate over
    one at a time, and not through a wrapper that fetches ahead: the state is that after the last batch fetched.

    Args:
        source: tokenised records in order.
        batch_size: rows of this process's batch; length: tokens in a row. Both may change between batches
            (`set_shape`) and across a resume, but the length not with best fit. All processes have the same.
        pad_id: the token that fills rows.
        on_bad_record: "skip" counts and leaves out, "error" raises at the first.
        packing: "concatenate" = `packing.pack`, "best_fit" = `packing.pack_best_fit`.
        tasks: what to write into the documents before they are packed.
        rank, world_size: which of how many processes this is; both may change across a resume.
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
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self._rank = rank
        self._world_size = world_size
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
        self._counted = _NOTHING  # epoch and position of the last record that the report has
        self._report = DataReport()
        self._goes_on = source.endless
        self._announced: set[str] = set()
        for place, bad in source.damage():
            if on_bad_record == "error":
                raise refusal(place, bad)
            if rank == 0:
                logger.warning("%s: %s, %s; what comes before is read", place, bad.kind, bad.detail)

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the last token handed out to any process; with best fit, of the first in its window."""
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
        """What all processes together have read and skipped up to the last batch, the same in each of them; a bad
        record counts in the first epoch only."""
        return self._report

    def fingerprint(self) -> str:
        """Hexadecimal digest of the data, the tokenizer and the order: equal where the same documents come."""
        identity = {key: value for key, value in self._identity.items() if key not in _NOT_IN_FINGERPRINT}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

    def state_dict(self) -> dict[str, Any]:
        """Where the next rows begin, as plain values for JSON: they are derived anew from there, nothing is stored.

        After the same number of batches it is the same in all processes, and in one with as many rows in a batch.
        """
        return {
            "version": _STATE_VERSION,
            "place": list(self._place),
            "counted": list(self._counted),
            "identity": self._identity,
            "report": self._report.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next `iter()` go on where `state` was taken, by whatever process of however many.

        Raises:
            InputError: the state is of another version, or the data, the tokenizer or the order are not those it was
                taken with.
        """
        self._check_state(state)
        self._place = Place(*state["place"])
        self._counted = tuple(state["counted"])
        self._report = DataReport.from_state(state["report"])
        self._announced.update(self._report.skipped)
        self._goes_on = True

    def _check_state(self, state: Mapping[str, Any]) -> None:
        # Up to version 2 a checkpoint held a list of them, one for each process.
        version = (state[0] if isinstance(state, list) else state).get("version")
        if version != _STATE_VERSION:
            raise InputError(
                f"the checkpoint's data state has version {version}, this program reads {_STATE_VERSION}: resume with "
                "the FusionTree that wrote it, or start a new run in another output_dir"
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
        while everyones := list(islice(rows, self._world_size * self.batch_size)):
            self._place = everyones[-1].after
            for row in everyones:
                self._report.tokens += row.tokens
                self._report.padding_tokens += self.length - row.tokens
                self._report.cut_documents += row.cut_documents
            mine = everyones[self._rank * self.batch_size : (self._rank + 1) * self.batch_size]
            yield _stack(mine or [_unlabelled(everyones[0])])

    def _documents(self, start: Place) -> Iterator[tuple[Place, np.ndarray]]:
        """What there is to pack; counts it, and sees to it that an epoch without a document is no endless loop.

        What a former `start` has read and counted already, the rest of a window for one, is not counted again.
        """
        whole_epoch_from = start.epoch + (start.position > 0)
        found = False
        for place, content, source, number, is_first in self._source.read(start):
            is_new = place[:2] > self._counted
            if is_new:
                self._counted = place[:2]
            if place.epoch > whole_epoch_from:
                if not found:
                    raise InputError(
                        f"not one record of a whole epoch gave a document to train on: {self._report.summary()}"
                    )
                whole_epoch_from, found = place.epoch, False
            if isinstance(content, BadRecord):
                if is_first:
                    self._skip(source, content, is_new)
                continue
            found = True
            self._report.documents += is_new
            if self._tasks is not None:
                content = self._tasks(content, place.epoch, number)
            yield start if place[:2] == start[:2] else place, content

    def _skip(self, source: str, bad: BadRecord, is_new: bool) -> None:
        if is_new:
            self._report.add(source, bad)
        if bad.kind == BLANK_LINE:
            return
        if self._on_bad_record == "error":
            raise refusal(source, bad)
        if is_new and self._rank == 0 and bad.kind not in self._announced:
            self._announced.add(bad.kind)
            logger.warning("skipped %s: %s, %s; others like it are only counted", source, bad.kind, bad.detail)


def _check_shape(batch_size: int, length: int) -> None:
    if length < 2:
        raise InputError(f"max_seq_length must be at least 2, got {length}: a row of 1 token predicts nothing")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")


def _unlabelled(row: Row) -> Row:
    return replace(row, labels=np.full_like(row.labels, IGNORED_LABEL))


def _stack(rows: list[Row]) -> Batch:
    return Batch(
        input_ids=torch.from_numpy(np.stack([row.input_ids for row in rows])),
        labels=torch.from_numpy(np.stack([row.labels for row in rows])),
        position_ids=torch.from_numpy(np.stack([row.position_ids for row in rows])),
    )


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
    """The batches of one split for one process.

    Args:
        split: "train" repeats for ever, each epoch in its own order where `settings.shuffle`, packed and augmented as
            the settings say; "eval" is one pass in file order, of the texts as they are, always concatenated: the
            figures of runs that pack differently compare, and no row is spent on padding.
        batch_size: rows of a batch of this process; max_seq_length: tokens in a row, at least 2.
        seed: of the order and of the tasks that are written into documents.
        rank, world_size: which of how many processes this is. Each reads everything and hands out its rows of every
            `world_size * batch_size`.

    Raises:
        InputError: impossible sizes, files that cannot be used, a separator that the tokenizer does not have, tasks
            that it cannot write.
    """
    _check_shape(batch_size, max_seq_length)  # before files are read for nothing
    encoder = DocumentEncoder(tokenizer, separator_id_of(tokenizer, settings.document_separator))
    order_seed = seed if split == "train" and settings.shuffle else None
    source = open_source(settings, encoder, split, seed=order_seed)
    is_augmented = settings.needle_in_haystack_prob > 0 or settings.structured_task_prob > 0
    return Loader(
        source,
        batch_size=batch_size,
        length=max_seq_length,
        pad_id=pad_id_of(tokenizer),
        on_bad_record=settings.on_bad_record,
        packing=settings.packing if split == "train" else "concatenate",
        tasks=_tasks_of(settings, encoder, seed) if split == "train" and is_augmented else None,
        rank=rank,
        world_size=world_size,
    )


def _tasks_of(settings: DataSettings, encoder: DocumentEncoder, seed: int) -> LongContextTasks:
    return LongContextTasks.for_encoder(
        encoder,
        needle_in_haystack_prob=settings.needle_in_haystack_prob,
        structured_task_prob=settings.structured_task_prob,
        seed=seed,
    )
