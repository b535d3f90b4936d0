"""What evaluations of a model have found."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from fusiontree.artifacts.base import Artifact, Record, library_versions


def perplexity_of(loss: float) -> float:
    """exp(loss) of a mean loss in nats per token; infinite where that overflows."""
    return math.inf if loss >= 700 else math.exp(loss)


class PositionLoss(Record):
    """Loss of the tokens at document positions start <= position < end."""

    start: int
    end: int
    tokens: int
    loss: float
    """Mean, in nats per token."""

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)


class AnswerStatistics(Record):
    """How well answers are known, each predicted from all that stands before it."""

    answers: int
    right: float
    """Share of the answers of which every token is the likeliest next one, as greedy decoding would have to find it."""
    tokens: int
    """Of all answers."""
    loss: float
    """Mean, in nats per token."""


class DistanceAnswers(AnswerStatistics):
    """Those with start <= tokens between the clue's end and the question's start < end."""

    start: int
    end: int


class TaskAnswers(AnswerStatistics):
    """Those of one kind of task."""

    task: Literal["needle", "recall", "copy"]
    """A fact asked for, a value of a list, a sequence repeated."""
    by_distance: list[DistanceAnswers]


class TaskReport(Record):
    """What a model finds again in documents that long-context tasks were written into."""

    written: list[str]
    """What was written into every document that is long enough: `needle`, `structured` (a list or a sequence)."""
    seed: int
    """What was written follows from it and the documents' numbers."""
    documents: int
    """Documents with tasks."""
    tokens: int
    """Tokens in them, tasks included."""
    too_short: int
    """Documents left out because they are too short to carry a task."""
    results: list[TaskAnswers]


class PasskeyReport(Record):
    """Which passkeys a model finds again, over a grid of depths and lengths."""

    lengths: list[int]
    """Tokens of a row."""
    depths: list[float]
    """Where the passkey stands: 0 at the row's start, 1 right before the question."""
    rows: int
    """Passkeys in each cell."""
    digits: int
    """Tokens of a passkey."""
    seed: int
    filler: list[str]
    """Files that they stand in; empty: a few sentences over and over."""
    right: list[list[float]]
    """For each depth the share of those found at each length."""


class MQARReport(Record):
    """What a model finds in multi-query associative recall, over a grid of pairs and lengths."""

    lengths: list[int]
    """Tokens of a row."""
    pairs: list[int]
    """Key-value pairs of a row; the value of each key is asked for once."""
    rows: int
    """Rows in each cell."""
    ids: int
    """Different token ids in use."""
    seed: int
    right: list[list[float]]
    """For each number of pairs the share of answers found at each length."""
    loss: list[list[float]]
    """Likewise their mean loss, in nats per answer."""


class CodeReport(Record):
    """How well a model completes the functions of Python files."""

    data: list[str]
    """Files."""
    files: int
    """That are Python."""
    unreadable: int
    """That are not."""
    functions: int
    """Whose ends were held out."""
    tokens: int
    """Of the ends."""
    loss: float
    """Mean over them, in nats per token."""
    next_line_right: float
    """Share of the ends of which greedy decoding writes the first line."""
    next_line_similarity: float
    """Mean of 1 - Levenshtein distance / length of the longer one, between the line written and the true one."""


class HarnessResult(Record):
    """One task of lm-evaluation-harness, or a group of them."""

    task: str
    metrics: dict[str, float]
    """As the harness names them, `acc` or, of a filter of its own, `exact_match,strict-match`."""
    errors: dict[str, float] = {}
    """Standard errors by the same names, where the harness gives one."""
    samples: int | None = None
    """Examples scored; None for a group."""
    shots: int | None = None
    """Worked examples before each question."""
    version: str | None = None
    """Of the task."""


class EvalReport(Artifact):
    """How good a model is: how well it predicts a text, and whatever else was asked for."""

    KIND = "eval_report"
    # 1 knows no `tasks`; 2 has a text in any case, no `passkeys`, `code` and `harness`; 3 no `mqar`; 4 no `step`
    VERSION = 5

    model: str
    """Path or name of the model."""
    step: int | None = None
    """Optimizer steps of the run's checkpoint that was evaluated; None where it was none, or is not known."""
    data: list[str] = []
    """Files evaluated."""
    tokens: int = 0
    """Tokens predicted."""
    loss: float | None = None
    """Mean, in nats per token; None where no text was evaluated."""
    perplexity: float | None = None
    """exp(loss), per token of the model's own tokenizer."""
    by_position: list[PositionLoss] = []
    tasks: TaskReport | None = None
    """What is found again in the same documents, where that was asked for; all else is about the texts as they are."""
    passkeys: PasskeyReport | None = None
    mqar: MQARReport | None = None
    code: CodeReport | None = None
    harness: dict[str, list[HarnessResult]] = {}
    """Of lm-evaluation-harness: the name of a task, group or tag that was asked for -> what belongs to it."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """How it was measured: context length, data type, device, limits."""
    parts: dict[str, str] = {}
    """What was measured -> digest of all that its figures depend on: an equal one need not be measured again."""
    versions: dict[str, str] = Field(default_factory=lambda: library_versions())
