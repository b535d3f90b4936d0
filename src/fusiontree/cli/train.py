"""`fusiontree train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from fusiontree.train.memory import DryRun


def train(
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Settings that override the file's."),
    config: Path = typer.Option(..., "--config", help="YAML file of the run."),
    resume: str = typer.Option(
        None, "--resume", help="`auto`: the run's newest checkpoint, or from the start if it has none; or a path."
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Print parameters, tokens per step and memory per device, and train nothing."
    ),
) -> None:
    """Train a model as a YAML file says.

    Leaves a run directory (`output_dir`) with config.yaml, manifest.json, metrics.jsonl, gates.jsonl, plots/,
    checkpoints/ and `latest`. Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint after the current step and exit with 130,
    143 and 138; the same signal again ends at once.
    """
    from fusiontree.train.settings import load_run_settings, placing_mistakes

    settings = load_run_settings(config, overrides or [])
    if dry_run:
        from fusiontree.train.memory import dry_run as estimate
        from fusiontree.train.setup import model_config, tokenizer_of

        # A model section that names its vocabulary can be measured without its tokenizer: only one that lies here is
        # read, to find out whether the two fit.
        named = settings.data.tokenizer
        is_read = named is not None and ("vocab_size" not in settings.model or Path(named).expanduser().is_dir())
        tokenizer = tokenizer_of(settings) if is_read else None
        devices = settings.system.num_devices or int(os.environ.get("WORLD_SIZE", "1"))
        with placing_mistakes(config, overrides or []):
            model = model_config(settings, tokenizer)
        _print_dry_run(estimate(settings, model, devices))
        return

    from fusiontree.plots import plot_run
    from fusiontree.train.engine import TrainingEngine
    from fusiontree.train.stop import EXIT_CODES, leave_together

    with placing_mistakes(config, overrides or []):
        engine = TrainingEngine(settings, resume=resume)
    result = engine.run(draw=plot_run)
    if result.stopped_by is not None:
        leave_together(result.stopped_by)
        raise typer.Exit(EXIT_CODES[result.stopped_by])


def _print_dry_run(estimate: DryRun) -> None:
    from rich.console import Console
    from rich.table import Table

    def share(part: float, whole: float) -> str:
        return f"{100 * part / whole:.1f} %"

    parameters = Table("component", "parameters", "share", title="Parameters")
    for name, count in estimate.components.items():
        parameters.add_row(name, f"{count:,}", share(count, estimate.parameters))
    parameters.add_row("total", f"{estimate.parameters:,}", "", style="bold")

    m = estimate.memory
    unit, size_of_unit = ("GiB", 2**30) if m.peak >= 2**30 else ("MiB", 2**20)
    memory = Table("what", unit, title=f"Memory per device ({estimate.devices} in all, {estimate.engine})")
    for name, size in (
        ("parameters", m.parameters),
        ("gradients", m.gradients),
        ("optimizer state", m.optimizer),
        ("communication and gathered parameters", m.buffers),
        ("activations", m.activations),
        *([("teacher", m.teacher)] if m.teacher else []),
    ):
        memory.add_row(name, f"{size / size_of_unit:.2f}")
    memory.add_row("peak", f"{m.peak / size_of_unit:.2f}", style="bold")

    for table in (parameters, memory):
        for column in table.columns[1:]:
            column.justify = "right"
    if estimate.warning is not None:
        print(estimate.warning, file=sys.stderr)
    console = Console()
    console.print(parameters)
    for group in estimate.groups:
        console.print(f"{group} ({', '.join(group.patterns())})", highlight=False, markup=False)
    console.print(f"{estimate.tokens_per_step:,} tokens per optimizer step on {estimate.devices} device(s)")
    if estimate.lengths.varies:
        largest = max(stage.length for stage in estimate.lengths.stages)
        console.print(f"rows of {estimate.lengths}; at most {largest:,}, the same tokens at every length")
    console.print(memory)
