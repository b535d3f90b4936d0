"""Which keys each run of queries reads, and the masks for it: computed once, shared by the layers of a model.

Shapes: B batch, T queries, S keys, t and s the queries and keys of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fusiontree.ops.block_attention import Block

# Queries per block. Larger blocks compute more pairs that the mask then drops; smaller ones call more kernels.
LOCAL_QUERIES = 128
GLOBAL_QUERIES = 256
# Masks with more elements than this in all are not kept but built again when needed.
KEPT_MASK_ELEMENTS = 2**23


class Shared:
    """Keeps what the layers of a model derive from one layout."""

    def share(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """What `build` makes of this layout, made once for all layers that ask with this key."""
        kept = self.__dict__.setdefault("_kept_for_layers", {})
        if key not in kept:
            kept[key] = build()
        return kept[key]


class AttentionLayout(Shared):
    """The documents of a batch as attention sees them; build it with `attention_layout`.

    Attributes:
        length: T.
        starts: [B,T] int64, the index of the first token of each token's document; None if every row is one document.
    """

    def __init__(self, length: int, starts: Tensor | None, device: torch.device | str | None):
        self.length = length
        self.starts = starts
        self.index = torch.arange(length, device=device)
        self._blocks: dict[int | None, list[Block]] = {}
        self._kept: dict[tuple[int | None, int, int, int, int, torch.dtype], Tensor] = {}
        self._kept_elements = 0

    def local_blocks(self, window_size: int) -> list[Block]:
        """Blocks for heads that see `window_size` keys."""
        if window_size >= self.length:
            return self.global_blocks()
        if window_size not in self._blocks:
            begins = range(0, self.length, LOCAL_QUERIES)
            first_keys = [0] * len(begins)
            if self.starts is not None:
                first_keys = self.starts[:, ::LOCAL_QUERIES].amin(0).tolist()
            self._blocks[window_size] = [
                self._local_block(begin, max(first_key, begin - window_size + 1), window_size)
                for begin, first_key in zip(begins, first_keys, strict=True)
            ]
        return self._blocks[window_size]

    def _local_block(self, begin: int, first_key: int, window: int) -> Block:
        stop = min(begin + LOCAL_QUERIES, self.length)
        if self.starts is None and first_key == begin and stop - begin <= window:
            return Block(begin, stop, begin, stop, causal=True)
        return Block(begin, stop, first_key, stop, partial(self._mask, None, begin, stop, first_key, window))

    def global_blocks(self) -> list[Block]:
        """Blocks for heads that see all of their document: a long document each, or a run of short ones."""
        if self.starts is None:
            return [Block(0, self.length, 0, self.length, causal=True)]
        if None not in self._blocks:
            firsts: list[list[int]] = [[] for _ in self.starts]
            for row, token in (self.starts == self.index).nonzero().tolist():
                firsts[row].append(token)
            self._blocks[None] = [block for row, tokens in enumerate(firsts) for block in self._row_blocks(row, tokens)]
        return self._blocks[None]

    def _row_blocks(self, row: int, firsts: list[int]) -> list[Block]:
        blocks, begin, documents = [], 0, 0
        for first, stop in zip(firsts, [*firsts[1:], self.length], strict=True):
            if documents and stop - begin > GLOBAL_QUERIES:
                blocks.append(self._run_of_documents(row, begin, first, documents))
                begin, documents = first, 0
            documents += 1
        return [*blocks, self._run_of_documents(row, begin, self.length, documents)]

    def _run_of_documents(self, row: int, begin: int, stop: int, documents: int) -> Block:
        mask = None if documents == 1 else partial(self._mask, row, begin, stop, begin, None)
        return Block(begin, stop, begin, stop, mask, causal=documents == 1, rows=slice(row, row + 1))

    def _mask(
        self, row: int | None, begin: int, stop: int, first_key: int, window: int | None, dtype: torch.dtype
    ) -> Tensor:
        """For one row, or None: all."""
        # Without packed documents, blocks of one shape share one mask.
        place = begin if self.starts is not None else 0
        key = (window, -1 if row is None else row, place, stop - begin, begin - first_key, dtype)
        if key in self._kept:
            return self._kept[key]
        queries, keys = self.index[begin:stop, None], self.index[first_key:stop]
        visible_BTS = (keys <= queries)[None]
        if window is not None:
            visible_BTS = visible_BTS & (keys > queries - window)
        if self.starts is not None:
            starts = self.starts if row is None else self.starts[row : row + 1]
            visible_BTS = visible_BTS & (keys >= starts[:, begin:stop, None])
        mask = additive_mask(visible_BTS, dtype)
        if self._kept_elements + mask.numel() <= KEPT_MASK_ELEMENTS:
            self._kept[key] = mask
            self._kept_elements += mask.numel()
        return mask


def attention_layout(
    position_ids: Tensor | None, length: int, *, device: torch.device | str | None = None
) -> AttentionLayout:
    """The layout of a batch of packed documents, for the `layout` argument of `local_global_attention`.

    Args:
        position_ids: [B,T]; a document starts where it is 0, and at index 0. None: each row is one document.
        length: T.
        device: where masks live; that of position_ids if given.
    """
    if position_ids is None:
        return AttentionLayout(length, None, device)
    begins = position_ids[:, 1:] == 0
    if not begins.any():
        return AttentionLayout(length, None, position_ids.device)
    index = torch.arange(length, device=position_ids.device)
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = torch.where(begins, index[1:], 0)
    return AttentionLayout(length, starts.cummax(dim=1).values, position_ids.device)


def additive_mask(visible_BTS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, else -inf: [B,1,T,S]."""
    mask = torch.zeros(visible_BTS.shape, dtype=dtype, device=visible_BTS.device)
    return mask.masked_fill_(~visible_BTS, float("-inf"))[:, None]


class CachedLayout:
    """Which cached keys a piece of queries sees; build it with `cached_layout`.

    Attributes:
        shape: B, T and S.
        query_index, key_index, window_size: as given.
        is_safe: every query is known to see a key, and the keys that it does not see to be finite, as their values.
        blocks: runs of queries, each with the span of keys that some query of it, in some row, may see. Queries that
            see nothing are given all of the span's keys, so that no kernel meets an empty row.
    """

    def __init__(self, query_index: Tensor, key_index: Tensor, window_size: int | Tensor | None, is_safe: bool = False):
        self.is_safe = is_safe
        self.query_index, self.key_index, self.window_size = query_index, key_index, window_size
        self.shape = (query_index.shape[0], query_index.shape[1], key_index.shape[1])
        self._kept: dict[tuple[int, torch.dtype], Tensor] = {}
        self._sees_nothing: dict[int, Tensor] = {}
        self._any_sees_nothing: Tensor | None = None
        self._all_masks_made = False
        self._kept_elements = 0
        self.blocks = [
            Block(begin, stop, first, last, partial(self._mask, begin, stop, first, last))
            for begin, stop, first, last in self._spans()
        ]

    def sees_nothing(self) -> Tensor | None:
        """[B,T] bool: queries without a visible key, whose output is to be dropped. None: no query is known to be one.

        To be asked once every block's mask was made.
        """
        if self.is_safe:
            return None
        if not self._all_masks_made:
            nothing = torch.cat([self._sees_nothing[block.query_start] for block in self.blocks], dim=1)
            # Elsewhere than on CPU, finding out would wait for the device.
            self._any_sees_nothing = None if nothing.device.type == "cpu" and not nothing.any() else nothing
            self._all_masks_made = True
        return self._any_sees_nothing

    def _spans(self) -> list[tuple[int, int, int, int]]:
        _, length, slots = self.shape
        if length == 1 or slots == 0:
            return [(0, length, 0, slots)]
        begins = range(0, length, GLOBAL_QUERIES)
        oldest = torch.zeros_like(self.query_index)
        if self.window_size is not None:
            oldest = self.query_index - self.window_size + 1
        # A query outside any document asks for no key: not before it, and nothing later than it.
        oldest = oldest.clamp(min=0).masked_fill(self.query_index < 0, torch.iinfo(oldest.dtype).max)
        wanted = []
        for begin in begins:
            queries = slice(begin, begin + GLOBAL_QUERIES)
            not_before = self.key_index >= oldest[:, queries].amin(1, keepdim=True)
            wanted.append((not_before & (self.key_index <= self.query_index[:, queries].amax(1, keepdim=True))).any(0))
        wanted_bS = torch.stack(wanted)  # b blocks
        first = wanted_bS.int().argmax(dim=1)
        last = torch.where(wanted_bS.any(dim=1), slots - wanted_bS.flip(1).int().argmax(dim=1), 1)
        stops = [min(begin + GLOBAL_QUERIES, length) for begin in begins]
        return list(zip(begins, stops, first.tolist(), last.tolist(), strict=True))

    def _mask(self, begin: int, stop: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
        if (begin, dtype) in self._kept:
            return self._kept[begin, dtype]
        queries, keys = self.query_index[:, begin:stop, None], self.key_index[:, None, first:last]
        visible = (keys >= 0) & (keys <= queries)
        if isinstance(self.window_size, Tensor):
            visible &= keys > queries - self.window_size[:, begin:stop, None]
        elif self.window_size is not None:
            visible &= keys > queries - self.window_size
        nothing = ~visible.any(dim=-1)
        self._sees_nothing[begin] = nothing
        mask = additive_mask(visible | nothing[:, :, None], dtype)
        if self._kept_elements + mask.numel() <= KEPT_MASK_ELEMENTS:
            self._kept[begin, dtype] = mask
            self._kept_elements += mask.numel()
        return mask


def cached_layout(
    query_index: Tensor, key_index: Tensor, *, window_size: int | Tensor | None = None, is_safe: bool = False
) -> CachedLayout:
    """What `cached_attention` works out from these three, for its `layout` argument: build it once for many layers.

    Arguments as `cached_attention`; the tensors must not change while the layout is in use. `is_safe` promises that
    every query sees a key and that invisible slots are finite, which saves a look at the result.
    """
    return CachedLayout(query_index, key_index, window_size, is_safe)


class _WholeLayout(CachedLayout):
    """See `whole_layout`. Its index tensors exist only once they are asked for."""

    is_safe = True
    window_size = None

    def __init__(self, batch: int, slots: int, device: torch.device | str):
        self.shape = (batch, 1, slots)
        self.device = device
        self.blocks = [Block(0, 1, 0, slots)]

    @cached_property
    def query_index(self) -> Tensor:  # type: ignore[override]
        return torch.full(self.shape[:2], self.shape[2] - 1, device=self.device)

    @cached_property
    def key_index(self) -> Tensor:  # type: ignore[override]
        return torch.arange(self.shape[2], device=self.device).expand(self.shape[0], -1)


def whole_layout(batch: int, slots: int, device: torch.device | str) -> CachedLayout:
    """The layout of one query per row that sees all of its `slots` keys, known without looking at any tensor."""
    return _WholeLayout(batch, slots, device)
