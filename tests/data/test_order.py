from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.data.order import MixedOrder, Permutation, PlainOrder
from fusiontree.errors import InputError


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000))
def test_every_element_comes_once(size, seed, epoch):
    order = Permutation(size, seed=seed, epoch=epoch)(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


@given(size=st.integers(1, 2**62), data=st.data())
def test_a_place_is_the_same_alone_and_among_others(size, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    order = Permutation(size, seed=1, epoch=2)
    together = order(np.array(positions))
    assert all(0 <= element < size for element in together)
    assert together.tolist() == [order(np.array([position]))[0] for position in positions]


def test_seed_and_epoch_change_the_order():
    orders = {
        tuple(Permutation(1000, seed=seed, epoch=epoch)(np.arange(1000)))
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert len(orders) == 4


def test_the_order_is_fixed_for_all_time():
    assert Permutation(10, seed=7, epoch=3)(np.arange(10)).tolist() == [5, 8, 2, 0, 6, 4, 9, 1, 3, 7]


@pytest.mark.parametrize("size", [2, 3, 7])
def test_every_element_is_equally_likely_everywhere(size):
    draws = 3000
    counts = np.zeros((size, size))
    for seed in range(draws):
        counts[np.arange(size), Permutation(size, seed=seed, epoch=0)(np.arange(size))] += 1
    expected = draws / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square / (size * (size - 1)) < 2  # 1 on average for uniform permutations


def test_all_orders_of_four_occur():
    orders = Counter(tuple(Permutation(4, seed=seed, epoch=0)(np.arange(4))) for seed in range(2400))
    assert len(orders) == 24
    assert max(orders.values()) < 3 * min(orders.values())


def test_neighbours_are_torn_apart():
    size = 20_000
    order = Permutation(size, seed=0, epoch=0)(np.arange(size)).astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert np.abs(np.diff(order)).mean() / size == pytest.approx(1 / 3, abs=0.01)  # as for independent draws


def test_places_outside_are_refused():
    with pytest.raises(IndexError):
        Permutation(10, seed=0, epoch=0)(np.array([10]))
    with pytest.raises(ValueError):
        Permutation(0, seed=0, epoch=0)


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
