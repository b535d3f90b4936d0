"""The cut on the page that compares models: parent, export and healed export, by loss, size and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusiontree.artifacts import ModelFigures, ShapeFigures
from fusiontree.eval.columns import Column
from fusiontree.eval.page import section
from fusiontree.eval.tables import Cell, Getter, note, number, outdated, table


def cut_section(columns: Sequence[Column]) -> str:
    """Empty where none of the columns was cut from another model or healed."""
    roles = {column.name: _role(column, columns) for column in columns}
    if not any(column.heal or cut_from(column) for column in columns):
        return ""
    rows: list[tuple[str, Getter]] = [
        ("is", lambda c: roles[c.name]),
        ("parameters", lambda c: None if c.parameters is None else f"{c.parameters:,}"),
        ("loss when healed", lambda c: number(_loss(c, columns), ".4f")),
        ("of what the cut lost, recovered", lambda c: number(c.heal.recovered if c.heal else None, ".1%")),
        ("weights, MB", lambda c: number(_cost(c, columns, "weight_bytes", 1e-6), ",.2f")),
        ("state, kB", lambda c: number(_cost(c, columns, "state_bytes", 1e-3), ",.1f")),
        ("reading, tokens/s", lambda c: number(_rate(c, columns, "prefill_seconds"), ",.0f")),
        ("decoding, tokens/s", lambda c: number(_rate(c, columns, "decode_seconds"), ",.1f")),
        ("at a context of", lambda c: number(_costs(c, columns).get("context"), ",.0f")),
    ]
    text = (
        "Loss: nats per token, of all three on the evaluation batches of the run that healed, when it ended. Weights, "
        "state and speed: parent and export in turns, when the export was made (one sequence, medians); a healed "
        "export has the size and speed of the export, and fusiontree bench measures it by itself."
    )
    return section("The cut", table(columns, rows, ("at a context of",)) + note(text))


def bench_section(columns: Sequence[Column]) -> str:
    """What `fusiontree bench` has measured, models beside it in columns at the end; empty where it measured none."""
    if not any(column.bench for column in columns):
        return ""
    older = outdated(columns, lambda column: column.bench.step if column.bench else None)
    columns = [*columns, *(peer for column in columns for peer in _peers(column))]

    def of(name: str, form: str, scale: float = 1, shape: tuple[int, int] | None = None) -> Getter:
        def get(column: Column) -> Cell:
            figures: ModelFigures | ShapeFigures | None = None
            if column.bench and column.bench.models:
                figures = column.bench.models[0]
                if shape is not None:
                    figures = next((one for one in figures.more if (one.context, one.batch) == shape), None)
            value = getattr(figures, name, None)
            return number(None if value is None else value * scale, form)

        return get

    def setting(name: str) -> Getter:
        return lambda column: str(column.bench.settings.get(name)) if column.bench else None

    def machine(column: Column) -> Cell:
        if column.bench is None:
            return None
        found = column.bench.machine
        return str(found.get("gpu") or f"{found.get('processor')}, {found.get('threads')} threads")

    rows: list[tuple[str, Getter]] = [
        ("weights, MB", of("parameter_bytes", ",.2f", 1e-6)),
        ("state of one sequence, kB", of("state_bytes", ",.1f", 1e-3)),
        ("reading, tokens/s", of("prefill_tokens_per_second", ",.0f")),
        ("first token, ms", of("first_token_seconds", ",.1f", 1e3)),
        ("decoding, tokens/s", of("decode_tokens_per_second", ",.1f")),
        ("training, tokens/s", of("train_tokens_per_second", ",.0f")),
        ("context", setting("context")),
        ("sequences at a time", setting("batch")),
        ("dtype", setting("dtype")),
        ("machine", machine),
    ]
    more = {(one.context, one.batch) for column in columns if column.bench for one in column.bench.models[0].more}
    for context, batch in sorted(more):
        place = f"{context:,} tokens x {batch}"
        rows += [
            (f"{place}: state of one, kB", of("state_bytes", ",.1f", 1e-3, (context, batch))),
            (f"{place}: reading, tokens/s", of("prefill_tokens_per_second", ",.0f", 1, (context, batch))),
            (f"{place}: first token, ms", of("first_token_seconds", ",.1f", 1e3, (context, batch))),
            (f"{place}: decoding, tokens/s", of("decode_tokens_per_second", ",.1f", 1, (context, batch))),
        ]
    text = (
        "The last fusiontree bench of each, medians over its rounds; the state is allocated bytes, decoding is timed "
        "from the stamps of streamed tokens. Figures of different runs compare less well than those of one; rows that "
        "stand in the way are marked."
    )
    marked = ("context", "sequences at a time", "dtype", "machine")
    return section("Generating: speed and memory", table(columns, rows, marked) + older + note(text))


def _peers(column: Column) -> list[Column]:
    """The other models of a column's bench as columns."""
    if column.bench is None:
        return []
    return [
        replace(
            column, name=f"{peer.name} beside {column.name}", bench=column.bench.model_copy(update={"models": [peer]})
        )
        for peer in column.bench.models[1:]
    ]


def cut_from(column: Column) -> str | None:
    """The parent that an export names."""
    manifest = column.manifest
    is_export = manifest is not None and column.kind == "model" and "plan" in manifest.config
    return manifest.parent_run if manifest is not None and is_export else None


def _is_at(path: str | None, column: Column) -> bool:
    """Whether a model's path is the column's directory, or a checkpoint in it."""
    if path is None:
        return False
    found, own = Path(path).resolve(), column.path.resolve()
    return found == own or own in found.parents


def _role(column: Column, columns: Sequence[Column]) -> Cell:
    def named(path: str) -> str:
        return next((other.name for other in columns if _is_at(path, other)), Path(path).name)

    if column.heal is not None:
        return f"healed from {named(column.heal.export)}"
    parent = cut_from(column)
    if parent is not None:
        return f"cut from {named(parent)}"
    is_parent = any(_is_at(cut_from(c), column) or (c.heal and _is_at(c.heal.parent, column)) for c in columns)
    return "parent" if is_parent else None


def _loss(column: Column, columns: Sequence[Column]) -> float | None:
    if column.heal is not None:
        return column.heal.healed_loss
    for heal in (other.heal for other in columns if other.heal is not None):
        if _is_at(heal.export, column):
            return heal.export_loss
        if _is_at(heal.parent, column):
            return heal.parent_loss
    return None


def _costs(column: Column, columns: Sequence[Column]) -> Mapping[str, Any]:
    """The figures of the export that measured this column, as itself or as its parent; `context` among them."""
    for export in columns:
        parent = cut_from(export)
        measured = export.manifest.config.get("costs") if export.manifest is not None and parent else None
        name = "export" if export is column else "parent" if _is_at(parent, column) else None
        if measured and name:
            return {**measured[name], "context": measured["context"]}
    return {}


def _cost(column: Column, columns: Sequence[Column], name: str, scale: float) -> float | None:
    value = _costs(column, columns).get(name)
    return None if value is None else value * scale


def _rate(column: Column, columns: Sequence[Column], name: str) -> float | None:
    costs = _costs(column, columns)
    tokens = costs.get("context") if name == "prefill_seconds" else 1
    return tokens / costs[name] if costs.get(name) and tokens else None
