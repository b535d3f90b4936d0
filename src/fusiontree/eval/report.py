"""One self-contained page about a training run: pictures, numbers and how each was measured.

The page needs no network and no other file, follows the reader's light or dark theme, and fits a phone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fusiontree.artifacts import EvalReport, RunManifest
from fusiontree.atomic import atomic_write
from fusiontree.eval.page import page, pairs, picture, section
from fusiontree.train.loggers import format_duration


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast the model generates, and what it remembers."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    decode_tokens_per_second: float
    state_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything the page shows."""

    title: str
    subtitle: str
    manifest: RunManifest
    parameters: int
    metrics: Sequence[Mapping[str, Any]]
    """Rows of metrics.jsonl."""
    evaluation: EvalReport
    speed: Speed
    machine: Mapping[str, Any]
    samples: Sequence[Sample]
    sampling: str
    """How the samples were drawn."""
    seconds: Mapping[str, float]
    """Stage -> wall-clock time."""
    learning_curve: Path
    gates_by_step: Path | None
    gates_by_channel: Path | None
    perplexity_by_position: Path
    commands: Sequence[tuple[str, str]]
    """(command, what it does): where to go from here."""


def write_report(report: RunReport, path: Path) -> None:
    """Writes the page."""
    body = "\n".join(
        [
            f"<header><h1>{escape(report.title)}</h1><p>{escape(report.subtitle)}</p></header>",
            _tiles(report),
            _learning(report),
            _gates(report),
            _positions(report),
            _samples(report),
            _settings(report),
            _commands(report),
        ]
    )
    atomic_write(path, page(report.title, body))


def _tiles(report: RunReport) -> str:
    first, last = _evaluations(report)
    trained = [row for row in report.metrics if "tokens_per_second" in row]
    tiles = [
        (f"{first:.2f} → {last:.2f}", "validation loss, nats per token"),
        (f"{report.evaluation.perplexity:.1f}", "perplexity on held-out documents"),
        (f"{report.evaluation.settings['bits_per_byte']:.2f}", "bits per byte of held-out text"),
        (f"{report.parameters / 1e6:.2f} M", "parameters"),
        (f"{_median([row['tokens_per_second'] for row in trained]):,.0f}", "training, tokens per second"),
        (f"{report.speed.decode_tokens_per_second:,.0f}", "decoding, tokens per second"),
    ]
    cells = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in tiles)
    return f'<section class="tiles">{cells}</section>'


def _learning(report: RunReport) -> str:
    settings, rows = report.manifest.config["training"], [row for row in report.metrics if "eval_loss" in row]
    batches = settings["eval_batches"]
    measured = (
        f"Training loss: the language-model loss, averaged over the tokens of {settings['log_interval']} steps. "
        f"Validation loss: the same {rows[-1]['eval_tokens']:,} tokens of held-out documents each time "
        f"({f'{batches} batches' if batches else 'all batches'} of packed rows)."
    )
    evaluations = "".join(
        f"<tr><td>{row['step']}</td><td>{row['eval_loss']:.4f}</td><td>{row['eval_perplexity']:,.1f}</td></tr>"
        for row in rows
    )
    table = (
        f"<table class=numbers><tr><th>step</th><th>validation loss</th><th>perplexity</th></tr>{evaluations}</table>"
    )
    return section("The model learns", picture(report.learning_curve, "Loss over steps", measured) + table)


def _gates(report: RunReport) -> str:
    if report.gates_by_step is None or report.gates_by_channel is None:
        return ""
    interval = report.manifest.config["gate_monitor"]["interval"]
    text = (
        "<p>Every block runs a Mamba branch and an attention branch side by side. A gate mixes them channel by "
        "channel: 1 takes the Mamba branch alone, 0 the attention branch alone.</p>"
    )
    by_step = f"Mean gate over all tokens and channels of one training step, recorded every {interval} steps."
    by_channel = "Mean gate of each channel over the tokens of the last recorded step."
    return section(
        "What the gates do",
        text
        + picture(report.gates_by_step, "Mean gate by layer and step", by_step)
        + picture(report.gates_by_channel, "Mean gate by layer and channel", by_channel),
    )


def _positions(report: RunReport) -> str:
    evaluation, length = report.evaluation, report.manifest.config["training"]["max_seq_length"]
    measured = (
        f"{evaluation.tokens:,} tokens of {evaluation.settings['documents']} whole documents that training never saw: "
        f"{evaluation.settings['measured']}. Rows in training were {length} tokens long; what lies further right shows "
        "how the model reads on beyond them."
    )
    rows = "".join(
        f"<tr><td>{bucket.start:,} – {bucket.end - 1:,}</td><td>{bucket.tokens:,}</td>"
        f"<td>{bucket.perplexity:,.1f}</td></tr>"
        for bucket in evaluation.by_position
    )
    table = f"<table class=numbers><tr><th>place in document</th><th>tokens</th><th>perplexity</th></tr>{rows}</table>"
    drawn = picture(report.perplexity_by_position, "Perplexity by place in the document", measured)
    return section("How far it sees", drawn + table)


def _samples(report: RunReport) -> str:
    shown = "".join(
        f"<pre><mark>{escape(sample.prompt)}</mark>{escape(sample.text)}</pre>" for sample in report.samples
    )
    note = f"<p class=note>The prompts are marked. {escape(report.sampling)}</p>"
    return section("What it writes", shown + note)


def _settings(report: RunReport) -> str:
    speed, first_last = report.speed, _evaluations(report)
    trained = [row for row in report.metrics if "tokens_per_second" in row]
    rate = _median([row["tokens_per_second"] for row in trained])
    processor = report.machine.get("gpu") or f"{report.machine['processor']}, {report.machine['threads']} threads"
    results = [
        ("Validation loss", f"{first_last[0]:.4f} before training, {first_last[1]:.4f} after"),
        ("Loss on whole held-out documents", f"{report.evaluation.loss:.4f} nats per token"),
        ("Tokens trained on", f"{trained[-1]['tokens']:,}"),
        (
            "Training speed",
            f"{rate:,.0f} tokens/s, median over the run",
        ),
        (
            "Decoding speed",
            f"{speed.decode_tokens_per_second:,.1f} tokens/s, from the stamps of {speed.new_tokens} streamed tokens "
            f"after a prompt of {speed.prompt_tokens}, one sequence",
        ),
        ("First token", f"{1e3 * speed.first_token_seconds:,.0f} ms after a prompt of {speed.prompt_tokens} tokens"),
        (
            "State of one sequence",
            f"{speed.state_bytes / 1e3:,.0f} kB at {speed.prompt_tokens + speed.new_tokens} tokens, allocated",
        ),
        *((f"Time: {stage}", format_duration(seconds)) for stage, seconds in report.seconds.items()),
        ("Machine", processor),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.manifest.versions.items())),
        ("Revision", report.manifest.git_revision or "installed package"),
        ("Command", report.manifest.command),
    ]
    parts = ["<h3>Results</h3>", pairs(results)]
    for name, settings in report.manifest.config.items():
        if isinstance(settings, Mapping) and settings:
            chosen = [(key, _shown(value)) for key, value in settings.items() if value not in (None, [], ())]
            parts += [f"<details><summary>Settings: {escape(name)}</summary>", pairs(chosen), "</details>"]
    return section("Results and settings", "".join(parts))


def _commands(report: RunReport) -> str:
    items = "".join(
        f"<dt><code>{escape(command)}</code></dt><dd>{escape(what)}</dd>" for command, what in report.commands
    )
    return section("Go on from here", f"<dl>{items}</dl>")


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _evaluations(report: RunReport) -> tuple[float, float]:
    """Validation loss at the beginning and at the end."""
    losses = [row["eval_loss"] for row in report.metrics if "eval_loss" in row]
    return losses[0], losses[-1]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
