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
    # What is not finite has no place on the axis.
    values = [value if math.isfinite(value := bucket.perplexity) else math.nan for bucket in ranges]
    drawn = [value for value in values if math.isfinite(value)]
    # Each range ends at twice its start: drawn equally wide, all but the first lie as on a logarithmic axis.
    axes.set_yscale("log")
    if drawn and min(drawn) == max(drawn) == report.perplexity:
        # Nothing for the axis to span. Before anything is drawn: limits found from one value come with a warning.
        axes.set_ylim(report.perplexity / 2, report.perplexity * 2)
    axes.stairs(values, baseline=None, linewidth=2, color="tab:blue")
    for index, value in enumerate(values):
        if math.isnan(value):
            axes.text(index + 0.5, 0.5, "not finite", ha="center", transform=axes.get_xaxis_transform())
            continue
        text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        axes.annotate(text, (index + 0.5, value), (0, 4), textcoords="offset points", ha="center")
    if math.isfinite(report.perplexity):
        axes.axhline(report.perplexity, color="tab:gray", linestyle="--", label=f"all tokens: {report.perplexity:.2f}")
        axes.legend()
    axes.set_xticks(range(len(ranges) + 1), [str(ranges[0].start), *(str(bucket.end) for bucket in ranges)])
    axes.margins(y=0.12)
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.set(xlabel="place of the predicted token in its document", ylabel="perplexity per token")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
