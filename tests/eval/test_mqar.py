"""Associative recall: every row can be answered from what stands before the question, and from nothing less."""

from __future__ import annotations

import pytest
import torch

from fusiontree.data.batch import IGNORED_LABEL, Batch
from fusiontree.errors import InputError
from fusiontree.eval.mqar import MQARTask, mqar_accuracy

TASK = MQARTask(length=64, pairs=8, vocab_size=65)


def rows(count: int = 50, seed: int = 0, task: MQARTask = TASK) -> Batch:
    return task.batch(count, torch.Generator().manual_seed(seed))


def test_every_key_is_asked_once_and_answered_with_its_value() -> None:
    batch = rows()
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        pairs = dict(zip(ids[0:16:2], ids[1:16:2], strict=True))
        assert len(pairs) == 8 and all(1 <= key <= 32 < value <= 64 for key, value in pairs.items())
        asked = [place - 1 for place, label in enumerate(labels) if label != IGNORED_LABEL]
        assert sorted(ids[place] for place in asked) == sorted(pairs)
        assert all(place >= 16 and labels[place + 1] == ids[place + 1] == pairs[ids[place]] for place in asked)
        questions = {place + step for place in asked for step in (0, 1)}
        assert all(ids[place] == 0 for place in range(16, 64) if place not in questions)


def test_rows_follow_the_generator_alone() -> None:
    assert torch.equal(rows(seed=3).input_ids, rows(seed=3).input_ids)
    assert not torch.equal(rows(seed=3).input_ids, rows(seed=4).input_ids)


def test_near_questions_are_likelier() -> None:
    batch = rows(2000, task=MQARTask(length=64, pairs=1, vocab_size=65))
    place = (batch.labels != IGNORED_LABEL).int().argmax(1)
    assert (place < 10).float().mean() > 0.4 > (place > 32).float().mean() > 0.05


def test_accuracy_counts_the_answers_alone() -> None:
    def knows(batch: Batch) -> torch.Tensor:
        return torch.nn.functional.one_hot(batch.input_ids.roll(-1, 1), TASK.vocab_size).float()

    def knows_the_first_half(batch: Batch) -> torch.Tensor:
        return knows(batch) * (batch.input_ids.roll(-1, 1) < 49)[..., None]

    assert mqar_accuracy(knows, TASK, rows=40, seed=0, at_once=16) == 1.0
    assert 0.4 < mqar_accuracy(knows_the_first_half, TASK, rows=40, seed=0, at_once=16) < 0.6
    assert mqar_accuracy(lambda batch: torch.zeros(*batch.input_ids.shape, 65), TASK, rows=40, seed=0) == 0.0


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"length": 31}, "`pairs` must be at least 1 and at most a quarter of `length` 31"),
        ({"pairs": 0}, "`pairs` must be at least 1"),
        ({"vocab_size": 16}, "`vocab_size` 16 leaves 7 keys for 8 pairs"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes: dict[str, int], says: str) -> None:
    with pytest.raises(InputError) as caught:
        MQARTask(**{"length": 64, "pairs": 8, "vocab_size": 65, **sizes})
    assert says in str(caught.value)
