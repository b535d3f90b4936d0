"""The composite training loss: language model + gate load balance - gate entropy + distillation + hidden states.

Every term is a sum over the rows of a whole optimizer step (all micro-batches, all ranks) divided by that step's own
total. Each micro-batch therefore returns its *share* of the step's loss; the shares add up, and how a batch is cut into
micro-batches changes no gradient.

Shapes: B rows, T tokens, L layers, n counted tokens, V vocabulary, H student width, G teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fusiontree.models.gate_stats import GateStats
from fusiontree.models.layout import IGNORE_INDEX, count_labels, shift_labels
from fusiontree.train.divergence import linear_divergence
from fusiontree.train.settings import LossSettings

if TYPE_CHECKING:
    from fusiontree.data.batch import Batch
    from fusiontree.models.hybrid_model import HybridOutput
    from fusiontree.train.teacher import Teacher

TERMS = ("lm", "load_balance", "entropy", "distillation", "hidden")


@dataclass(frozen=True)
class StepTotals:
    """Denominators of one optimizer step, over all its micro-batches and ranks."""

    labels: float
    rows: float
    tokens: float

    @staticmethod
    def local(batches: list[Batch]) -> torch.Tensor:
        """[3] float64 (labels, rows, tokens) of one rank's micro-batches; training rows carry no padding."""
        counts = [
            torch.tensor(
                [float(count_labels(b.labels, b.position_ids)), float(b.labels.shape[0]), float(b.labels.numel())],
                dtype=torch.float64,
            )
            for b in batches
        ]
        return torch.stack(counts).sum(0)

    @classmethod
    def of(cls, counts: torch.Tensor) -> StepTotals:
        """From the [3] tensor of `local`, summed over ranks; a total of 0 becomes 1 since its numerator is 0 too."""
        labels, rows, tokens = (max(1.0, value) for value in counts.tolist())
        return cls(labels=labels, rows=rows, tokens=tokens)


@dataclass(frozen=True)
class LossShare:
    """One micro-batch's share of the step's loss."""

    total: torch.Tensor
    """Scalar with gradient: the weighted sum of the terms."""
    terms: torch.Tensor
    """[5] float32, detached: each term unweighted, in the order of `TERMS`."""
    gates: torch.Tensor
    """[2] float32, detached: sum over tokens of the mean gate, and the tokens it sums over (0 without working gate)."""


def load_balance_sum(stats: GateStats, target: float, margin: float) -> torch.Tensor:
    """Sum over rows of the hinge max(0, |row's gate mean - target| - margin), averaged over the active layers."""
    # A row without a real token has no mean.
    hinge_LB = ((stats.mean - target).abs() - margin).clamp_min(0.0) * (stats.tokens > 0)
    return _over_active_layers(hinge_LB, stats).sum()


def negative_entropy_sum(stats: GateStats) -> torch.Tensor:
    """Minus the gates' binary entropy (nats): channel mean, summed over tokens, averaged over the active layers."""
    return -(_over_active_layers(stats.entropy, stats) * stats.tokens).sum()


def hidden_distance_sum(states: Sequence[torch.Tensor], taught: Sequence[torch.Tensor]) -> torch.Tensor:
    """|x - y|^2 / |y|^2 of each token, summed over tokens, averaged over layers; float32.

    Args:
        states, taught: x and y of each layer, [B, T, H] each; y carries no gradient.
    """
    distances = [
        ((x.float() - y.float()).square().sum(-1) / y.float().square().sum(-1).clamp_min(1e-12)).sum()
        for x, y in zip(states, taught, strict=True)
    ]
    return torch.stack(distances).mean()


@torch.no_grad()
def _gate_sum(stats: GateStats) -> torch.Tensor:
    tokens = stats.tokens.sum() * stats.active.any()
    return torch.stack(((_over_active_layers(stats.mean, stats) * stats.tokens).sum(), tokens)).float()


def _over_active_layers(value_LB: torch.Tensor, stats: GateStats) -> torch.Tensor:
    """[L, B] -> [B]: mean over the layers whose gate chose between two branches; 0 where there are none."""
    active_L1 = stats.active.to(value_LB.dtype)[:, None]
    return (value_LB * active_L1).sum(0) / active_L1.sum().clamp_min(1.0)


def coefficients_at(step: int, max_steps: int, s: LossSettings) -> dict[str, float]:
    """The terms' weights in optimizer step `step` (from 1) of `max_steps`, by the names of `TERMS`.

    From `commit_from * max_steps` on gates are let go, linearly until the last step: the load balance's weight falls to
    0, and the entropy's turns from `entropy_reg_coeff`, which keeps gates undecided, to minus `commit_coeff`.
    """
    begin = max_steps if s.commit_from is None else s.commit_from * max_steps
    done = max(0.0, (step - begin) / (max_steps - begin)) if step > begin else 0.0
    end = s.entropy_reg_coeff if s.commit_coeff is None else s.commit_coeff
    return {
        "lm": 1.0,
        "load_balance": (1 - done) * s.load_balance_coeff,
        "entropy": (1 - done) * s.entropy_reg_coeff - done * end,
        "distillation": s.distillation_coeff,
        "hidden": s.hidden_coeff,
    }


class HybridModelLoss:
    """Loss of a step, one micro-batch at a time: the terms, each times its coefficient (`coefficients_at`).

    - lm: cross entropy summed over counted labels / counted labels of the step.
    - load_balance: hinge of each row's gate mean around `gate_target` +- `gate_margin`, averaged over the active layers
      and the rows of the step.
    - entropy: minus the mean binary entropy of the gates, over real tokens, channels and active layers of the step.
    - distillation: T^2 KL(teacher || student) at temperature T (Hinton et al. 2015), averaged over counted tokens.
    - hidden: |x - y|^2 / |y|^2 with x a layer's output and y the teacher's, averaged over real tokens and layers.

    `coefficients` are those of the next micro-batch; whoever counts steps sets them.
    """

    def __init__(self, settings: LossSettings, teacher: Teacher | None = None):
        self.settings = settings
        self.teacher = teacher
        self.coefficients = coefficients_at(0, 1, settings)

    @property
    def needs_hidden_states(self) -> bool:
        """Whether `__call__` reads `output.hidden_states` (it must then be asked of the model)."""
        return self.teacher is not None

    @property
    def needs_head(self) -> bool:
        """Whether `__call__` reads `head_weight`, which must be whole then."""
        return self.teacher is not None and self.settings.distillation_coeff > 0

    def __call__(
        self, output: HybridOutput, batch: Batch, totals: StepTotals, head_weight: torch.Tensor | None = None
    ) -> LossShare:
        """Share of one micro-batch.

        Args:
            output: of the model on `batch`, with `loss` the mean over the batch's counted labels.
            batch: the micro-batch.
            totals: of the whole step.
            head_weight: [V, H] the student's output embedding; read if `needs_head`.
        """
        stats, s, weights = output.gate_stats, self.settings, self.coefficients
        assert output.loss is not None and stats is not None
        counted = count_labels(batch.labels, batch.position_ids)
        lm = output.loss * (counted / totals.labels)
        load_balance = load_balance_sum(stats, s.gate_target, s.gate_margin) / totals.rows
        entropy = negative_entropy_sum(stats) / totals.tokens
        total = lm + weights["load_balance"] * load_balance + weights["entropy"] * entropy
        distillation = hidden = torch.zeros_like(lm)
        if self.teacher is not None:
            assert output.hidden_states is not None
            taught = self.teacher.layer_outputs(batch) if s.hidden_coeff else (self.teacher.hidden_states(batch),)
            if s.hidden_coeff:
                hidden = hidden_distance_sum(output.hidden_states[1:], taught) / totals.tokens
                total = total + weights["hidden"] * hidden
            if self.needs_head:
                assert head_weight is not None
                divergence = self._divergence_sum(output.hidden_states[-1], head_weight, taught[-1], batch)
                distillation = divergence / totals.labels
                total = total + weights["distillation"] * distillation
        terms = torch.stack([term.detach().float() for term in (lm, load_balance, entropy, distillation, hidden)])
        return LossShare(total=total, terms=terms, gates=_gate_sum(stats))

    def _divergence_sum(
        self, hidden_BTH: torch.Tensor, head_weight: torch.Tensor, teacher_BTG: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """T^2 KL(teacher || student) summed over the counted tokens."""
        teacher = self.teacher
        assert teacher is not None
        counts_BT = shift_labels(batch.labels, batch.position_ids) != IGNORE_INDEX
        teacher_nG = teacher_BTG[counts_BT]
        return linear_divergence(
            hidden_BTH[counts_BT],
            head_weight,
            lambda part: teacher.logits(teacher_nG[part]),
            vocabulary=teacher.vocabulary,
            temperature=self.settings.distillation_temperature,
        )
