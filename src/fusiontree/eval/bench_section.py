"""What `fusiontree bench` has measured, on the page that compares models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fusiontree.artifacts import ModelFigures, ShapeFigures
from fusiontree.eval.columns import Column
from fusiontree.eval.page import section
from fusiontree.eval.tables import Cell, Getter, note, number, outdated, table


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
        return lambda column: str(found) if column.bench and (found := column.bench.settings.get(name)) else None

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
        ("weights rounded to", setting("weights")),
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
    marked = ("context", "sequences at a time", "dtype", "weights rounded to", "machine")
    return section("Generating: speed and memory", table(columns, rows, marked) + older + note(text))


def _peers(column: Column) -> list[Column]:
    """The other models of a column's bench as columns; only the first one's weights are rounded."""
    if column.bench is None:
        return []
    settings = column.bench.settings | {"weights": None}
    return [
        replace(
            column,
            name=f"{peer.name} beside {column.name}",
            bench=column.bench.model_copy(update={"models": [peer], "settings": settings}),
        )
        for peer in column.bench.models[1:]
    ]
