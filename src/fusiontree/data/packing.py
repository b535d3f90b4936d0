"""Documents laid end to end into rows of a given length. T tokens of a row.

A document that does not fit is cut at the row's end and goes on in the next row. No state is carried from row to row,
so what goes on there is a document of its own to the model: its positions start at 0 again, and the label of its first
token does not count. A cut costs one label; no token is lost, and no row but the last is padded.

Documents are int32 arrays, one number a token: its id, or ~id (below 0) where the token is read but not learnt, as the
turns of a conversation are that the model is not to write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fusiontree.data.batch import IGNORED_LABEL


class Place(NamedTuple):
    """The next token to hand out: which epoch, which document in that epoch's order, which of its tokens."""

    epoch: int = 0
    position: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Row:
    """One packed row, int64 [T] each, and the place right behind it."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    after: Place


def pack(documents: Iterable[tuple[Place, np.ndarray]], *, length: Callable[[], int], pad_id: int) -> Iterator[Row]:
    """Rows of `length()` tokens; when the documents end, what is left makes a last row, padded.

    Rows are made only as they are asked for, and no document is taken before the row at hand needs it.

    Args:
        documents: the place of each document's first token to lay down, and the ids of the whole document.
        length: asked as a row begins, so that rows may be of different lengths.
    """
    row = _RowInProgress(length(), pad_id)
    after = Place()
    for after, ids in documents:
        while after.offset < len(ids):
            after = after._replace(offset=row.fill(ids, after.offset))
            if row.is_full:
                yield row.finish(after)
                row = _RowInProgress(length(), pad_id)
    if row.filled:
        yield row.finish(after)


class _RowInProgress:
    def __init__(self, length: int, pad_id: int) -> None:
        self.length = length
        self.filled = 0
        self.input_ids = np.full(length, pad_id, dtype=np.int64)
        self.labels = np.full(length, IGNORED_LABEL, dtype=np.int64)
        self.position_ids = np.zeros(length, dtype=np.int64)

    @property
    def is_full(self) -> bool:
        return self.filled == self.length

    def fill(self, ids: np.ndarray, start: int) -> int:
        """Lay down ids[start:] as far as they fit; the index of the first that did not."""
        stop = min(len(ids), start + self.length - self.filled)
        end = self.filled + stop - start
        piece = ids[start:stop]
        self.input_ids[self.filled : end] = np.where(piece < 0, ~piece, piece)
        self.labels[self.filled : end] = np.where(piece < 0, IGNORED_LABEL, piece)
        self.position_ids[self.filled : end] = np.arange(stop - start)
        self.filled = end
        return stop

    def finish(self, after: Place) -> Row:
        self.position_ids[self.filled :] = np.arange(self.length - self.filled)
        return Row(self.input_ids, self.labels, self.position_ids, after)
