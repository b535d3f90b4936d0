"""One hybrid block: a Mamba and an attention branch in parallel, mixed per channel by a low-rank gate.

Shapes: B batch, T tokens, H hidden, r gate rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from fusiontree.models.cache import HybridLayerState
from fusiontree.models.configuration import HybridLanguageModelConfig
from fusiontree.models.gate_stats import layer_details
from fusiontree.models.layout import Layout
from fusiontree.models.local_global_attn import LocalGlobalAttention
from fusiontree.models.mamba_block import MambaBlock
from fusiontree.ops.gated_mix import mix_alone, mix_with_reductions

_MEAN_MOMENTUM = 0.99


class AlignmentMLP(nn.Module):
    """z = W_s h + W_2 silu(W_1 h) with h the branches' outputs side by side; W_1 and the shortcut W_s are one matrix.

    A layer of one branch reads that branch alone. Without `hidden_layer` only the linear shortcut remains.
    """

    def __init__(self, hidden_size: int, branches: int, hidden_layer: bool):
        super().__init__()
        self.hidden_size = hidden_size
        self.in_proj = nn.Linear(branches * hidden_size, 2 * hidden_size if hidden_layer else hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size) if hidden_layer else None

    def forward(self, *branches: torch.Tensor) -> torch.Tensor:
        """Branch outputs, each [B, T, H] -> z [B, T, H]."""
        h = self.in_proj(torch.cat(branches, dim=-1))
        if self.out_proj is None:
            return h
        shortcut, inner = h.split(self.hidden_size, dim=-1)
        return shortcut + self.out_proj(F.silu(inner))


class GateLowRank(nn.Module):
    """The gate's logits W_d tanh(W_u z); the gate is their sigmoid, so it starts at one half."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.up = nn.Linear(hidden_size, rank, bias=False)
        self.down = nn.Linear(rank, hidden_size, bias=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """z [B, T, H] -> logits [B, T, H]."""
        return self.down(torch.tanh(self.up(z)))


class SmallMLP(nn.Module):
    """H -> 2H -> H with a SiLU."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.out_proj = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.out_proj(F.silu(self.in_proj(z)))


@dataclass
class BlockGates:
    """What a block's gate did.

    Attributes:
        reductions: gives the gate's mean and entropy [B, T], with their gradient.
        active: whether they count.
        details: sums, when asked for.
        is_deferred: whether `reductions` has yet to compute them.
    """

    reductions: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    active: bool
    details: dict[str, torch.Tensor] | None
    is_deferred: bool


class HybridBlock(nn.Module):
    """See `forward` for the equation. With one branch (`layer_branches`) the absent one is the constant 0."""

    mamba_mean: torch.Tensor
    attention_mean: torch.Tensor
    mean_updates: torch.Tensor

    def __init__(self, config: HybridLanguageModelConfig, layer: int):
        super().__init__()
        hidden, branch = config.hidden_size, config.branch(layer)
        self.branch = branch
        self.ln_input = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.mamba = MambaBlock(config) if branch != "attention" else None
        self.attention = LocalGlobalAttention(config, layer) if branch != "mamba" else None
        self.alignment = AlignmentMLP(hidden, 2 if branch == "both" else 1, config.use_alignment)
        self.gate = GateLowRank(hidden, config.gate_rank)
        self.fusion_proj = nn.Linear(hidden, hidden)
        self.small_mlp = SmallMLP(hidden)
        for linear in (self.fusion_proj, self.small_mlp.out_proj):
            linear.writes_residual = True  # type: ignore[assignment]  # read by the initialisation
        self.ln_output = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable | None = None
        self.tracks_means = branch == "both" and config.drop_branch_prob > 0
        if branch == "both":
            # Always there, so that branch dropout can be switched on or off for a trained model.
            self.register_buffer("mamba_mean", torch.zeros(hidden))
            self.register_buffer("attention_mean", torch.zeros(hidden))
            self.register_buffer("mean_updates", torch.zeros(2))

    def forward(
        self,
        x: torch.Tensor,
        layout: Layout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        time_encoding: torch.Tensor,
        state: HybridLayerState | None = None,
        drop: str | None = None,
        with_details: bool = False,
    ) -> tuple[torch.Tensor, BlockGates]:
        """x [B, T, H] -> out [B, T, H] and what the gate did.

        Args:
            rotary: cos and sin [B or 1, T, D/2].
            time_encoding: [B or 1, T, H], the shared SRTE.
            state: this layer's recurrent state, updated in place.
            drop: "mamba" or "attention" when branch dropout replaces that branch by its running mean.
            with_details: also sum the statistics of `GateDetails`.
        """
        u = self.ln_input(x)
        h_m = self._run(self.mamba, state, u + time_encoding, layout) if self._runs("mamba", drop) else None
        h_a = self._run(self.attention, state, u, layout, rotary) if self._runs("attention", drop) else None
        h_m, h_a = self._fill_dropped(h_m, h_a, layout, drop)
        z = self.alignment(*(h for h in (h_m, h_a) if h is not None))
        logits = self.gate(z)
        # In a step of decoding nobody may ever look at the gates: reducing them would cost as much as the mix.
        deferred = state is not None and x.shape[1] == 1 and not with_details and not torch.is_grad_enabled()
        f, reductions = (mix_alone if deferred else mix_with_reductions)(
            logits, torch.zeros_like(logits) if h_m is None else h_m, torch.zeros_like(logits) if h_a is None else h_a
        )
        y = x + self.dropout(self.fusion_proj(f) + self.small_mlp(z))
        active = self.branch == "both" and drop is None
        details = None
        if with_details and active and h_m is not None and h_a is not None:
            details = layer_details(logits, h_m, h_a, reductions()[1], layout.mask)
        return self.ln_output(y), BlockGates(reductions, active, details, deferred)

    def _runs(self, branch: str, drop: str | None) -> bool:
        return self.branch in ("both", branch) and drop != branch

    def _run(self, branch: nn.Module | None, state: HybridLayerState | None, *inputs: Any) -> torch.Tensor:
        """A branch, recomputed in backward when gradient checkpointing is on; the rest of the block is kept.

        Not on a state: recomputation would read the one that the first run has left, and write it a second time.
        """
        assert branch is not None
        recompute = self.gradient_checkpointing and self.training and state is None
        if recompute and self._gradient_checkpointing_func is not None:
            return self._gradient_checkpointing_func(branch.__call__, *inputs)
        return branch(*inputs, state)

    def _fill_dropped(
        self,
        h_m: torch.Tensor | None,
        h_a: torch.Tensor | None,
        layout: Layout,
        drop: str | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Branch dropout: a dropped branch's running mean stands in for it; the branches that ran update theirs."""
        if not self.training or not self.tracks_means:
            return h_m, h_a
        for branch, (output, mean) in enumerate(((h_m, self.mamba_mean), (h_a, self.attention_mean))):
            if output is not None:
                self.mean_updates[branch] += 1
                # A plain mean at first, so that it does not start out near zero.
                weight = (1 / self.mean_updates[branch]).clamp(min=1 - _MEAN_MOMENTUM).to(mean.dtype)
                mean.lerp_(_token_mean(output, layout.mask).to(mean.dtype), weight)
        if drop == "mamba" and h_a is not None:
            h_m = self.mamba_mean.to(h_a.dtype, copy=True).expand_as(h_a)
        elif drop == "attention" and h_m is not None:
            h_a = self.attention_mean.to(h_m.dtype, copy=True).expand_as(h_m)
        return h_m, h_a


@torch.no_grad()
def _token_mean(h: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, T, H] -> [H]: mean over real tokens."""
    if mask is None:
        return h.float().mean((0, 1))
    return (h.float() * mask[..., None]).sum((0, 1)) / mask.sum().clamp_min(1)
