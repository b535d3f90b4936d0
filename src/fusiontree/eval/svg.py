"""Line charts and heat maps as inline SVG: no script and no fonts of their own; the page's style sheet colours them.

Shapes: L layers, R records.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib import colormaps

# Small enough for a telephone to show at its own size; wider screens put several side by side.
WIDTH, HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 38
_LETTER = 7  # width of one in the page's axes, at most

#: Longer curves are drawn as means of neighbouring points.
MOST_POINTS = 240

_MARKED = 20  # Points up to which each gets a dot.


@dataclass(frozen=True)
class Line:
    label: str
    colour: str
    """CSS."""
    points: Sequence[tuple[float, float]]
    dashes: str = ""


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    from_zero: bool = False,
    least_span: float = 0.0,
) -> str:
    """Curves over one pair of axes.

    Args:
        lines: in the order in which they are drawn; points that are not finite are left out.
        title: for those who hear the page.
        x_label: the axis, with its unit; the other one's belongs above the chart.
        x_ticks: places and names of the marks; None: round numbers.
        from_zero: whether the y axis begins at 0 rather than at the lowest point.
        least_span: of the y axis, so that noise around a constant does not fill it.
    """
    finite = [(line, [point for point in line.points if all(map(math.isfinite, point))]) for line in lines]
    drawn = [(line, thinned(points)) for line, points in finite if points]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    if not drawn:
        return '<p class="note">Nothing recorded.</p>'
    x_low, x_high = _spread(min(xs), max(xs), 0.0)
    y_low, y_high = _spread(0.0 if from_zero else min(ys), max(ys), 0.05)
    missing = max(0.0, least_span - (y_high - y_low))
    y_low, y_high = (0.0, y_high + missing) if from_zero else (y_low - missing / 2, y_high + missing / 2)

    def place_x(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def place_y(y: float) -> float:
        return HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [_y_axis([(place_y(y), compact(y)) for y in round_numbers(y_low, y_high)])]
    marks = x_ticks if x_ticks is not None else [(x, compact(x)) for x in round_numbers(x_low, x_high)]
    parts.append(_x_axis([(place_x(x), name) for x, name in marks], x_label))
    for line, points in drawn:
        parts.append(_curve(line, [(place_x(x), place_y(y)) for x, y in points]))
    return _svg(title, "".join(parts))


def heat_map(values_LR: np.ndarray, columns: Sequence[str], *, title: str, x_label: str, reach: float) -> str:
    """Gates by layer and record: one half is white, `reach` above it red, `reach` below it blue, NaN grey.

    Args:
        values_LR: the gates.
        columns: the records' names.
        title: for those who hear the page.
        x_label: what the columns are.
        reach: deviation from one half that is drawn in full colour.
    """
    layers, records = values_LR.shape
    colours = colormaps["RdBu_r"].with_extremes(bad="0.5")
    pixels_LR4 = colours(np.ma.masked_invalid((values_LR - 0.5) / (2 * reach) + 0.5), bytes=True)
    picture = base64.b64encode(_png(pixels_LR4)).decode("ascii")
    width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    image = (
        f'<image href="data:image/png;base64,{picture}" x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}" '
        'preserveAspectRatio="none" style="image-rendering:pixelated"/>'
    )
    shown_rows = _some(layers, 8)
    shown_columns = _some(records, 6)
    rows = [(_TOP + (layer + 0.5) / layers * height, str(layer)) for layer in shown_rows]
    marks = [(_LEFT + (index + 0.5) / records * width, columns[index]) for index in shown_columns]
    return _svg(title, image + _y_axis(rows, grid=False) + _x_axis(marks, x_label))


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`: means of runs of neighbours."""
    if len(points) <= MOST_POINTS:
        return list(points)
    parts = np.array_split(np.array(points, dtype=float), MOST_POINTS)
    return [(float(x), float(y)) for x, y in (part.mean(0) for part in parts)]


def round_numbers(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about as many as wanted."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def compact(value: float) -> str:
    """A number in a few characters."""
    size = abs(value)
    if 0 < size < 1e-3:
        power = math.floor(math.log10(size))
        return f"{value / 10.0**power:.3g}e{power}"
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def _spread(low: float, high: float, margin: float) -> tuple[float, float]:
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        reach = abs(high) / 2 or 1.0
        return low - reach, high + reach
    return low - margin * (high - low), high + margin * (high - low)


def _some(count: int, most: int) -> list[int]:
    """Up to `most` indices below `count`, the first and the last among them."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most))})


def _curve(line: Line, points: Sequence[tuple[float, float]]) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dashes = f' stroke-dasharray="{line.dashes}"' if line.dashes else ""
    dots = ""
    if len(points) <= _MARKED:
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in points)
    name = f"<title>{escape(line.label)}</title>"
    return f'<g class="curve" style="--c:{line.colour}">{name}<path d="M{path}"{dashes}/>{dots}</g>'


def _y_axis(marks: Sequence[tuple[float, str]], *, grid: bool = True) -> str:
    parts = []
    for y, name in marks:
        if grid:
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
    return "".join(parts)


def _x_axis(marks: Sequence[tuple[float, str]], label: str) -> str:
    base = HEIGHT - _BOTTOM
    parts = [f'<path class="grid" d="M{_LEFT} {base}H{WIDTH - _RIGHT}"/>']
    for x, name in marks:
        # The outermost name must not be cut off at the edge.
        anchor = "end" if x + len(name) * _LETTER / 2 > WIDTH else "middle"
        parts.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="{anchor}">{escape(name)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return "".join(parts) + f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(label)}</text>'


def _svg(title: str, content: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{content}</svg>'


def _png(pixels_HW4: np.ndarray) -> bytes:
    """[H,W,4] bytes as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels_HW4.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels_HW4)
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
