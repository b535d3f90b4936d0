"""When a run is saved, and what stands beside its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusiontree.artifacts import checkpoint_name
from fusiontree.errors import InputError
from fusiontree.train.checkpoint import TrainingState, save_checkpoint, saved_fingerprint
from fusiontree.train.checkpoint_files import BEST, drop_old, point
from fusiontree.train.monitor_gate import GateMonitor
from fusiontree.train.parallel import Parallel
from fusiontree.train.processes import Processes
from fusiontree.train.settings import RunSettings


class RunSaver:
    """Writes a run's checkpoints, `best`, and the prune plan of its gates.

    Args:
        settings: the run's.
        newest: the checkpoint that the run goes on from, if any.
        best: the best evaluation that this one knows of.
        state: tells what the next step depends on beside weights and moments.

    Attributes:
        newest: the newest checkpoint.
    """

    def __init__(
        self,
        settings: RunSettings,
        newest: Path | None,
        *,
        best: dict[str, Any] | None,
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
        self._best = best
        self.newest = newest

    def has(self, step: int) -> bool:
        """Whether the newest checkpoint is this run's own of `step`."""
        path = self._run / "checkpoints" / checkpoint_name(step)
        return self.newest is not None and self.newest.resolve() == path.resolve()

    def save_on_the_way(self, warn: Callable[[str], None]) -> None:
        """A checkpoint that cannot be saved costs no more than itself: the next one may."""
        try:
            self.save(warn)
        except InputError as error:
            warn(f"{error}; training goes on")

    def save(self, warn: Callable[[str], None]) -> None:
        """A checkpoint of where the run stands, unless there is one that knows the best evaluation.

        Args:
            warn: is told what could not be done once the checkpoint was whole.

        Raises:
            InputError: as `save_checkpoint`.
        """
        state = self._state()
        # An evaluation that a stop had cut short is made up for after its step was saved, and may be the best.
        if self.has(state.step) and state.best == self._best:
            return
        self._processes.enter("saving", state.step)
        self.newest = save_checkpoint(self._run, self._parallel, self._processes, self._tokenizer, state)
        self._best = state.best
        if self._processes.is_main:
            self._follow(self.newest, state, warn)

    def _follow(self, path: Path, state: TrainingState, warn: Callable[[str], None]) -> None:
        """What comes after a checkpoint, by the main process alone: the others do not wait for it, nor hear of it."""

        @contextmanager
        def trying(what: str) -> Iterator[None]:
            try:
                yield
            except OSError as error:
                warn(f"checkpoint {path} is saved, but {what}: {error.strerror or error}")

        if state.best is not None and state.best["step"] == state.step:
            with trying(f"{self._run / BEST} could not be pointed to it"):
                point(self._run / BEST, path)
        limit = self._settings.training.save_total_limit
        if limit is not None:
            with trying("older ones could not be removed"):
                drop_old(path.parent, keep=path, limit=limit)
        if self._settings.gate_monitor.enabled and self._settings.gate_monitor.export_plan:
            plan = self._run / "prune_plan.json"
            with trying(f"{plan} could not be written"):
                self._monitor.plan(str(self._run), saved_fingerprint(path, self._parallel.module)).save(plan)
