"""From settings to what they name: the files of a split, its tokenised records in order, streams."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Literal

from fusiontree.data.corpus import Corpus, resolve_paths
from fusiontree.data.lazy import LazyDataset
from fusiontree.data.order import MixedOrder, Order, PlainOrder
from fusiontree.data.ordered import OrderedSource
from fusiontree.data.records import BadRecord
from fusiontree.data.remote import Patience
from fusiontree.data.report import DataReport, refusal
from fusiontree.data.settings import STREAMING_PRESETS, DataSettings, StreamSource
from fusiontree.data.source import DocumentSource, RecordSet
from fusiontree.data.static import LongContextDataset
from fusiontree.data.streaming import MixedStreams, StreamEntry, StreamingDataset, StreamingSource, open_streams
from fusiontree.data.tokenizer import DocumentEncoder
from fusiontree.errors import InputError

logger = logging.getLogger(__name__)

Split = Literal["train", "eval"]


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


def open_source(settings: DataSettings, encoder: DocumentEncoder, split: Split, *, seed: int | None) -> DocumentSource:
    """The tokenised records of a split in their order: training goes on for ever, evaluation is one pass.

    Args:
        seed: of the shuffle; None = as they stand.

    Raises:
        InputError: files, tokens or streams that cannot be used.
    """
    if split == "train" and settings.data_mode == "hf_streaming":
        return StreamingSource(open_training_streams(settings, seed=seed), encoder, endless=True)
    records, order = open_records(settings, encoder, split, seed=seed)
    return OrderedSource(records, order, num_workers=settings.num_workers, endless=split == "train")


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
            raise refusal(source, text)
    if report.skipped:
        logger.warning(report.summary())
