"""What a data mode provides; packing, counting and resuming are the loader's and the same for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from fusiontree.data.packing import Place
from fusiontree.data.records import BadRecord


class SourceRecord(NamedTuple):
    """One record in its turn: where it stands, its int32 ids (signed as in `packing`) or why it has none, and then its
    `file:line`; and its number among all records, which neither order nor rank nor data mode changes."""

    place: Place
    content: np.ndarray | BadRecord
    source: str
    number: int


class DocumentSource(Protocol):
    """Tokenised records in the order in which one rank trains on them, readable from any place."""

    @property
    def endless(self) -> bool:
        """Whether epoch follows epoch; else reading ends after the first."""
        ...

    def read(self, start: Place) -> Iterator[SourceRecord]:
        """Every record from that of `start` on, bad ones included, places ascending."""
        ...

    def identity(self) -> Mapping[str, object]:
        """What must be equal for a place to mean the same tokens, by name; plain values."""
        ...
