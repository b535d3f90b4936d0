"""Pictures of evaluations, drawn from their reports alone.

Figures are made without pyplot: they need no display and leave a program's own matplotlib backend as it is.
"""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fusiontree.artifacts import EvalReport


def plot_perplexity_by_position(report: EvalReport, path: Path) -> Path:
    """Perplexity of the tokens in each range of places in their document, one step a range."""
    assert report.perplexity is not None, "the report is about no text"
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    ranges = report.by_position
    values = [math.exp(min(bucket.loss, 700)) for bucket in ranges]
    # Each range ends at twice its start: drawn equally wide, all but the first lie as on a logarithmic axis.
    axes.stairs(values, baseline=None, linewidth=2, color="tab:blue")
    for index, value in enumerate(values):
        text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        axes.annotate(text, (index + 0.5, value), (0, 4), textcoords="offset points", ha="center")
    axes.axhline(report.perplexity, color="tab:gray", linestyle="--", label=f"all tokens: {report.perplexity:.2f}")
    axes.set_xticks(range(len(ranges) + 1), [str(ranges[0].start), *(str(bucket.end) for bucket in ranges)])
    axes.set_yscale("log")
    axes.margins(y=0.12)
    if min(values) == max(values) == report.perplexity:  # nothing for the axis to span
        axes.set_ylim(report.perplexity / 2, report.perplexity * 2)
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.set(xlabel="place of the predicted token in its document", ylabel="perplexity per token")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
