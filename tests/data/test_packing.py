"""Rows hold every token once, in order, and positions say where each document begins."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusiontree.data.packing import Place, pack

PAD = 999


def with_places(documents):
    return ((Place(0, i), np.array(ids)) for i, ids in enumerate(documents))


def rows_of(documents, length):
    return list(pack(with_places(documents), length=lambda: length, pad_id=PAD))


documents_of_any_length = st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=30), min_size=1, max_size=12)


@given(documents=documents_of_any_length, length=st.integers(2, 17))
def test_every_token_once_in_order(documents, length):
    rows = rows_of(documents, length)
    kept = np.concatenate([row.input_ids[row.labels >= 0] for row in rows])
    assert kept.tolist() == [token for ids in documents for token in ids]
    assert all((row.labels >= 0).all() for row in rows[:-1])


@given(documents=documents_of_any_length, length=st.integers(2, 17))
def test_positions_restart_at_documents_and_rows_and_count_in_between(documents, length):
    total = sum(map(len, documents))
    begins = set(np.cumsum([0, *map(len, documents)])[:-1]) | set(range(0, total, length))
    positions = np.concatenate([row.position_ids for row in rows_of(documents, length)])
    expected = 0
    for i in range(total):
        expected = 0 if i in begins else expected + 1
        assert positions[i] == expected


@given(documents=documents_of_any_length, length=st.integers(2, 17))
def test_the_place_after_a_row_leads_to_the_rest(documents, length):
    rows = rows_of(documents, length)
    for number, row in enumerate(rows):
        after = row.after
        rest = ((after if i == after.position else Place(0, i), np.array(ids)) for i, ids in enumerate(documents))
        left = (item for item in rest if item[0].position >= after.position)
        again = list(pack(left, length=lambda: length, pad_id=PAD))
        assert [r.input_ids.tolist() for r in again] == [r.input_ids.tolist() for r in rows[number + 1 :]]
        assert [r.position_ids.tolist() for r in again] == [r.position_ids.tolist() for r in rows[number + 1 :]]


@given(documents=documents_of_any_length, lengths=st.lists(st.integers(2, 17), min_size=1, max_size=5))
def test_rows_of_changing_lengths_lose_no_token(documents, lengths):
    asked = []

    def length():
        asked.append(lengths[len(asked) % len(lengths)])
        return asked[-1]

    rows = list(pack(with_places(documents), length=length, pad_id=PAD))
    kept = np.concatenate([row.input_ids[row.labels >= 0] for row in rows])
    assert kept.tolist() == [token for ids in documents for token in ids]
    assert [len(row.input_ids) for row in rows] == asked[: len(rows)]


def test_padding_is_a_document_of_its_own_that_counts_nowhere():
    (row,) = rows_of([[1, 2, 3], [4, 5]], 8)
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5, PAD, PAD, PAD]
    assert row.labels.tolist() == [1, 2, 3, 4, 5, -100, -100, -100]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]


def test_tokens_that_are_read_but_not_learnt_have_no_label():
    (row,) = rows_of([[1, ~2, ~0, 3], [~4, 5]], 7)
    assert row.input_ids.tolist() == [1, 2, 0, 3, 4, 5, PAD]
    assert row.labels.tolist() == [1, -100, -100, 3, -100, 5, -100]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0]


def test_no_document_is_taken_before_it_is_needed():
    taken = []

    def documents():
        for i in range(10):
            taken.append(i)
            yield Place(0, i), np.arange(4)

    rows = pack(documents(), length=lambda: 4, pad_id=PAD)
    next(rows)
    assert taken == [0]
