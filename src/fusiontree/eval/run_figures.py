"""The figures of the page that compares runs, and the style sheet that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from fusiontree.artifacts import GateStatistics
from fusiontree.eval.columns import Axis, Column, Points
from fusiontree.eval.svg import Line, heat_map, line_chart
from fusiontree.eval.tables import number

#: Records of a heat map; of more, evenly spaced ones are drawn.
MOST_RECORDS = 120

#: Least height of an axis of gates: what is smaller is next to nothing.
GATE_SPAN = 0.1

LAYER_COLOURS = "background:linear-gradient(90deg,hsl(200 75% 50%),hsl(275 60% 55%),hsl(350 70% 52%))"

_DASHES = ("", "5 3", "1.5 3")
_TIME_UNITS = ((2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))


def learning_figures(columns: Sequence[Column]) -> str:
    """Losses and learning rate over steps, tokens and time, one of the three in view at a time."""
    longest = max((point for column in columns for point in column.numbers("elapsed")), default=0.0)
    _, seconds, unit = next(entry for entry in _TIME_UNITS if longest >= entry[0])
    axes: list[tuple[Axis, str, str, float]] = [
        ("step", "steps", "optimizer step", 1),
        ("tokens", "tokens", "tokens trained on", 1),
        ("elapsed", "time", f"{unit} of training", seconds),
    ]
    choices, panes = [], []
    for axis, name, label, scale in axes:
        checked = " checked" if axis == "step" else ""
        choices.append(
            f'<input type="radio" name="axis" id="over-{axis}"{checked}><label for="over-{axis}">{name}</label>'
        )
        charts = [
            _figure(
                title,
                unit,
                line_chart(
                    _lines(columns, [[(x / scale, y) for x, y in column.curve(key, axis)] for column in columns]),
                    title=f"{title} over {name}",
                    x_label=label,
                ),
            )
            for title, key, unit in (
                ("Training loss", "lm_loss", "nats per token"),
                ("Evaluation loss", "eval_loss", "nats per token"),
                ("Learning rate", "lr", "last step of the row"),
            )
        ]
        panes.append(f'<div class="charts over-{axis}">{"".join(charts)}</div>')
    return f'<div class="choice">{"".join(choices)}{"".join(panes)}</div>'


def other_figures(columns: Sequence[Column]) -> str:
    norm = _by_step(columns, [("Gradient norm", "grad_norm", "L2, before clipping")])
    terms = [("Load balance", "load_balance_loss", "unweighted"), ("Entropy of the gates", "entropy_loss", "negative")]
    terms += [("Distillation", "distillation_loss", "unweighted"), ("Hidden states", "hidden_loss", "unweighted")]
    used = [term for term in terms if any(any(column.numbers(term[1])) for column in columns)]
    return _charts(norm + _by_step(columns, used, from_zero=False))


def overview_of_gates(columns: Sequence[Column]) -> str:
    mean = _by_step(columns, [("Mean gate", "gate_mean", "all layers")], from_zero=False, least_span=GATE_SPAN)
    deviation = _by_step(columns, [("Deviation of the gate", "gate_std", "all layers")], least_span=GATE_SPAN)
    return _charts(mean + deviation)


def speed_figures(columns: Sequence[Column]) -> str:
    charts = (
        ("Tokens per second", "tokens_per_second", "all devices"),
        ("TFLOP per second", "tflops", "one device"),
        ("Model FLOP utilisation", "mfu", "share of the device's peak"),
        ("Peak memory", "peak_memory_gib", "GiB"),
    )
    return _charts(_by_step(columns, charts))


def gate_figures(columns: Sequence[Column]) -> str:
    """Per run the gate of each layer: mean and deviation over steps, and the mean as a heat map."""
    parts = []
    for column in columns:
        means_LR = _by_layer(column.gates, "mean")
        reach = float(np.nanmax(np.abs(means_LR - 0.5), initial=0.01))
        steps = [record.step for record in column.gates]
        charts = [
            _figure(
                title,
                "one line a layer",
                line_chart(
                    _layer_lines(steps, values_LR),
                    title=f"{title}, {column.name}",
                    x_label="optimizer step",
                    from_zero=from_zero,
                    least_span=GATE_SPAN,
                ),
            )
            for title, values_LR, from_zero in (
                ("Mean gate", means_LR, False),
                ("Deviation of the gate", _by_layer(column.gates, "std"), True),
            )
        ]
        some = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_RECORDS)).round().astype(int))
        drawn = heat_map(
            means_LR[:, some],
            [f"{steps[index]:,}" for index in some],
            title=f"Mean gate by layer and step, {column.name}",
            x_label="optimizer step of the record",
            reach=reach,
        )
        ends = f"<span>{0.5 - reach:.2f}</span><i></i><span>{0.5 + reach:.2f}</span>"
        charts.append(_figure("Mean gate", "layer by record", drawn + f'<div class="scale">{ends}</div>'))
        parts.append(f"<h3>{escape(column.name)}</h3>{_charts(''.join(charts))}")
    return "".join(parts)


def evaluation_figure(columns: Sequence[Column]) -> str:
    """Perplexity over the place in the document, which doubles from mark to mark."""
    evaluated = [column.evaluation for column in columns if column.evaluation and column.evaluation.by_position]
    if not evaluated:
        return ""
    ends = sorted({bucket.end for evaluation in evaluated for bucket in evaluation.by_position})

    def points(column: Column) -> Points:
        ranges = column.evaluation.by_position if column.evaluation else []
        return [(math.log2(bucket.end), bucket.perplexity) for bucket in ranges]

    chart = line_chart(
        _lines(columns, [points(column) for column in columns]),
        title="Perplexity by place in the document",
        x_label="place in the document, up to",
        x_ticks=[(math.log2(end), f"{end:,}") for end in ends[:: max(1, math.ceil(len(ends) / 7))]],
    )
    return _charts(_figure("Perplexity", "by place in the document", chart))


def grid_figures(columns: Sequence[Column]) -> str:
    """Shares of passkeys and of associative recall that each evaluation found, as heat tables."""
    tables = []
    for column in columns:
        if column.evaluation is None:
            continue
        passkeys, mqar = column.evaluation.passkeys, column.evaluation.mqar
        if passkeys is not None:
            depths = [f"{depth:.0%}" for depth in passkeys.depths]
            drawn = _heat_table("depth", depths, passkeys.lengths, passkeys.right)
            tables.append(_figure("Passkeys found", f"by depth and tokens of the row, {column.name}", drawn))
        if mqar is not None:
            drawn = _heat_table("pairs", [f"{pairs:,}" for pairs in mqar.pairs], mqar.lengths, mqar.right)
            tables.append(_figure("Associative recall (MQAR)", f"by pairs and tokens of the row, {column.name}", drawn))
    return _charts("".join(tables)) if tables else ""


def _heat_table(corner: str, rows: Sequence[str], lengths: Sequence[int], shares: Sequence[Sequence[float]]) -> str:
    """A row for each name and a column for each length; the more was found, the fuller a cell's colour."""
    head = "".join(f"<th scope=col>{length:,}</th>" for length in lengths)
    body = []
    for name, values in zip(rows, shares, strict=True):
        # Half of the colour at most, on which the page's ink can be read in light and dark.
        cells = "".join(
            f'<td style="background:rgb(34 150 90/{_opacity(value):.3f})">{number(value, ".0%")}</td>'
            for value in values
        )
        body.append(f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>")
    table = f'<table class="heat"><tr><th>{corner}</th>{head}</tr>{"".join(body)}</table>'
    return f'<div class="wide">{table}</div>'


def _opacity(share: float) -> float:
    return share / 2 if math.isfinite(share) else 0.0


def _by_layer(records: Sequence[GateStatistics], name: str) -> np.ndarray:
    """[L,R]; NaN where a record has fewer layers, or a layer no working gate."""
    layers = max(len(record.layers) for record in records)
    values_LR = np.full((layers, len(records)), np.nan)
    for index, record in enumerate(records):
        values_LR[: len(record.layers), index] = [getattr(layer, name) for layer in record.layers]
    return values_LR


def _layer_lines(steps: Sequence[int], values_LR: np.ndarray) -> list[Line]:
    layers = len(values_LR)
    lines = []
    for layer, values in enumerate(values_LR):
        depth = layer / max(layers - 1, 1)
        points = [(float(step), float(value)) for step, value in zip(steps, values, strict=True) if np.isfinite(value)]
        lines.append(Line(f"layer {layer}", f"hsl({200 + 150 * depth:.0f} 70% 52%)", points))
    return lines


def _lines(columns: Sequence[Column], curves: Sequence[Points]) -> list[Line]:
    return [
        Line(column.name, f"var(--c{index % 8})", points, _DASHES[index // 8 % 3])
        for index, (column, points) in enumerate(zip(columns, curves, strict=True))
    ]


def _by_step(
    columns: Sequence[Column],
    charts: Sequence[tuple[str, str, str]],
    *,
    from_zero: bool = True,
    least_span: float = 0.0,
) -> str:
    """A chart for each (title, key, unit) that any column has numbers of."""
    drawn = [
        _figure(
            title,
            unit,
            line_chart(
                _lines(columns, [column.curve(key) for column in columns]),
                title=f"{title} over steps",
                x_label="optimizer step",
                from_zero=from_zero,
                least_span=least_span,
            ),
        )
        for title, key, unit in charts
        if any(column.numbers(key) for column in columns)
    ]
    return "".join(drawn)


def _charts(figures: str) -> str:
    return f'<div class="charts">{figures}</div>'


def _figure(title: str, unit: str, drawn: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(unit)}</figcaption>{drawn}</figure>"


_LIGHT = ("#1f6fc4", "#d9541e", "#22884f", "#9440b8", "#a8780a", "#cf2a62", "#128a94", "#68707b")
_DARK = ("#6db3f5", "#ff9566", "#66cf93", "#cf94ec", "#e3b94c", "#ff86ad", "#57cdd6", "#aab3bf")


def _palette(colours: Sequence[str]) -> str:
    return ";".join(f"--c{index}:{colour}" for index, colour in enumerate(colours))


STYLE = f"""
:root {{ {_palette(_LIGHT)}; }}
@media (prefers-color-scheme: dark) {{ :root {{ {_palette(_DARK)}; }} }}
{"".join(f".c{index} {{ --mine: var(--c{index}); }}" for index in range(8))}
main {{ max-width: 84rem; }}
.legend {{ position: sticky; top: 0; z-index: 1; display: flex; gap: .4rem 1.1rem; overflow-x: auto; list-style: none;
  margin: 0 0 1rem; padding: .55rem .2rem; background: var(--page); border-bottom: 1px solid var(--line); }}
.legend li {{ white-space: nowrap; font-size: .9rem; }}
.legend li::before, .columns th[class]::before {{ content: "\\25CF\\A0"; color: var(--mine); }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .6rem 1.2rem; }}
.charts figure {{ margin: 0 0 .4rem; min-width: 0; }}
.charts figcaption {{ margin: 0 0 .2rem; }}
svg {{ display: block; width: 100%; height: auto; }}
svg text {{ fill: var(--soft); font: 12px system-ui, sans-serif; }}
.grid {{ stroke: var(--line); stroke-width: 1; }}
.curve path {{ fill: none; stroke: var(--c); stroke-width: 1.7; stroke-linejoin: round; }}
.curve circle {{ fill: var(--c); }}
.wide {{ overflow-x: auto; }}
.columns {{ width: auto; min-width: 60%; }}
.columns th, .columns td {{ min-width: 6.5rem; max-width: 24rem; overflow-wrap: anywhere; }}
.columns th {{ overflow-wrap: break-word; }}
.columns th[scope=row] {{ font-weight: 500; color: var(--soft); min-width: 9rem; }}
@media (max-width: 32rem) {{ .columns {{ width: 100%; font-size: .82rem; }}
  .columns th, .columns td {{ padding: .3rem .35rem; min-width: 4.6rem; }}
  .columns th[scope=row] {{ min-width: 6rem; }} }}
.heat {{ width: auto; font-size: .82rem; }}
.heat th, .heat td {{ text-align: right; padding: .3rem .55rem; font-variant-numeric: tabular-nums; }}
.heat th {{ font-weight: 500; color: var(--soft); }}
.columns th[scope=row] {{ position: sticky; left: 0; background: var(--card); }}
.wide + .charts {{ margin-top: 1rem; }}
.columns td {{ font-variant-numeric: tabular-nums; }}
.differs > td, .columns .differs > th[scope=row] {{ background: var(--mark); }}
.choice > input {{ position: absolute; opacity: 0; }}
.choice > label {{ display: inline-block; padding: .15rem .8rem; margin: 0 .3rem .7rem 0; border: 1px solid var(--line);
  border-radius: 1rem; font-size: .9rem; cursor: pointer; }}
.choice > input:checked + label {{ background: var(--accent); color: var(--card); border-color: var(--accent); }}
.choice > input:focus-visible + label {{ outline: 2px solid var(--accent); outline-offset: 2px; }}
.choice > .charts {{ display: none; }}
#over-step:checked ~ .over-step, #over-tokens:checked ~ .over-tokens, #over-elapsed:checked ~ .over-elapsed
  {{ display: grid; }}
.scale {{ display: flex; align-items: center; gap: .5rem; font-size: .8rem; color: var(--soft); padding-left: 12%; }}
.scale i {{ flex: 1; height: .6rem; border-radius: .3rem;
  background: linear-gradient(90deg, #053061, #4393c3, #f7f7f7, #d6604d, #67001f); }}
.layers {{ display: inline-block; width: 8rem; height: .6rem; border-radius: .3rem; }}
.branches {{ display: flex; flex-wrap: wrap; gap: .25rem; list-style: none; margin: 0 0 .6rem; padding: 0; }}
.branches li {{ min-width: 2.1rem; padding: .25rem .3rem; border-radius: .3rem; text-align: center; font-size: .85rem;
  background: var(--page); border: 1px solid var(--line); }}
.branches .mamba {{ background: #c0392b; border-color: #c0392b; color: #fff; }}
.branches .attention {{ background: #2166ac; border-color: #2166ac; color: #fff; }}
.branches .constant {{ border-style: dashed; color: var(--soft); }}
p.note {{ font-size: .88rem; margin: .6rem 0; }}
h3 {{ margin-top: .8rem; overflow-wrap: anywhere; }}
"""
