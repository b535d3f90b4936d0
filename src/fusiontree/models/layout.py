"""Where every token stands: positions, document boundaries, padding, and the encodings that read them.

Shapes: B batch, T tokens of this piece, H hidden, D attention head width, R rows of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn

from fusiontree.errors import InputError
from fusiontree.models.configuration import HybridLanguageModelConfig
from fusiontree.ops.attention_layouts import Shared

IGNORE_INDEX = -100
NO_RESET = -(2**31)


@dataclass
class Layout(Shared):
    """The one description of a piece of tokens that attention, convolution, scan, RoPE and SRTE all read.

    Attributes:
        position_ids: [B or 1, T] place in the document as the encodings count it; a document starts at 0.
        reset: [B, T] bool, True where a real token starts a document, as a row's first one always does; None if no
            state has to be reset.
        mask: [B, T] bool, True for real tokens; None if all are real.
        place: [B, T] index of a real token among its document's real tokens, -1 for padding.
        final_place: [B, T] as `place`, but -1 also for tokens of documents that end inside the piece.
        last_real: [B] index of each row's last real token, -1 if it has none; None where neither mask nor positions
            were given.
        last_reset: [B] index of each row's last document start in this piece, `NO_RESET` (before any token) if none;
            None as `last_real`.
        carried: [B] tokens of the row's current document that the cache held before this piece.
        read: [B] real tokens of the row that have been read, of all documents, this piece's included.
        lengths: [B] tokens of the row's current document after this piece.
        next_position: [B] the position that follows the row's last real token.
        max_position: no position of this piece exceeds it.
        max_length: no entry of `lengths` exceeds it.
        past_length: no entry of `carried` exceeds it.
        explicit: whether the caller gave `position_ids`, so that documents may start anywhere.
        even: every entry of `carried` is `past_length`, of `lengths` `max_length`, and every last position is
            `max_position`, so that slots are known without a look at any tensor.
        unchecked: what invisible slots of the state hold is known to be finite, so that no result is looked at.
    """

    position_ids: torch.Tensor
    reset: torch.Tensor | None
    mask: torch.Tensor | None
    place: torch.Tensor
    final_place: torch.Tensor
    last_real: torch.Tensor | None
    last_reset: torch.Tensor | None
    carried: torch.Tensor
    read: torch.Tensor
    lengths: torch.Tensor
    next_position: torch.Tensor
    max_position: int
    max_length: int
    past_length: int
    explicit: bool
    even: bool
    unchecked: bool = False

    @property
    def documents(self) -> torch.Tensor | None:
        """[B, T], 0 where a document starts; None when each row of the piece is one document without padding."""
        return self.place if self.explicit or self.mask is not None else None

    def real_tokens(self, batch: int) -> torch.Tensor:
        """[B] float32: real tokens of each row."""
        if self.mask is None:
            return torch.full((batch,), float(self.place.shape[1]), device=self.place.device)
        return self.mask.sum(1, dtype=torch.float32)


def _piece_mask(
    attention_mask: torch.Tensor | None, past: int, shape: tuple[int, int], read: torch.Tensor
) -> torch.Tensor | None:
    """The last T columns of [B, past + T] as bool; None when nothing is masked."""
    if attention_mask is None:
        return None
    expected = (shape[0], past + shape[1])
    if tuple(attention_mask.shape) != expected:
        raise InputError(
            f"`attention_mask` has shape {list(attention_mask.shape)}, expected {list(expected)}: one column for each "
            f"of the {past} cached and {shape[1]} new tokens"
        )
    mask = attention_mask.bool()
    if past and (mask[:, :past].sum(1) < read).any():
        raise InputError("`attention_mask` hides tokens that the cache has read: what a state has taken in stays in it")
    mask = mask[:, past:]
    # A row that holds tokens counts as one real token before the piece.
    begins = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + (mask[:, 0] | (read > 0))
    if shape[1] > 1 and (begins > 1).any():
        raise InputError(
            "`attention_mask` has zeros between real tokens; padding may stand before a row's first token and at the "
            "end of a piece alone"
        )
    return None if mask.all() else mask


def build_layout(
    shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    next_position: torch.Tensor | None = None,
    read: torch.Tensor | None = None,
    past: int = 0,
    past_length: int = 0,
    past_position: int = 0,
    even: bool = True,
) -> Layout:
    """Describe a piece of shape [B, T].

    Args:
        shape: (B, T).
        device: where the index tensors live.
        attention_mask: [B, past + T], zeros for padding at a row's ends.
        position_ids: [B or 1, T]; a token starts a document iff its position is 0. Default: counted over real tokens,
            going on from `next_position`.
        lengths, next_position: [B] what the cache holds of each row's current document; None means nothing.
        read: [B] real tokens that each row of the cache has read; None means none.
        past: columns already cached.
        past_length: upper bound of `lengths`.
        past_position: upper bound of `next_position`.
        even: the two bounds are the value of every row.
    """
    batch, tokens = shape
    zeros = torch.zeros(batch, dtype=torch.long, device=device)
    carried = zeros if lengths is None else lengths
    read = zeros if read is None else read
    mask = _piece_mask(attention_mask, past, shape, read)
    index = torch.arange(tokens, device=device)

    if position_ids is not None:
        if position_ids.dim() == 1:
            position_ids = position_ids[None]
        if position_ids.shape[-1] != tokens or position_ids.shape[0] not in (1, batch):
            raise InputError(f"`position_ids` has shape {list(position_ids.shape)}, expected {[batch, tokens]}")
        positions = position_ids.long().expand(batch, tokens)
    elif mask is None:
        positions = index[None] if next_position is None else next_position[:, None] + index
    else:
        start = zeros if next_position is None else next_position
        positions = (start[:, None] + mask.cumsum(1) - 1).clamp_min(0)

    if mask is None and position_ids is None:
        place = carried[:, None] + index
        return Layout(
            position_ids=positions,
            reset=None,
            mask=None,
            place=place,
            final_place=place,
            last_real=None,
            last_reset=None,
            carried=carried,
            read=read + tokens,
            lengths=carried + tokens,
            next_position=(positions[:, -1] + 1).expand(batch),
            max_position=past_position + tokens - 1,
            max_length=past_length + tokens,
            past_length=past_length,
            explicit=False,
            even=even,
        )

    real = torch.ones(batch, tokens, dtype=torch.bool, device=device) if mask is None else mask
    count = real.cumsum(1)
    # Whatever position the caller gives it, nothing stands before a row's first real token, padding least of all.
    reset = real & ((positions == 0) | ((read[:, None] == 0) & (count == 1)))
    # Number of the row's real tokens before the document of token t; negative where it began before this piece.
    before = torch.where(reset, count - 1, -carried[:, None]).cummax(1).values
    place = torch.where(real, count - 1 - before, -1)
    last_real = torch.where(real, index, -1).amax(1)
    last_reset = torch.where(reset, index, NO_RESET).amax(1)
    at_last = last_real.clamp_min(0)[:, None]
    has_real = last_real >= 0
    start = zeros if next_position is None else next_position
    explicit = position_ids is not None
    new_lengths = torch.where(has_real, place.gather(1, at_last)[:, 0] + 1, carried)
    return Layout(
        position_ids=positions,
        reset=reset,
        mask=mask,
        place=place,
        final_place=torch.where(index >= last_reset[:, None], place, -1),
        last_real=last_real,
        last_reset=last_reset,
        carried=carried,
        read=read + count[:, -1],
        lengths=new_lengths,
        next_position=torch.where(has_real, positions.gather(1, at_last)[:, 0] + 1, start),
        max_position=int(positions.max()) if explicit else past_position + tokens - 1,
        max_length=int(new_lengths.max()) if explicit else past_length + tokens,
        past_length=past_length,
        explicit=explicit,
        even=False,
    )


def shift_labels(labels: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """[B, T] labels aligned with the hidden states that predict them.

    Entry t is label t+1, or -100 where nothing counts: at the row's end and where token t+1 starts a document
    (its position is 0), since no token of its own document stands before it.
    """
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    if position_ids is not None:
        starts = position_ids.expand_as(labels)[:, 1:] == 0
        shifted[:, :-1] = shifted[:, :-1].masked_fill(starts, IGNORE_INDEX)
    return shifted


def count_labels(labels: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Scalar int64: the labels of [B, T] that count in the language-model loss."""
    return (shift_labels(labels, position_ids) != IGNORE_INDEX).sum()


class SinusoidTable:
    """cos and sin of position x frequency, float32 [R, dim/2], growing on demand and rebuilt on a change of device.

    It holds no parameters and no buffers: transformers re-creates non-persistent buffers empty on loading, and a table
    that is computed when it is first read cannot be stale.
    """

    def __init__(self, dim: int, theta: float):
        self.dim, self.theta = dim, theta
        self._cos: torch.Tensor | None = None
        self._sin: torch.Tensor | None = None

    def __call__(self, position_ids: torch.Tensor, max_position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin: [..., dim/2] for position_ids [...], all of them at most max_position."""
        if self._cos is None or self._sin is None or self._cos.device != position_ids.device:
            self._grow(max(max_position + 1, 256), position_ids.device)
        elif max_position >= len(self._cos):
            self._grow(max(max_position + 1, 2 * len(self._cos)), position_ids.device)
        assert self._cos is not None and self._sin is not None
        return self._cos[position_ids], self._sin[position_ids]

    def _grow(self, rows: int, device: torch.device) -> None:
        # float64 angles: in float32 a position of 10^5 times a frequency near 1 is off by about 0.01 radian.
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float64, device=device) / self.dim
        angle = torch.arange(rows, dtype=torch.float64, device=device)[:, None] * self.theta**-exponent
        self._cos, self._sin = angle.cos().float(), angle.sin().float()


class SRTE(nn.Module):
    """Shared relative time encoding: one low-rank encoding of positions, added to every layer's Mamba input.

    `sincos` projects fixed sinusoids of `srte_rank` features to H and reads any position; `learned` projects a trained
    table of `max_position_embeddings` rows of `srte_rank`.

    A position's sinusoids are scaled to length 1. Most of them hardly change from token to token, so a step of the
    optimizer on `proj` moves every token's input alike, by up to the learning rate times the sum of their sizes; at
    length sqrt(srte_rank / 2) = 8 that was 0.16 at a rate of 2e-3, a noise on the input of every layer.
    """

    def __init__(self, config: HybridLanguageModelConfig):
        super().__init__()
        self.encoding = config.srte_encoding
        self.max_positions = config.max_position_embeddings
        if self.encoding == "learned":
            self.table = nn.Embedding(config.max_position_embeddings, config.srte_rank)
            self.table.holds_positions = True  # type: ignore[assignment]  # read by the initialisation
        else:
            self.sinusoids = SinusoidTable(config.srte_rank, config.rope_theta)
        self.proj = nn.Linear(config.srte_rank, config.hidden_size, bias=False)

    def forward(self, position_ids: torch.Tensor, max_position: int) -> torch.Tensor:
        """[B or 1, T] positions -> [B or 1, T, H].

        Raises:
            InputError: a position lies past the learned table.
        """
        if self.encoding == "learned":
            # The bound counts padding; only a position that is really read past the table is an error.
            if max_position >= self.max_positions and (reached := int(position_ids.max())) >= self.max_positions:
                raise InputError(
                    f"position {reached} lies past the learned time encoding of {self.max_positions} positions: "
                    "shorten the text, raise `max_position_embeddings` and train it, or use `srte_encoding: sincos`"
                )
            features = self.table(position_ids)
        else:
            features = torch.cat(self.sinusoids(position_ids, max_position), dim=-1)
            features = (features * (features.shape[-1] / 2) ** -0.5).to(self.proj.weight.dtype)
        return self.proj(features)
