"""A plan's constants folded into the weights around them, in float64: the cut model as a model of the same class.

With the branch outputs h, their weights w (g and 1 - g, or 1 each without a gate) and constants c for what is removed:
the kept branch's output becomes h - c, so that f = c + w * (h - c) has lost its first term to `fusion_proj`'s bias, and
z = alignment([h ; c]) has lost (W_h + W_c) c to the alignment's biases (those of its shortcut too, which is a part of
the same matrix). A frozen gate is a weight per channel, which moves into the map before or behind it. Of a head that is
removed, the output projection's columns times its constant go to the branch's own bias.

Shapes: H hidden.
"""

from __future__ import annotations

from typing import Any

import torch

from fusiontree.artifacts import LayerDecision, PrunePlan
from fusiontree.deploy.cuts import BRANCHES_OF, Tensors, drop_heads, layer_heads_of
from fusiontree.deploy.merging import merge_maps, merge_of
from fusiontree.deploy.reference import ConstantGate, blocks_of, check_plan, constants_of
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.models.hybrid_block import HybridBlock


def fold(model: HybridLanguageModel, plan: PrunePlan, merge: bool = False) -> HybridLanguageModel:
    """The cut model, on the parent's device and in its dtype, in evaluation mode; the parent stays as it is.

    Args:
        merge: also multiply out linear maps, where no one else reads what lies between them and no parameters are added
            (`merge_of`); such a layer cannot be cut again.

    Raises:
        InputError: the plan does not fit the model, see `check_plan`.
    """
    check_plan(model, plan)
    blocks = blocks_of(model)
    config = cut_config(model.config, plan, merge)
    tensors = dict(model.state_dict())
    for index, (block, decision) in enumerate(zip(blocks, plan.layers, strict=True)):
        prefix = f"layers.{index}."
        layer = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        folded = _fold_layer(block, decision, layer)
        if (merges := config.merges(index)) != model.config.merges(index):
            folded = merge_maps(config.branch(index), merges, {name: value.double() for name, value in folded.items()})
        tensors |= {prefix + name: value for name, value in folded.items()}
    with torch.random.fork_rng(devices=[]):
        cut = HybridLanguageModel(config)
    cut.to(device=model.device, dtype=model.dtype).load_state_dict(tensors)
    cut.generation_config = model.generation_config
    cut.tokenizer = getattr(model, "tokenizer", None)
    return cut.eval()


def cut_config(config: HybridLanguageModelConfig, plan: PrunePlan, merge: bool = False) -> HybridLanguageModelConfig:
    """The configuration of the model that the plan leaves, with `merge` as of `fold`."""
    gates = [
        config.has_gate(index) and decision.gate is None and decision.keep != "constant"
        for index, decision in enumerate(plan.layers)
    ]
    # A layer without branches has no gate either way: it needs none of the list to say so.
    needs_list = any(not gate and kept != "constant" for gate, kept in zip(gates, plan.layer_branches, strict=True))
    fields: dict[str, Any] = {"layer_branches": plan.layer_branches, "layer_gates": gates if needs_list else None}
    fields["layer_heads"] = layer_heads_of(config, plan.layers)
    merges = [
        config.merges(index) if decision.keep == config.branch(index) else "none"
        for index, decision in enumerate(plan.layers)
    ]
    fields["layer_merges"] = merges if set(merges) != {"none"} else None
    cut = HybridLanguageModelConfig.from_dict(config.to_dict() | fields)
    if merge:
        merges = [own if own != "none" else merge_of(cut, index) for index, own in enumerate(merges)]
        cut.layer_merges = merges if set(merges) != {"none"} else None
    return cut


@torch.no_grad()
def _fold_layer(block: HybridBlock, decision: LayerDecision, layer: Tensors) -> Tensors:
    constants = constants_of(block, decision)
    kept = BRANCHES_OF[decision.keep]
    is_frozen = decision.gate is not None and block.gate is not None
    if not constants and not is_frozen and not decision.heads:
        return layer
    exact = {name: value.double() if value.is_floating_point() else value for name, value in layer.items()}
    drop_heads(block, decision, exact)
    constants = {name: value.to(block.ln_output.weight.device) for name, value in constants.items()}
    if not kept:
        constant_H = _constant_layer(block, decision, exact, constants)
        stays = ("ln_output.", "residual_mlp.")
        return {name: value for name, value in layer.items() if name.startswith(stays)} | {"constant": constant_H}
    names = BRANCHES_OF[block.branch]
    hidden = len(exact["ln_output.weight"])
    columns: Tensors = {}
    if block.alignment is not None:
        columns = dict(zip(names, exact["alignment.in_proj.weight"].split(hidden, dim=1), strict=True))
    if constants:
        (constant_H,) = constants.values()
        (removed,) = constants
        (left,) = kept
        if block.gate is not None:
            exact[f"{left}.out_proj.bias"] = exact[f"{left}.out_proj.bias"] - constant_H
        if columns:
            read = columns[removed] if block.gate is None else columns[removed] + columns[left]
            exact["alignment.in_proj.bias"] = exact["alignment.in_proj.bias"] + read @ constant_H
        exact["fusion_proj.bias"] = exact["fusion_proj.bias"] + exact["fusion_proj.weight"] @ constant_H
    if is_frozen:
        gate_H = torch.tensor(decision.gate, dtype=torch.float64, device=block.ln_output.weight.device)
        weights = {"mamba": gate_H, "attention": 1 - gate_H}
        if len(kept) == 1:
            exact["fusion_proj.weight"] = exact["fusion_proj.weight"] * weights[kept[0]]
        else:
            for name in kept:
                exact[f"{name}.out_proj.weight"] = exact[f"{name}.out_proj.weight"] * weights[name][:, None]
                exact[f"{name}.out_proj.bias"] = exact[f"{name}.out_proj.bias"] * weights[name]
                # Branch dropout puts it in place of the branch.
                exact[f"{name}_mean"] = exact[f"{name}_mean"] * weights[name]
                columns[name] = columns[name] / weights[name]
    if columns:
        exact["alignment.in_proj.weight"] = torch.cat([columns[name] for name in kept], dim=1)
    gone = [f"{name}." for name in constants] + (["gate."] if is_frozen else [])
    if is_frozen and block.small_mlp is None:
        gone.append("alignment.")  # the gate was its only reader
    if constants and block.branch == "both":
        gone += ["mamba_mean", "attention_mean", "mean_updates"]
    return {name: value for name, value in exact.items() if not name.startswith(tuple(gone))}


def _constant_layer(
    block: HybridBlock, decision: LayerDecision, exact: Tensors, constants: dict[str, torch.Tensor]
) -> torch.Tensor:
    """[H]: what a layer adds whose branches are all constant, by the block's own maps with float64 tensors."""

    def run(part: str, x: torch.Tensor) -> torch.Tensor:
        own = {name.removeprefix(f"{part}."): value for name, value in exact.items() if name.startswith(f"{part}.")}
        return torch.func.functional_call(getattr(block, part), own, (x,))

    h = [constants[name] for name in BRANCHES_OF[block.branch]]
    z_H = torch.zeros_like(h[0]) if block.alignment is None else run("alignment", torch.cat(h))
    f_H = torch.stack(h).sum(0)
    if block.gate is not None:
        frozen = None if decision.gate is None else torch.tensor(decision.gate, dtype=torch.float64).to(z_H.device)
        logits_H = run("gate", z_H) if frozen is None else ConstantGate(frozen)(z_H)
        weights = {"mamba": torch.sigmoid(logits_H), "attention": torch.sigmoid(-logits_H)}
        f_H = torch.stack([weights[name] * constants[name] for name in BRANCHES_OF[block.branch]]).sum(0)
    return run("fusion_proj", f_H) + (0 if block.small_mlp is None else run("small_mlp", z_H))
