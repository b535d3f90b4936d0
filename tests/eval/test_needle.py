"""Passkey retrieval: the passkey stands where it should, once, and nothing but it can answer the question."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusiontree.data.batch import IGNORED_LABEL, Batch
from fusiontree.errors import InputError
from fusiontree.eval.needle import PasskeyTask, passkey_accuracy

TASK = PasskeyTask(length=40, depth=0.5, digits=3, marker=(0, 9), alphabet=range(10, 30))


def test_the_passkey_stands_at_its_depth_and_is_asked_for_at_the_end() -> None:
    for depth, place in ((0.0, 0), (0.5, 15), (1.0, 30)):
        batch = replace(TASK, depth=depth).batch(range(20), seed=0)
        assert batch.input_ids.shape == (20, 40)
        needle, question = batch.input_ids[:, place : place + 5], batch.input_ids[:, -5:]
        assert torch.equal(needle, question) and (needle[:, :2] == torch.tensor([0, 9])).all()
        hay = torch.cat((batch.input_ids[:, :place], batch.input_ids[:, place + 5 : -5]), 1)
        assert hay.shape[1] == 30 and ((hay >= 10) & (hay < 30)).all()
        assert torch.equal(batch.labels[:, -3:], batch.input_ids[:, -3:])
        assert (batch.labels[:, :-3] == IGNORED_LABEL).all()
        assert torch.equal(batch.position_ids[7], torch.arange(40))


def test_a_row_follows_from_its_number_and_the_seed_alone() -> None:
    whole = TASK.batch(range(10), seed=3).input_ids
    assert torch.equal(TASK.batch([7, 2], seed=3).input_ids, whole[[7, 2]])
    assert len({tuple(row) for row in whole[:, -3:].tolist()}) == 10
    assert not torch.equal(TASK.batch(range(10), seed=4).input_ids, whole)
    for other in (replace(TASK, length=60), replace(TASK, depth=0.1), replace(TASK, depth=None)):
        assert torch.equal(other.batch(range(10), seed=3).input_ids[:, -3:], whole[:, -3:])


def test_a_depth_that_is_not_given_is_drawn_for_every_row() -> None:
    ids = replace(TASK, depth=None).batch(range(200), seed=0).input_ids
    places = (ids == 0).int().argmax(1)
    assert places.min() < 4 and places.max() > 26 and 13 < places.float().mean() < 17


def test_filler_is_cut_from_a_text_and_goes_round_at_its_end() -> None:
    text = torch.arange(100, 120)
    ids = TASK.batch(range(30), seed=0, filler=text).input_ids
    hay = torch.cat((ids[:, :15], ids[:, 20:-5]), 1)
    assert ((hay[:, 1:] - hay[:, :-1]) % 20 == 1).all() and ((hay >= 100) & (hay < 120)).all()
    assert hay[:, 0].unique().numel() > 10


def test_accuracy_is_of_whole_passkeys_by_depth_and_length() -> None:
    def knows(batch: Batch) -> torch.Tensor:
        return torch.nn.functional.one_hot(batch.input_ids.roll(-1, 1), 30).float()

    def forgets(batch: Batch) -> torch.Tensor:
        """One token of the passkey is lost where it stands further back than 20 tokens."""
        far = (batch.input_ids == 0).int().argmax(1) < batch.input_ids.shape[1] - 5 - 20
        said = knows(batch)
        said[far, -3] = 0
        return said

    grid = {"lengths": (20, 40), "depths": (0.0, 1.0), "rows": 10, "seed": 0, "at_once": 4}
    assert passkey_accuracy(knows, TASK, **grid) == [[1.0, 1.0], [1.0, 1.0]]
    assert passkey_accuracy(forgets, TASK, **grid) == [[1.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"length": 9}, "a row of 9 tokens is too short for a marker of 2 and a passkey of 3 tokens"),
        ({"depth": 1.5}, "`depth` must lie between 0 (the row's start) and 1 (its end), got 1.5"),
        ({"digits": 0}, "got `digits` 0"),
        ({"marker": ()}, "`marker` []"),
        ({"alphabet": range(5, 30)}, "none of the marker [0, 9], got 25 ids"),
        ({"alphabet": [10]}, "at least two ids"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes: dict, says: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(TASK, **sizes)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", [[1, 0, 9, 2], [9, 1, 1, 0], [1]])
def test_a_text_that_holds_the_marker_is_refused(text: list[int]) -> None:
    with pytest.raises(InputError, match=r"holds the marker \[0, 9\]"):
        TASK.batch([0], seed=0, filler=torch.tensor(text))
