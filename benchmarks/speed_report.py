"""From single measurements of speed.py to its records and tables."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import records

REFERENCES = ("llama", "falcon_h1", "bamba")
METRICS = {"train": ("train",), "generate": ("prefill", "decode")}


def rates(found: dict) -> dict[str, float]:
    """Tokens per second of one measurement, by metric; `train_cpu` is per second of CPU time of one thread."""
    tokens = found["batch"] * found["length"]
    if found["task"] == "train":
        return {"train": tokens / found["seconds"], "train_cpu": tokens / found["cpu_seconds"] * found["threads"]}
    return {"prefill": tokens / found["prefill_seconds"], "decode": found["batch"] / found["token_seconds"]}


def one_line(found: dict) -> str:
    shown = ", ".join(f"{name} {rate:.1f} tok/s" for name, rate in rates(found).items())
    return (
        f"round {found['round']} {found['title']} {found['length']}x{found['batch']} {shown}, "
        f"peak {found['peak_bytes'] / 1e9:.2f} GB, load {found['load_before']}"
    )


def summarise(measurements: list[dict]) -> list[dict]:
    """Per task, shape and model: medians over the rounds.

    A ratio to another model is the median of the rounds' ratios, since the two were measured next to each other.
    """
    summary = []
    for task, length, batch in dict.fromkeys((m["task"], m["length"], m["batch"]) for m in measurements):
        group = [m for m in measurements if (m["task"], m["length"], m["batch"]) == (task, length, batch)]
        by_model = {name: [m for m in group if m["model"] == name] for name in sorted({m["model"] for m in group})}
        for name, own in by_model.items():
            found = [rates(m) for m in own]
            ratios = {}
            for reference in REFERENCES:
                if reference in by_model and reference != name:
                    pairs = list(zip(found, map(rates, by_model[reference]), strict=True))
                    for metric in found[0]:
                        ratio = median(mine[metric] / other[metric] for mine, other in pairs)
                        ratios[f"{metric}_to_{reference}"] = round(ratio, 3)
            summary.append(
                {
                    "task": task,
                    "length": length,
                    "batch": batch,
                    "model": name,
                    "title": own[0]["title"],
                    "parameters": own[0]["parameters"],
                    "tokens_per_second": {key: round(median(f[key] for f in found), 1) for key in found[0]},
                    "ratios": ratios,
                    "peak_bytes": int(median(m["peak_bytes"] for m in own)),
                }
            )
    return summary


def table(summary: list[dict]) -> str:
    lines = [
        "| task | tokens x rows | model | parameters | tok/s | to Llama | to Falcon-H1 | to Bamba | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = {name: place for place, name in enumerate(METRICS)}
    for entry in sorted(summary, key=lambda e: (order[e["task"]], e["length"], e["title"] != "FusionTree", e["title"])):
        for metric, rate in entry["tokens_per_second"].items():
            ratio = [entry["ratios"].get(f"{metric}_to_{reference}") for reference in REFERENCES]
            shown = " | ".join(f"{value:.2f}x" if value is not None else "" for value in ratio)
            name = "train, per CPU second x threads" if metric == "train_cpu" else metric
            lines.append(
                f"| {name} | {entry['length']}x{entry['batch']} | {entry['title']} | {entry['parameters'] / 1e6:.2f} M "
                f"| {rate:.1f} | {shown} | {entry['peak_bytes'] / 1e9:.2f} |"
            )
    return "\n".join(lines) + "\n"


def save(directory: Path, record: dict) -> str:
    """Put `record` into the file of this processor, in the place of one with equal settings, and rewrite the tables.

    Returns:
        The record's own table.
    """
    records.save_for_cpu(directory, "speed", record, _report)
    return table(record["summary"])


def _report(kept: list[dict]) -> str:
    parts = ["# Speed and memory\n"]
    for entry in kept:
        settings, loads = entry["settings"], [m["load_before"] for m in entry["measurements"]]
        parts.append(f"## {settings['size']} parameters, {settings['dtype']}, {settings['threads']} thread(s)\n")
        parts.append(table(entry["summary"]))
        parts.append(
            f"{entry['cpu']}; medians of {entry['rounds']} rounds; torch {entry['versions']['torch']}, "
            f"transformers {entry['versions']['transformers']}; commit {entry['commit']}, "
            f"code revision {entry['revision']}; {entry['date']}; `{entry['command']}`. "
            f"Load average before the measurements: {min(loads)} to {max(loads)}. "
            f"Allocator: {records.shown_allocator(entry['allocator'])}.\n"
        )
    return "\n".join(parts)
