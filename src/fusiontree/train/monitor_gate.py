"""What the gates do during training: records for gates.jsonl, and the prune plan that thresholds draw from them.

Shapes: L layers, H channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import accumulate
from typing import Any, cast

import torch

from fusiontree.artifacts import BranchKind, GateStatistics, LayerDecision, LayerGateStatistics, PrunePlan
from fusiontree.models.gate_stats import HISTOGRAM_BINS, GateDetails
from fusiontree.train.settings import GateMonitorSettings

QUANTILE_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
SATURATION_MARGIN = 0.05


class GateMonitor:
    """Collects the gates' sums of one optimizer step, turns them into a record, and plans from the last records.

    Args:
        settings: intervals and thresholds.
        num_layers: L.
        layer_branches: per layer "both", "mamba" or "attention"; None = "both" everywhere.
    """

    def __init__(self, settings: GateMonitorSettings, num_layers: int, layer_branches: list[str] | None = None):
        self.settings = settings
        self.branches = cast("list[BranchKind]", layer_branches or ["both"] * num_layers)
        self.last: GateStatistics | None = None
        self._sums: GateDetails | None = None
        self._means: list[list[float | None]] = []
        # Per layer what Mamba and attention said on average, [H] each, when its gate was last recorded.
        self._outputs: list[tuple[list[float], list[float]] | None] = [None] * num_layers

    def due(self, step: int) -> bool:
        """Whether optimizer step `step` (from 1) is recorded: the first one, then every `interval`."""
        return self.settings.enabled and (step == 1 or step % self.settings.interval == 0)

    def update(self, details: GateDetails) -> None:
        """Add the sums of one micro-batch (or rank)."""
        added = {f.name: getattr(details, f.name).double() for f in fields(GateDetails)}
        if self._sums is not None:
            added = {name: value + getattr(self._sums, name) for name, value in added.items()}
        self._sums = GateDetails(**added)

    def forget(self) -> None:
        """Drop what was added for a step that is left out."""
        self._sums = None

    def record(
        self, step: int, tokens: int, tokens_seen: int, reduce: Callable[[torch.Tensor], torch.Tensor] = torch.clone
    ) -> GateStatistics:
        """Close the step: the record of everything added since the last one.

        Args:
            step: optimizer steps taken.
            tokens: real tokens of this step.
            tokens_seen: real tokens since the start of the run.
            reduce: sum of a tensor over all ranks.
        """
        layers = [LayerGateStatistics(branches=branch, tokens=0) for branch in self.branches]
        if self._sums is not None:
            sums = GateDetails(**{f.name: reduce(getattr(self._sums, f.name)).cpu() for f in fields(GateDetails)})
            layers = [layer_statistics(sums, index, branch) for index, branch in enumerate(self.branches)]
            self._outputs = [mean_outputs(sums, index) or before for index, before in enumerate(self._outputs)]
        self._sums = None
        statistics = GateStatistics(
            step=step,
            tokens=tokens,
            tokens_seen=tokens_seen,
            quantile_levels=list(QUANTILE_LEVELS),
            saturation_margin=SATURATION_MARGIN,
            layers=layers,
        )
        self.remember(statistics)
        return statistics

    def remember(self, statistics: GateStatistics) -> None:
        """Take a record, in the order in which they were made, into what `plan` looks at."""
        self.last = statistics
        means = [layer.mean if layer.tokens else None for layer in statistics.layers]
        self._means = [*self._means, means][-self.settings.plan_records :]

    def plan(self, source: str, model: str | None = None) -> PrunePlan:
        """Cut by thresholds: a layer whose mean gate, averaged over the last `plan_records` records, lies above
        `mamba_threshold` keeps Mamba alone, below `attention_threshold` attention alone; none before `plan_min_steps`,
        with a standard deviation above `plan_max_std`, or where fewer than `plan_confidence` of the records agree.
        What the removed branch said on average in the last record stands in for it.

        Args:
            source: the run that the records come from.
            model: fingerprint of its model.
        """
        s, step = self.settings, self.last.step if self.last else 0
        decisions = [self._decide(index, branch, step) for index, branch in enumerate(self.branches)]
        thresholds = {
            "mamba": s.mamba_threshold,
            "attention": s.attention_threshold,
            "min_steps": s.plan_min_steps,
            "max_std": s.plan_max_std,
            "confidence": s.plan_confidence,
        }
        for decision, branch, outputs in zip(decisions, self.branches, self._outputs, strict=True):
            if decision.keep != branch and outputs is not None:
                decision.constant = outputs[1 if decision.keep == "mamba" else 0]
        return PrunePlan(
            criterion="gate thresholds",
            thresholds=thresholds,
            source=source,
            step=step,
            layers=decisions,
            model=model,
        )

    def _decide(self, index: int, branch: BranchKind, step: int) -> LayerDecision:
        s = self.settings
        seen = [value for record in self._means if (value := record[index]) is not None]
        if branch != "both":
            return LayerDecision(keep=branch, reason="has one branch already")
        if not seen:
            return LayerDecision(keep="both", reason="no gate record yet")
        evidence = {"gate_mean": sum(seen) / len(seen), "records": len(seen)}
        if step < s.plan_min_steps:
            reason = f"too early: step {step} of at least {s.plan_min_steps}"
            return LayerDecision(keep="both", reason=reason, evidence=evidence)
        keep: BranchKind
        if evidence["gate_mean"] > s.mamba_threshold:
            keep, reason = "mamba", f"mean gate above {s.mamba_threshold}"
            agreeing = sum(value > s.mamba_threshold for value in seen)
        elif evidence["gate_mean"] < s.attention_threshold:
            keep, reason = "attention", f"mean gate below {s.attention_threshold}"
            agreeing = sum(value < s.attention_threshold for value in seen)
        else:
            return LayerDecision(keep="both", reason="mean gate between the thresholds", evidence=evidence)
        assert self.last is not None
        evidence |= {"gate_std": self.last.layers[index].std, "confidence": agreeing / len(seen)}
        if evidence["gate_std"] > s.plan_max_std:
            keep, reason = "both", f"{reason}, but its standard deviation is above {s.plan_max_std}"
        elif evidence["confidence"] < s.plan_confidence:
            keep, reason = "both", f"{reason}, but in {agreeing} of {len(seen)} records only"
        return LayerDecision(keep=keep, reason=reason, evidence=evidence)

    def state_dict(self) -> dict[str, Any]:
        """JSON values: the last record, the layer means that the plan averages, and the branches' mean outputs."""
        return {"last": self.last.dumps() if self.last else None, "means": self._means, "outputs": self._outputs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        last = state["last"]
        self.last = GateStatistics.loads(last, source="the checkpoint's gate record") if last else None
        self._means = [list(means) for means in state["means"]]
        # Older checkpoints have none.
        found = state.get("outputs") or [None] * len(self.branches)
        self._outputs = [None if pair is None else (pair[0], pair[1]) for pair in found]


def layer_statistics(sums: GateDetails, index: int, branch: BranchKind) -> LayerGateStatistics:
    """One layer's numbers from its sums (on the CPU)."""
    tokens = float(sums.tokens[index])
    if tokens == 0:
        return LayerGateStatistics(branches=branch, tokens=0)
    channel_mean_H = sums.channel_sum[index] / tokens
    square = float(sums.channel_square_sum[index].mean()) / tokens
    mean = float(channel_mean_H.mean())
    histogram = (sums.histogram[index] / sums.histogram[index].sum()).tolist()
    edge = round(SATURATION_MARGIN * HISTOGRAM_BINS)
    return LayerGateStatistics(
        branches=branch,
        tokens=int(tokens),
        mean=mean,
        std=max(0.0, square - mean * mean) ** 0.5,
        quantiles=[round(value, 4) for value in histogram_quantiles(histogram, QUANTILE_LEVELS)],
        histogram=[round(share, 6) for share in histogram],
        entropy=float(sums.entropy_sum[index]) / tokens,
        saturation=sum(histogram[:edge]) + sum(histogram[-edge:]),
        mamba_norm=float(sums.mamba_norm_sum[index]) / tokens,
        attention_norm=float(sums.attention_norm_sum[index]) / tokens,
        # Three decimals draw any heat map and keep a record of 18 layers x 1536 channels below 200 kB.
        channel_mean=[round(value, 3) for value in channel_mean_H.tolist()],
    )


def mean_outputs(sums: GateDetails, index: int) -> tuple[list[float], list[float]] | None:
    """One layer's mean outputs of Mamba and attention, [H] each to six digits; None where its gate was not at work."""
    tokens = float(sums.tokens[index])
    if tokens == 0:
        return None
    mamba, attention = (
        [float(f"{value:.6g}") for value in (part[index] / tokens).tolist()]
        for part in (sums.mamba_sum, sums.attention_sum)
    )
    return mamba, attention


def histogram_quantiles(histogram: list[float], levels: tuple[float, ...]) -> list[float]:
    """Quantiles of values in (0, 1) from the shares in equal bins, linear inside a bin."""
    ends = list(accumulate(histogram))
    width = 1.0 / len(histogram)
    found = []
    for level in levels:
        target = level * ends[-1]
        index = next(i for i, end in enumerate(ends) if end >= target and histogram[i] > 0)
        inside = (target - (ends[index] - histogram[index])) / histogram[index]
        found.append((index + min(max(inside, 0.0), 1.0)) * width)
    return found


def mean_gate(statistics: GateStatistics) -> tuple[float, float] | None:
    """(mean, standard deviation) of the gates, averaged over the layers that have a working gate; None without one."""
    working = [layer for layer in statistics.layers if layer.tokens]
    if not working:
        return None
    return sum(layer.mean for layer in working) / len(working), sum(layer.std for layer in working) / len(working)
