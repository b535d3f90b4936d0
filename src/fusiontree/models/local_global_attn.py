"""The attention branch: most heads see a sliding window, the last few see their whole document.

Shapes: B batch, T tokens, H hidden, q query heads, k key/value heads, D head width, W window, S cached keys.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from fusiontree.models.cache import HybridLayerState, ring_index
from fusiontree.models.configuration import HybridLanguageModelConfig
from fusiontree.models.layout import Layout
from fusiontree.ops import (
    CachedLayout,
    apply_rotary,
    attention_layout,
    cached_attention,
    cached_layout,
    local_global_attention,
    whole_layout,
)


class LocalGlobalAttention(nn.Module):
    """Grouped-query attention with `num_heads - global_heads` local heads, then `global_heads` global ones, less those
    that `layer_heads` says were cut.

    Local query i sees the keys of its document at i-W+1 … i. Rotary positions come from one table shared by all layers.
    """

    def __init__(self, config: HybridLanguageModelConfig, layer: int):
        super().__init__()
        self.head_dim = config.head_dim
        heads = config.heads(layer)
        self.num_heads, self.num_kv_heads = heads.queries, heads.keys
        self.global_heads, self.global_kv_heads = heads.globals, heads.global_keys
        self.window = config.layer_window(layer)
        self.qkv_proj = nn.Linear(
            config.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=False
        )
        # None where it is merged with what follows (`layer_merges`).
        self.out_proj: nn.Module | None = nn.Linear(self.num_heads * self.head_dim, config.hidden_size)

    def forward(
        self,
        u: torch.Tensor,
        layout: Layout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        state: HybridLayerState | None = None,
    ) -> torch.Tensor:
        """u [B, T, H], rotary cos and sin [B or 1, T, D/2] -> [B, T, H]; updates `state` in place when given."""
        heads = self.qkv_proj(u).unflatten(-1, (-1, self.head_dim))  # [B,T,q+2k,D]
        qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        q, k = apply_rotary(qk, *rotary).split((self.num_heads, self.num_kv_heads), dim=2)
        if state is None:
            y = self._attend_piece(q, k, v, layout)
        else:
            y = self._attend_state(q, k, v, layout, state)
        y = y.flatten(-2)
        return y if self.out_proj is None else self.out_proj(y)

    def _attend_piece(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
        shared = layout.share("piece", lambda: attention_layout(layout.documents, q.shape[1], device=q.device))
        return local_global_attention(
            q, k, v, window_size=self.window, num_global_heads=self.global_heads, layout=shared
        )

    def _attend_state(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, state: HybridLayerState
    ) -> torch.Tensor:
        fresh = state.local_keys is None and state.global_keys is None
        state.ensure_attention(q.shape[0], layout.max_length, k)
        if q.shape[1] == 1 and not k.requires_grad:
            self._write(k, v, layout, state)
            return self._attend_step(q, layout, state)
        if fresh:
            y = self._attend_piece(q, k, v, layout)
        else:
            # Attend before writing: the piece may overwrite ring slots that its own first tokens still read.
            y = self._attend_past(q, k, v, layout, state)
        self._write(k.detach(), v.detach(), layout, state)
        return y

    def _attend_step(self, q: torch.Tensor, layout: Layout, state: HybridLayerState) -> torch.Tensor:
        """One token per row, already written: it reads the ring and the buffer where they lie."""
        local, outputs = self.num_heads - self.global_heads, []
        if local:
            slots = torch.sym_min(self.window, layout.max_length)  # one program for all lengths, where that is compiled
            ring = layout.share(("ring", self.window), lambda: _ring_layout(layout, self.window, slots))
            k, v = _stored(state.local_keys, state.local_values, slots, q)
            outputs.append(cached_attention(q[:, :, :local], k, v, layout=ring))
        if self.global_heads:
            buffer = layout.share("buffer", lambda: _buffer_layout(layout))
            k, v = _stored(state.global_keys, state.global_values, layout.max_length, q)
            outputs.append(cached_attention(q[:, :, local:], k, v, layout=buffer))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _attend_past(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, state: HybridLayerState
    ) -> torch.Tensor:
        """A piece on top of a state: every query reads the state's keys and the piece's own."""
        local, local_kv = self.num_heads - self.global_heads, self.num_kv_heads - self.global_kv_heads
        outputs = []
        if local:
            visible = layout.share(("past ring", self.window), lambda: _past_layout(layout, self.window))
            past_k, past_v = _stored(state.local_keys, state.local_values, self.window, k)
            keys = torch.cat((past_k, k[:, :, :local_kv]), dim=1)
            values = torch.cat((past_v, v[:, :, :local_kv]), dim=1)
            outputs.append(cached_attention(q[:, :, :local], keys, values, layout=visible))
        if self.global_heads:
            visible = layout.share("past buffer", lambda: _past_layout(layout, None))
            past_k, past_v = _stored(state.global_keys, state.global_values, layout.past_length, k)
            keys = torch.cat((past_k, k[:, :, local_kv:]), dim=1)
            values = torch.cat((past_v, v[:, :, local_kv:]), dim=1)
            outputs.append(cached_attention(q[:, :, local:], keys, values, layout=visible))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _write(self, k: torch.Tensor, v: torch.Tensor, layout: Layout, state: HybridLayerState) -> None:
        """Keep the piece's keys and values of each row's last document; the rest goes to the spare slot."""
        local_kv = self.num_kv_heads - self.global_kv_heads
        if local_kv:
            ring = layout.share(("ring slots", self.window), lambda: _ring_slots(layout, self.window))
            _put(state.local_keys, ring, k[:, :, :local_kv])
            _put(state.local_values, ring, v[:, :, :local_kv])
        if self.global_kv_heads:
            buffer = layout.share("buffer slots", lambda: _buffer_slots(layout, state.global_keys.shape[2] - 1))
            _put(state.global_keys, buffer, k[:, :, local_kv:])
            _put(state.global_values, buffer, v[:, :, local_kv:])


def _stored(
    keys_BkSD: torch.Tensor, values_BkSD: torch.Tensor, slots: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first slots' keys and values [B, slots, k, D], in place where the dtype is that of `like`."""
    return (
        keys_BkSD[:, :, :slots].transpose(1, 2).to(like.dtype),
        values_BkSD[:, :, :slots].transpose(1, 2).to(like.dtype),
    )


# Where a piece's tokens are written: runs of slots with the piece's tokens, or a slot for each token [B, T].
_Slots = list[tuple[slice, slice]] | torch.Tensor


def _put(stored_BkSD: torch.Tensor, slots: _Slots, new_BTkD: torch.Tensor) -> None:
    if isinstance(slots, torch.Tensor):
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        stored_BkSD.transpose(1, 2)[rows, slots] = new_BTkD.to(stored_BkSD.dtype)
        return
    for run, tokens in slots:
        stored_BkSD[:, :, run] = new_BTkD[:, tokens].transpose(1, 2)


def _ring_slots(layout: Layout, window: int) -> _Slots:
    if layout.even:
        end, tokens = layout.max_length, layout.max_length - layout.past_length
        begin = max(layout.past_length, end - window)
        turn = min(end, begin - begin % window + window)  # from there on the ring begins anew
        runs = [(begin, turn)] if turn == end else [(begin, turn), (turn, end)]
        return [
            (slice(first % window, first % window + last - first), slice(tokens - (end - first), tokens - (end - last)))
            for first, last in runs
        ]
    place = layout.final_place
    kept = (place >= 0) & (place >= layout.lengths[:, None] - window)
    return torch.where(kept, place % window, window)


def _buffer_slots(layout: Layout, spare: int) -> _Slots:
    if layout.even:
        return [(slice(layout.past_length, layout.max_length), slice(None))]
    return torch.where(layout.final_place >= 0, layout.final_place, spare)


def _buffer_index(lengths: torch.Tensor, slots: int) -> torch.Tensor:
    """[B, S] places held by the growing buffer's first S slots, -1 where empty."""
    slot = torch.arange(slots, device=lengths.device)
    return torch.where(slot < lengths[:, None], slot, -1)


def _ring_layout(layout: Layout, window: int, slots: int) -> CachedLayout:
    if layout.even:
        return whole_layout(len(layout.lengths), slots, layout.lengths.device)
    return cached_layout(layout.place, ring_index(layout.lengths, window, slots), is_safe=layout.unchecked)


def _buffer_layout(layout: Layout) -> CachedLayout:
    if layout.even:
        return whole_layout(len(layout.lengths), layout.max_length, layout.lengths.device)
    return cached_layout(layout.place, _buffer_index(layout.lengths, layout.max_length), is_safe=layout.unchecked)


def _past_layout(layout: Layout, window: int | None) -> CachedLayout:
    """Indices count the row's tokens from the start of the document that the state holds, so a token of a later
    document inside the piece sees back exactly `place + 1` tokens."""
    carried, place = layout.carried, layout.place
    if layout.mask is None:
        row_index = carried[:, None] + torch.arange(place.shape[1], device=place.device)
    else:
        row_index = torch.where(layout.mask, carried[:, None] + layout.mask.cumsum(1) - 1, -1)
    span = place + 1
    if window is None:
        past = _buffer_index(carried, layout.past_length)
    else:
        past, span = ring_index(carried, window), span.clamp(max=window)
    return cached_layout(row_index, torch.cat((past, row_index), dim=1), window_size=span)
