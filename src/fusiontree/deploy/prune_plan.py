"""From a trained model and some text to a prune plan: what to cut, in which order, until a budget is met.

Every criterion ranks the branches of all layers, and the least worth goes first; those that measure removals rank anew
after each, since removals interact, and can rank single heads beside whole branches. After every removal the constants
of all that was removed are recorded once more, in the state that the model is then in, and the loss is measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from fusiontree.artifacts import Branch, CutStep, GateStatistics, LayerDecision, PrunePlan
from fusiontree.deploy import criteria
from fusiontree.deploy.budget import FASTER, LOSS, SMALLER, CostModel, ImpossibleBudgetError, blank, shortfall
from fusiontree.deploy.calibration import Calibration, CalibrationText, Joint
from fusiontree.deploy.costs import DEFAULT_CONTEXT, describe_machine, measure_costs, timed_context
from fusiontree.deploy.criteria import Place, Scores
from fusiontree.deploy.cuts import BRANCHES_OF, Cuts, Removal
from fusiontree.deploy.plan_settings import PlanSettings
from fusiontree.deploy.reference import blocks_of, model_fingerprint
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel
from fusiontree.train.monitor_gate import GateMonitor
from fusiontree.train.settings import GateMonitorSettings


def make_plan(
    model: HybridLanguageModel,
    text: CalibrationText,
    settings: PlanSettings,
    *,
    source: str,
    costs: CostModel | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> PrunePlan:
    """Plans the cut of a model.

    Args:
        model: as `fusiontree.load` returns it; it is changed while it is measured, and restored.
        text: calibration text, other than what the result will be judged on.
        source: name of the model, for the plan.
        costs: of an earlier plan of the same model on this machine; None measures them.
        progress: called with what is done next.

    Raises:
        ImpossibleBudgetError: the budget cannot be met; the sentence says the nearest that can.
        InputError: nothing of the model can be cut.
    """
    if all(block.merges != "none" or block.branch == "constant" for block in blocks_of(model)):
        raise InputError(
            f"nothing can be cut from {source}: the maps of each of its layers are merged, or it has no branch; plan "
            "for the model that it was exported from"
        )
    calibration = Calibration(model, text, measures_recall=settings.criterion == "recall")
    if costs is None:
        costs = CostModel.measured(
            model,
            context=settings.context,
            rounds=settings.rounds,
            progress=lambda what: progress(f"costs: {what}"),
            heads=settings.takes_heads,
            gates=settings.freeze_gates > 0,
        )
    return _Planner(calibration, costs, settings, source, progress).plan()


def plan_by_thresholds(
    model: HybridLanguageModel,
    text: CalibrationText,
    records: Sequence[GateStatistics],
    settings: GateMonitorSettings,
    *,
    source: str,
    context: int = DEFAULT_CONTEXT,
    rounds: int = 3,
    progress: Callable[[str], None] = lambda what: None,
) -> PrunePlan:
    """The plan that thresholds draw from what a run recorded about its gates (`GateMonitor.plan`), with constants.

    Args:
        model, text, source, context, rounds, progress: as of `make_plan`.
        records: of the run, in their order.
        settings: the thresholds.

    Raises:
        InputError: the records are of too early a step, or of another model.
    """
    step = records[-1].step
    if step < settings.plan_min_steps:
        raise InputError(
            f"the gate statistics of {source} are from step {step}, and thresholds are for gates of at least "
            f"{settings.plan_min_steps} steps: train on, or set gate_monitor.plan_min_steps lower"
        )
    calibration = Calibration(model, text)
    if [layer.branches for layer in records[-1].layers] != list(calibration.parent.kinds):
        raise InputError(f"the gate statistics of {source} are of a model with other layers than this one")
    monitor = GateMonitor(settings, len(calibration.blocks), list(calibration.parent.kinds))
    for record in records:
        monitor.remember(record)
    plan = monitor.plan(source)
    joint = calibration.cut(plan.layer_branches)
    costs = _measure(calibration, joint, context, rounds, progress)
    evidence = criteria.gate_evidence(calibration)
    plan.layers = [
        found.model_copy(update={"reason": decided.reason, "evidence": evidence[layer] | decided.evidence})
        for layer, (found, decided) in enumerate(zip(joint.decisions, plan.layers, strict=True))
    ]
    plan.model = model_fingerprint(model)
    plan.expected = costs | _losses(calibration, joint)
    plan.measured = _measured_how(calibration) | {"context": timed_context(model.config, context)}
    return plan


def _measure(
    calibration: Calibration, joint: Joint, context: int, rounds: int, progress: Callable[[str], None]
) -> dict[str, float]:
    """What the whole cut model costs, measured beside its parent."""
    model = calibration.model
    models = {"parent": model, "cut": blank(model, joint.cuts)}
    found = measure_costs(models, context=context, rounds=rounds, progress=progress)
    return found["cut"].against(found["parent"])


def _losses(calibration: Calibration, joint: Joint) -> dict[str, float]:
    parent = calibration.parent.loss
    found = {"loss_increase": joint.loss - parent, "loss": joint.loss, "parent_loss": parent}
    if not math.isnan(joint.recall_loss):
        found |= {"recall_loss": joint.recall_loss, "parent_recall_loss": calibration.parent.recall_loss}
    return found


def _measured_how(calibration: Calibration, costs: CostModel | None = None) -> dict[str, Any]:
    text, model = calibration.text, calibration.model
    how = describe_machine(model.device) | {
        "calibration_tokens": text.tokens,
        "row_length": text.input_ids.shape[1],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if costs is None:
        return how
    return how | {
        "context": costs.context,
        "parent_prefill_seconds": costs.parent.prefill_seconds,
        "parent_decode_seconds": costs.parent.decode_seconds,
        "parent_memory_bytes": costs.parent.memory_bytes,
    }


class _Planner:
    def __init__(
        self,
        calibration: Calibration,
        costs: CostModel,
        settings: PlanSettings,
        source: str,
        progress: Callable[[str], None],
    ):
        self.calibration, self.costs, self.settings = calibration, costs, settings
        self.source, self.progress = source, progress
        self.limit = settings.targets.get(LOSS)
        self.wanted = [name for name in settings.targets if name != LOSS]
        self.steps: list[CutStep] = []
        self.evidence = criteria.gate_evidence(calibration)
        self.heads = criteria.head_order(calibration) if settings.takes_heads else {}
        self._check_within_reach()
        self.scores = self._score()
        self.first_scores = dict(self.scores)
        self.cheapest = math.inf

    def plan(self) -> PrunePlan:
        # Gates first: what they save need not be cut elsewhere.
        joint, expected = self._cut_to_budget(self._freeze_gates(self.calibration.parent))
        return PrunePlan(
            criterion=self.settings.criterion,
            thresholds={},
            source=self.source,
            layers=[self._decision(layer, decision) for layer, decision in enumerate(joint.decisions)],
            model=model_fingerprint(self.calibration.model),
            targets=self.settings.targets,
            expected=expected | _losses(self.calibration, joint),
            steps=self.steps,
            measured=_measured_how(self.calibration, self.costs)
            | {
                "seed": self.settings.seed,
                "heads": self.settings.takes_heads,
                "freeze_gates": self.settings.freeze_gates,
            },
        )

    def _score(self) -> Scores:
        calibration, places = self.calibration, criteria.branches(self.calibration)
        match self.settings.criterion:
            case "gate":
                return criteria.gate_scores(self.evidence, places)
            case "contribution":
                return criteria.contribution_scores(self.evidence, places)
            case "ablation" | "recall":
                return criteria.ablation_scores(calibration, self.progress, self.heads)
            case "trained":
                cuts = calibration.parent.cuts
                prices = {place: self.costs.saving(cuts, Removal(*place), self.wanted) for place in places}
                return criteria.trained_scores(calibration, prices, seed=self.settings.seed, progress=self.progress)
            case _:
                return criteria.random_scores(places, self.settings.seed)

    def _cut_to_budget(self, joint: Joint) -> tuple[Joint, dict[str, float]]:
        """Cuts until the targets of speed and size are reached; without any, while the loss allows it.

        Costs are first those that the branches add up to, and at the end those of the whole model, measured twice: the
        first time that is fast enough may be a lucky one, so it is the second that counts.
        """
        while True:
            reached = self.costs.reached(joint.cuts)
            if self.wanted and not shortfall(self.settings.targets, reached):
                for _ in range(2 if self.settings.is_verified else 0):
                    reached = self._measured(joint)
                    if shortfall(self.settings.targets, reached):
                        break
                else:
                    return joint, reached
            found = self._next(joint)
            if found is None:
                if not self.wanted and (self.steps or joint.cuts.frozen):
                    return joint, self._measured(joint)
                raise ImpossibleBudgetError(self._impossible(joint))
            removal, joint = found
            step = CutStep(
                layer=removal.layer,
                branch=cast("Branch", removal.branch),
                heads=list(removal.heads),
                loss_increase=self._rise(joint),
                saving=self.costs.reached(joint.cuts),
            )
            self.steps.append(step)
            self.progress(f"removed {_words(removal)}: loss {step.loss_increase:+.4f}")

    def _measured(self, joint: Joint) -> dict[str, float]:
        return _measure(self.calibration, joint, self.costs.context, self.settings.rounds, self.progress)

    def _next(self, joint: Joint) -> tuple[Removal, Joint] | None:
        """The next branch or heads to remove, and the model without; None where none may go any more.

        Criteria that rank once and for all give the order. Where removals are measured it is the cheapest rise of the
        loss for what it saves, and a rise measured in an earlier state only orders the candidates: the best of those
        measured anew is taken once it comes before the old value of the next (lazy greedy; Minoux 1978).
        """
        ranks_anew = self.settings.criterion in criteria.MEASURED
        left = {place: removal for place in self.scores if (removal := self._removal(joint.cuts, place)) is not None}
        rank = {
            place: self._price(joint, place, removal) if ranks_anew else self.scores[place]
            for place, removal in left.items()
        }
        best: tuple[Place, Joint] | None = None
        self.cheapest = math.inf  # the smallest rise of the loss that this search sees
        for place in sorted(left, key=lambda place: rank[place]):
            if best is not None and (not ranks_anew or rank[best[0]] <= rank[place]):
                break
            self.progress(f"measuring without {_words(left[place])}")
            found = self.calibration.remove(joint, left[place])
            self.cheapest = min(self.cheapest, self._rise(found))
            if ranks_anew:
                self.scores[place] = found.rise_from(joint)
                rank[place] = self._price(joint, place, left[place])
            if self.limit is not None and self._rise(found) > self.limit:
                continue
            if best is None or rank[place] < rank[best[0]]:
                best = place, found
        return None if best is None else (left[best[0]], best[1])

    def _removal(self, cuts: Cuts, place: Place) -> Removal | None:
        """What would go next of a part of a layer; None where nothing may."""
        layer, part = place
        if self.calibration.blocks[layer].merges != "none":
            return None  # cannot be cut again
        names = BRANCHES_OF[cuts.kinds[layer]]
        if part in BRANCHES_OF["both"]:
            return Removal(layer, part) if part in names and (len(names) > 1 or self.settings.empty_layers) else None
        branch = criteria.HEAD_PARTS[part]
        if branch not in names:
            return None
        gone = cuts.heads_of(layer, branch)
        removal = next((found for found in self.heads[place] if not set(found.heads) & set(gone)), None)
        own = self.calibration.model.config.heads(layer)
        count = own.mamba if branch == "mamba" else own.queries
        return removal if removal is not None and len(gone) + len(removal.heads) < count else None

    def _price(self, joint: Joint, place: Place, removal: Removal) -> float:
        """Of a removal: the rise of the loss for what it saves."""
        rise, saving = self.scores[place], max(1e-6, self.costs.saving(joint.cuts, removal, self.wanted))
        return rise / saving if rise > 0 else rise * saving

    def _rise(self, joint: Joint) -> float:
        return joint.loss - self.calibration.parent.loss

    def _gated(self) -> list[int]:
        """The layers whose gate may be frozen."""
        if not self.settings.freeze_gates:
            return []
        return [layer for layer, block in enumerate(self.calibration.blocks) if block.gate is not None]

    def _freeze_gates(self, joint: Joint) -> Joint:
        """Freezes gates, first those that cost least, while all of them together cost no more than is allowed."""
        start, gated = joint.loss, self._gated()
        losses = {}
        for layer in gated:
            self.progress(f"measuring layer {layer} with its gate frozen")
            losses[layer] = self.calibration.freeze(joint, layer).loss
        for layer in sorted(gated, key=lambda layer: losses[layer]):
            found = self.calibration.freeze(joint, layer)
            too_much = self.limit is not None and self._rise(found) > self.limit
            if too_much or found.loss - start > self.settings.freeze_gates:
                break
            joint = found
        return joint

    def _decision(self, layer: int, decision: LayerDecision) -> LayerDecision:
        evidence = dict(self.evidence[layer])
        parent = self.calibration.parent
        first = {place: removals[0] for place, removals in self.heads.items()}
        for place, score in self.first_scores.items():
            if place[0] == layer:
                name, removal = place[1].replace(" ", "_"), first.get(place, Removal(*place))
                evidence[f"{name}_{self.settings.criterion}"] = score
                evidence[f"{name}_saving"] = self.costs.saving(parent.cuts, removal, self.wanted)
                spared = self.costs.spared(parent.cuts, removal)
                evidence |= {f"{name}_{cost}": value for cost, value in spared.items()}
        reasons = [
            f"{step.branch} removed in step {number}"
            for number, step in enumerate(self.steps, 1)
            if step.layer == layer and not step.heads
        ]
        for branch, heads in decision.heads.items():
            own = getattr(self.calibration.blocks[layer], branch)
            reasons.append(f"{len(heads)} of {own.num_heads} {branch} heads removed")
        if not reasons:
            reasons = ["kept" if parent.kinds[layer] == "both" else "has one branch already"]
        if decision.gate is not None:
            reasons.append("gate frozen")
        return decision.model_copy(update={"reason": ", ".join(reasons), "evidence": evidence})

    def _check_within_reach(self) -> None:
        """Before anything is measured: whether the smallest model that may be left meets each target.

        What branches and heads cost adds up, so the smallest model has the smallest layers.
        """
        start = replace(self.calibration.parent.cuts, frozen=frozenset(self._gated()))
        for name in self.wanted:
            sign, cuts = 1 if name in SMALLER else -1, start
            for layer, kind in enumerate(start.kinds):
                ways = [self._bare(cuts, layer, order) for order in itertools.permutations(BRANCHES_OF[kind])]
                cuts = min(ways, key=lambda found: sign * self.costs.reached(found)[name])
            best = self.costs.reached(cuts)
            if shortfall({name: self.settings.targets[name]}, best):
                raise ImpossibleBudgetError(
                    f"{self._asked()} cannot be met: {self._where()} it is {_told(name, best[name])} at best; ask for "
                    f"less{self._more()}"
                )

    def _bare(self, cuts: Cuts, layer: int, order: Sequence[str]) -> Cuts:
        """The cuts and all that may go of a layer: its branches in that order, then heads of what stays."""
        for part in (*order, *criteria.HEAD_PARTS):
            while (layer, part) in self.heads or part in BRANCHES_OF["both"]:
                removal = self._removal(cuts, (layer, part))
                if removal is None:
                    break
                cuts = cuts.without(removal)
        return cuts

    def _impossible(self, joint: Joint) -> str:
        """Why the budget cannot be met, and what can."""
        asked, more = self._asked(), self._more()
        if not self.wanted:
            if math.isinf(self.cheapest):
                return f"{asked} cannot be met: no layer has anything to spare{more}"
            return f"{asked} cannot be met: the cheapest removal raises the loss; allow {_told(LOSS, self.cheapest)}"
        reached = self._measured(joint)
        nearest_values = ", ".join(_told(name, reached[name]) for name in (*FASTER, *SMALLER) if name in self.wanted)
        if self.limit is not None and self.limit < self.cheapest < math.inf:
            return (
                f"{asked} cannot be met: the nearest within that rise of the loss is {nearest_values} (at "
                f"{self._rise(joint):+.4f}); ask for that, or allow a larger max_loss_increase{more}"
            )
        return f"{asked} cannot be met: {self._where()} it is {nearest_values}; ask for less{more}"

    def _asked(self) -> str:
        return ", ".join(
            f"{name}={value:g}{'' if name == LOSS else 'x'}" for name, value in self.settings.targets.items()
        )

    def _more(self) -> str:
        return "" if self.settings.empty_layers else ", or let layers lose both branches (--empty-layers)"

    def _where(self) -> str:
        """What is left at the end of all cuts that are allowed."""
        where = "without any branch" if self.settings.empty_layers else "with one branch left in every layer"
        return where + (", and one step of its heads" if self.heads and not self.settings.empty_layers else "")


def _told(name: str, value: float) -> str:
    """A target that can be met, as it is asked for: rounded towards less."""
    if name == LOSS:
        return f"{name}={math.ceil(value * 1e4) / 1e4:.4f}"
    return f"{name}={(math.floor if name in FASTER else math.ceil)(value * 100) / 100:.2f}x"


def _words(removal: Removal) -> str:
    heads = f"{len(removal.heads)} heads of " if removal.heads else ""
    return f"{heads}{removal.branch} of layer {removal.layer}"
