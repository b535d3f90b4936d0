"""`fusiontree report`."""

from __future__ import annotations

from pathlib import Path

import typer


def report(
    runs: list[Path] = typer.Argument(..., metavar="RUN...", help="Directories of training runs, or of models."),
    out: Path = typer.Option(Path("report.html"), "--out", "-o", help="The page."),
) -> None:
    """Show runs side by side on one page: settings, curves, gates, speed, memory, the cut, evaluations, origins.

    Reads what lies in the directories (config.yaml, manifest.json, metrics.jsonl, gates.jsonl, prune_plan.json,
    eval_report.json, heal_report.json, bench.json) and writes one HTML file that needs no network and no other file.
    """
    from fusiontree.errors import InputError
    from fusiontree.eval.run_report import write_run_report

    if out.is_dir():
        raise InputError(f"--out {out} is a directory; name a file, such as {out / 'report.html'}")
    write_run_report(runs, out)
    print(out)
