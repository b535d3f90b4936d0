"""The rows that are decoded together: a state of fixed buffers in which rows join and leave between steps."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

from fusiontree.models import HybridCache, HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.models.cache import cache_geometry

# Rows share buffers as long as the longest of them: rows of very different lengths are kept apart, in classes of
# lengths up to this many tokens, four times as many, and so on.
_SHORTEST_CLASS = 1024
_CLASS_FACTOR = 4
_LEAST_ROWS = 4
LEAST_ROOM = 64  # tokens that a new state has room for anyhow


def length_class(tokens: int) -> int:
    """The tokens up to which rows are decoded together with one of so many."""
    bound = _SHORTEST_CLASS
    while bound < tokens:
        bound *= _CLASS_FACTOR
    return bound


def program_rows(rows: int, max_rows: int) -> int:
    """The rows of the compiled step that takes so many: of four numbers, as a program is kept for no more of them."""
    factor, size = program_padding(max_rows), 1
    while size < rows:
        size *= factor
    return max(rows, min(size, max_rows))


def program_padding(max_rows: int) -> int:
    """The rows of a compiled step are fewer than so many times those that it is for."""
    return next(factor for factor in range(2, max_rows + 2) if factor**3 >= max_rows)


def state_bytes(config: HybridLanguageModelConfig, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the state of one row with room for so many tokens, in a model that computes in `dtype`."""
    scan_size = max(dtype.itemsize, torch.float32.itemsize)
    total = 0
    for g in cache_geometry(config):
        kept = g.get("taps", 0) * g.get("conv", 0)
        kept += 2 * g.get("local_kv_heads", 0) * (g.get("window", 0) + 1) * g.get("head_dim", 0)
        kept += 2 * g.get("global_kv_heads", 0) * (tokens + 1) * g.get("head_dim", 0)
        scanned = g.get("scan_heads", 0) * max(g.get("scan_width", 0), 1) * g.get("scan_state", 0)
        total += kept * dtype.itemsize + scanned * scan_size
    return total


Owner = TypeVar("Owner")


class Slots(Generic[Owner]):
    """Rows of one class of lengths; row i belongs to `owners[i]` and holds `lengths[i]` tokens.

    Args:
        model: that reads them.
        bound: of the class: no row is ever longer.
        max_rows: room that is made beforehand never exceeds so many rows.
    """

    def __init__(self, model: HybridLanguageModel, bound: int, max_rows: int) -> None:
        self.bound = bound
        self._max_rows = max_rows
        self.owners: list[Owner] = []
        self.lengths: list[int] = []
        self._model = model
        self._state: HybridCache | None = None
        self._rows = self._room = 0
        self._view: HybridCache | None = None

    @property
    def nbytes(self) -> int:
        state = self._state  # asked for by the server's thread too
        return 0 if state is None else state.nbytes

    def spare_bytes(self, state: HybridCache) -> int:
        """Bytes by which `add` would grow the buffers for a row like that of `state`, spare room included."""
        rows, room = self._grown(state.max_length, spare=True)
        per_row = state_bytes(self._model.config, self._model.dtype, room)
        return max(0, rows * per_row - self.nbytes)

    def add(self, state: HybridCache, owner: Owner, spare: bool) -> None:
        """A row like the only one of `state` becomes the last.

        Args:
            spare: whether to make room for more rows than this one.
        """
        length, row = state.max_length, len(self.lengths)
        if self._state is None:
            self._state, self._rows, self._room = state.clone(), 0, 0
        size = self._grown(length, spare)
        if size != (self._rows, self._room):
            self._resize(*size)
        self._state.copy_row(row, state, 0, length)
        self.owners.append(owner)
        self.lengths.append(length)
        self._view = None

    def _grown(self, length: int, spare: bool) -> tuple[int, int]:
        """Rows and room that one more row of so many tokens needs, and its next token."""
        rows = len(self.lengths) + 1
        if rows <= self._rows:
            rows = self._rows
        elif spare:  # it doubles, so that growing is rare
            rows = max(rows, min(self._max_rows, max(2 * rows - 2, _LEAST_ROWS)))
        return rows, self._room_for(length + 1)

    def _room_for(self, tokens: int) -> int:
        """Doubles like the rows."""
        if tokens <= self._room:
            return self._room
        return min(self.bound, max(LEAST_ROOM, 1 << (tokens - 1).bit_length()))

    def remove(self, row: int) -> None:
        """The last row takes the place of `row`."""
        assert self._state is not None
        last = len(self.lengths) - 1
        if row != last:
            self._state.copy_row(row, self._state, last, self.lengths[last])
            self.lengths[row], self.owners[row] = self.lengths[last], self.owners[last]
        self.lengths.pop()
        self.owners.pop()
        self._view = None
        if not self.lengths:
            self._state, self._rows, self._room = None, 0, 0

    def take(self, row: int) -> HybridCache:
        """A copy of the row as a state of its own."""
        assert self._state is not None
        return self._state.take_row(row, self.lengths[row])

    def trim(self) -> None:
        """Give back the room that no row needs now."""
        if self._state is not None:
            self._room = 0
            self._resize(len(self.lengths), self._room_for(max(self.lengths) + 1))

    @torch.no_grad()
    def step(self, tokens: list[int]) -> torch.Tensor:
        """Each row reads its token: logits [B, V]."""
        assert self._state is not None
        rows = len(tokens)
        if self._model.decodes_compiled:  # idle rows fill up
            rows = program_rows(rows, self._max_rows)
        size = max(rows, self._rows), self._room_for(max(self.lengths) + 1)
        if size != (self._rows, self._room):
            self._resize(*size)
        idle = [0] * (rows - len(tokens))
        lengths = self.lengths + idle
        if self._view is None or len(lengths) != self._view.batch_size:
            self._view = self._state.view_rows(lengths)
        else:
            self._view.set_lengths(lengths)
        input_ids = torch.tensor([*tokens, *idle], device=self._model.device)[:, None]
        output = self._model(input_ids, past_key_values=self._view, use_cache=True, logits_to_keep=1)
        self.lengths = [length + 1 for length in self.lengths]
        return output.logits[: len(tokens), 0]

    def _resize(self, rows: int, room: int) -> None:
        assert self._state is not None
        self._rows, self._room, self._view = rows, room, None
        self._state.resize(rows, room)
