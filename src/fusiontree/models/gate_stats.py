"""What the gates of one forward pass did, reduced so that no [B, T, H] tensor leaves a block.

Shapes: L layers, B rows, T tokens, H channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

HISTOGRAM_BINS = 100


@dataclass
class GateDetails:
    """Detached float32 sums over the real tokens of every active layer; they add up over batches and ranks.

    Attributes:
        tokens: [L] real tokens counted in each layer (0 where the layer was not active).
        channel_sum, channel_square_sum: [L, H] sums of g and g².
        histogram: [L, 100] counts of g in equal bins over [0, 1], over tokens and channels.
        entropy_sum: [L] sum of each token's mean binary entropy over channels, in nats.
        mamba_norm_sum, attention_norm_sum: [L] sums of the tokens' L2 norms of each branch's output.
        mamba_sum, attention_sum: [L, H] sums of each branch's output.
    """

    tokens: torch.Tensor
    channel_sum: torch.Tensor
    channel_square_sum: torch.Tensor
    histogram: torch.Tensor
    entropy_sum: torch.Tensor
    mamba_norm_sum: torch.Tensor
    attention_norm_sum: torch.Tensor
    mamba_sum: torch.Tensor
    attention_sum: torch.Tensor


@dataclass
class GateStats:
    """Per-layer reductions of the gates; `mean` and `entropy` carry gradient.

    Attributes:
        mean: [L, B] mean gate over the row's real tokens and all channels.
        entropy: [L, B] mean binary entropy over the same, in nats.
        tokens: [B] real tokens of each row, float32.
        active: [L] bool; False where a layer has one branch or branch dropout hit it. Such layers belong in no gate
            loss and no statistic.
        details: `GateDetails` when asked for with `output_gates=True`.
    """

    mean: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor
    active: torch.Tensor
    details: GateDetails | None = None

    @classmethod
    def deferred(cls, build: Callable[[], GateStats]) -> GateStats:
        """What `build` returns, made when an attribute is first read: a step of decoding need not pay for it."""
        stats = cls.__new__(cls)
        stats.__dict__["_build"] = build
        return stats

    def __getattr__(self, name: str) -> Any:
        # Called for attributes that are not there (yet).
        build = self.__dict__.get("_build") if name in self.__dataclass_fields__ else None
        if build is None:
            raise AttributeError(f"GateStats has no attribute {name!r}")
        self.__dict__ |= vars(build())
        del self.__dict__["_build"]
        return self.__dict__[name]


@torch.no_grad()
def layer_details(
    logits: torch.Tensor, h_m: torch.Tensor, h_a: torch.Tensor, entropy: torch.Tensor, mask: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """One layer's row of `GateDetails`: logits, h_m, h_a [B,T,H], entropy [B,T], mask [B,T] or None."""
    weight = torch.ones_like(entropy) if mask is None else mask.to(entropy.dtype)
    gate = torch.sigmoid(logits.float())
    counted = gate * weight.float()[..., None]  # no matrix products here: autocast would round them
    real = weight.bool()
    bins = (gate[real] * HISTOGRAM_BINS).long().clamp_(0, HISTOGRAM_BINS - 1).flatten()
    return {
        "tokens": weight.sum(),
        "channel_sum": counted.sum((0, 1)),
        "channel_square_sum": (counted * gate).sum((0, 1)),
        "histogram": torch.bincount(bins, minlength=HISTOGRAM_BINS).float(),
        "entropy_sum": (entropy * weight).sum(),
        "mamba_norm_sum": (h_m.float().norm(dim=-1) * weight).sum(),
        "attention_norm_sum": (h_a.float().norm(dim=-1) * weight).sum(),
        "mamba_sum": (h_m.float() * weight.float()[..., None]).sum((0, 1)),
        "attention_sum": (h_a.float() * weight.float()[..., None]).sum((0, 1)),
    }
