"""`fusiontree gates`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from fusiontree.artifacts import GateStatistics, LayerGateStatistics


def gates(
    run: Path = typer.Argument(..., help="Directory of a training run, or a checkpoint of one."),
    step: int = typer.Option(None, "--step", help="Leave out what was recorded after this step."),
) -> None:
    """Show what the gates of a run did: a table of one record, and heat maps of all of them.

    Writes gates.json (the record tabulated), plots/gates_by_step.png (layer x step) and plots/gates_by_channel.png
    (layer x channel) into the run directory. A gate of 1 takes the Mamba branch alone, 0 the attention branch.
    """
    from fusiontree.artifacts import checkpoint_step
    from fusiontree.errors import InputError
    from fusiontree.plots import plot_gates
    from fusiontree.runs import read_gates

    at_checkpoint = checkpoint_step(run.resolve()) if (run / "config.json").is_file() else None
    if at_checkpoint is not None:  # RUN/checkpoints/step_…, or RUN/latest, which is a link to one
        run, step = run.resolve().parent.parent, at_checkpoint if step is None else min(step, at_checkpoint)
    records = read_gates(run)
    upto = [record for record in records if step is None or record.step <= step]
    if not upto:
        raise InputError(f"{run} has no gate record up to step {step}; its first one is of step {records[0].step}")
    _print_table(upto[-1])
    upto[-1].save(run / "gates.json")
    for path in [run / "gates.json", *plot_gates(records, run / "plots")]:
        print(path)


def _print_table(record: GateStatistics) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    # All columns where the output is a file; a narrow terminal gets the median alone rather than figures cut short.
    if not console.is_terminal:
        console = Console(width=140)
    is_narrow = console.width < 110
    shown = [i for i, level in enumerate(record.quantile_levels) if not is_narrow or level == 0.5]
    quantiles = [f"{100 * record.quantile_levels[i]:.0f}%" for i in shown]
    margin = record.saturation_margin
    table = Table(title=f"Gates at step {record.step}, over {record.tokens:,} tokens (1 = Mamba, 0 = attention)")
    heads = ["layer", "branches", "mean", "std", *quantiles, "entropy", f"<{margin:g} >{1 - margin:g}"]
    norms = ["‖m‖", "‖a‖"] if is_narrow else ["‖mamba‖", "‖attention‖"]
    for head in [*heads, *norms]:
        table.add_column(head, justify="left" if head == "branches" else "right")
    for index, layer in enumerate(record.layers):
        table.add_row(str(index), *_cells(layer, shown))
    console.print(table)
    print("entropy in nats (ln 2 = 0.693 at a gate of 0.5); norms are means over tokens of each branch's output")


def _cells(layer: LayerGateStatistics, quantiles: list[int]) -> list[str]:
    def number(value: float, digits: int = 3) -> str:
        return "–" if math.isnan(value) else f"{value:.{digits}f}"

    return [
        layer.branches,
        number(layer.mean),
        number(layer.std),
        *(f"{layer.quantiles[i]:.2f}" if layer.quantiles else "–" for i in quantiles),
        number(layer.entropy),
        "–" if math.isnan(layer.saturation) else f"{100 * layer.saturation:.1f} %",
        number(layer.mamba_norm, 2),
        number(layer.attention_norm, 2),
    ]
