"""The cut on the page that compares models: parent, export, healed export and their rivals, by quality, size, speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fusiontree.artifacts import EvalReport
from fusiontree.eval.columns import Column
from fusiontree.eval.evaluation_section import answers_found, found_by_length, weights_of
from fusiontree.eval.page import section
from fusiontree.eval.roles import cut_from, is_at, parent_among, role, tokens_learned
from fusiontree.eval.tables import Cell, Getter, note, number, table

_FILES, _WEIGHTS = "evaluated on", "evaluated with weights in"


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """Size and speed of one model, as one command measured them."""

    by: str
    context: int
    weight_bytes: int
    state_bytes: int
    prefill_rate: float
    """Tokens a second, as is the next."""
    decode_rate: float
    conditions: tuple[object, ...] = ()
    """What has to be equal for two of them to compare."""
    parent: _Costs | None = None
    """Of the parent, measured in turns with this one or under the same conditions."""

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.state_bytes


def cut_section(columns: Sequence[Column]) -> str:
    """Empty where none of the columns was cut from another model or healed."""
    if not any(column.heal or cut_from(column) for column in columns):
        return ""
    costs = _costs(columns)
    rows: list[tuple[str, Getter]] = [
        ("is", lambda c: role(c, columns)),
        ("parameters", lambda c: None if c.parameters is None else f"{c.parameters:,}"),
        ("tokens trained on, in all", lambda c: number(tokens_learned(c, columns), ",.0f")),
        ("loss when healed", lambda c: number(_loss(c, columns), ".4f")),
        ("of what the cut lost, recovered", lambda c: number(c.heal.recovered if c.heal else None, ".1%")),
        *_quality(columns),
        ("weights, MB", lambda c: _cost(costs, c, lambda one: one.weight_bytes / 1e6, ",.2f")),
        ("state, kB", lambda c: _cost(costs, c, lambda one: one.state_bytes / 1e3, ",.1f")),
        ("both, MB", lambda c: _cost(costs, c, lambda one: one.memory_bytes / 1e6, ",.2f", is_against_parent=True)),
        ("reading, tokens/s", lambda c: _cost(costs, c, lambda one: one.prefill_rate, ",.0f", is_against_parent=True)),
        ("decoding, tokens/s", lambda c: _cost(costs, c, lambda one: one.decode_rate, ",.1f", is_against_parent=True)),
        *_rounded(columns),
        ("at a context of", lambda c: _cost(costs, c, lambda one: one.context, ",.0f")),
        ("size and speed by", lambda c: costs[c.name].by if c.name in costs else None),
    ]
    text = (
        "In brackets: against the parent. Loss when healed: nats per token, of parent, export and healed export on the "
        "evaluation batches of the run that healed, when it ended. Loss on other text, perplexity by place in the "
        "document and what is found again: the last fusiontree eval of each, where files differ they do not compare. "
        "Tokens trained on: with those of the model that it was made from. Weights, state and speed: from fusiontree "
        "bench where it measured all of them, else parent and export in turns, when the export was made (one sequence, "
        "medians), and fusiontree bench for the rest; a healed export has the size and speed of the export."
    )
    marked = ("at a context of", "size and speed by", _FILES, _WEIGHTS)
    return section("The cut", table(columns, rows, marked) + note(text))


def _quality(columns: Sequence[Column]) -> list[tuple[str, Getter]]:
    """Rows of what `fusiontree eval` found."""
    parent = parent_among(columns)
    base = parent.evaluation if parent is not None else None

    def of(get: Callable[[EvalReport], Cell]) -> Getter:
        return lambda column: None if column.evaluation is None else get(column.evaluation)

    def loss(found: EvalReport) -> Cell:
        if found.loss is None or base is None or base is found or not base.loss or _text(found) != _text(base):
            return number(found.loss, ".4f")
        change = found.loss / base.loss - 1
        return f"{found.loss:.4f} ({change:+.1%})" if math.isfinite(change) else number(found.loss, ".4f")

    def perplexity(start: int, found: EvalReport) -> Cell:
        return number(next((place.perplexity for place in found.by_position if place.start == start), None), ",.3f")

    reports = [column.evaluation for column in columns if column.evaluation is not None]
    places = sorted({(place.start, place.end) for report in reports for place in report.by_position})
    kinds = dict.fromkeys(one.task for report in reports if report.tasks for one in report.tasks.results)
    return [
        ("loss on other text", of(loss)),
        *(
            (f"perplexity at {start:,} – {end - 1:,}", of(partial(perplexity, start)))
            for start, end in dict(places).items()
        ),
        *((f"{kind} found", of(partial(answers_found, kind))) for kind in kinds),
        ("passkeys found, by length", of(lambda found: found_by_length(found.passkeys))),
        ("associative recall (MQAR) found, by length", of(lambda found: found_by_length(found.mqar))),
        (_FILES, of(lambda found: ", ".join(found.data) or None)),
        (_WEIGHTS, of(weights_of)),
    ]


def _text(report: EvalReport) -> tuple[object, ...]:
    """What has to be equal for two losses to compare."""
    return tuple(report.data), report.tokens


def _loss(column: Column, columns: Sequence[Column]) -> float | None:
    if column.heal is not None:
        return column.heal.healed_loss
    for heal in (other.heal for other in columns if other.heal is not None):
        if is_at(heal.export, column):
            return heal.export_loss
        if is_at(heal.parent, column):
            return heal.parent_loss
    return None


def _costs(columns: Sequence[Column]) -> dict[str, _Costs]:
    """Of each column that was measured: all by `fusiontree bench`, or each by whatever there is."""
    parent = parent_among(columns)
    benched = {column.name: found for column in columns if (found := _bench(column, parent))}
    if len(benched) == len(columns):
        return benched
    measured = benched | {column.name: found for column in columns if (found := _when_exported(column, columns))}
    for column in columns:
        heal = column.heal
        if heal is not None and column.name not in measured:
            exports = (one.name for one in columns if is_at(heal.export, one) and one.name in measured)
            if (export := next(exports, None)) is not None:
                measured[column.name] = measured[export]
    return measured


def _bench(column: Column, parent: Column | None) -> _Costs | None:
    bench = column.bench
    if bench is None or not bench.models:
        return None
    figures, how = bench.models[0], bench.settings
    own = _Costs(
        by="fusiontree bench",
        context=how["context"],
        weight_bytes=figures.parameter_bytes,
        state_bytes=figures.state_bytes,
        prefill_rate=figures.prefill_tokens_per_second,
        decode_rate=figures.decode_tokens_per_second,
        conditions=(*(how.get(name) for name in ("context", "new_tokens", "batch", "dtype", "weights")), bench.machine),
    )
    base = _bench(parent, None) if parent is not None and parent is not column else None
    is_alike = base is not None and base.conditions == own.conditions
    return replace(own, parent=base) if is_alike else own


def _when_exported(column: Column, columns: Sequence[Column], name: str = "export") -> _Costs | None:
    """The figures of the export that measured this column, as itself or as its parent.

    Args:
        name: `export`, or what its weights were rounded to.
    """
    for export in columns:
        parent = cut_from(export)
        measured = export.manifest.config.get("costs") if export.manifest is not None and parent else None
        if measured and name in measured and (export is column or is_at(parent, column)):
            base = _exported(measured, "parent")
            return replace(_exported(measured, name), parent=base) if export is column else base
    return None


def _exported(measured: Mapping[str, Any], name: str) -> _Costs:
    context, found = measured["context"], measured[name]
    return _Costs(
        by="fusiontree export",
        context=context,
        weight_bytes=found["weight_bytes"],
        state_bytes=found["state_bytes"],
        prefill_rate=context / found["prefill_seconds"],
        decode_rate=1 / found["decode_seconds"],
    )


def _rounded(columns: Sequence[Column]) -> list[tuple[str, Getter]]:
    """Rows of exports that were also measured with rounded weights, in turns with the rest."""

    def of(kind: str, get: Callable[[_Costs], float], form: str) -> Getter:
        def cell(column: Column) -> Cell:
            found = _when_exported(column, [column], kind)
            return None if found is None else _against_parent(found, get, form)

        return cell

    rows: list[tuple[str, Getter]] = []
    for kind in dict.fromkeys(_rounded_to(column) for column in columns):
        if kind is not None:
            rows += [
                (f"in {kind}: both, MB", of(kind, lambda one: one.memory_bytes / 1e6, ",.2f")),
                (f"in {kind}: reading, tokens/s", of(kind, lambda one: one.prefill_rate, ",.0f")),
                (f"in {kind}: decoding, tokens/s", of(kind, lambda one: one.decode_rate, ",.1f")),
            ]
    return rows


def _rounded_to(column: Column) -> str | None:
    rounded = column.manifest.config.get("rounded") if column.manifest is not None and cut_from(column) else None
    return rounded["kind"] if rounded else None


def _cost(
    costs: dict[str, _Costs],
    column: Column,
    get: Callable[[_Costs], float],
    form: str,
    is_against_parent: bool = False,
) -> Cell:
    found = costs.get(column.name)
    if found is None:
        return None
    return _against_parent(found, get, form) if is_against_parent else format(get(found), form)


def _against_parent(found: _Costs, get: Callable[[_Costs], float], form: str) -> str:
    ratio = f" ({get(found) / get(found.parent):.2f}x)" if found.parent is not None else ""
    return f"{get(found):{form}}{ratio}"
