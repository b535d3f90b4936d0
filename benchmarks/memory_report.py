"""From one record of memory.py to its file and its tables."""

from __future__ import annotations

from pathlib import Path

import records


def save(directory: Path, record: dict) -> str:
    """Put `record` into the file of this processor, in the place of one with equal settings, and rewrite the tables.

    Returns:
        The record's own tables.
    """
    heading = "# Memory of training\n"
    records.save_for_cpu(directory, "memory", record, lambda kept: "\n".join([heading, *map(tables, kept)]))
    return tables(record)


def tables(record: dict) -> str:
    settings = record["settings"]
    parts = [
        f"## {settings['size']}, {settings['shape']}, {settings['dtype']}, {settings['threads']} thread(s)\n",
        "What gradient checkpointing recomputes; MB, and ratios to `off`:\n",
        _scopes(record["scopes"]),
        "What `off` saves for the backward pass, largest first:\n",
        _largest(record["scopes"]["off"]),
        "With a rotary table for each layer, and with attention that holds scores; MB:\n",
        _variants(record["variants"]),
    ]
    if record["recipe"]:
        parts += [
            "The original recipe (hidden size 1536, 18 layers, 1024x4, bf16), of which nothing was run; MB:\n",
            _variants(record["recipe"]),
        ]
    parts.append(
        f"{record['cpu']}; CPU time: medians of {record['rounds']} rounds, scopes in turns. Bytes of the "
        "first three columns: counted, without head and loss. torch "
        f"{record['versions']['torch']}, transformers {record['versions']['transformers']}; commit {record['commit']}, "
        f"code revision {record['revision']}; {record['date']}; `{record['command']}`. Load average before: "
        f"{record['load_before']}. Allocator: {records.shown_allocator(record['allocator'])}.\n"
    )
    return "\n".join(parts)


def _scopes(scopes: dict[str, dict]) -> str:
    off = scopes["off"]
    lines = [
        "| recomputed | saved for backward | | held after forward | | peak | | `--dry-run` says | peak of process | | "
        "CPU s a step | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scope, found in scopes.items():
        cells = []
        for key in ("saved", "held", "peak"):
            cells += [_mb(found[key]), f"{found[key] / off[key]:.2f}"]
        cells.append(_mb(found["dry_run"]))
        for key, shown in (("peak_of_process", _mb), ("cpu_seconds", "{:.2f}".format)):
            measured = found.get(key) is not None
            ratio = "time_to_off" if key == "cpu_seconds" else key
            cells += [shown(found[key]), f"{found[ratio] / off[ratio]:.2f}"] if measured else ["", ""]
        lines.append(f"| {scope} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _largest(found: dict) -> str:
    lines = ["| module, shape, dtype | MB | |", "|---|---|---|"]
    rows = found["largest"] | {"(in all these: narrower copies of weights)": found["weight_copies"]}
    lines += [f"| {what} | {_mb(size)} | {size / found['saved']:.1%} |" for what, size in rows.items()]
    return "\n".join(lines) + "\n"


def _variants(found: list[list]) -> str:
    lines = ["| variant | recomputed | saved for backward | held after forward | peak |", "|---|---|---|---|---|"]
    for name, scope, sizes in found:
        lines.append(f"| {name} | {scope} | " + " | ".join(_mb(sizes[key]) for key in ("saved", "held", "peak")) + " |")
    return "\n".join(lines) + "\n"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"
