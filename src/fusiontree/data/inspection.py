"""What a corpus is made of, measured on an even sample of its records."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np

from fusiontree.data.batch import Batch
from fusiontree.data.corpus import Corpus
from fusiontree.data.order import Permutation
from fusiontree.data.records import BadRecord, Content, Conversation
from fusiontree.data.report import DataReport
from fusiontree.data.streaming import MixedStreams, StreamingDataset
from fusiontree.data.tokenizer import DocumentEncoder

# Names of characters begin with their script; what is not here is counted under its first word.
_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}
_SCRIPT_SAMPLE = 2000  # characters of a document that are looked at
_RECORDS_AT_ONCE = 64


@dataclass
class Inspection:
    """A sample of a corpus.

    Attributes:
        records: records looked at; `of`: records there are, None where that is not known.
        lengths: tokens of each document, separator included; characters and text_bytes (UTF-8): of all of them.
        scripts: letters by script, beside "digits", "space" and "other", over the beginnings of the documents.
        report: what could be read and what not.
    """

    records: int
    of: int | None
    lengths: list[int] = field(default_factory=list)
    characters: int = 0
    text_bytes: int = 0
    scripts: Counter[str] = field(default_factory=Counter)
    report: DataReport = field(default_factory=DataReport)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def estimated_tokens(self) -> int | None:
        """Tokens of the whole corpus, if the rest is like the sample."""
        return None if self.of is None else round(self.tokens * self.of / self.records)

    def histogram(self) -> list[tuple[int, int]]:
        """(upper bound in tokens, documents with at most that many and more than the bound before); bounds double."""
        bounds = Counter(1 << max(0, length - 1).bit_length() for length in self.lengths)
        if not bounds:
            return []
        bound, result = min(bounds), []
        while bound <= max(bounds):
            result.append((bound, bounds[bound]))
            bound *= 2
        return result


def inspect_corpus(corpus: Corpus, encoder: DocumentEncoder, *, records: int) -> Inspection:
    """Read and tokenise up to `records` records, spread evenly over the corpus, the same ones every time."""
    count = min(records, len(corpus))
    chosen = Permutation(len(corpus), seed=0, epoch=0)(np.arange(count)).tolist()
    contents = ((corpus.source(record), corpus.read(record)) for record in chosen)
    return _inspect(contents, encoder, Inspection(records=count, of=len(corpus)))


def inspect_stream(stream: StreamingDataset | MixedStreams, encoder: DocumentEncoder, *, records: int) -> Inspection:
    """Read and tokenise the first `records` records of a stream; how many there are is not known."""
    first = islice(stream.records(), records)
    inspection = _inspect(
        ((record.source, record.decode()) for record in first), encoder, Inspection(records=0, of=None)
    )
    report = inspection.report
    inspection.records = report.documents + report.total_skipped + report.blank_lines
    return inspection


def _inspect(contents: Iterable[tuple[str, Content]], encoder: DocumentEncoder, inspection: Inspection) -> Inspection:
    contents = iter(contents)
    while chunk := list(islice(contents, _RECORDS_AT_ONCE)):
        for (source, content), ids in zip(chunk, encoder.records([content for _, content in chunk]), strict=True):
            if isinstance(ids, BadRecord):
                inspection.report.add(source, ids)
                continue
            text = text_of(content)
            inspection.report.documents += 1
            inspection.lengths.append(len(ids))
            inspection.characters += len(text)
            inspection.text_bytes += len(text.encode())
            inspection.scripts.update(map(script_of, text[:_SCRIPT_SAMPLE]))
    return inspection


def text_of(content: Content) -> str:
    """The text of a record, or of all messages of a conversation."""
    if isinstance(content, Conversation):
        return "\n".join(str(message.get("content") or "") for message in content.messages)
    return content if isinstance(content, str) else ""


def script_of(character: str) -> str:
    """The script of a letter ("Latin", "Han", "Kana", "Cyrillic", …), else "digits", "space" or "other"."""
    category = unicodedata.category(character)
    if category[0] in "LM":
        word = unicodedata.name(character, "OTHER").split()[0]
        return _SCRIPTS.get(word.split("-")[0], word.capitalize())
    if category[0] == "N":
        return "digits"
    return "space" if character.isspace() else "other"


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of a row that belong together: a document, what a cut left of one, or padding."""

    kind: Literal["document", "padding"]
    ids: list[int]


def stretches(batch: Batch, row: int) -> Iterator[Stretch]:
    """The documents of one packed row in order, its padding last."""
    starts = (batch.position_ids[row] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], batch.input_ids.shape[1]]
    for start, end in zip(starts, ends, strict=True):
        counted = bool((batch.labels[row, start:end] >= 0).any())
        yield Stretch("document" if counted else "padding", batch.input_ids[row, start:end].tolist())
