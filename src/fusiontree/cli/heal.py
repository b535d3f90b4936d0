"""`fusiontree heal`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import typer


def heal(
    export: Path = typer.Argument(..., help="Folder of the pruned model, as `fusiontree export` wrote it."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Settings of the run, as of `train`."),
    parent: Path = typer.Option(None, "--parent", help="What to distil from; default: what the export was cut from."),
    config: Path = typer.Option(
        None, "--config", help="YAML file with data and training; default: the parent's run's."
    ),
    resume: str = typer.Option(None, "--resume", help="`auto` or a checkpoint, as of `train`."),
) -> None:
    """Distil a pruned model from its parent for a short while, and say how much of the lost loss is recovered.

    A training run like any other (`output_dir`, default runs/NAME-healed), which starts from the export's weights and
    learns from text and from the parent's predictions. Without other settings it takes a tenth of the parent's steps.
    """
    from fusiontree.deploy.heal import REPORT, heal_settings, is_parent, recovery
    from fusiontree.deploy.heal import heal as run_healing
    from fusiontree.plots import plot_run
    from fusiontree.train.launch import is_first_process
    from fusiontree.train.stop import EXIT_CODES, leave_together

    settings = heal_settings(export, parent=parent, config=config, overrides=overrides or [])
    if parent is not None and is_first_process() and not is_parent(parent, export):
        told = "the losses told of a parent will be those of a teacher"
        print(f"{parent} is not what {export} was cut from: {told}", file=sys.stderr)
    given = [f"--{name}={path}" for name, path in (("parent", parent), ("config", config)) if path is not None]
    again = shlex.join(["fusiontree", "heal", str(export), *(overrides or []), *given, "--resume", "auto"])
    healed = run_healing(settings, resume=resume, draw=plot_run, go_on_with=again)
    if healed.stopped_by is not None:
        leave_together(healed.stopped_by)
        raise typer.Exit(EXIT_CODES[healed.stopped_by])
    if not is_first_process():
        return
    if (report := healed.report) is None:
        return
    print(
        f"loss: parent {report.parent_loss:.4f}, export {report.export_loss:.4f}, healed {report.healed_loss:.4f} "
        f"({recovery(report)}) after {report.tokens:,} tokens"
    )
    print(healed.run / REPORT)
