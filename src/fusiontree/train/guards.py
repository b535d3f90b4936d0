"""Watches every step's numbers: what is not finite is left out, counted, and in the end stops the run."""

from __future__ import annotations

import math
from typing import Any, Literal

from fusiontree.train.settings import TrainingSettings

#: Losses that the spike report compares a new one with; it needs a quarter of them before it says anything.
_WINDOW = 100

Verdict = Literal["go on", "roll back", "stop"]


class StepGuard:
    """Counts steps that were left out and knows when to go back to the last checkpoint, which it allows once.

    Attributes:
        skipped: steps left out since the start of the run.
        in_a_row: of these, the newest ones without a finite step in between.
        spikes: losses since the start of the run that were reported as spikes.
    """

    def __init__(self, settings: TrainingSettings):
        self._settings = settings
        self.skipped = 0
        self.in_a_row = 0
        self.spikes = 0
        self._went_back = False
        self._losses: list[float] = []

    def left_out(self) -> Verdict:
        """A step was not finite and changed nothing; what to do now."""
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row <= self._settings.max_skipped_steps:
            return "go on"
        if self._went_back:
            return "stop"
        self._went_back = True
        self.in_a_row = 0
        return "roll back"

    def finished(self, loss: float) -> float | None:
        """A step was finite.

        Returns:
            How many standard deviations its loss lies above the mean of the recent ones, if that makes it a spike.
        """
        self.in_a_row = 0
        deviations = None
        if len(self._losses) >= _WINDOW // 4:
            mean = sum(self._losses) / len(self._losses)
            variance = sum((value - mean) ** 2 for value in self._losses) / len(self._losses)
            # Losses of a memorised text may not differ at all.
            deviations = (loss - mean) / max(math.sqrt(variance), 1e-3 * abs(mean) + 1e-12)
        self._losses = [*self._losses, loss][-_WINDOW:]
        if deviations is None or deviations <= self._settings.spike_deviations:
            return None
        self.spikes += 1
        return deviations

    def state_dict(self) -> dict[str, Any]:
        """JSON values. That the run went back once is not among them: a resumed run may do so again."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes, "losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.skipped = state["skipped"]
        self.in_a_row = state["in_a_row"]
        self.spikes = state.get("spikes", 0)  # older checkpoints counted none
        self._losses = list(state["losses"])
