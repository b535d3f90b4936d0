"""What gates are worth as a guide: how they, and contributions, rank branches against the measured rise of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusiontree.artifacts import PrunePlan

#: Evidence of what removing a branch alone costs, after the branch's name.
_RISES = ("ablation", "recall")
_LEAST = 3  # branches; fewer always agree or disagree


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: Pearson's correlation of the ranks, equal values sharing theirs; NaN where either is constant."""
    ranks = [[(sum(x < v for x in values) + sum(x <= v for x in values) - 1) / 2 for v in values] for values in (a, b)]
    (ra, rb), n = ranks, len(a)
    da, db = [x - sum(ra) / n for x in ra], [x - sum(rb) / n for x in rb]
    scale = (sum(x * x for x in da) * sum(x * x for x in db)) ** 0.5
    return sum(x * y for x, y in zip(da, db, strict=True)) / scale if scale else math.nan


def gate_guide(plan: PrunePlan) -> str | None:
    """How the gate's weights and the contributions of branches rank beside the rise of the loss without each, in words.

    Returns:
        None where the plan measured no such rise (criteria but ablation and recall do not), or of too few branches.
    """
    weights, shares = [], []
    for layer in plan.layers:
        gate = layer.evidence.get("gate_mean")
        for branch in ("mamba", "attention"):
            rise = next((layer.evidence[name] for end in _RISES if (name := f"{branch}_{end}") in layer.evidence), None)
            if rise is None:
                continue
            if gate is not None:
                weights.append((gate if branch == "mamba" else 1 - gate, rise))
            if f"{branch}_contribution" in layer.evidence:
                shares.append((layer.evidence[f"{branch}_contribution"], rise))
    found = [
        f"{name} {rho:+.2f}"
        for name, pairs in (("weight by the gate", weights), ("contribution", shares))
        if len(pairs) >= _LEAST and not math.isnan(rho := rank_correlation(*zip(*pairs, strict=True)))
    ]
    if not found:
        return None
    branches = max(len(weights), len(shares))
    return f"rank correlation with the measured rise of the loss (Spearman, {branches} branches): {', '.join(found)}"
