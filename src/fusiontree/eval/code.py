"""Completing Python: the ends of functions are held out, and predicted from all of the file before them.

The next line and its likeness are those of repository-level code completion (Lu et al. 2021, "CodeXGLUE"; Liu et al.
2023, "RepoBench"), on whatever files are given.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from fusiontree.artifacts import CodeReport
from fusiontree.data.tokenizer import DocumentEncoder
from fusiontree.deploy.runtime import InferenceRuntime, SamplingOptions, SchedulerSettings
from fusiontree.errors import InputError
from fusiontree.eval.eval_llm import tokenizer_for
from fusiontree.eval.texts import Texts
from fusiontree.models import HybridLanguageModel
from fusiontree.train.evaluation import evaluation_mode, hidden_in_pieces, logits_in_chunks

_PREFIX_BYTES = 2**28
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Ending:
    """The end of a function: characters start to stop of its file, the newline before its first line included."""

    start: int
    stop: int


def held_out(source: str) -> list[Ending]:
    """The later half of the body of each function that has two statements or more, docstring not counted.

    Functions inside functions belong to the outer one. The end begins with a line of its own.

    Args:
        source: a Python file, its lines ended by newlines alone.

    Raises:
        SyntaxError, ValueError: it is none.
    """
    starts = np.cumsum([0, *(len(line) + 1 for line in source.split("\n"))]).tolist()
    endings = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes and the like, in files that are only read
        tree = ast.parse(source)
    for function in _outermost(tree):
        body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
        first, before = body[(len(body) + 1) // 2 :], body[: (len(body) + 1) // 2]
        if not first or not before:
            continue
        line = min([first[0].lineno, *(one.lineno for one in getattr(first[0], "decorator_list", []))])
        if line <= (before[-1].end_lineno or line):  # statements that share a line
            continue
        assert function.end_lineno is not None
        endings.append(Ending(starts[line - 1] - 1, starts[function.end_lineno] - 1))
    return endings


def _outermost(node: ast.AST) -> Iterator[_Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield child
        else:
            yield from _outermost(child)


@dataclass(frozen=True)
class _Task:
    """One end, by its tokens in the file's: ids[:start] stand before it."""

    start: int
    stop: int
    line: str
    """Its first line."""


def evaluate_code(
    model: HybridLanguageModel,
    texts: Texts,
    *,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    piece: int = 2048,
    mixed_precision: Literal["bf16", "no"] = "no",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CodeReport:
    """How well a model completes the functions of Python files.

    Each end is predicted token by token, and its first line written by greedy decoding, from all of the file before it,
    the true ends of earlier functions included. A file is cut into tokens at the beginning and the end of each end.

    Args:
        model: as `fusiontree.load` returns it.
        texts: Python files.
        name: of the model, for messages.
        tokenizer: the model's own if None.
        piece: tokens of one forward pass; changes memory and speed, not the result.
        mixed_precision: "bf16" computes under autocast, as training does.
        progress: called with the functions done and all of them.

    Raises:
        InputError: no tokenizer, no function with an end to hold out, or a file that is longer than the model's learned
            time encoding.
    """
    encode = DocumentEncoder(tokenizer_for(model, tokenizer, name), separator_id=None)
    files: list[tuple[list[int], list[_Task]]] = []
    unreadable = read = 0
    for source, _ in texts:
        source = source.replace("\r\n", "\n").replace("\r", "\n")
        try:
            endings = held_out(source)
        except (SyntaxError, ValueError, RecursionError):
            unreadable += 1
            continue
        read += 1
        if endings:
            files.append(_encoded(encode, source, endings))
    total = sum(len(tasks) for _, tasks in files)
    if not total:
        raise InputError(
            f"none of the {read + unreadable} files of code is Python and holds a function of two statements or more, "
            "of which the end could be held out"
        )
    runtime = InferenceRuntime(
        model, encode.tokenizer, settings=SchedulerSettings(prefix_bytes=_PREFIX_BYTES, max_rows=1)
    )
    losses, tokens, right, likeness, done = 0.0, 0, 0, 0.0, 0
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=mixed_precision == "bf16")
    with autocast, evaluation_mode(model):
        for ids, tasks in files:
            losses += _loss(model, ids, tasks, piece)
            for task in tasks:
                tokens += task.stop - task.start
                written = _next_line(runtime, ids, task, encode)
                right += written == task.line
                likeness += similarity(written, task.line)
                done += 1
                progress(done, total)
    return CodeReport(
        data=texts.paths,
        files=read,
        unreadable=unreadable,
        functions=total,
        tokens=tokens,
        loss=losses / tokens,
        next_line_right=right / total,
        next_line_similarity=likeness / total,
    )


def _encoded(encode: DocumentEncoder, source: str, endings: Sequence[Ending]) -> tuple[list[int], list[_Task]]:
    ids: list[int] = list(encode.prefix)
    tasks, place = [], 0
    for ending in endings:
        ids += encode.plain(source[place : ending.start])
        start = len(ids)
        text = source[ending.start : ending.stop]
        ids += encode.plain(text)
        tasks.append(_Task(start, len(ids), text.split("\n")[1].rstrip()))
        place = ending.stop
    return ids, tasks


def _loss(model: HybridLanguageModel, ids: list[int], tasks: Sequence[_Task], piece: int) -> float:
    """Sum over the tokens of all ends, from one reading of the file."""
    row = np.array(ids)
    places = np.concatenate([np.arange(task.start, task.stop) for task in tasks])
    total = 0.0
    for part, hidden in hidden_in_pieces(model, [row], piece):
        # A token is predicted from the state behind the one before it.
        inside = places[(places > part.start) & (places <= part.stop)]
        before = torch.from_numpy(inside - 1 - part.start).to(hidden.device)
        targets = torch.from_numpy(row[inside]).to(hidden.device)
        for chunk, logits in logits_in_chunks(model, hidden[0, before]):
            total += F.cross_entropy(logits, targets[chunk], reduction="sum").item()
    return total


def _next_line(runtime: InferenceRuntime, ids: list[int], task: _Task, encode: DocumentEncoder) -> str:
    """What greedy decoding writes up to the end of the line; with room for twice the tokens of the true one."""
    room = 2 * len(encode.plain(f"\n{task.line}\n")) + 8
    longest = runtime.model.config.max_position_embeddings
    if runtime.model.config.srte_encoding == "learned":
        room = max(1, min(room, longest - task.start + 1))
    with runtime.stream_ids(ids[: task.start], SamplingOptions(max_new_tokens=room)) as stream:
        text = ""
        for written in stream:
            text += written
            if "\n" in text.lstrip("\n"):
                break
    return text.lstrip("\n").split("\n")[0].rstrip()


def similarity(one: str, other: str) -> float:
    """1 - Levenshtein distance / length of the longer text; 1 for equal ones."""
    if one == other:
        return 1.0
    distances = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        diagonal, distances[0] = distances[0], row
        for column, right in enumerate(other, start=1):
            kept = diagonal + (left != right)
            diagonal = distances[column]
            distances[column] = min(kept, distances[column] + 1, distances[column - 1] + 1)
    return 1 - distances[-1] / max(len(one), len(other))
