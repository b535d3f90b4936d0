"""What is taken from a model: branches, single heads and gates; and what taking heads out does to a layer's tensors.

Shapes: B batch, T tokens, H hidden, h heads, P head width, d = h P, N state, q query heads, k key/value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
import torch.nn as nn

from fusiontree.artifacts import BranchKind, LayerDecision
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModelConfig
from fusiontree.models.hybrid_block import HybridBlock
from fusiontree.models.layer_heads import LayerHeads, whole_layer
from fusiontree.models.local_global_attn import LocalGlobalAttention
from fusiontree.models.mamba_block import MambaBlock

#: What each kind of layer has, in the order in which the alignment reads them.
BRANCHES_OF: dict[str, tuple[str, ...]] = {
    "both": ("mamba", "attention"),
    "mamba": ("mamba",),
    "attention": ("attention",),
    "constant": (),
}

Tensors = dict[str, torch.Tensor]


def kind_without(kind: str, branch: str) -> BranchKind:
    """What a layer of that kind is without one of its branches."""
    left = tuple(name for name in BRANCHES_OF[kind] if name != branch)
    return cast("BranchKind", next(other for other, names in BRANCHES_OF.items() if names == left))


class Removal(NamedTuple):
    """A branch of a layer, or some heads of it; attention's are query heads, whole groups that share their keys."""

    layer: int
    branch: str
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cuts:
    """Everything that is taken from a model.

    Attributes:
        kinds: which branches each layer keeps.
        frozen: the layers whose gate is constant.
        heads: (layer, branch, head) of those taken from branches that stay.
    """

    kinds: tuple[BranchKind, ...]
    frozen: frozenset[int] = frozenset()
    heads: frozenset[tuple[int, str, int]] = frozenset()

    def without(self, removal: Removal) -> Cuts:
        """These cuts and one more."""
        layer, branch, heads = removal
        if heads:
            return replace(self, heads=self.heads | {(layer, branch, head) for head in heads})
        kinds = list(self.kinds)
        kinds[layer] = kind_without(kinds[layer], branch)
        others = frozenset(head for head in self.heads if head[:2] != (layer, branch))
        return replace(self, kinds=tuple(kinds), heads=others)

    def with_frozen(self, layer: int) -> Cuts:
        """These cuts, and that layer's gate constant."""
        return replace(self, frozen=self.frozen | {layer})

    def heads_of(self, layer: int, branch: str) -> list[int]:
        """The heads that are taken from a branch."""
        return sorted(head for found, name, head in self.heads if (found, name) == (layer, branch))

    def decision(self, layer: int) -> LayerDecision:
        """What becomes of a layer, without the constants."""
        kind = self.kinds[layer]
        heads = {name: found for name in BRANCHES_OF[kind] if (found := self.heads_of(layer, name))}
        return LayerDecision(keep=kind, reason="", heads=heads)


def heads_left(config: HybridLanguageModelConfig, layer: int, decision: LayerDecision) -> LayerHeads:
    """How many heads of each kind the decision leaves."""
    own, kept = config.heads(layer), BRANCHES_OF[decision.keep]
    removed = decision.heads.get("attention", [])
    has_attention = "attention" in kept
    return LayerHeads(
        mamba=own.mamba - len(decision.heads.get("mamba", [])) if "mamba" in kept else 0,
        local=own.local - sum(head < own.local for head in removed) if has_attention else 0,
        globals=own.globals - sum(head >= own.local for head in removed) if has_attention else 0,
        group=own.group,
    )


def layer_heads_of(
    config: HybridLanguageModelConfig, decisions: Sequence[LayerDecision]
) -> list[dict[str, int] | None] | None:
    """The field `layer_heads` of the model that the decisions leave; None where all its heads are there."""
    left = [heads_left(config, layer, decision) for layer, decision in enumerate(decisions)]
    entries = [
        None if heads == whole_layer(config, decision.keep) else heads.entry()
        for heads, decision in zip(left, decisions, strict=True)
    ]
    return entries if any(entry is not None for entry in entries) else None


def check_heads(block: HybridBlock, decision: LayerDecision, where: str) -> None:
    """Whether the decision's heads can be taken from a layer.

    Raises:
        InputError: of a branch that does not stay, of Mamba-1, heads that are not there, a part of a group that shares
            its keys, all heads of a branch, or constants of another number.
    """
    width = 0
    for name, removed in decision.heads.items():
        if name not in BRANCHES_OF[decision.keep]:
            raise InputError(f"{where} takes single heads from {name}, which does not stay: drop one or the other")
        branch = _branch(block, name)
        count = len(set(removed))
        if count != len(removed) or any(not 0 <= head < branch.num_heads for head in removed):
            raise InputError(f"{where} takes the {name} heads {removed}, but there are 0 to {branch.num_heads - 1}")
        if count == branch.num_heads:
            raise InputError(f"{where} takes all {count} heads of {name}: take the branch out instead")
        if isinstance(branch, LocalGlobalAttention):
            group = branch.num_heads // branch.num_kv_heads
            if count != group * len({head // group for head in removed}):
                raise InputError(
                    f"{where} takes the attention heads {removed}, which are no whole groups of the {group} that share "
                    "a key/value head"
                )
        width += count * branch.head_dim
    if decision.head_constants is not None and len(decision.head_constants) != width:
        raise InputError(
            f"{where} gives {len(decision.head_constants)} values for heads where {width} are needed: as many as the "
            "removed heads are wide"
        )


def _branch(block: HybridBlock, name: str) -> MambaBlock | LocalGlobalAttention:
    branch = block.mamba if name == "mamba" else block.attention
    assert branch is not None
    if isinstance(branch, MambaBlock) and branch.version == 1:
        raise InputError("a Mamba-1 branch has no heads that could be taken out")
    return branch


def head_constants_of(block: HybridBlock, decision: LayerDecision) -> dict[str, torch.Tensor]:
    """What stands in for the removed heads of each branch, before its output projection, [heads P] float64 each."""
    widths = {name: len(removed) * _branch(block, name).head_dim for name, removed in heads_in_order(decision)}
    values = decision.head_constants if decision.head_constants is not None else [0.0] * sum(widths.values())
    parts = torch.tensor(values, dtype=torch.float64).split(list(widths.values()))
    return dict(zip(widths, parts, strict=True))


def heads_in_order(decision: LayerDecision) -> list[tuple[str, list[int]]]:
    """(branch, heads that it loses), Mamba's first, as their constants are."""
    return [(name, heads) for name, heads in sorted(decision.heads.items(), reverse=True) if heads]


class ConstantHeads(nn.Module):
    """A branch's output projection that reads constants in place of some heads."""

    is_held_d: torch.Tensor
    held_d: torch.Tensor

    def __init__(self, out_proj: nn.Module, columns: torch.Tensor, constants: torch.Tensor, width: int):
        super().__init__()
        self.out_proj = out_proj
        held = constants.new_zeros(width).index_copy(0, columns, constants)
        self.register_buffer("held_d", held)
        self.register_buffer("is_held_d", torch.zeros_like(held, dtype=torch.bool).index_fill(0, columns, True))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """y [B, T, d] -> [B, T, H]."""
        return self.out_proj(torch.where(self.is_held_d, self.held_d.to(y.dtype), y))


def hold_heads(block: HybridBlock, decision: LayerDecision) -> None:
    """Puts the constants of the decision's heads into a layer, in place."""
    like = block.ln_output.weight
    constants = head_constants_of(block, decision)
    for name, removed in heads_in_order(decision):
        branch = _branch(block, name)
        columns = _columns(removed, branch.head_dim).to(like.device)
        width = branch.num_heads * branch.head_dim
        # As a part of the module it is found by everything that reads a branch's output projection.
        assert branch.out_proj is not None  # layers of merged maps lose no heads
        branch.out_proj = ConstantHeads(branch.out_proj, columns, constants[name].to(like), width)


def _columns(heads: Sequence[int], width: int) -> torch.Tensor:
    """Indices of the heads' entries where heads lie side by side."""
    return (torch.tensor(list(heads))[:, None] * width + torch.arange(width)).flatten()


def drop_heads(block: HybridBlock, decision: LayerDecision, layer: Tensors) -> None:
    """Takes the decision's heads out of a layer's float64 tensors, in place; their constants go to the branch's bias.

    Mamba's B and C, which all heads read, stay; a key/value head goes with its query heads.
    """
    constants = head_constants_of(block, decision)
    for name, removed in heads_in_order(decision):
        branch = _branch(block, name)
        kept = [head for head in range(branch.num_heads) if head not in removed]
        projection, bias = f"{name}.out_proj.weight", f"{name}.out_proj.bias"
        weight_Hd = layer[projection]
        constant = constants[name].to(weight_Hd.device)
        layer[bias] = layer[bias] + weight_Hd[:, _columns(removed, branch.head_dim)] @ constant
        layer[projection] = weight_Hd[:, _columns(kept, branch.head_dim)]
        rows = _mamba_rows(branch, kept) if isinstance(branch, MambaBlock) else _attention_rows(branch, kept)
        for tensor, index in rows.items():
            layer[f"{name}.{tensor}"] = layer[f"{name}.{tensor}"][index]


def _mamba_rows(branch: MambaBlock, kept: list[int]) -> Tensors:
    """The rows of each tensor that the heads `kept` read: z, x, B, C and dt lie one after the other."""
    d, shared = branch.inner_size, torch.arange(2 * branch.state_size)
    inner, heads = _columns(kept, branch.head_dim), torch.tensor(kept)
    return {
        "in_proj.weight": torch.cat((inner, d + inner, 2 * d + shared, 2 * d + len(shared) + heads)),
        "conv_weight": torch.cat((inner, d + shared)),
        "conv_bias": torch.cat((inner, d + shared)),
        "norm_weight": inner,
        "A_log": heads,
        "D": heads,
        "dt_bias": heads,
    }


def _attention_rows(branch: LocalGlobalAttention, kept: list[int]) -> Tensors:
    """The same of attention: queries, keys and values lie one after the other."""
    width, queries, keys = branch.head_dim, branch.num_heads, branch.num_kv_heads
    shared = _columns(sorted({head * keys // queries for head in kept}), width)
    return {
        "qkv_proj.weight": torch.cat(
            (_columns(kept, width), queries * width + shared, (queries + keys) * width + shared)
        )
    }
