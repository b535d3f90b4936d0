"""Multi-query associative recall (Arora et al. 2023, "Zoology: Measuring and improving recall in efficient language
models"): a row lists pairs of a key and its value, then asks for the value of every key once, at places drawn so that
near ones are likelier. What fills the rest asks nothing.

Shapes: B rows, T tokens, n pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusiontree.data.batch import IGNORED_LABEL, Batch
from fusiontree.errors import InputError

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
            raise InputError(
                f"`pairs` must be at least 1 and at most a quarter of `length` {self.length} (a pair and its question "
                f"take four tokens), got {self.pairs}"
            )
        if self.keys < self.pairs:
            raise InputError(f"`vocab_size` {self.vocab_size} leaves {self.keys} keys for {self.pairs} pairs: raise it")

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
