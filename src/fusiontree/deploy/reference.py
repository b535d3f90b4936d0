"""What a prune plan means: the parent itself, with constants where branches or heads are removed and gates are frozen.

Shapes: B batch, T tokens, H hidden.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.nn as nn

from fusiontree.artifacts import LayerDecision, PrunePlan
from fusiontree.deploy.cuts import BRANCHES_OF, check_heads, hold_heads
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel
from fusiontree.models.hybrid_block import HybridBlock
from fusiontree.train.checkpoint import weights_fingerprint


class ConstantBranch(nn.Module):
    """A branch that says the same of every token, and keeps no state."""

    constant_H: torch.Tensor

    def __init__(self, constant_H: torch.Tensor):
        super().__init__()
        self.register_buffer("constant_H", constant_H)

    def forward(self, u: torch.Tensor, *layout_and_state: object) -> torch.Tensor:
        return self.constant_H.to(u.dtype).expand(u.shape)


class ConstantGate(nn.Module):
    """A gate that is the same for every token.

    Args:
        gate_H: in float64, and its logits until the module is moved: rounded, a gate near 1 would be 1.
    """

    logits_H: torch.Tensor

    def __init__(self, gate_H: torch.Tensor):
        super().__init__()
        self.register_buffer("logits_H", torch.logit(gate_H))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.logits_H.to(z.dtype).expand(z.shape)


def blocks_of(model: HybridLanguageModel) -> list[HybridBlock]:
    """The model's layers."""
    return cast("list[HybridBlock]", list(model.layers))


def removed_branches(block: HybridBlock, decision: LayerDecision) -> list[str]:
    """The branches that the decision takes from a layer, Mamba first."""
    return [name for name in BRANCHES_OF[block.branch] if name not in BRANCHES_OF[decision.keep]]


def constants_of(block: HybridBlock, decision: LayerDecision) -> dict[str, torch.Tensor]:
    """What stands in for each removed branch, [H] float64 each; zeros where the plan recorded none."""
    removed = removed_branches(block, decision)
    hidden = block.ln_output.normalized_shape[0]
    values = decision.constant if decision.constant is not None else [0.0] * hidden * len(removed)
    return dict(zip(removed, torch.tensor(values, dtype=torch.float64).view(-1, hidden), strict=True))


def model_fingerprint(model: HybridLanguageModel) -> str:
    """Hexadecimal digest of the sizes and weights: what a plan is bound to. The same on every device."""
    return weights_fingerprint(model.config, sorted(model.named_parameters()))


def planned_dtype(plan: PrunePlan) -> torch.dtype | None:
    """The type in which the plan read the weights that it is bound to; None where it does not tell: as saved."""
    found = getattr(torch, str(plan.measured.get("dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def check_plan(model: HybridLanguageModel, plan: PrunePlan, where: str = "the plan") -> None:
    """Whether the plan can be carried out on the model.

    Raises:
        InputError: it was made for another model; it keeps a branch that a layer does not have; constants of another
            width, or that were not read along with it.
    """
    if plan.constants_file is not None:
        raise InputError(f"{where} has its constants in {plan.constants_file}: read it with PrunePlan.load")
    blocks = blocks_of(model)
    if len(plan.layers) != len(blocks):
        raise InputError(
            f"{where} decides about {len(plan.layers)} layers, but the model has {len(blocks)}: it was made for "
            "another model"
        )
    if plan.model is not None and (found := model_fingerprint(model)) != plan.model:
        raise InputError(
            f"{where} was made for another model (fingerprint {plan.model[:12]}, this one has {found[:12]}): make a "
            "plan for this one"
        )
    for index, (block, decision) in enumerate(zip(blocks, plan.layers, strict=True)):
        missing = set(BRANCHES_OF[decision.keep]) - set(BRANCHES_OF[block.branch])
        if missing:
            raise InputError(
                f"{where} keeps {decision.keep} in layer {index}, which has {block.branch} alone: that would leave it "
                f"without a branch; keep {block.branch}, or constant where the layer is to be emptied"
            )
        if block.merges != "none" and (decision.keep != block.branch or decision.heads):
            raise InputError(
                f"{where} cuts layer {index}, whose linear maps are merged: cut the model from which it was exported"
            )
        hidden = model.config.hidden_size
        width = hidden * len(removed_branches(block, decision))
        for name, values, wanted in (("constant", decision.constant, width), ("gate", decision.gate, hidden)):
            if values is not None and len(values) != wanted:
                raise InputError(
                    f"{where} gives {len(values)} values as {name} of layer {index} where {wanted} are needed"
                )
        check_heads(block, decision, f"{where} of layer {index}")
        if decision.gate is not None and not all(0 < value < 1 for value in decision.gate):
            raise InputError(f"{where} freezes a gate of layer {index} outside of 0 to 1")


def stand_in(block: HybridBlock, decision: LayerDecision) -> None:
    """Puts the decision's constants into a layer, in place."""
    like = block.ln_output.weight
    for name, constant_H in constants_of(block, decision).items():
        setattr(block, name, ConstantBranch(constant_H.to(like)))
    hold_heads(block, decision)
    if decision.gate is not None and block.gate is not None:
        # As a part of the module it is found by everything that reads a block's gate.
        gate_H = torch.tensor(decision.gate, dtype=torch.float64)
        block.gate = ConstantGate(gate_H).to(device=like.device, dtype=like.dtype)  # type: ignore[assignment]


def reference_parent(model: HybridLanguageModel, plan: PrunePlan) -> HybridLanguageModel:
    """A copy of the model in which each removed branch or head says its recorded constant and each frozen gate its own.

    It is what an export has to equal (`export`), computed by the parent's own equation and as slowly as that.

    Raises:
        InputError: the plan does not fit the model, see `check_plan`.
    """
    check_plan(model, plan)
    program, model._decoding_program = model._decoding_program, None  # it holds the weights once more
    try:
        parent = copy.deepcopy(model)
    finally:
        model._decoding_program = program
    for block, decision in zip(blocks_of(parent), plan.layers, strict=True):
        stand_in(block, decision)
    return parent.eval()
