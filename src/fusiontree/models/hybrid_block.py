"""One hybrid block: a Mamba and an attention branch in parallel, mixed per channel by a low-rank gate.

Shapes: B batch, T tokens, H hidden, r gate rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fusiontree.models.cache import HybridLayerState
from fusiontree.models.configuration import HybridLanguageModelConfig
from fusiontree.models.gate_stats import layer_details
from fusiontree.models.layout import Layout
from fusiontree.models.local_global_attn import LocalGlobalAttention
from fusiontree.models.mamba_block import MambaBlock
from fusiontree.models.merged_maps import MergedMaps
from fusiontree.ops.gated_mix import gate_reductions, gated_mix, mix_alone
from fusiontree.ops.swiglu import swiglu

_MEAN_MOMENTUM = 0.99

#: What gradient checkpointing can recompute in the backward pass, with the branches that are recomputed by themselves.
CHECKPOINTING_SCOPES: dict[str, tuple[str, ...]] = {
    "mamba": ("mamba",),
    "attention": ("attention",),
    "branches": ("mamba", "attention"),
    "block": (),  # the block as a whole instead
}
DEFAULT_SCOPE = "branches"


class AlignmentMLP(nn.Module):
    """z = W_s h + W_2 silu(W_1 h) with h the branches' outputs side by side; W_1 and the shortcut W_s are one matrix.

    A layer of one branch reads that branch alone. Without `hidden_layer` only the linear shortcut remains.
    """

    def __init__(self, hidden_size: int, branches: int, hidden_layer: bool):
        super().__init__()
        self.hidden_size = hidden_size
        self.in_proj = nn.Linear(branches * hidden_size, 2 * hidden_size if hidden_layer else hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size) if hidden_layer else None

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h [B, T, branches * H] -> z [B, T, H]."""
        projected = self.in_proj(h)
        if self.out_proj is None:
            return projected
        shortcut, inner = projected.split(self.hidden_size, dim=-1)
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
        self.out_proj = _writing_residual(nn.Linear(2 * hidden_size, hidden_size))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.out_proj(F.silu(self.in_proj(z)))


class ResidualMLP(nn.Module):
    """W_3 (silu(W_1 n) * W_2 n) with n = norm(y): a SwiGLU (Shazeer 2020, arXiv 2002.05202) on the residual stream.

    4/3 H wide, rounded to a multiple of 32, which int4 weights need: as many parameters as `SmallMLP` has.
    """

    def __init__(self, hidden_size: int, norm_eps: float):
        super().__init__()
        width = 32 * max(1, round(hidden_size / 24))
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.in_proj = nn.Linear(hidden_size, 2 * width, bias=False)
        self.out_proj = _writing_residual(nn.Linear(width, hidden_size, bias=False))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.out_proj(swiglu(self.in_proj(self.norm(y))))


@dataclass
class BlockGates:
    """What a block's gate did.

    Attributes:
        gate: its mean and entropy over channels, [B, T] each, with gradient; or its logits [B, T, H] alone, where these
            are to be computed only if somebody asks.
        active: whether they count.
        details: sums, when asked for.
    """

    gate: tuple[torch.Tensor, ...]
    active: bool
    details: dict[str, torch.Tensor] | None

    @property
    def is_deferred(self) -> bool:
        return len(self.gate) == 1

    def reductions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gate's mean and entropy, [B, T] each."""
        mean, entropy = gate_reductions(*self.gate) if self.is_deferred else self.gate
        return mean, entropy


class _Pass(NamedTuple):
    """What one forward pass gives every part of a block, beside x and the time encoding.

    scope: of `CHECKPOINTING_SCOPES`; None recomputes nothing.
    stand_in: [H] running mean of the branch that branch dropout removes.
    defers_gates: leave the gate's reductions to whoever reads them.
    """

    layout: Layout
    rotary: tuple[torch.Tensor, torch.Tensor]
    state: HybridLayerState | None
    scope: str | None
    drop: str | None
    stand_in: torch.Tensor | None
    with_details: bool
    defers_gates: bool


# Of the Mamba and of the attention branch; None where it is absent.
_Pair = tuple[torch.Tensor | None, torch.Tensor | None]


class HybridBlock(nn.Module):
    """See `forward` for the equation. With one branch (`layer_branches`) the absent one is the constant 0; without a
    gate (`layer_gates`) f is the sum of the branches. With no branch all that they led to is one constant vector. With
    `layer_merges` consecutive linear maps behind the one branch are one. What nobody reads is not there: z without a
    gate where the MLP reads the residual stream.
    """

    mamba_mean: torch.Tensor
    attention_mean: torch.Tensor
    mean_updates: torch.Tensor

    def __init__(self, config: HybridLanguageModelConfig, layer: int):
        super().__init__()
        hidden, branch = config.hidden_size, config.branch(layer)
        self.branch, self.merges = branch, config.merges(layer)
        self.is_gated = branch == "both" and config.has_gate(layer)
        self.mamba = self.attention = self.alignment = self.gate = self.small_mlp = self.merged = None
        is_aligned = config.mlp == "aligned"
        if branch == "constant":
            self.constant = nn.Parameter(torch.zeros(hidden))
        else:
            # In the order of the equation, which is that of their random initialisation.
            self.ln_input = nn.LayerNorm(hidden, eps=config.norm_eps)
            heads = config.heads(layer).mamba or None  # version 1 counts none
            self.mamba = MambaBlock(config, heads) if branch in ("both", "mamba") else None
            self.attention = LocalGlobalAttention(config, layer) if branch in ("both", "attention") else None
            width = config.branch_width(layer) if self.merges == "hz" else hidden  # of what is read in place of h
            if self.merges == "none" or not is_aligned:
                if is_aligned or config.has_gate(layer):
                    self.alignment = AlignmentMLP(hidden, 2 if branch == "both" else 1, config.use_alignment)
                self.gate = GateLowRank(hidden, config.gate_rank) if config.has_gate(layer) else None
                self.fusion_proj = _writing_residual(nn.Linear(width, hidden))
                self.small_mlp = SmallMLP(hidden) if is_aligned else None
            else:
                self.merged = MergedMaps(width, hidden, config.use_alignment)
            if self.merges == "hz":
                getattr(self, branch).out_proj = None
        self.residual_mlp = None if is_aligned else ResidualMLP(hidden, config.norm_eps)
        self.ln_output = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        # Set by the model's `_set_gradient_checkpointing`; the first has the name by which transformers asks for it.
        self.gradient_checkpointing = False
        self.checkpointing_scope = DEFAULT_SCOPE
        self.checkpoint: Callable = checkpoint
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
        # Not on a state: recomputation would read the one that the first run has left, and write it a second time.
        recomputes = self.gradient_checkpointing and self.training and state is None
        scope = self.checkpointing_scope if recomputes else None
        # In a step of decoding nobody may ever look at the gates: reducing them would cost as much as the mix.
        defers_gates = state is not None and x.shape[1] == 1 and not with_details and not torch.is_grad_enabled()
        # The running means are read before and written after what may run twice.
        given = _Pass(layout, rotary, state, scope, drop, self._stand_in(drop), with_details, defers_gates)
        compute = partial(self.checkpoint, self._compute) if scope == "block" else self._compute
        out, details, token_means, *gate = compute(x, time_encoding, given)
        self._update_means(token_means)
        return out, BlockGates(tuple(gate), self.is_gated and drop is None, details)

    def _compute(self, x: torch.Tensor, time_encoding: torch.Tensor, given: _Pass) -> tuple[Any, ...]:
        """out, details, the branches' token means, then `BlockGates.gate`; changes nothing but a state."""
        if self.branch == "constant":
            return self._end(x + self.constant), None, (None, None), *_no_gate(x, given)
        h_m, h_a = self._branches(x, time_encoding, given)
        token_means = self._token_means(h_m, h_a, given.layout)
        h, h_m, h_a = _side_by_side(*_fill_dropped(h_m, h_a, given))
        if self.merged is not None:
            return self._end(x + self.dropout(self.merged(h))), None, token_means, *_no_gate(x, given)
        z = None if self.alignment is None else self.alignment(h)
        f, details, *gate = self._mix(z, h_m, h_a, given)
        update = self.fusion_proj(f)
        if self.small_mlp is not None:
            update = update + self.small_mlp(z)
        return self._end(x + self.dropout(update)), details, token_means, *gate

    def _end(self, y: torch.Tensor) -> torch.Tensor:
        """ln_output(y), before it the MLP that reads y, where there is one; [B, T, H]."""
        return self.ln_output(y if self.residual_mlp is None else y + self.dropout(self.residual_mlp(y)))

    def _mix(
        self, z: torch.Tensor | None, h_m: torch.Tensor | None, h_a: torch.Tensor | None, given: _Pass
    ) -> tuple[Any, ...]:
        """f [B, T, H], details, then `BlockGates.gate`."""
        if self.gate is None:
            f = h_a if h_m is None else h_m if h_a is None else h_m + h_a
            return f, None, *_no_gate(f, given)
        logits = self.gate(z)
        f, *gate = (mix_alone if given.defers_gates else gated_mix)(
            logits, torch.zeros_like(logits) if h_m is None else h_m, torch.zeros_like(logits) if h_a is None else h_a
        )
        details = None
        if given.with_details and given.drop is None and h_m is not None and h_a is not None:
            details = layer_details(logits, h_m, h_a, gate[1], given.layout.mask)
        return f, details, *gate

    def _branches(self, x: torch.Tensor, time_encoding: torch.Tensor, given: _Pass) -> _Pair:
        """The branches that run on this layer, those of the scope recomputed in backward; [B, T, H] each."""
        runs = [name for name in ("mamba", "attention") if self.branch in ("both", name) and given.drop != name]
        covered = [name for name in runs if given.scope and name in CHECKPOINTING_SCOPES[given.scope]]
        if not covered:
            return self._normed_and_run(runs, x, time_encoding, given)[1:]
        # The norm belongs to what is recomputed: a branch then keeps x alone, which all of them share.
        u, *found = self.checkpoint(self._normed_and_run, covered, x, time_encoding, given)
        others = self._run(set(runs).difference(covered), u, time_encoding, given)
        h_m, h_a = (one if other is None else other for one, other in zip(found, others, strict=True))
        return h_m, h_a

    def _normed_and_run(
        self, names: Collection[str], x: torch.Tensor, time_encoding: torch.Tensor, given: _Pass
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        u = self.ln_input(x)
        return u, *self._run(names, u, time_encoding, given)

    def _run(self, names: Collection[str], u: torch.Tensor, time_encoding: torch.Tensor, given: _Pass) -> _Pair:
        h_m = h_a = None
        if self.mamba is not None and "mamba" in names:
            h_m = self.mamba(u + time_encoding, given.layout, given.state)
        if self.attention is not None and "attention" in names:
            h_a = self.attention(u, given.layout, given.rotary, given.state)
        return h_m, h_a

    def _stand_in(self, drop: str | None) -> torch.Tensor | None:
        """Branch dropout: what stands in for the dropped branch, a copy that later updates do not reach."""
        if drop is None or not self.training or not self.tracks_means:
            return None
        return (self.mamba_mean if drop == "mamba" else self.attention_mean).clone()

    def _token_means(self, h_m: torch.Tensor | None, h_a: torch.Tensor | None, layout: Layout) -> _Pair:
        """[H] of each branch that ran, where running means are kept."""
        if not self.training or not self.tracks_means:
            return None, None
        m_m, m_a = (None if h is None else _token_mean(h, layout.mask) for h in (h_m, h_a))
        return m_m, m_a

    def _update_means(self, token_means: _Pair) -> None:
        for branch, (found, mean) in enumerate(zip(token_means, ("mamba_mean", "attention_mean"), strict=True)):
            if found is not None:
                running = getattr(self, mean)
                self.mean_updates[branch] += 1
                # A plain mean at first, so that it does not start out near zero.
                weight = (1 / self.mean_updates[branch]).clamp(min=1 - _MEAN_MOMENTUM).to(running.dtype)
                running.lerp_(found.to(running.dtype), weight)


def _writing_residual(linear: nn.Linear) -> nn.Linear:
    """The map, marked for the initialisation: what it gives is added to the residual stream."""
    linear.writes_residual = True  # type: ignore[assignment]
    return linear


def _fill_dropped(h_m: torch.Tensor | None, h_a: torch.Tensor | None, given: _Pass) -> _Pair:
    """The stand-in in place of the branch that branch dropout removed."""
    kept = h_m if h_a is None else h_a
    if given.stand_in is None or kept is None:
        return h_m, h_a
    filled = given.stand_in.to(kept.dtype).expand_as(kept)
    return (filled, h_a) if given.drop == "mamba" else (h_m, filled)


def _no_gate(x: torch.Tensor, given: _Pass) -> tuple[torch.Tensor, ...]:
    """`BlockGates.gate` of a layer without gate, which no one counts."""
    logits = x.new_zeros(*x.shape[:2], 1)
    return (logits,) if given.defers_gates else gate_reductions(logits)


def _side_by_side(
    h_m: torch.Tensor | None, h_a: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The branches' outputs in one tensor [B, T, branches * H], and as its halves, so that they are kept once."""
    if h_m is None or h_a is None:
        alone = h_a if h_m is None else h_m
        assert alone is not None
        return alone, h_m, h_a
    h = torch.cat((h_m, h_a), dim=-1)
    h_m, h_a = h.chunk(2, dim=-1)
    return h, h_m, h_a


@torch.no_grad()
def _token_mean(h: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, T, H] -> [H]: mean over real tokens."""
    if mask is None:
        return h.float().mean((0, 1))
    return (h.float() * mask[..., None]).sum((0, 1)) / mask.sum().clamp_min(1)
