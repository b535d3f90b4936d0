"""What a data mode provides; packing, counting and resuming are the loader's and the same for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fusiontree.data.order import Place
from fusiontree.data.records import BadRecord


class SourceRecord(NamedTuple):
    """One record in its turn: where it stands, its int32 ids (signed as in `packing`) or why it has none, and then its
    `file:line`; its number among all records, which the order does not change (of a stream its place in the epoch's
    order); and whether it has not come before, in an earlier epoch or round of its source."""

    place: Place
    content: np.ndarray | BadRecord
    source: str
    number: int
    is_first: bool = True


class RecordSet(Protocol):
    """Tokenised records by number, each readable alone."""

    @property
    def num_bytes(self) -> int:
        """About what all of them take to read."""
        ...

    def __len__(self) -> int: ...

    def __getitems__(self, records: Sequence[int], /) -> list[np.ndarray | BadRecord]:
        """Signed int32 ids of each record, or why it has none."""
        ...

    def source(self, record: int) -> str:
        """`file:line` of a record."""
        ...

    def damage(self) -> Sequence[tuple[str, BadRecord]]:
        """Where files are known to be damaged before their records are read, and what was found."""
        ...

    def identity(self) -> Mapping[str, object]:
        """What the ids depend on, by name; plain values."""
        ...


class DocumentSource(Protocol):
    """Tokenised records in the order of training, readable from any place."""

    @property
    def endless(self) -> bool:
        """Whether epoch follows epoch; else reading ends after the first."""
        ...

    def damage(self) -> Sequence[tuple[str, BadRecord]]:
        """Where files are known to be damaged before anything is read, and what was found."""
        ...

    def read(self, start: Place) -> Iterator[SourceRecord]:
        """Every record from that of `start` on, bad ones included, places ascending; the offset of `start` is nothing
        to it."""
        ...

    def identity(self) -> Mapping[str, object]:
        """What must be equal for a place to mean the same tokens, by name; plain values."""
        ...
