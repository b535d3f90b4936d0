"""The choices inside our block, each as one edit of a freshly built model: what the ablation study compares.

A variant is settings of the configuration, an edit of the modules, or both; sizes make up for parameters gained or
lost.

Shapes: B batch, T tokens, H hidden, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fusiontree.models import HybridLanguageModel
from fusiontree.models.initialization import initialize


class Normalised(nn.Module):
    """A branch with its output normalised over channels."""

    def __init__(self, branch: nn.Module, hidden_size: int):
        super().__init__()
        self.branch = branch
        self.norm = nn.RMSNorm(hidden_size, eps=1e-5)

    def forward(self, *inputs: Any) -> torch.Tensor:
        return self.norm(self.branch(*inputs))


class Zero(nn.Module):
    """0, whatever the input: stands for a term that is left out."""

    def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x.new_zeros(())


class PerHeadGate(nn.Module):
    """One logit for each run of D channels, from z through the same rank."""

    def __init__(self, hidden_size: int, rank: int, width: int):
        super().__init__()
        self.width = width
        self.up = nn.Linear(hidden_size, rank, bias=False)
        self.down = nn.Linear(rank, hidden_size // width, bias=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(z))).repeat_interleave(self.width, dim=-1)


class FixedGate(nn.Module):
    """Logits of 0: a gate of one half."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(z)


def _without_output_norms(model: HybridLanguageModel) -> None:
    for block in model.layers[:-1]:  # the head reads the last one
        block.ln_output = nn.Identity()


def _normalised_branches(model: HybridLanguageModel) -> None:
    for block in model.layers:
        block.mamba = Normalised(block.mamba, model.config.hidden_size)
        block.attention = Normalised(block.attention, model.config.hidden_size)


def _gate_per_head(model: HybridLanguageModel) -> None:
    config = model.config
    for block in model.layers:
        block.gate = _initialised(model, PerHeadGate(config.hidden_size, config.gate_rank, config.head_dim))


def _fixed_gate(model: HybridLanguageModel) -> None:
    for block in model.layers:
        block.gate = FixedGate()


def _no_time_encoding(model: HybridLanguageModel) -> None:
    model.srte = Zero()


def _initialised(model: HybridLanguageModel, module: nn.Module) -> nn.Module:
    """`module` with its parts drawn as the model draws its own."""
    for part in module.modules():
        initialize(part, model.config)
    return module


@dataclass(frozen=True)
class Variant:
    """One choice: `edits` of the built model, in order, and `settings` of its configuration.

    The layers and ranks named among the settings keep the size `6.6M`; other sizes may want others (`--ours`).
    """

    edits: tuple[Callable[[HybridLanguageModel], None], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


VARIANTS = {
    "no ln_output": Variant((_without_output_norms,)),
    "branches normalised": Variant((_normalised_branches,)),
    "branches normalised, no ln_output": Variant((_normalised_branches, _without_output_norms)),
    "MLP from z": Variant(settings={"mlp": "aligned"}),
    "MLP from z, no ln_output": Variant((_without_output_norms,), {"mlp": "aligned"}),
    "no alignment": Variant(settings={"use_alignment": False, "num_layers": 5, "num_kv_heads": 2}),
    "gate per head": Variant((_gate_per_head,)),
    "gate 0.5": Variant((_fixed_gate,), {"mlp": "aligned"}),  # or nobody would read z, and its weights be idle
    "no SRTE": Variant((_no_time_encoding,)),
    "expand 1": Variant(settings={"mamba_expand": 1, "num_layers": 5, "num_kv_heads": 2}),
    "no global heads": Variant(settings={"global_heads": 0}),
    "global heads alone": Variant(settings={"global_heads": 4}),
    "window 64": Variant(settings={"window_size": 64}),
    "learned SRTE": Variant(settings={"srte_encoding": "learned", "max_position_embeddings": 512}),
}
