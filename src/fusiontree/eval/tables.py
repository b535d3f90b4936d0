"""Tables of the page that compares runs: a column for each, and a row for whatever any of them has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from html import escape

from fusiontree.eval.columns import Column

Cell = str | None
Getter = Callable[[Column], Cell]


def table(columns: Sequence[Column], rows: Sequence[tuple[str, Getter]], marked: Collection[str] = ()) -> str:
    """A row for each getter that has a value anywhere; those named in `marked` stand out where their values differ."""
    heads = "".join(
        f'<th scope="col" class="c{index % 8}">{_breakable(column.name)}</th>' for index, column in enumerate(columns)
    )
    body = []
    for name, get in rows:
        values = [get(column) for column in columns]
        if not any(values):
            continue
        is_marked = name in marked and len({value for value in values if value}) > 1
        cells = "".join(f"<td>{'–' if value is None else escape(value)}</td>" for value in values)
        body.append(f"<tr{' class=differs' if is_marked else ''}><th scope=row>{_breakable(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table class="columns"><tr><td></td>{heads}</tr>{"".join(body)}</table></div>'


def _breakable(name: str) -> str:
    """A name that goes on in the next line behind its dots, dashes, slashes and underscores, rather than in a word."""
    return "<wbr>".join(escape(part) for part in re.split(r"(?<=[._/-])(?=.)", name))


def note(text: str) -> str:
    """A paragraph that says how figures were measured."""
    return f'<p class="note">{escape(text)}</p>'


def outdated(columns: Sequence[Column], step_of: Callable[[Column], int | None]) -> str:
    """Notes on the columns whose figures are of another step than their newest checkpoint."""
    return "".join(
        note(f"{column.name}: of step {step:,}, the run is at step {column.step:,}.")
        for column in columns
        if (step := step_of(column)) is not None and column.step is not None and step != column.step
    )


def number(value: object, form: str) -> Cell:
    """A number in a format, in words where it is not finite; None for anything else."""
    if not isinstance(value, (int, float)):
        return None
    if math.isfinite(value):
        return format(value, form)
    return "not a number" if math.isnan(value) else "infinite"
