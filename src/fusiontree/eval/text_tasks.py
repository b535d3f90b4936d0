"""What a model finds again in texts: long-context tasks written into documents as in training, their answers scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from fusiontree.artifacts import AnswerStatistics, DistanceAnswers, TaskAnswers, TaskReport
from fusiontree.data.augment import MIN_TOKENS, Answer, LongContextTasks, TaskKind
from fusiontree.data.tokenizer import DocumentEncoder
from fusiontree.errors import InputError, nearest
from fusiontree.eval.eval_llm import tokenizer_for
from fusiontree.eval.texts import Texts
from fusiontree.models import HybridLanguageModel
from fusiontree.train.evaluation import (
    bucket_of,
    bucket_range,
    encoded_documents,
    evaluation_mode,
    hidden_in_pieces,
    logits_in_chunks,
    packed_rows,
)

TASKS = ("needle", "structured")
"""What can be written into a document: a fact asked for; a list whose values are asked for, or a sequence to copy."""


@dataclass(frozen=True)
class _Document:
    """A document with its tasks, every id plain."""

    ids: np.ndarray
    answers: list[Answer]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Scored:
    """An answer and how the model did."""

    answer: Answer
    is_right: bool
    loss: float  # sum over its tokens

    @property
    def tokens(self) -> int:
        return self.answer.stop - self.answer.start


def check_tasks(tasks: Sequence[str], where: str = "tasks") -> list[str]:
    """The tasks named, each once, in the order of `TASKS`.

    Raises:
        InputError: none is named, or one that there is not (the nearest is named); `where` says where the names are
            from.
    """
    for name in tasks:
        if name not in TASKS:
            close = nearest(name, TASKS)
            hint = f"did you mean {close!r}?" if close else f"there are {' and '.join(TASKS)}"
            raise InputError(f"{where}: there is no task {name!r}; {hint}")
    if not tasks:
        raise InputError(f"{where} names no task; there are {' and '.join(TASKS)}")
    return [name for name in TASKS if name in tasks]


def evaluate_tasks(
    model: HybridLanguageModel,
    texts: Texts,
    tasks: Sequence[str] = TASKS,
    *,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    piece: int = 2048,
    max_tokens: int | None = None,
    mixed_precision: Literal["bf16", "no"] = "no",
    progress: Callable[[int, int], None] = lambda read, tokens: None,
) -> TaskReport:
    """Writes tasks into every document that is long enough, and scores each answer, given all that stands before it.

    Args:
        model: as `fusiontree.load` returns it.
        texts: what to write the tasks into.
        tasks: of `TASKS`, the kinds of which each document gets one.
        name: of the model, for messages.
        tokenizer: the model's own if None.
        seed: what is written follows from it, the document and its number among the texts.
        piece: tokens of one forward pass; changes memory and speed, not the result.
        max_tokens: stop after the document that reaches this many tokens to predict, tasks not counted; None = all.
        mixed_precision: "bf16" computes under autocast, as training does.
        progress: called with the bytes of text and the tokens read so far.

    Raises:
        InputError: an unknown task, no tokenizer or one without digits, `piece` below 2, no document that is long
            enough, or one that with its tasks is longer than the model's learned time encoding.
    """
    wanted = check_tasks(tasks)
    encode = DocumentEncoder(tokenizer_for(model, tokenizer, name), separator_id=None)
    writer = LongContextTasks.for_encoder(
        encode,
        needle_in_haystack_prob=float("needle" in wanted),
        structured_task_prob=float("structured" in wanted),
        seed=seed,
        without_digits=f"evaluate {name} without tasks",
    )
    too_short = 0

    def written() -> Iterator[_Document]:
        nonlocal too_short
        for number, (_, ids) in enumerate(encoded_documents(encode, texts, max_tokens)):
            signed, answers = writer.write(ids, 0, number)
            if answers:
                yield _Document(np.where(signed < 0, ~signed, signed), answers)
            else:
                too_short += 1

    documents = tokens = 0
    scored: list[_Scored] = []
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=mixed_precision == "bf16")
    with autocast, evaluation_mode(model):
        for row in packed_rows(written(), piece):
            scored += _score_row(model, row, piece)
            documents += len(row)
            tokens += sum(map(len, row))
            progress(texts.bytes_read, tokens)
    if not scored:
        raise InputError(
            f"none of the {too_short} documents of the evaluation data has the {MIN_TOKENS} tokens that a document "
            "needs to carry a task: evaluate on longer texts, or without tasks"
        )
    return TaskReport(
        written=wanted,
        seed=seed,
        documents=documents,
        tokens=tokens,
        too_short=too_short,
        results=[_summary(kind, found) for kind in get_args(TaskKind) if (found := _of_kind(scored, kind))],
    )


def _score_row(model: HybridLanguageModel, row: list[_Document], piece: int) -> list[_Scored]:
    """Every answer of a row of documents, first to last."""
    starts = np.cumsum([0, *map(len, row)])[:-1].tolist()
    answers = [(answer, start) for document, start in zip(row, starts, strict=True) for answer in document.answers]
    ids = np.concatenate([document.ids for document in row]).astype(np.int64)
    is_answer = np.zeros(len(ids), dtype=bool)
    for answer, start in answers:
        is_answer[start + answer.start : start + answer.stop] = True
    losses, is_likeliest = np.zeros(len(ids)), np.zeros(len(ids), dtype=bool)
    for part, hidden in hidden_in_pieces(model, [document.ids for document in row], piece):
        # A token is predicted from the state behind the one before it.
        places = np.flatnonzero(is_answer[part.start + 1 : part.stop + 1])
        for chunk, logits in logits_in_chunks(model, hidden[0, torch.from_numpy(places).to(hidden.device)]):
            predicted = part.start + 1 + places[chunk]
            targets = torch.from_numpy(ids[predicted]).to(hidden.device)
            losses[predicted] = F.cross_entropy(logits, targets, reduction="none").cpu().numpy()
            is_likeliest[predicted] = (logits.argmax(-1) == targets).cpu().numpy()
    spans = [(answer, slice(start + answer.start, start + answer.stop)) for answer, start in answers]
    return [_Scored(answer, bool(is_likeliest[span].all()), float(losses[span].sum())) for answer, span in spans]


def _of_kind(scored: list[_Scored], kind: TaskKind) -> list[_Scored]:
    return [one for one in scored if one.answer.kind == kind]


def _summary(kind: TaskKind, scored: list[_Scored]) -> TaskAnswers:
    buckets = bucket_of(np.array([one.answer.distance for one in scored]))
    by_distance = [
        DistanceAnswers(
            **bucket_range(bucket),
            **_statistics([scored[place] for place in np.flatnonzero(buckets == bucket)]).model_dump(),
        )
        for bucket in np.unique(buckets).tolist()
    ]
    return TaskAnswers(task=kind, **_statistics(scored).model_dump(), by_distance=by_distance)


def _statistics(scored: list[_Scored]) -> AnswerStatistics:
    tokens = sum(one.tokens for one in scored)
    return AnswerStatistics(
        answers=len(scored),
        right=sum(one.is_right for one in scored) / len(scored),
        tokens=tokens,
        loss=sum(one.loss for one in scored) / tokens,
    )
