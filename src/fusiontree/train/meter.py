"""Numbers of the steps since the last row of metrics.jsonl, and of the run as a whole."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fusiontree.data.batch import Batch
from fusiontree.train.losses import TERMS, StepTotals
from fusiontree.train.throughput import Throughput

_SUMS = ("steps", "labels", "tokens", "seconds", "flops", "gate", "gate_weight", "beside", *TERMS)


class StepMeter:
    """Averages steps into rows. Its state is part of a checkpoint, so that a row may span a stop.

    `tokens` and `elapsed` count from the start of the run, stops left out; `newest` holds the last step's numbers and
    `seconds_per_step` those of the last row's steps.
    """

    def __init__(self, throughput: Throughput):
        self._throughput = throughput
        self.tokens = 0
        self.gate_std: float | None = None
        self.newest: dict[str, float | None] = {}
        self._window = dict.fromkeys(_SUMS, 0.0)
        self._last = {"lr": 0.0, "grad_norm": 0.0}
        self.seconds_per_step = 0.0
        self._elapsed_before = 0.0
        self._started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of wall-clock time since the start, evaluation and saving included."""
        return self._elapsed_before + time.perf_counter() - self._started

    def count_operations(self, micro_batches: Sequence[Batch]) -> None:
        """Count what a step asks of this process's device."""
        self._window["flops"] += self._throughput.flops(micro_batches)

    def add(
        self,
        values: list[float],
        totals: StepTotals,
        learning_rate: float,
        seconds: float,
        coefficients: Mapping[str, float],
    ) -> None:
        """Count a step.

        Args:
            values: the loss terms in the order of `TERMS`, the gate's sum and weight, the gradient norm unclipped.
            totals: of the step.
            seconds: that the step took.
            coefficients: of the terms in this step.
        """
        terms = dict(zip(TERMS, values[: len(TERMS)], strict=True))
        gate, gate_weight, grad_norm = values[len(TERMS) :]
        window = self._window
        window["steps"] += 1
        window["labels"] += totals.labels
        window["tokens"] += totals.tokens
        window["seconds"] += seconds
        window["gate"] += gate
        window["gate_weight"] += gate_weight
        window["lm"] += terms["lm"] * totals.labels
        for name in TERMS[1:]:
            window[name] += terms[name]
        beside = sum(coefficients[name] * terms[name] for name in TERMS[1:])
        window["beside"] += beside
        self._last = {"lr": learning_rate, "grad_norm": grad_norm}
        self.tokens += int(totals.tokens)
        self.newest = {
            "loss": terms["lm"] + beside,
            "tokens_per_second": totals.tokens / seconds,
            "gate_mean": gate / gate_weight if gate_weight else None,
            "lr": learning_rate,
        }

    def add_skipped(self, totals: StepTotals, seconds: float) -> None:
        """Count a step that was left out: its tokens were read and its time passed, but it has no loss."""
        self._window["tokens"] += totals.tokens
        self._window["seconds"] += seconds
        self.tokens += int(totals.tokens)

    def close_row(self, step: int) -> dict[str, Any]:
        """The row of all steps since the last one: losses are means (the LM loss over tokens), `lr` and `grad_norm` the
        last step's, `tokens` and `elapsed` (seconds) totals of the run, `tokens_per_second` and what `Throughput.row`
        adds of the steps alone."""
        window = self._window
        steps, labels = max(1.0, window["steps"]), max(1.0, window["labels"])
        # All steps since the last row may have been left out.
        terms = {name: window[name] / steps if window["steps"] else math.nan for name in TERMS[1:]}
        terms["lm"] = window["lm"] / labels if window["steps"] else math.nan
        self.seconds_per_step = window["seconds"] / steps
        row = {
            "step": step,
            "loss": terms["lm"] + window["beside"] / steps,  # coefficients may change from step to step
            **{f"{name}_loss": terms[name] for name in TERMS},
            **self._last,
            "tokens": self.tokens,
            "tokens_per_second": window["tokens"] / window["seconds"],
            **self._throughput.row(window["flops"], window["seconds"]),
            "gate_mean": window["gate"] / window["gate_weight"] if window["gate_weight"] else None,
            "gate_std": self.gate_std,
            "elapsed": self.elapsed,
        }
        self._window = dict.fromkeys(window, 0.0)
        return row

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "tokens": self.tokens,
            "gate_std": self.gate_std,
            "window": self._window,
            "last": self._last,
            "elapsed": self.elapsed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; the clock restarts now."""
        self.tokens = state["tokens"]
        self.gate_std = state["gate_std"]
        self._window = dict.fromkeys(_SUMS, 0.0) | state["window"]  # older checkpoints counted no operations
        self._last = dict(state["last"])
        self._elapsed_before = state["elapsed"]
        self._started = time.perf_counter()
