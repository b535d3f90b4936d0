"""What a run writes into its directory beside checkpoints: settings, manifest and the two logs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fusiontree.artifacts import RunManifest, make_directory
from fusiontree.config import dump_yaml
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModelConfig
from fusiontree.train.checkpoint_files import MANIFEST, remove_unfinished
from fusiontree.train.loggers import JsonlLog
from fusiontree.train.settings import RunSettings
from fusiontree.train.trackers import MetricsLog


class RunFiles:
    """The main process writes; the others hold one that stays closed.

    Attributes:
        metrics: metrics.jsonl, with the trackers that follow it.
        gates: gates.jsonl.
    """

    def __init__(self, settings: RunSettings):
        self._settings = settings
        self._run = Path(settings.output_dir)
        self.metrics = MetricsLog(self._run)
        self.gates = JsonlLog(self._run / "gates.jsonl")

    def open(
        self,
        config: HybridLanguageModelConfig,
        *,
        step: int,
        checkpoint: Path | None,
        fingerprint: Callable[[], str],
    ) -> int | None:
        """Make the directory, or drop from its logs what a resumed run is about to write again.

        Args:
            config: of the model as it is built.
            step: that the run goes on from.
            checkpoint: likewise; None: from the start.
            fingerprint: tells which data the run reads.

        Returns:
            The last step that the log has an evaluation of: a stop may have cut short that of the step it saved.

        Raises:
            InputError: a file cannot be written.
        """
        try:
            make_directory(self._run, "output_dir")
            remove_unfinished(self._run / "checkpoints")
            evaluated = self.truncate(step if checkpoint else -1)
            resolved = self._settings.model_dump(mode="json")
            # Every field, so that the file trains the same run again when a default has changed.
            resolved["model"] = {name: getattr(config, name) for name in type(config).__annotations__}
            dump_yaml(resolved, self._run / "config.yaml")
            path = self._run / MANIFEST
            if checkpoint is not None and path.exists():
                manifest = RunManifest.load(path).resumed(
                    resolved, step=step, checkpoint=str(checkpoint), data_fingerprint=fingerprint()
                )
            else:
                started = str(checkpoint) if checkpoint else self._settings.training.init_from
                manifest = RunManifest.collect(
                    resolved,
                    data_fingerprint=fingerprint(),
                    parent_run=os.path.abspath(started) if started else None,
                )
            manifest.save(path)
            self.metrics.open_trackers(self._settings.logging, resolved)
            return evaluated
        except OSError as error:
            raise InputError(
                f"output_dir: the run's files cannot be written to {self._run} ({error.strerror}); name another place"
            ) from error

    def truncate(self, step: int) -> int | None:
        """Drop the rows of later steps; returns the last step with an evaluation among those that stay."""
        self.close()
        rows = self.metrics.truncate_after(step)
        self.gates.truncate_after(step)
        return max((row["step"] for row in rows if "eval_loss" in row), default=None)

    @staticmethod
    def write(log: JsonlLog, row: Mapping[str, Any] | str, warn: Callable[[str], None]) -> None:
        """A log that cannot be written costs its rows, not the run."""
        try:
            log.write(row)
        except InputError as error:
            warn(f"{error}")

    def close(self) -> None:
        self.metrics.close()
        self.gates.close()
