"""Rows hold every token once, and positions say where each document begins; best fit cuts nothing that fits."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.data.packing import Place, pack, pack_best_fit

PAD = 999


def read(documents, start=Place()):  # noqa: B008
    """What a loader gives to a packer that goes on at `start`."""
    for i in range(start.position, len(documents)):
        yield (start if i == start.position else Place(0, i)), np.array(documents[i])


def with_places(documents):
    return ((Place(0, i), np.array(ids)) for i, ids in enumerate(documents))


def rows_of(documents, length):
    return list(pack(read(documents), length=lambda: length, pad_id=PAD))


def best_fit_rows(documents, length, window_rows=2, start=Place()):  # noqa: B008
    return list(pack_best_fit(read(documents, start), length=length, pad_id=PAD, window_rows=window_rows))


def pieces_of(row) -> list[list[int]]:
    """The tokens of each document or piece in a row, without its padding."""
    starts = np.flatnonzero(row.position_ids[: row.tokens] == 0)
    return [piece.tolist() for piece in np.split(row.input_ids[: row.tokens], starts[1:])]


def content(rows):
    return [(r.input_ids.tolist(), r.labels.tolist(), r.position_ids.tolist(), r.after) for r in rows]


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


def test_rows_count_their_tokens_and_the_documents_that_were_cut_in_them():
    rows = rows_of([[1] * 10, [2] * 3, [3] * 2, [4] * 4], 4)
    assert [row.tokens for row in rows] == [4, 4, 4, 4, 3]
    assert [row.cut_documents for row in rows] == [1, 0, 1, 1, 0]  # the 3s alone fit what is left of a row
    rows = best_fit_rows([[1] * 10, [2] * 3, [3] * 2, [4] * 4], 4, window_rows=9)
    assert sorted(row.tokens for row in rows) == [3, 4, 4, 4, 4]
    assert sum(row.cut_documents for row in rows) == 1


def numbered(lengths) -> list[list[int]]:
    """Documents of these lengths in which every token is another number."""
    starts = np.cumsum([0, *lengths])
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]


lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(lengths=lengths_of_documents, length=st.integers(2, 17), window_rows=st.integers(1, 5))
def test_best_fit_holds_every_token_once_and_cuts_only_what_is_longer_than_a_row(lengths, length, window_rows):
    documents = numbered(lengths)
    rows = best_fit_rows(documents, length, window_rows)
    pieces = [piece for row in rows for piece in pieces_of(row)]
    assert sorted(sum(pieces, [])) == list(range(sum(lengths)))
    expected = [ids[start : start + length] for ids in documents for start in range(0, len(ids), length)]
    assert sorted(pieces) == sorted(expected)
    assert sum(row.cut_documents for row in rows) == sum(len(ids) > length for ids in documents)


@given(lengths=lengths_of_documents, length=st.integers(2, 17), window_rows=st.integers(1, 5))
def test_best_fit_restarts_positions_and_pads_as_the_other_packer_does(lengths, length, window_rows):
    for row in best_fit_rows(numbered(lengths), length, window_rows):
        positions = [i for piece in pieces_of(row) for i in range(len(piece))] + list(range(length - row.tokens))
        assert row.position_ids.tolist() == positions
        assert (row.labels[: row.tokens] == row.input_ids[: row.tokens]).all()
        assert (row.labels[row.tokens :] == -100).all() and (row.input_ids[row.tokens :] == PAD).all()


@given(
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12),
    length=st.integers(4, 17),
    window_rows=st.integers(1, 5),
    offset=st.integers(0, 30),
)
@settings(deadline=None)
def test_best_fit_goes_on_behind_any_row(lengths, length, window_rows, offset):
    documents = numbered(lengths)
    rows = best_fit_rows(documents, length, window_rows, Place(0, 0, offset))
    for number, row in enumerate(rows):
        again = best_fit_rows(documents, length, window_rows, row.after)
        assert content(again) == content(rows[number + 1 :])


@given(lengths=lengths_of_documents, length=st.integers(2, 17))
def test_no_two_rows_of_a_window_would_fit_one(lengths, length):
    filled = sorted(row.tokens for row in best_fit_rows(numbered(lengths), length, window_rows=10**6))
    assert len(filled) < 2 or filled[0] + filled[1] > length


def test_padding_of_random_documents_is_small():
    draw = np.random.default_rng(0)
    for longest, share in [(64, 0.005), (300, 0.02), (512, 0.1)]:
        lengths = draw.integers(1, longest + 1, 4000)
        rows = best_fit_rows([[1] * length for length in lengths], 512, window_rows=64)
        padding = 1 - sum(row.tokens for row in rows) / (512 * len(rows))
        in_order, room = 0, 0  # rows that the same documents take uncut, one after the other
        for length in lengths:
            if length > room:
                in_order, room = in_order + 1, 512
            room -= length
        assert padding <= share
        assert padding < (1 - sum(lengths) / (512 * in_order)) / 2


def test_best_fit_reads_one_window_at_a_time():
    taken = []

    def documents():
        for i in range(10):
            taken.append(i)
            yield Place(0, i), np.arange(4)

    rows = pack_best_fit(documents(), length=4, pad_id=PAD, window_rows=3)
    for held in ([0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]):  # a window, and the document that does not belong to it
        for _ in range(3):
            next(rows)
            assert taken == held


def test_rows_do_not_come_by_size():
    lengths = np.random.default_rng(1).integers(1, 200, 600)
    rows = best_fit_rows(numbered(lengths), 256, window_rows=64)
    longest = np.array([max(map(len, pieces_of(row))) for row in rows])
    assert abs(np.corrcoef(np.arange(len(rows)) % 64, longest)[0, 1]) < 0.4
