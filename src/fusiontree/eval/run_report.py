"""Runs and models side by side on one page: what was set, how they learned, what their gates did, how fast they are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from html import escape
from pathlib import Path

from fusiontree.artifacts import RunManifest, RunResume
from fusiontree.atomic import atomic_write
from fusiontree.eval.bench_section import bench_section
from fusiontree.eval.columns import Column, differences, read_columns
from fusiontree.eval.cut_section import cut_section
from fusiontree.eval.evaluation_section import evaluation_section
from fusiontree.eval.page import page, section
from fusiontree.eval.plan_section import plan_section
from fusiontree.eval.run_figures import (
    LAYER_COLOURS,
    STYLE,
    gate_figures,
    learning_figures,
    other_figures,
    overview_of_gates,
    speed_figures,
)
from fusiontree.eval.tables import Cell, Getter, note, table
from fusiontree.train.loggers import format_duration

#: Settings that say on what `eval_loss` was measured: where they differ, it does not compare.
_EVALUATED_ON = (
    *("data.eval_paths", "data.tokenizer"),
    *("training.eval_batches", "training.batch_size", "training.max_seq_length"),
)


def write_run_report(paths: Sequence[Path], out: Path) -> None:
    """Reads runs and models and writes the page that compares them.

    Args:
        paths: directories of runs or models.
        out: the file.

    Raises:
        InputError: a directory that is neither, or a file in one that is broken.
    """
    columns = read_columns(paths)
    parts = [_header(columns), _glance(columns)]
    parts += [
        part(columns)
        for part in (
            _differences,
            _learning,
            _gates,
            _speed,
            cut_section,
            bench_section,
            evaluation_section,
            plan_section,
            _origin,
        )
    ]
    parts.append(_settings(columns))
    title = columns[0].name if len(columns) == 1 else f"{len(columns)} runs side by side"
    atomic_write(out, page(title, "\n".join(filter(None, parts)), STYLE))


def _header(columns: Sequence[Column]) -> str:
    names = "".join(f'<li class="c{index % 8}">{escape(column.name)}</li>' for index, column in enumerate(columns))
    title = columns[0].name if len(columns) == 1 else "Side by side"
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"<header><h1>{escape(title)}</h1><p>Written by fusiontree report on {made} from what lies in the "
        f'directories named below.</p></header><ul class="legend">{names}</ul>'
    )


def _glance(columns: Sequence[Column]) -> str:
    rows: list[tuple[str, Getter]] = [
        ("parameters", lambda c: None if c.parameters is None else f"{c.parameters:,}"),
        ("steps", _steps),
        ("tokens", lambda c: _last(c, "tokens", ",.0f")),
        ("time", lambda c: format_duration(c.numbers("elapsed")[-1]) if c.numbers("elapsed") else None),
        ("training loss", lambda c: _last(c, "lm_loss", ".4f")),
        ("evaluation loss, last", lambda c: _last(c, "eval_loss", ".4f")),
        ("evaluation loss, best", lambda c: _best(c, "eval_loss")),
        ("evaluation perplexity, last", lambda c: _last(c, "eval_perplexity", ",.2f")),
        ("steps left out", lambda c: _last(c, "skipped_steps", ",.0f")),
        ("loss spikes", lambda c: _last(c, "spikes", ",.0f")),
        ("gates, mean", lambda c: _last(c, "gate_mean", ".3f")),
        ("gates, deviation", lambda c: _last(c, "gate_std", ".3f")),
        ("tokens/s", lambda c: _median(c, "tokens_per_second", ",.0f")),
        ("TFLOP/s per device", lambda c: _median(c, "tflops", ".3g")),
        ("model FLOP utilisation", lambda c: _median(c, "mfu", ".1%")),
        ("peak memory, GiB", lambda c: f"{max(values):.2f}" if (values := c.numbers("peak_memory_gib")) else None),
    ]
    text = (
        "Losses are nats per token: training over the tokens of the last row, evaluation over the run's own evaluation "
        "batches. Speeds are medians over the rows of metrics.jsonl, from the seconds of the optimizer steps alone; "
        "time includes evaluation and saving, stops not. FLOPs are the model's, recomputation not counted; utilisation "
        "needs the device's peak. Memory is the largest of one process: allocated on a GPU, resident on a CPU. "
        "Parameters are those of the newest checkpoint."
    )
    return section("At a glance", table(columns, rows) + note(text))


def _differences(columns: Sequence[Column]) -> str:
    if len(columns) == 1:
        return ""
    rows = [(key, _setting(key)) for key in differences(columns)]
    if not rows:
        return section("What differs", note("No setting differs."))
    text = "Settings that are not equal everywhere, from config.yaml and, for the model, the newest checkpoint."
    return section("What differs", table(columns, rows) + note(text))


def _learning(columns: Sequence[Column]) -> str:
    runs = [column for column in columns if column.metrics]
    if not runs:
        return ""
    text = (
        "Training: the language-model loss, averaged over the tokens of the steps since the row before. Evaluation: "
        "the same packed batches of held-out text each time, without dropout. Time is that of the run, evaluation and "
        "saving included, stops not; an evaluation stands at the training row of its step. Curves of many rows are "
        "drawn as means of neighbours."
    )
    unequal = [key for key in differences(runs) if key in _EVALUATED_ON]
    if unequal:
        text += f" Evaluation losses do not compare where these differ: {', '.join(unequal)}."
    others = other_figures(columns) + note("The norm is that of a row's last step, the terms are means over its steps.")
    more = f"<details><summary>Gradient norm and the other terms of the loss</summary>{others}</details>"
    return section("How they learn", learning_figures(columns) + note(text) + more)


def _gates(columns: Sequence[Column]) -> str:
    if not any(column.gates or column.numbers("gate_mean") for column in columns):
        return ""
    text = (
        "A gate mixes the branches channel by channel: 1 takes the Mamba branch alone, 0 the attention branch alone. "
        "Mean: over layers, channels and the tokens since the row before; deviation: over the tokens of the last gate "
        "record."
    )
    parts = [overview_of_gates(columns), note(text)]
    recorded = [column for column in columns if column.gates]
    if recorded:
        intervals = {str(column.settings.get("gate_monitor.interval", "?")) for column in recorded}
        layers = (
            f"Each record covers one optimizer step and is taken every {' or '.join(sorted(intervals))} steps: mean "
            "and standard deviation of a layer's gate over its tokens and channels. In the heat map records stand "
            "side by side at equal width; white is 1/2, red leans to Mamba, blue to attention, grey is a layer without "
            "a working gate. Its colours follow the run's own gates: mind the ends of each scale."
        )
        scale = f'<p class="note">Layers, first to last: <span class="layers" style="{LAYER_COLOURS}"></span></p>'
        parts += [gate_figures(recorded), scale, note(layers)]
    return section("What the gates do", "".join(parts))


def _speed(columns: Sequence[Column]) -> str:
    if not any(column.numbers("tokens_per_second") for column in columns):
        return ""
    text = (
        "Tokens of all devices, operations of one, both over the seconds of the steps of a row, evaluation and saving "
        "left out. Operations are those of the model: 6 a weight and token, 12 a pair of tokens that see each other "
        "and unit of head width, 12 a state element and token; what is computed again does not count. Memory is the "
        "most that one process has held so far."
    )
    return section("How fast, in how much memory", speed_figures(columns) + note(text))


def _origin(columns: Sequence[Column]) -> str:
    def of(get: Callable[[RunManifest], Cell]) -> Getter:
        return lambda column: None if column.manifest is None else get(column.manifest)

    libraries = dict.fromkeys(name for c in columns if c.manifest is not None for name in c.manifest.versions)
    rows: list[tuple[str, Getter]] = [
        ("directory", lambda c: str(c.path)),
        ("kind", lambda c: c.kind),
        ("started", of(lambda m: m.started)),
        ("revision", of(lambda m: m.git_revision or "installed package")),
        ("data fingerprint", of(lambda m: m.data_fingerprint)),
        ("started from", of(lambda m: m.parent_run)),
        ("command", of(lambda m: m.command)),
        ("resumed", of(lambda m: ", ".join(map(_resume, m.resumes)) or None)),
        *((name, of(partial(_version, name))) for name in libraries),
    ]
    text = "From manifest.json: as it was when the run began, and how it was resumed. Marked rows differ."
    return section(
        "Where they come from", table(columns, rows, ("revision", "data fingerprint", *libraries)) + note(text)
    )


def _resume(resume: RunResume) -> str:
    changes = ", ".join(f"{key}={value}" for key, value in resume.changed.items())
    return f"at step {resume.step}{f' with {changes}' if changes else ''}"


def _version(library: str, manifest: RunManifest) -> Cell:
    return manifest.versions.get(library)


def _settings(columns: Sequence[Column]) -> str:
    keys = list(dict.fromkeys(key for column in columns for key in column.settings))
    sections = list(dict.fromkeys(key.partition(".")[0] if "." in key else "run" for key in keys))
    parts = []
    for name in sections:
        inside = [key for key in keys if (key.partition(".")[0] if "." in key else "run") == name]
        settings = table(columns, [(key, _setting(key)) for key in inside], inside)
        parts.append(f"<details><summary>{escape(name)}</summary>{settings}</details>")
    return section("All settings", "".join(parts))


def _setting(key: str) -> Getter:
    def get(column: Column) -> Cell:
        if key not in column.settings:
            return None
        value = column.settings[key]
        if isinstance(value, (list, tuple)):
            return ", ".join(map(str, value)) or "none"
        return {None: "null", True: "true", False: "false"}.get(value, str(value)) if _is_plain(value) else str(value)

    return get


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _steps(column: Column) -> Cell:
    if not column.metrics:
        return None
    last = f"{column.metrics[-1]['step']:,}"
    wanted = column.settings.get("training.max_steps")
    return f"{last} of {wanted:,}" if isinstance(wanted, int) else last


def _last(column: Column, key: str, form: str) -> Cell:
    values = column.numbers(key)
    return format(values[-1], form) if values else None


def _best(column: Column, key: str) -> Cell:
    rows = column.rows(key)
    if not rows:
        return None
    step, value = min(rows, key=lambda row: row[1])
    return f"{value:.4f} (step {step:,})"


def _median(column: Column, key: str, form: str) -> Cell:
    values = column.numbers(key)
    return format(statistics.median(values), form) if values else None
