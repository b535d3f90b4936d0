"""The last evaluations on the page that compares models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from fusiontree.artifacts import EvalReport, MQARReport, PasskeyReport
from fusiontree.eval.columns import Column
from fusiontree.eval.page import section
from fusiontree.eval.run_figures import evaluation_figure, grid_figures
from fusiontree.eval.tables import Cell, Getter, note, number, outdated, table


def evaluation_section(columns: Sequence[Column]) -> str:
    found = [column for column in columns if column.evaluation is not None]
    if not found:
        return ""

    def of(get: Callable[[EvalReport], Cell]) -> Getter:
        return lambda column: None if column.evaluation is None else get(column.evaluation)

    rows: list[tuple[str, Getter]] = [
        ("loss, nats per token", of(lambda e: number(e.loss, ".4f"))),
        ("perplexity per token", of(lambda e: number(e.perplexity, ",.3f"))),
        ("bits per byte", of(lambda e: number(e.settings.get("bits_per_byte"), ".4f"))),
        ("tokens", of(lambda e: f"{e.tokens:,}" if e.tokens else None)),
        ("documents", of(lambda e: number(e.settings.get("documents"), ",.0f"))),
        ("files", of(lambda e: ", ".join(e.data) or None)),
        ("model", of(lambda e: e.model)),
        ("weights in", of(weights_of)),
        ("measured", of(lambda e: str(e.settings.get("measured", "")) or None)),
    ]
    tasks = [c.evaluation.tasks for c in found if c.evaluation is not None and c.evaluation.tasks is not None]
    kinds = dict.fromkeys(result.task for report in tasks for result in report.results)
    rows += [(f"{task}: answers found", of(partial(answers_found, task))) for task in kinds]
    rows += [
        ("Python: next lines right", of(lambda e: number(e.code.next_line_right, ".1%") if e.code else None)),
        (
            "Python: likeness of next lines",
            of(lambda e: number(e.code.next_line_similarity, ".3f") if e.code else None),
        ),
        ("Python: loss of functions' ends", of(lambda e: number(e.code.loss, ".4f") if e.code else None)),
        ("passkeys found", of(lambda e: found_by_length(e.passkeys))),
        ("answers found in associative recall (MQAR)", of(lambda e: found_by_length(e.mqar))),
    ]
    scored = [c.evaluation.harness for c in found if c.evaluation is not None]
    metrics = dict.fromkeys(
        (result.task, metric)
        for harness in scored
        for results in harness.values()
        for result in results
        for metric in result.metrics
    )
    rows += [(f"{task}: {metric}", of(partial(_harness, task, metric))) for task, metric in metrics]
    text = (
        "The last fusiontree eval of each: every token of whole held-out documents once, predicted from all of its "
        "document before it. Losses compare where files and tokens are the same, bits per byte also between "
        "tokenizers; rows that stand in the way are marked. The depth of a passkey is 0 at the row's start and 100 % "
        "right before the question; it is found where each of its digits is the likeliest next token, and so is an "
        "answer of associative recall."
    )
    return section(
        "Last evaluation",
        table(columns, rows, ("tokens", "documents", "files", "weights in", "measured"))
        + outdated(columns, lambda column: column.evaluation.step if column.evaluation else None)
        + evaluation_figure(columns)
        + grid_figures(columns)
        + note(text),
    )


def answers_found(task: str, evaluation: EvalReport) -> Cell:
    found = [result for result in evaluation.tasks.results if result.task == task] if evaluation.tasks else []
    return f"{number(found[0].right, '.1%')} of {found[0].answers:,}" if found else None


def found_by_length(grid: PasskeyReport | MQARReport | None) -> Cell:
    if grid is None:
        return None
    by_length = zip(grid.lengths, *grid.right, strict=True)
    return ", ".join(f"{number(sum(shares) / len(shares), '.0%')} in {length:,}" for length, *shares in by_length)


def _harness(task: str, metric: str, evaluation: EvalReport) -> Cell:
    for result in (result for results in evaluation.harness.values() for result in results):
        if result.task == task and metric in result.metrics:
            value, error = number(result.metrics[metric], ",.4f"), number(result.errors.get(metric), ".4f")
            return value if error is None else f"{value} ± {error}"
    return None


def weights_of(evaluation: EvalReport) -> Cell:
    """The type of the weights, and what they were rounded to."""
    dtype, rounded = (evaluation.settings.get(name) for name in ("dtype", "weights"))
    return f"{rounded}, computing in {dtype}" if rounded else dtype
