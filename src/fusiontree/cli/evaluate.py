"""`fusiontree eval`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from fusiontree.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from fusiontree.artifacts import AnswerStatistics, EvalReport, TaskReport
    from fusiontree.eval.texts import Texts
    from fusiontree.models import HybridLanguageModel

REPORT = "eval_report.json"
PICTURE = "perplexity_by_position.png"


def evaluate(
    model: Path = typer.Argument(..., help="Model folder, or a run directory, whose newest checkpoint is taken."),
    more: list[str] = typer.Argument(None, metavar="[FILES]...", help="More files, as --data *.jsonl gives them."),
    data: list[str] = typer.Option(..., "--data", help="Files or globs: .jsonl, or whole texts of any other suffix."),
    by_position: bool = typer.Option(False, "--by-position", help="Also tabulate perplexity by place in the document."),
    tasks: str = typer.Option(
        "", "--tasks", help="Also write needle, structured (commas between) into the texts and score the answers."
    ),
    seed: int = typer.Option(0, "--seed", help="Of what --tasks writes."),
    out: Path = typer.Option(None, "--out", help="Folder for what is written; default: MODEL."),
    text_key: str = typer.Option("text", "--text-key", help="Key of a JSONL record that holds its text."),
    max_tokens: int = typer.Option(None, "--max-tokens", min=1, help="Stop after the document that reaches so many."),
    piece: int = typer.Option(2048, "--piece", min=2, help="Tokens of a forward pass: changes memory and speed alone."),
    mixed_precision: str = typer.Option("no", "--mixed-precision", help="bf16 = under autocast, as in training."),
    device: str = typer.Option(None, "--device", help="cpu or cuda; default: cuda where there is a device."),
    dtype: str = typer.Option(None, "--dtype", help="float32, bfloat16 or float16; default: as saved."),
) -> None:
    """Perplexity of a model on held-out text: each token once, predicted from all of its document before it.

    Writes eval_report.json and perplexity_by_position.png. Bits per byte compare models with different tokenizers.
    --tasks reads the texts once more, with facts, lists and sequences in them that are asked for at the end.
    """
    if mixed_precision not in ("bf16", "no"):
        raise InputError(f"--mixed-precision must be bf16 or no, got {mixed_precision!r}")
    from fusiontree.artifacts import make_directory
    from fusiontree.cli._options import dtype_named
    from fusiontree.deploy.loading import load
    from fusiontree.eval.figures import plot_perplexity_by_position
    from fusiontree.eval.text_tasks import check_tasks
    from fusiontree.eval.texts import Texts

    wanted = check_tasks([part.strip() for part in tasks.split(",") if part.strip()], "--tasks") if tasks else []
    folder = out or model
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; name a folder")
    texts = Texts([*data, *(more or [])], text_key=text_key, where="--data")
    loaded = load(model, device=device, dtype=dtype_named(dtype))
    make_directory(folder, "--out")
    report = _run(loaded, texts, str(model), wanted, seed, piece, max_tokens, mixed_precision)
    print_report(report, by_position=by_position)
    report.save(folder / REPORT)
    picture = plot_perplexity_by_position(report, folder / PICTURE)
    for path in (folder / REPORT, picture):
        print(path)


def _run(
    model: HybridLanguageModel,
    texts: Texts,
    name: str,
    tasks: list[str],
    seed: int,
    piece: int,
    max_tokens: int | None,
    mixed_precision: str,
) -> EvalReport:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from fusiontree.eval.eval_llm import evaluate_perplexity
    from fusiontree.eval.text_tasks import evaluate_tasks

    precision: Literal["bf16", "no"] = "bf16" if mixed_precision == "bf16" else "no"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
    )
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:

        def shown_as(description: str) -> Callable[[int, int], None]:
            task = bar.add_task(description, total=texts.num_bytes, tokens=0)
            return lambda read, tokens: bar.update(task, completed=read, tokens=tokens)

        # Tasks first: what can be wrong with them is then said before the longer wait.
        found = None
        if tasks:
            found = evaluate_tasks(
                model,
                texts,
                tasks,
                name=name,
                seed=seed,
                piece=piece,
                max_tokens=max_tokens,
                mixed_precision=precision,
                progress=shown_as("tasks"),
            )
        report = evaluate_perplexity(
            model,
            texts,
            name=name,
            piece=piece,
            max_tokens=max_tokens,
            mixed_precision=precision,
            progress=shown_as("eval"),
        )
        return report.model_copy(update={"tasks": found})


def print_report(report: EvalReport, *, by_position: bool) -> None:
    """Prints a report as tables."""
    import math

    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    settings = report.settings
    console.print(f"{report.model} on {_shortened(report.data)}", highlight=False, markup=False, soft_wrap=True)
    table = Table(show_header=False)
    table.add_column(justify="right")
    for value, meaning in (
        (f"{report.perplexity:.3f}", "perplexity per token"),
        (f"{report.loss:.4f}", "loss, nats per token"),
        (f"{settings['bits_per_byte']:.4f}", "bits per byte of text"),
        (f"{report.tokens:,}", "tokens predicted"),
        (f"{settings['documents']:,}", "documents"),
        (f"{settings['tokens_per_second']:,.0f}", f"tokens per second ({settings['seconds']:.1f} s)"),
        (f"{sum(settings['skipped'].values()):,}", f"records skipped{_kinds(settings['skipped'])}"),
    ):
        table.add_row(value, meaning)
    console.print(table)
    if by_position:
        places = Table("places", "tokens", "loss", "perplexity", title="By place in the document")
        for column in places.columns:
            column.justify = "right"
        for bucket in report.by_position:
            perplexity = f"{math.exp(min(bucket.loss, 700)):.3f}"
            span = f"{bucket.start:,} – {bucket.end - 1:,}"
            places.add_row(span, f"{bucket.tokens:,}", f"{bucket.loss:.4f}", perplexity)
        console.print(places)
    if report.tasks is not None:
        console.print(_tasks_table(report.tasks))


def _tasks_table(tasks: TaskReport) -> Table:
    from rich.table import Table

    title = f"Tasks in {tasks.documents:,} documents (seed {tasks.seed})"
    if tasks.too_short:
        title += f", {tasks.too_short:,} too short for any"
    table = Table("task", "tokens between", "answers", "right", "loss", title=title)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(task: str, distance: str, row: AnswerStatistics, *, is_last: bool) -> None:
        table.add_row(
            task, distance, f"{row.answers:,}", f"{100 * row.right:.1f} %", f"{row.loss:.4f}", end_section=is_last
        )

    for result in tasks.results:
        add(result.task, "all", result, is_last=False)
        for distance in result.by_distance:
            is_last = distance is result.by_distance[-1]
            add("", f"{distance.start:,} – {distance.end - 1:,}", distance, is_last=is_last)
    return table


def _shortened(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _kinds(skipped: dict[str, int]) -> str:
    return ": " + ", ".join(f"{count} {kind}" for kind, count in skipped.items()) if skipped else ""
