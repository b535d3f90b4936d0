"""What `fusiontree eval` has found, as tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fusiontree.artifacts import (
    AnswerStatistics,
    CodeReport,
    EvalReport,
    HarnessResult,
    MQARReport,
    PasskeyReport,
    TaskReport,
)


def print_report(report: EvalReport, *, by_position: bool) -> None:
    """Prints a report as tables."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    on = f" on {_shortened(report.data)}" if report.data else ""
    if weights := report.settings.get("weights"):
        on = f", weights in {weights},{on}"
    console.print(f"{report.model}{on}", highlight=False, markup=False, soft_wrap=True)
    if report.loss is not None:
        console.print(_text_table(report))
    if by_position and report.by_position:
        console.print(_positions_table(report))
    if report.tasks is not None:
        console.print(_tasks_table(report.tasks))
    if report.passkeys is not None:
        console.print(_passkeys_table(report.passkeys))
    if report.mqar is not None:
        console.print(_mqar_table(report.mqar))
    if report.code is not None:
        console.print(_code_table(report.code))
    if report.harness:
        console.print(_harness_table(report.harness))


def _text_table(report: EvalReport) -> Table:
    settings = report.settings
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
    return table


def _positions_table(report: EvalReport) -> Table:
    table = Table("places", "tokens", "loss", "perplexity", title="By place in the document")
    for column in table.columns:
        column.justify = "right"
    for bucket in report.by_position:
        place = f"{bucket.start:,} – {bucket.end - 1:,}"
        table.add_row(place, f"{bucket.tokens:,}", f"{bucket.loss:.4f}", f"{bucket.perplexity:.3f}")
    return table


def _passkeys_table(passkeys: PasskeyReport) -> Table:
    title = f"Passkeys found, {passkeys.rows} a cell, by depth and tokens of the text"
    return _found_table(title, "depth", passkeys.lengths, [f"{depth:g}" for depth in passkeys.depths], passkeys.right)


def _mqar_table(mqar: MQARReport) -> Table:
    title = f"Associative recall (MQAR), {mqar.rows} rows a cell: answers found, by pairs and tokens of a row"
    return _found_table(title, "pairs", mqar.lengths, [f"{number:,}" for number in mqar.pairs], mqar.right)


def _found_table(title: str, corner: str, lengths: list[int], names: list[str], right: list[list[float]]) -> Table:
    table = Table(corner, *(f"{length:,}" for length in lengths), title=title)
    for column in table.columns:
        column.justify = "right"
    for name, shares in zip(names, right, strict=True):
        table.add_row(name, *(f"{100 * share:.0f} %" for share in shares))
    return table


def _code_table(code: CodeReport) -> Table:
    table = Table(show_header=False, title=f"Ends of functions in {code.files:,} Python files")
    table.add_column(justify="right")
    for value, meaning in (
        (f"{100 * code.next_line_right:.1f} %", "next lines written exactly"),
        (f"{code.next_line_similarity:.3f}", "likeness of next lines, 1 = equal"),
        (f"{code.loss:.4f}", "loss, nats per token of the ends"),
        (f"{code.functions:,}", f"functions, {code.tokens:,} tokens in their ends"),
        (f"{code.unreadable:,}", "files that are not Python"),
    ):
        table.add_row(value, meaning)
    return table


def _harness_table(harness: dict[str, list[HarnessResult]]) -> Table:
    table = Table("task", "metric", "value", "± error", "examples", "shots", title="lm-evaluation-harness")
    for column in table.columns[2:]:
        column.justify = "right"
    for result in (result for results in harness.values() for result in results):
        for place, (metric, value) in enumerate(result.metrics.items()):
            error = result.errors.get(metric)
            counted = [result.samples, result.shots] if place == 0 else [None, None]
            table.add_row(
                result.task if place == 0 else "",
                metric,
                f"{value:,.4f}",
                "" if error is None else f"{error:.4f}",
                *("" if number is None else f"{number:,}" for number in counted),
            )
    return table


def _tasks_table(tasks: TaskReport) -> Table:
    title = f"Tasks in {tasks.documents:,} document{'s' if tasks.documents != 1 else ''} (seed {tasks.seed})"
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
