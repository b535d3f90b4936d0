"""Documents laid into rows of a given length, in either of two ways. T tokens of a row.

`pack` lays them end to end: a document that does not fit is cut at the row's end and goes on in the next row. No state
is carried from row to row, so what goes on there is a document of its own to the model: its positions start at 0 again,
and the label of its first token does not count. A cut costs one label and what stood before it; no token is lost, and
no row but the last is padded.

`pack_best_fit` cuts only what is longer than a row and pads instead (Ding et al. 2024, "Fewer Truncations Improve
Language Modeling"). It chooses among the documents of a window, a few rows' worth at a time.

Documents are int32 arrays, one number a token: its id, or ~id (below 0) where the token is read but not learnt, as the
turns of a conversation are that the model is not to write.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fusiontree.data.batch import IGNORED_LABEL
from fusiontree.data.order import Place


@dataclass(frozen=True)
class Row:
    """One packed row, int64 [T] each, and the place right behind it.

    tokens: how many of the T are no padding.
    cut_documents: documents of which the first piece of several stands here.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    after: Place
    tokens: int
    cut_documents: int


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


def pack_best_fit(
    documents: Iterable[tuple[Place, np.ndarray]], *, length: int, pad_id: int, window_rows: int = 64
) -> Iterator[Row]:
    """Rows of `length` tokens in which no document that fits a row is cut; what stays free of a row is padded.

    A window is as many documents as have no more tokens than `window_rows` rows, but at least one. A document longer
    than a row is cut into full rows and a rest; then every piece, the longest first, goes where it leaves least room.
    Nothing but the window and the document behind it is held, and the rows of a window follow from its documents alone:
    read again from a row's `after`, they give the rows behind it.

    Args:
        documents: as for `pack`.
    """
    window: list[tuple[Place, np.ndarray]] = []
    tokens = 0
    for place, ids in documents:
        left = len(ids) - place.offset
        if left <= 0:
            continue
        # Closed before it overflows: a window of a little more than whole rows would end in a row of next to nothing.
        if window and tokens + left > window_rows * length:
            yield from _rows_of_window(window, length, pad_id)
            window, tokens = [], 0
        window.append((place, ids))
        tokens += left
    if window:
        yield from _rows_of_window(window, length, pad_id)


def _rows_of_window(window: Sequence[tuple[Place, np.ndarray]], length: int, pad_id: int) -> Iterator[Row]:
    """The rows of a window that are not handed out yet."""
    pieces = [
        (ids, start, min(start + length, len(ids)))
        for place, ids in window
        for start in range(place.offset, len(ids), length)
    ]
    rows = _best_fit([stop - start for _, start, stop in pieces], length)
    first, (last, last_ids) = window[0][0], window[-1]
    for number in range(first.rows, len(rows)):
        row = _RowInProgress(length, pad_id)
        for piece in sorted(rows[number]):
            row.fill(*pieces[piece])
        is_last = number + 1 == len(rows)
        yield row.finish(last._replace(offset=len(last_ids), rows=0) if is_last else first._replace(rows=number + 1))


def _best_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Which pieces make each row: best-fit decreasing, equal pieces and equal rooms in order.

    The rows come in the order of the pieces that opened them. That is unrelated to size where the documents' order is,
    while rows as they fill up would begin with the longest documents of a window and end with the shortest.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # ascending: what is free of a row, and which row
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        found = bisect_left(rooms, (lengths[piece], 0))
        if found < len(rooms):
            room, row = rooms.pop(found)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(piece)
        insort(rooms, (room - lengths[piece], row))
    return sorted(rows)


class _RowInProgress:
    def __init__(self, length: int, pad_id: int) -> None:
        self.length = length
        self.filled = 0
        self.cut_documents = 0
        self.input_ids = np.full(length, pad_id, dtype=np.int64)
        self.labels = np.full(length, IGNORED_LABEL, dtype=np.int64)
        self.position_ids = np.zeros(length, dtype=np.int64)

    @property
    def is_full(self) -> bool:
        return self.filled == self.length

    def fill(self, ids: np.ndarray, start: int, stop: int | None = None) -> int:
        """Lay down ids[start:stop] as far as they fit; the index of the first that did not."""
        stop = min(len(ids) if stop is None else stop, start + self.length - self.filled)
        self.cut_documents += start == 0 and stop < len(ids)
        end = self.filled + stop - start
        piece = ids[start:stop]
        self.input_ids[self.filled : end] = np.where(piece < 0, ~piece, piece)
        self.labels[self.filled : end] = np.where(piece < 0, IGNORED_LABEL, piece)
        self.position_ids[self.filled : end] = np.arange(stop - start)
        self.filled = end
        return stop

    def finish(self, after: Place) -> Row:
        self.position_ids[self.filled :] = np.arange(self.length - self.filled)
        return Row(self.input_ids, self.labels, self.position_ids, after, self.filled, self.cut_documents)
