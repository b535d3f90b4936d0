"""The gradients of one optimizer step: its micro-batches, forward, loss, backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from fusiontree.data.batch import Batch
from fusiontree.errors import InputError
from fusiontree.train.losses import TERMS, HybridModelLoss, StepTotals, coefficients_at
from fusiontree.train.monitor_gate import GateMonitor
from fusiontree.train.parallel import Parallel
from fusiontree.train.processes import Processes
from fusiontree.train.settings import RunSettings
from fusiontree.train.setup import autocast, seed_step


def fetch(batches: Iterator[Batch], count: int, processes: Processes) -> tuple[list[Batch], StepTotals]:
    """The next `count` micro-batches of this process, and what all processes' hold together.

    Raises:
        InputError: the data of one process failed it, in all.
    """
    failure, micro_batches = None, []
    try:
        micro_batches = [next(batches) for _ in range(count)]
        counts = StepTotals.local(micro_batches)
    except InputError as error:
        failure, counts = error, torch.zeros(3, dtype=torch.float64)
    failed = torch.tensor([float(failure is not None)], dtype=torch.float64)
    *_, failures = counts = processes.sum(torch.cat((counts, failed)))
    if failures:
        processes.on_all(lambda: _raise(failure))
    return micro_batches, StepTotals.of(counts[:3])


def _raise(error: InputError | None) -> None:
    if error is not None:
        raise error


class StepGradients:
    """Adds up the gradients of a step's micro-batches."""

    def __init__(
        self,
        settings: RunSettings,
        processes: Processes,
        *,
        parallel: Parallel,
        loss: HybridModelLoss,
        monitor: GateMonitor,
    ):
        self._settings = settings
        self._processes = processes
        self._parallel = parallel
        self._loss = loss
        self._monitor = monitor

    def __call__(
        self, step: int, micro_batches: list[Batch], totals: StepTotals, *, with_details: bool
    ) -> torch.Tensor:
        """Forward and backward passes.

        Args:
            step: number of the step, from 1.
            totals: of all processes' micro-batches.
            with_details: hand the gates' full statistics to the monitor.

        Returns:
            This process's loss terms in the order of `TERMS`, its gate sum and gate weight; [7] float32.
        """
        device = self._processes.device
        seed_step(self._settings.seed, step, self._processes.index)
        self._loss.coefficients = coefficients_at(step, self._settings.training.max_steps, self._settings.loss)
        sums = torch.zeros(len(TERMS) + 2, device=device)
        for index, micro_batch in enumerate(micro_batches):
            self._processes.enter("forward", step)
            batch = micro_batch.to(device, non_blocking=True)
            self._parallel.module.set_dropout_key(self._settings.seed, step, index)
            with self._parallel.accumulate(is_last=index == len(micro_batches) - 1):
                with autocast(self._settings, device):
                    output = self._parallel.model(
                        input_ids=batch.input_ids,
                        position_ids=batch.position_ids,
                        labels=batch.labels,
                        output_gates=with_details,
                        output_hidden_states=self._loss.needs_hidden_states,
                    )
                    head = self._parallel.module.lm_head.weight if self._loss.needs_head else None
                    with nullcontext() if head is None else self._parallel.gathered(head):
                        share = self._loss(output, batch, totals, head)
                self._processes.enter("backward", step)
                self._parallel.backward(share.total)
            self._parallel.average_running_means()
            sums += torch.cat((share.terms, share.gates))
            if output.gate_stats.details is not None:
                self._monitor.update(output.gate_stats.details)
            del output, share
        return sums
