"""Multi-query associative recall (Arora et al. 2023, "Zoology: Measuring and improving recall in efficient language
models"): a row lists pairs of a key and its value, then asks for the value of every key once, at places drawn so that
near ones are likelier. What fills the rest asks nothing.

Shapes: B rows, T tokens, n pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from fusiontree.artifacts import MQARReport
from fusiontree.data.batch import IGNORED_LABEL, Batch
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel
from fusiontree.train.evaluation import evaluation_mode, hidden_in_pieces, logits_in_chunks

#: The k-th place behind the list of pairs is drawn for a question with weight k^(POWER - 1), as published.
POWER = 0.01


@dataclass(frozen=True, kw_only=True)
class MQARTask:
    """The sizes of the task.

    length: tokens T in a row.
    pairs: n key-value pairs, each asked for once.
    vocab_size: ids in use; 0 fills, the lower half of the rest are keys, the upper half values.

    Raises:
        InputError: the pairs and their questions do not fit into a row, or there are fewer keys than pairs.
    """

    length: int = 256
    pairs: int = 16
    vocab_size: int = 512

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.length < 4 * self.pairs:
            most = self.length // 4
            room = f"1 to {most} pairs" if most > 1 else "one pair" if most else "no pair"
            raise InputError(
                f"a row of {self.length} tokens has room for {room} (a pair and its question take four tokens), got "
                f"{self.pairs} pairs: take longer rows or fewer pairs"
            )
        if self.keys < self.pairs:
            raise InputError(f"{self.vocab_size} token ids leave {self.keys} keys for {self.pairs} pairs: use more ids")

    @property
    def keys(self) -> int:
        """Number of different keys; there are as many values."""
        return (self.vocab_size - 1) // 2

    def batch(self, rows: int, generator: torch.Generator) -> Batch:
        """Rows drawn from `generator`; labels are unshifted and count at the answers alone."""
        n, start = self.pairs, 2 * self.pairs
        input_ids = torch.zeros(rows, self.length, dtype=torch.long)
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        keys_Bn = 1 + torch.rand(rows, self.keys, generator=generator).argsort(1)[:, :n]
        values_Bn = 1 + self.keys + torch.randint(self.keys, (rows, n), generator=generator)
        input_ids[:, 0:start:2], input_ids[:, 1:start:2] = keys_Bn, values_Bn
        slots = (self.length - start) // 2  # of a key and its value each
        weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (POWER - 1)
        slot_Bn = torch.multinomial(weights.expand(rows, -1), n, generator=generator)
        question_Bn = start + 2 * slot_Bn
        input_ids.scatter_(1, question_Bn, keys_Bn).scatter_(1, question_Bn + 1, values_Bn)
        labels.scatter_(1, question_Bn + 1, values_Bn)
        return Batch(input_ids, labels, torch.arange(self.length).expand(rows, -1).contiguous())


@torch.no_grad()
def mqar_accuracy(
    logits: Callable[[Batch], torch.Tensor], task: MQARTask, *, rows: int, seed: int, at_once: int = 32
) -> float:
    """Share of the answers that are the likeliest next token.

    Args:
        logits: rows -> [B, T, V]; the logits of column t are for token t + 1.
        rows: how many are asked, `at_once` together.
        seed: of the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    right = asked = 0
    for start in range(0, rows, at_once):
        batch = task.batch(min(at_once, rows - start), generator)
        counted_BT = batch.labels[:, 1:] != IGNORED_LABEL
        said_BT = logits(batch)[:, :-1].argmax(-1).cpu()
        right += int((said_BT == batch.labels[:, 1:])[counted_BT].sum())
        asked += int(counted_BT.sum())
    return right / asked


@torch.no_grad()
def evaluate_mqar(
    model: HybridLanguageModel,
    *,
    name: str,
    lengths: Sequence[int],
    pairs: Sequence[int],
    rows: int,
    ids: int | None = None,
    seed: int = 0,
    piece: int = 2048,
    mixed_precision: Literal["bf16", "no"] = "no",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MQARReport:
    """What a model finds of the task, in each cell of a grid. No tokenizer is needed: the rows are ids.

    Args:
        model: as `fusiontree.load` returns it.
        name: of the model, for messages.
        lengths: tokens T of a row.
        pairs: numbers n of pairs in a row.
        rows: rows in each cell.
        ids: different token ids in use, from 0 on; None: 512, or the whole vocabulary where that is smaller.
        seed: of the rows.
        piece: tokens of one forward pass; changes memory and speed, not the result.
        mixed_precision: "bf16" computes under autocast, as training does.
        progress: called with the rows done and all of them.

    Raises:
        InputError: more ids than the model has, too few for the pairs, or more pairs than fit into a row.
    """
    vocab_size = model.config.vocab_size
    ids = min(512, vocab_size) if ids is None else ids
    if ids > vocab_size:
        raise InputError(f"{name} has a vocabulary of {vocab_size} ids, {ids} are asked for")
    grid = [[MQARTask(length=length, pairs=n, vocab_size=ids) for length in lengths] for n in pairs]
    right: list[list[float]] = [[] for _ in pairs]
    loss: list[list[float]] = [[] for _ in pairs]
    done, total = 0, len(lengths) * len(pairs) * rows
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=mixed_precision == "bf16")
    with autocast, evaluation_mode(model):
        for tasks, shares, losses in zip(grid, right, loss, strict=True):
            for task in tasks:
                batch = task.batch(rows, torch.Generator().manual_seed(seed))
                found, nats = 0, 0.0
                at_once = max(1, piece // task.length)
                for input_ids, labels in zip(batch.input_ids.split(at_once), batch.labels.split(at_once), strict=True):
                    more, more_nats = _answers(model, input_ids, labels, piece)
                    found, nats, done = found + more, nats + more_nats, done + len(input_ids)
                    progress(done, total)
                shares.append(found / (rows * task.pairs))
                losses.append(nats / (rows * task.pairs))
    return MQARReport(lengths=list(lengths), pairs=list(pairs), rows=rows, ids=ids, seed=seed, right=right, loss=loss)


def _answers(
    model: HybridLanguageModel, input_ids: torch.Tensor, labels: torch.Tensor, piece: int
) -> tuple[int, float]:
    """How many answers of rows [B, T] are found, and the sum of their losses; a row longer than `piece` is alone."""
    before_BT = F.pad(labels[:, 1:] != IGNORED_LABEL, (0, 1))  # the tokens behind which an answer follows
    if input_ids.shape[1] <= piece:
        hidden = model.backbone(input_ids=input_ids.to(model.device), use_cache=False).last_hidden_state
        states = hidden[before_BT.to(model.device)]
    else:
        parts = hidden_in_pieces(model, [input_ids[0].numpy()], piece)
        states = torch.cat([hidden[:, before_BT[0, part].to(model.device)][0] for part, hidden in parts])
    answers = labels[:, 1:][before_BT[:, :-1]].to(model.device)
    right, loss = 0, 0.0
    for chunk, logits in logits_in_chunks(model, states):
        right += int((logits.argmax(-1) == answers[chunk]).sum())
        loss += F.cross_entropy(logits, answers[chunk], reduction="sum").item()
    return right, loss
