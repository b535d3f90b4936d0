"""How much each branch of each layer is worth, by six measures; the least worth goes first. Where removals are
measured, single heads are ranked beside whole branches.

- `gate`: the mean weight that the gate gives the branch.
- `contribution`: the mean norm of gate times output, as a share of both branches'.
- `ablation`: the rise of the loss when the branch alone is replaced by its mean output.
- `recall`: the same, with the rise of the loss of text that is read twice added.
- `trained`: see `trained_scores`.
- `random`: a draw, the control.

Shapes: B rows, T tokens, H hidden.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
import torch.nn as nn

from fusiontree.deploy.calibration import Calibration, CalibrationText
from fusiontree.deploy.cuts import BRANCHES_OF, Removal
from fusiontree.models import HybridLanguageModel
from fusiontree.ops import linear_cross_entropy

CRITERIA = ("gate", "contribution", "ablation", "recall", "trained", "random")
#: Those that measure removals, and rank anew after each.
MEASURED = ("ablation", "recall")

#: Heads of a branch that are taken out a few at a time, by the name that a place has for them.
HEAD_PARTS = {"mamba heads": "mamba", "local heads": "attention", "global heads": "attention"}
_MAMBA_PARTS = 8  # Mamba heads go by eighths of a branch: they are many

#: A part of a layer: a branch by its name, or one of `HEAD_PARTS`.
Place = tuple[int, str]
Scores = dict[Place, float]

_STEPS = 80
_ROWS = 4
_RATE = 0.15
_PRESSURE = 1.0  # nats that keeping every branch costs at the end of the training
_START = 3.0  # sigmoid(3) = 0.95


def branches(calibration: Calibration) -> list[Place]:
    """Every branch of every layer, but of those whose maps are merged."""
    cuttable = [(layer, block) for layer, block in enumerate(calibration.blocks) if block.merges == "none"]
    return [(layer, name) for layer, block in cuttable for name in BRANCHES_OF[block.branch]]


@torch.no_grad()
def gate_evidence(calibration: Calibration) -> list[dict[str, float]]:
    """Per layer: mean and standard deviation of its gate, and what each branch contributes; empty for one branch."""
    found: list[dict[str, float]] = []
    for block, x in zip(calibration.blocks, calibration.parent.inputs, strict=True):
        if block.branch != "both":
            found.append({})
            continue
        tokens = calibration.text.input_ids.numel()
        total = square = count = 0.0
        norms = dict.fromkeys(BRANCHES_OF["both"], 0.0)
        gates = calibration.gates(block, x) if block.gate is not None else repeat(torch.ones(()))
        for group, (gate, part) in enumerate(zip(gates, calibration.of_text(x), strict=False)):
            total, square, count = (
                total + float(gate.double().sum()),
                square + float(gate.double().square().sum()),
                count + gate.numel(),
            )
            for name in norms:
                weight = 1 - gate if name == "attention" and block.gate is not None else gate
                output = calibration.branch_output(block, name, part, group)
                norms[name] += float((weight * output).float().norm(dim=-1).sum())
        evidence = {f"{name}_norm": norm / tokens for name, norm in norms.items()}
        evidence |= {f"{name}_contribution": norm / sum(norms.values()) for name, norm in norms.items()}
        if block.gate is not None:
            mean = total / count
            evidence |= {"gate_mean": mean, "gate_std": max(0.0, square / count - mean**2) ** 0.5}
        found.append(evidence)
    return found


def gate_scores(evidence: list[dict[str, float]], places: list[Place]) -> Scores:
    """The weight that each branch gets; of a layer without a gate, or with one branch, one half."""
    means = [layer.get("gate_mean", 0.5) for layer in evidence]
    return {(layer, name): means[layer] if name == "mamba" else 1 - means[layer] for layer, name in places}


def contribution_scores(evidence: list[dict[str, float]], places: list[Place]) -> Scores:
    """Its share of the layer's two contributions; 1 where there is no other."""
    return {(layer, name): evidence[layer].get(f"{name}_contribution", 1.0) for layer, name in places}


def ablation_scores(
    calibration: Calibration, progress: Callable[[str], None], heads: dict[Place, list[Removal]] | None = None
) -> Scores:
    """The rise of the loss when a branch alone is replaced by its mean, in nats per token; with the rise of the text
    read twice, where that is measured. Of `head_order`'s places, the same of the heads that would go first."""
    first = {place: Removal(*place) for place in branches(calibration)}
    first |= {place: removals[0] for place, removals in (heads or {}).items()}
    scores = {}
    for (layer, part), removal in first.items():
        progress(f"ablation: layer {layer}, {part}")
        scores[layer, part] = calibration.remove(calibration.parent, removal).rise_from(calibration.parent)
    return scores


def head_order(calibration: Calibration) -> dict[Place, list[Removal]]:
    """Heads of each layer's branches, in the steps in which they would go: those whose contribution varies least first.

    What a head adds to its branch's output y is W_h y_h; once its mean stands in for it, the variance of that is what
    is missing. Attention heads go with all that share their keys, Mamba heads by eighths of a branch.
    """
    found: dict[Place, list[Removal]] = {}
    for layer, name in branches(calibration):
        branch = getattr(calibration.blocks[layer], name)
        if getattr(branch, "version", 2) == 1:
            continue  # Mamba-1 has no heads
        variance = _head_variance(calibration, layer, name)
        for part, heads, group, step in _parts(branch, name):
            worth = variance[heads].view(-1, group).sum(1)
            ordered = [heads[group * index : group * (index + 1)] for index in worth.argsort(stable=True).tolist()]
            steps = [ordered[start : start + step] for start in range(0, len(ordered), step)]
            # The last of a branch's heads go with the branch.
            if steps and len(steps[0]) * group < branch.num_heads:
                found[layer, part] = [Removal(layer, name, tuple(sorted(sum(some, [])))) for some in steps]
    return found


def _parts(branch: Any, name: str) -> list[tuple[str, list[int], int, int]]:
    """(name of the part, its heads, how many of them go together, how many such groups go in a step)."""
    every = list(range(branch.num_heads))
    if name == "mamba":
        return [("mamba heads", every, 1, max(1, len(every) // _MAMBA_PARTS))]
    group, local = branch.num_heads // branch.num_kv_heads, branch.num_heads - branch.global_heads
    return [("local heads", every[:local], group, 1), ("global heads", every[local:], group, 1)]


@torch.no_grad()
def _head_variance(calibration: Calibration, layer: int, name: str) -> torch.Tensor:
    """[heads]: variance of what each head adds to the branch's output, summed over channels."""
    block = calibration.blocks[layer]
    branch, tokens = getattr(block, name), calibration.text.input_ids.numel()
    total = square = torch.zeros((), dtype=torch.float64)
    for y in calibration.head_outputs(block, name, calibration.parent.inputs[layer]):
        heads = y.flatten(0, 1).unflatten(-1, (branch.num_heads, -1)).float().cpu()
        total = total + heads.double().sum(0)
        square = square + torch.einsum("nhp,nhq->hpq", heads, heads).double()
    mean = total / tokens
    covariance = square / tokens - mean[:, :, None] * mean[:, None, :]
    weight = branch.out_proj.weight.double().cpu().unflatten(1, (branch.num_heads, -1))
    return torch.einsum("ohp,hpq,ohq->h", weight, covariance, weight).clamp_min(0)


def random_scores(places: list[Place], seed: int) -> Scores:
    """Uniform draws."""
    draw = random.Random(seed)
    return {place: draw.random() for place in places}


class _Scaled(nn.Module):
    """A branch whose deviation from its mean is scaled by sigmoid(theta): 0 leaves the mean alone."""

    def __init__(self, branch: nn.Module, mean_H: torch.Tensor, theta: torch.Tensor):
        super().__init__()
        self.branch, self.mean_H, self.theta = branch, mean_H, theta

    def forward(self, u: torch.Tensor, *given: Any) -> torch.Tensor:
        return torch.lerp(self.mean_H.to(u.dtype), self.branch(u, *given), torch.sigmoid(self.theta).to(u.dtype))


def trained_scores(
    calibration: Calibration,
    costs: dict[Place, float],
    *,
    seed: int = 0,
    steps: int = _STEPS,
    progress: Callable[[str], None] = lambda what: None,
) -> Scores:
    """One scalar per branch and layer, trained under a growing price for what it costs, all weights frozen.

    After FlashMorph (arXiv 2606.30562), which picks attention layers this way. The scalar scales how far a branch's
    output deviates from its mean. Trained on calibration text and, in every other step, on synthetic recall: a stretch
    of text that is read twice, of which only the second reading counts. The price grows from 0 to `_PRESSURE` nats for
    all branches together; a branch is worth the mean of its scalar on the way: what gives way early is worth little.

    Args:
        costs: of each branch, in any one unit.
    """
    model, text = calibration.model, calibration.text
    texts = text, text.read_twice()
    places = branches(calibration)
    theta = torch.full((len(places),), _START, device=model.device, requires_grad=True)
    price = torch.tensor([max(0.0, costs[place]) for place in places], device=model.device)
    price = price / price.sum().clamp_min(1e-12)
    optimizer = torch.optim.Adam([theta], lr=_RATE)
    generator = torch.Generator().manual_seed(seed)
    path = torch.zeros(len(places))
    wanted_gradients = [parameter.requires_grad for parameter in model.parameters()]
    own = [(calibration.blocks[layer], name, getattr(calibration.blocks[layer], name)) for layer, name in places]
    try:
        model.requires_grad_(False)
        for index, (layer, name) in enumerate(places):
            block = calibration.blocks[layer]
            mean_H = calibration.mean_output(block, name, calibration.parent.inputs[layer]).to(model.device)
            setattr(block, name, _Scaled(getattr(block, name), mean_H, theta[index]))
        for step in range(steps):
            progress(f"training the scalars: step {step + 1} of {steps}")
            # The wrappers hold views of theta, and a view's graph lasts one backward pass.
            for index, (block, name, _) in enumerate(own):
                getattr(block, name).theta = theta[index]
            rows = torch.randint(len(text.input_ids), (_ROWS,), generator=generator)
            loss = _loss_of(model, texts[step % 2], rows)
            scalars = torch.sigmoid(theta)
            (loss + _PRESSURE * (step + 1) / steps * (price * scalars).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            path += scalars.detach().cpu()
    finally:
        for block, name, branch in own:
            setattr(block, name, branch)
        for parameter, wanted in zip(model.parameters(), wanted_gradients, strict=True):
            parameter.requires_grad_(wanted)
    return {place: float(value) for place, value in zip(places, path / steps, strict=True)}


def _loss_of(model: HybridLanguageModel, text: CalibrationText, rows: torch.Tensor) -> torch.Tensor:
    ids, positions, targets = (one[rows].to(model.device) for one in (text.input_ids, text.position_ids, text.targets))
    hidden = model.backbone(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return linear_cross_entropy(hidden, model.lm_head.weight, targets)
