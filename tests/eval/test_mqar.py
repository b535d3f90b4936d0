"""Associative recall: every row can be answered from what stands before the question, and from nothing less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusiontree import HybridLanguageModel
from fusiontree.data.batch import IGNORED_LABEL, Batch
from fusiontree.errors import InputError
from fusiontree.eval.mqar import MQARTask, evaluate_mqar, mqar_accuracy
from fusiontree.plots import plot_mqar

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
        (
            {"length": 31},
            "a row of 31 tokens has room for 1 to 7 pairs (a pair and its question take four",
        ),
        ({"pairs": 0}, "take four tokens), got 0"),
        ({"length": 3, "pairs": 1}, "a row of 3 tokens has room for no pair (a pair and its question take four"),
        ({"vocab_size": 16}, "16 token ids leave 7 keys for 8 pairs"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes: dict[str, int], says: str) -> None:
    with pytest.raises(InputError) as caught:
        MQARTask(**{"length": 64, "pairs": 8, "vocab_size": 65, **sizes})
    assert says in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("piece", [40, 150, 4096])
def test_the_grid_is_that_of_rows_read_alone(eval_model: HybridLanguageModel, piece: int, tmp_path: Path) -> None:
    """Few ids, so that a model that knows nothing finds some answers by chance."""
    seen: list[tuple[int, int]] = []
    report = evaluate_mqar(
        eval_model,
        name="tiny",
        lengths=[32, 64],
        pairs=[1, 2],
        rows=6,
        ids=5,
        seed=3,
        piece=piece,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (report.lengths, report.pairs, report.rows, report.ids) == ([32, 64], [1, 2], 6, 5)
    assert seen[-1] == (24, 24)
    for pairs, rights, losses in zip(report.pairs, report.right, report.loss, strict=True):
        for length, right, loss in zip(report.lengths, rights, losses, strict=True):
            batch = rows(6, seed=3, task=MQARTask(length=length, pairs=pairs, vocab_size=5))
            asked = (batch.labels != IGNORED_LABEL).nonzero().tolist()
            said = [eval_model(row[None]).logits[0] for row in batch.input_ids]
            logits = torch.stack([said[row][place - 1] for row, place in asked])
            answers = torch.tensor([int(batch.labels[row, place]) for row, place in asked])
            assert right == pytest.approx((logits.argmax(-1) == answers).float().mean().item())
            assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, answers).item(), abs=1e-5)
    assert plot_mqar(report, tmp_path / "mqar.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_needs_the_ids(eval_model: HybridLanguageModel) -> None:
    with pytest.raises(InputError, match="tiny has a vocabulary of "):
        evaluate_mqar(eval_model, name="tiny", lengths=[32], pairs=[1], rows=1, ids=10**6)
