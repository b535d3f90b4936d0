"""`fusiontree quickstart`."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from fusiontree.artifacts import EvalReport
    from fusiontree.eval.report import RunReport, Sample, Speed
    from fusiontree.models import HybridLanguageModel
    from fusiontree.train.settings import RunSettings

from fusiontree.cli import _quickstart as steps
from fusiontree.errors import InputError


def quickstart(
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Settings that override the quickstart's."
    ),
    out: Path = typer.Option(Path("runs/quickstart"), "--out", help="The run directory."),
    corpus_bytes: int = typer.Option(steps.CORPUS_BYTES, "--corpus-bytes", help="Text to use, in bytes."),
    vocab_size: int = typer.Option(steps.VOCABULARY, "--vocab-size", help="Tokens of the tokenizer that is trained."),
) -> None:
    """Train a small model, look at what it learned and let it write, in minutes on two CPU cores.

    The text is this Python's own standard library and language reference, so no download is needed. Leaves a run
    directory whose index.html shows everything on one page. Interrupted, it goes on where it stopped when run again.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder for the run")
    settings = steps.quickstart_settings(out, overrides or [])
    watch = steps.Stopwatch()
    _say(f"1/4  set-up: text and tokenizer in {out}")
    _say(f"     {steps.prepare_data(out, corpus_bytes, vocab_size)}")

    import torch

    from fusiontree.deploy.loading import load
    from fusiontree.plots import plot_run
    from fusiontree.runs import read_metrics
    from fusiontree.train import train
    from fusiontree.train.stop import EXIT_CODES

    seconds = {"set-up": watch.seconds}
    _say(f"2/4  training: {settings.training.max_steps} steps")
    watch = steps.Stopwatch()
    result = train(settings, resume="auto")
    if result.stopped_by is not None:
        _say("interrupted: run the same command again to go on from here")
        raise typer.Exit(EXIT_CODES[result.stopped_by])
    metrics = read_metrics(out)
    # Where the run was interrupted, the log knows how long all of its parts took.
    logged = next(row["elapsed"] for row in reversed(metrics) if "elapsed" in row)
    seconds["training"] = max(watch.seconds, logged)

    watch = steps.Stopwatch()
    _say("3/4  evaluation on held-out documents, a sample of text")
    device = None if settings.system.device == "auto" else settings.system.device
    model = load(out, device=device)
    evaluation = steps.evaluate_run(settings, model)
    samples = steps.write_samples(out, model)
    speed = steps.measure_speed(model)
    seconds["evaluation"] = watch.seconds

    _say("4/4  pictures and page")
    pictures = {path.name: path for path in plot_run(out)}
    report = _report(settings, model, metrics, evaluation, samples, speed, seconds, pictures)
    from fusiontree.eval.report import write_report

    write_report(report, out / "index.html")
    _say(_summary(report, torch.get_num_threads()))


def _report(
    settings: RunSettings,
    model: HybridLanguageModel,
    metrics: list[dict[str, Any]],
    evaluation: EvalReport,
    samples: list[Sample],
    speed: Speed,
    seconds: dict[str, float],
    pictures: dict[str, Path],
) -> RunReport:
    from fusiontree.artifacts import RunManifest
    from fusiontree.cli.evaluate import PICTURE
    from fusiontree.deploy.costs import describe_machine
    from fusiontree.eval.peers import count_parameters
    from fusiontree.eval.report import RunReport
    from fusiontree.plots import GATES_BY_CHANNEL, GATES_BY_STEP, LEARNING_CURVE

    run, c = Path(settings.output_dir), model.config
    name = shlex.quote(str(run))
    drawn = ", ".join(f"{option.replace('_', ' ')} {value}" for option, value in steps.SAMPLING.items())
    return RunReport(
        title="FusionTree quickstart",
        subtitle=(
            f"A hybrid Mamba + attention language model of {c.num_layers} layers and width {c.hidden_size}, trained "
            "from nothing on the source of Python's standard library and the language reference."
        ),
        manifest=RunManifest.load(run / "manifest.json"),
        parameters=count_parameters(model),
        metrics=metrics,
        evaluation=evaluation,
        speed=speed,
        machine=describe_machine(model.device),
        samples=samples,
        sampling=f"Up to {steps.SAMPLE_TOKENS} new tokens each, drawn with {drawn}.",
        seconds=seconds,
        learning_curve=pictures[LEARNING_CURVE],
        gates_by_step=pictures.get(GATES_BY_STEP),
        gates_by_channel=pictures.get(GATES_BY_CHANNEL),
        perplexity_by_position=run / "plots" / PICTURE,
        commands=[
            (f'fusiontree generate {name} --prompt "def "', "lets the model write more"),
            (f"fusiontree gates {name}", "tabulates what the gates of each layer do"),
            (f"fusiontree eval {name} --data FILES --by-position", "measures perplexity on texts of your own"),
            (f"fusiontree bench {name} --peers llama,falcon_h1", "compares speed and memory with models of equal size"),
            ("fusiontree train --config FILE data.train_paths=FILES", "trains on your own text; configs/ has examples"),
        ],
    )


def _summary(report: RunReport, threads: int) -> str:
    run, losses = report.evaluation.model, [row["eval_loss"] for row in report.metrics if "eval_loss" in row]
    seconds = report.seconds
    minutes = (seconds["training"] + seconds["evaluation"]) / 60
    lines = [
        "",
        f"set-up {seconds['set-up']:.0f} s",
        f"training {seconds['training']:.0f} s + evaluation {seconds['evaluation']:.0f} s = {minutes:.1f} minutes "
        f"({threads} threads)",
        f"validation loss {' -> '.join(f'{loss:.3f}' for loss in losses)}",
        f"perplexity {report.evaluation.perplexity:.2f} on {report.evaluation.tokens:,} held-out tokens",
        "",
        f"the page      {run}/index.html",
        f"the text      {run}/sample.txt",
        f"the pictures  {run}/plots/",
        "",
        "next:" if shutil.which("fusiontree") else f"next (first: source {shlex.quote(sys.prefix)}/bin/activate):",
        *(f"  {command}" for command, _ in report.commands),
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)
