"""A layer of one branch without gate whose consecutive linear maps are one (`layer_merges`), as an export may leave it.

Shapes: B batch, T tokens, H hidden, d width of what is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F

from fusiontree.errors import InputError

if TYPE_CHECKING:
    from fusiontree.models.configuration import HybridLanguageModelConfig

#: What is not computed any more: nothing; z, between alignment and small MLP; also h, the branch's output, before both
#: alignment and fusion projection.
MERGES = ("none", "z", "hz")


class MergedMaps(nn.Module):
    """fusion_proj(h) + small_mlp(alignment(h)), of which h and what follows it are linear up to each SiLU.

    `in_proj` gives what is added to the residual stream, the small MLP's inner layer, and, where the alignment has a
    hidden layer, that; `align_proj` is the small MLP's first map after the alignment's second.

    Args:
        width: d of the input: H for a branch's output, or what its output projection would have read.
        hidden_layer: whether the alignment has one (`use_alignment`).
    """

    def __init__(self, width: int, hidden_size: int, hidden_layer: bool):
        super().__init__()
        self.sizes = [hidden_size, 2 * hidden_size] + ([hidden_size] if hidden_layer else [])
        self.in_proj = nn.Linear(width, sum(self.sizes))
        self.align_proj = nn.Linear(hidden_size, 2 * hidden_size, bias=False) if hidden_layer else None
        self.out_proj = nn.Linear(2 * hidden_size, hidden_size)
        self.out_proj.writes_residual = True  # type: ignore[assignment]  # read by the initialisation

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h [B, T, d] -> [B, T, H]: what the layer adds to its input."""
        f, inner, *hidden = self.in_proj(h).split(self.sizes, dim=-1)
        if self.align_proj is not None:
            inner = inner + self.align_proj(F.silu(hidden[0]))
        return f + self.out_proj(F.silu(inner))


def check_layer_merges(config: HybridLanguageModelConfig) -> None:
    """Raises InputError unless every entry of `layer_merges` can be built."""
    entries = config.layer_merges
    if not isinstance(entries, list) or len(entries) != config.num_layers:
        raise InputError(
            f"`layer_merges` must name one of {', '.join(MERGES)} for each of the {config.num_layers} layers, got "
            f"{entries!r}"
        )
    for layer, merged in enumerate(entries):
        if merged not in MERGES:
            raise InputError(f"`layer_merges[{layer}]` must be one of {', '.join(MERGES)}, got {merged!r}")
        if merged != "none" and (config.branch(layer) not in ("mamba", "attention") or config.has_gate(layer)):
            raise InputError(
                f"`layer_merges[{layer}]` is {merged}, but maps can be merged only in a layer of one branch whose gate "
                f"is gone (`layer_gates[{layer}]` false): a gate reads what lies between them"
            )
        if merged == "z" and config.mlp == "residual":
            raise InputError(
                f"`layer_merges[{layer}]` is z, but with `mlp: residual` a layer without a gate has no z: name hz"
            )
