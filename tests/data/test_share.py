"""Every document once an epoch, whatever the number of processes, also when it changes in between."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.config import InputError
from fusiontree.data.order import MixedOrder, Place, PlainOrder, Share


def walk(share: Share, start: Place, steps: int) -> tuple[list[tuple[int, int, int]], Place]:
    """(epoch, place, offset) of the next `steps` documents of a rank, and where it then stands."""
    read, place = [], start
    while len(read) < steps:
        if place.position >= share.count(place.epoch):
            place = Place(place.epoch + 1)
            continue
        (where,) = share.places(place.epoch, np.array([place.position])).tolist()
        read.append((place.epoch, where, share.offset(place.epoch, where)))
        place = Place(place.epoch, place.position + 1)
    return read, place


@given(
    size=st.integers(3, 40),
    phases=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=4),
)
@settings(deadline=None)
def test_each_document_once_an_epoch_through_changes_of_the_number_of_ranks(size, phases):
    """Each phase: how many documents each of its ranks reads before all stop."""
    seen: list[tuple[int, int]] = []
    history: list[list[Place]] = []
    for amounts in phases:
        shares = [Share(size, rank, len(amounts), history) for rank in range(len(amounts))]
        ends = []
        for share, amount in zip(shares, amounts, strict=True):
            read, end = walk(share, share.start, amount)
            seen += [(epoch, place) for epoch, place, _ in read]
            ends.append(end)
        history.append(ends)
    assert len(seen) == len(set(seen))
    # One process reads the rest: then the epochs that were begun are whole.
    last = Share(size, 0, 1, history)
    wanted = last.first_whole_epoch
    place = last.start
    while place.epoch < wanted:
        if place.position >= last.count(place.epoch):
            place = Place(place.epoch + 1)
            continue
        seen += [(place.epoch, int(last.places(place.epoch, np.array([place.position]))[0]))]
        place = Place(place.epoch, place.position + 1)
    assert sorted(seen) == [(epoch, place) for epoch in range(wanted) for place in range(size)]


def test_documents_that_were_cut_go_on_behind_what_was_read():
    history = [[Place(0, 2, 7), Place(0, 1, 0), Place(1, 0, 3)]]
    share = Share(9, 0, 1, history)
    read, _ = walk(share, share.start, 13)
    # Rank 0 had 0, 3, 6: of 6 seven tokens are gone. Of rank 1's 1, 4, 7 two are left. Rank 2 has begun anew with 2.
    assert read[:3] == [(0, 4, 0), (0, 6, 7), (0, 7, 0)]
    assert read[3:12] == [(1, place, 3 if place == 2 else 0) for place in range(9)]
    again = Share(9, 1, 2, [*history, [Place(0, 2, 5)]])
    assert walk(again, again.start, 2)[0] == [(1, 1, 0), (1, 3, 0)]
    assert walk(Share(9, 0, 2, [*history, [Place(0, 2, 5)]]), Place(), 1)[0] == [(0, 7, 5)]


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    seed=st.one_of(st.none(), st.integers(0, 5)),
    data=st.data(),
)
@settings(deadline=None)
def test_a_mix_keeps_its_shares_and_reads_every_source_evenly(sizes, seed, data):
    weights = data.draw(st.lists(st.floats(0.05, 5), min_size=len(sizes), max_size=len(sizes)))
    order = MixedOrder(sizes, weights, seed)
    places = np.arange(3000)
    epochs, within = np.divmod(places, order.size)
    records = np.concatenate([order(epoch, within[epochs == epoch]) for epoch in np.unique(epochs).tolist()])
    bounds = np.cumsum([0, *sizes])
    for source, weight in enumerate(weights):
        mine = records[(records >= bounds[source]) & (records < bounds[source + 1])]
        assert abs(len(mine) - len(records) * weight / sum(weights)) <= 3
        # Round after round, each record once.
        for begin in range(0, len(mine) - sizes[source] + 1, sizes[source]):
            assert len(set(mine[begin : begin + sizes[source]].tolist())) == sizes[source]
        counts = np.bincount(mine - bounds[source], minlength=sizes[source])
        assert counts.max() - counts.min() <= 1
    # Any place alone, and the same again.
    picked = np.array([0, order.size - 1])
    assert order(2, picked).tolist() == [order(2, picked[:1])[0], order(2, picked[1:])[0]]


def test_a_weight_without_a_place_is_an_error():
    with pytest.raises(InputError, match=r"source 2 has less than 1/4096 of all weights: raise its weight"):
        MixedOrder([5, 5], [1, 1e-6], 0)


def test_a_plain_order_is_the_file_order_or_a_shuffle():
    assert PlainOrder(5, None)(3, np.arange(5)).tolist() == [0, 1, 2, 3, 4]
    first, second = (PlainOrder(50, 1)(epoch, np.arange(50)).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
