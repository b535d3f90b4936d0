"""Pictures of a run, drawn from the artifacts in its directory alone, and the heat map of an evaluation.

Figures are made without pyplot: they need no display and leave a program's own matplotlib backend as it is.

Shapes: L layers, H channels, R records; D depths, S lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusiontree.artifacts import GateStatistics, MQARReport, PasskeyReport
from fusiontree.runs import read_gates, read_metrics

LEARNING_CURVE = "learning_curve.png"
GATES_BY_STEP = "gates_by_step.png"
GATES_BY_CHANNEL = "gates_by_channel.png"


def plot_run(run: Path) -> list[Path]:
    """Every picture that the run's files allow, in `plots/`; the paths of those drawn."""
    drawn = [plot_learning_curve(run)]
    if (run / "gates.jsonl").is_file() and (records := read_gates(run)):
        drawn += plot_gates(records, run / "plots")
    return drawn


def plot_learning_curve(run: Path) -> Path:
    """Training and evaluation loss over steps, with the learning rate below: `plots/learning_curve.png`."""
    rows = read_metrics(run)
    train = [row for row in rows if "lm_loss" in row]
    evaluation = [row for row in rows if "eval_loss" in row]
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    loss.plot([row["step"] for row in train], [row["lm_loss"] for row in train], label="training", color="tab:blue")
    if evaluation:
        steps, losses = [row["step"] for row in evaluation], [row["eval_loss"] for row in evaluation]
        loss.plot(steps, losses, "o-", label="evaluation", color="tab:orange")
    loss.set_ylabel("language-model loss (nats per token)")
    loss.legend()
    loss.grid(alpha=0.3)
    rate.plot([row["step"] for row in train], [row["lr"] for row in train], color="tab:gray")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("optimizer step")
    rate.grid(alpha=0.3)
    return _save(figure, run / "plots" / LEARNING_CURVE)


def plot_gates(records: Sequence[GateStatistics], directory: Path) -> list[Path]:
    """The heat maps layer x step (mean gate of every record) and layer x channel (of the last record)."""
    by_step_RL = np.array([[layer.mean for layer in record.layers] for record in records], dtype=float)
    figure = Figure(figsize=(9, 0.3 * by_step_RL.shape[1] + 2), layout="constrained")
    axes = figure.add_subplot()
    _heat_map(figure, axes, by_step_RL.T, "optimizer step", "mean gate (1 = Mamba, 0 = attention)")
    shown = np.unique(np.linspace(0, len(records) - 1, min(len(records), 10)).round().astype(int))
    axes.set_xticks(shown, [str(records[i].step) for i in shown])
    by_step = _save(figure, directory / GATES_BY_STEP)

    last = records[-1]
    width = max((len(layer.channel_mean) for layer in last.layers), default=0) or 1
    by_channel_LH = np.array([layer.channel_mean or [np.nan] * width for layer in last.layers], dtype=float)
    figure = Figure(figsize=(12, 0.3 * by_channel_LH.shape[0] + 2), layout="constrained")
    axes = figure.add_subplot()
    _heat_map(figure, axes, by_channel_LH, "channel", f"mean gate at step {last.step} (1 = Mamba, 0 = attention)")
    return [by_step, _save(figure, directory / GATES_BY_CHANNEL)]


def plot_passkeys(report: PasskeyReport, path: Path) -> Path:
    """The share of passkeys found, depth by length."""
    depths, title = [f"{depth:g}" for depth in report.depths], f"passkeys found, {report.rows} a cell"
    return _plot_found(report.right, report.lengths, depths, "depth (0 = its start)", title, path)


def plot_mqar(report: MQARReport, path: Path) -> Path:
    """The share of answers found in associative recall, pairs by length."""
    pairs, title = [str(number) for number in report.pairs], f"answers found (MQAR), {report.rows} rows a cell"
    return _plot_found(report.right, report.lengths, pairs, "pairs in a row", title, path)


def _plot_found(
    right: Sequence[Sequence[float]], lengths: Sequence[int], names: Sequence[str], label: str, title: str, path: Path
) -> Path:
    """Shares by name and length, from 0 to 1 whatever was found."""
    right_DS = np.array(right)
    figure = Figure(figsize=(1.1 * len(lengths) + 3, 0.5 * len(names) + 2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(right_DS, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(right_DS):
        colour = "white" if share > 0.5 else "black"
        text = f"{share:.0%}" if np.isfinite(share) else "not a number"
        axes.text(column, row, text, ha="center", va="center", color=colour)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="tokens of the text", ylabel=label, title=title)
    figure.colorbar(image, ax=axes)
    return _save(figure, path)


def _heat_map(figure: Figure, axes: Axes, values_Lx: np.ndarray, x_label: str, title: str) -> None:
    # One half is always the neutral colour, red always leans to Mamba. The ends follow the data, since gates that are
    # held around one half would all look alike on a scale from 0 to 1. Grey marks layers without a working gate.
    deviation = np.nanmax(np.abs(values_Lx - 0.5), initial=0.01)
    ends = {"vmin": 0.5 - deviation, "vmax": 0.5 + deviation}
    colours = colormaps["RdBu_r"].with_extremes(bad="0.8")
    image = axes.imshow(values_Lx, aspect="auto", cmap=colours, interpolation="nearest", **ends)
    figure.colorbar(image, ax=axes)
    axes.set(xlabel=x_label, ylabel="layer", title=title, yticks=range(values_Lx.shape[0]))


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
