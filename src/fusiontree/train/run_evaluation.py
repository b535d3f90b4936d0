"""The evaluations of a run: when one is due, what it found, which was the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusiontree.data.loader import Loader
from fusiontree.train.evaluation import TokenLoss, evaluate_loader
from fusiontree.train.processes import Processes
from fusiontree.train.settings import RunSettings
from fusiontree.train.setup import autocast


class RunEvaluation:
    """Evaluates on the run's evaluation data.

    Args:
        settings: the run's.
        loader: of the evaluation data; None: the run evaluates nothing.

    Attributes:
        step: the last one that was evaluated.
        result: what the last evaluation of this process found.
        best: step and loss of the lowest one so far; only kept where the settings ask for it.
    """

    def __init__(self, settings: RunSettings, loader: Loader | None, processes: Processes):
        self._settings = settings
        self._processes = processes
        self.loader = loader
        self.step: int | None = None
        self.result: TokenLoss | None = None
        self.best: dict[str, Any] | None = None

    def is_due(self, step: int) -> bool:
        """At step 0, at every interval and at the end; also where a stop cut an evaluation short before resuming."""
        t = self._settings.training
        due = step % max(1, t.eval_interval) == 0 or step == t.max_steps
        return self.loader is not None and due and self.step != step

    def at(self, step: int, model: torch.nn.Module, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Evaluate the run's own model after `step`.

        Returns:
            The row for metrics.jsonl; None when `stop` gave up.
        """
        self._processes.enter("evaluating", step)
        result = self.measure(model, lambda: self._processes.any(stop()))
        if result is None:
            return None
        self.result, self.step = result, step
        return {
            "step": step,
            "eval_loss": result.loss,
            "eval_perplexity": result.perplexity,
            "eval_tokens": result.tokens,
        }

    def is_best(self) -> bool:
        """Whether the last evaluation was the best of a run that keeps its best checkpoint; it then is `best`."""
        if not self._settings.training.save_best or not self.step or self.result is None:
            return False
        if self.best is not None and self.result.loss >= self.best["loss"]:
            return False
        self.best = {"step": self.step, "loss": self.result.loss}
        return True

    def measure(self, model: torch.nn.Module, stop: Callable[[], bool] = lambda: False) -> TokenLoss | None:
        """Loss of a model, the run's own or another; None when `stop`, which all processes answer alike, gave up."""
        assert self.loader is not None
        with autocast(self._settings, self._processes.device):
            return evaluate_loader(
                model,
                self.loader,
                self._settings.training.eval_batches,
                device=self._processes.device,
                reduce=self._processes.sum,
                stop=stop,
            )
