"""When a run is saved, and what stands beside its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusiontree.artifacts import checkpoint_name
from fusiontree.errors import InputError
from fusiontree.train.checkpoint import TrainingState, save_checkpoint, saved_fingerprint
from fusiontree.train.checkpoint_files import BEST, point
from fusiontree.train.monitor_gate import GateMonitor
from fusiontree.train.parallel import Parallel
from fusiontree.train.processes import Processes
from fusiontree.train.settings import RunSettings


class RunSaver:
    """Writes a run's checkpoints, `best`, and the prune plan of its gates.

    Args:
        settings: the run's.
        newest: the checkpoint that the run goes on from, if any.
        state: tells what the next step depends on beside weights and moments.

    Attributes:
        newest: the newest checkpoint.
    """

    def __init__(
        self,
        settings: RunSettings,
        newest: Path | None,
        *,
        parallel: Parallel,
        processes: Processes,
        tokenizer: Any,
        monitor: GateMonitor,
        state: Callable[[], TrainingState],
    ):
        self._settings = settings
        self._run = Path(settings.output_dir)
        self._parallel = parallel
        self._processes = processes
        self._tokenizer = tokenizer
        self._monitor = monitor
        self._state = state
        self.newest = newest

    def has(self, step: int) -> bool:
        """Whether the newest checkpoint is this run's own of `step`."""
        path = self._run / "checkpoints" / checkpoint_name(step)
        return self.newest is not None and self.newest.resolve() == path.resolve()

    def save_on_the_way(self, warn: Callable[[str], None]) -> None:
        """A checkpoint that cannot be saved costs no more than itself: the next one may."""
        try:
            self.save()
        except InputError as error:
            warn(f"{error}; training goes on")

    def save(self) -> None:
        """A checkpoint of where the run stands, unless there is one.

        Raises:
            InputError: as `save_checkpoint`.
        """
        state = self._state()
        if self.has(state.step):
            return
        limit = self._settings.training.save_total_limit
        path = save_checkpoint(self._run, self._parallel, self._processes, self._tokenizer, state, limit)
        self.newest = path
        if not self._processes.is_main:
            return
        if state.best is not None and state.best["step"] == state.step:
            point(self._run / BEST, path)
        if self._settings.gate_monitor.enabled and self._settings.gate_monitor.export_plan:
            model = saved_fingerprint(path, self._parallel.module)
            self._monitor.plan(str(self._run), model).save(self._run / "prune_plan.json")
