"""Law 4: packed documents = the documents one by one."""

from __future__ import annotations

import pytest
import torch
from conftest_laws import BF16_TOLERANCE, TOLERANCE, packed_positions, tokens

LENGTHS = [[7, 1, 12, 3], [2, 2, 18, 1]]


def documents(ids):
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            yield row, start, ids[row : row + 1, start : start + length]
            start += length


def test_logits_and_loss(any_model):
    ids, positions = tokens(2, 23, seed=4), packed_positions(*LENGTHS)
    out = any_model(ids, position_ids=positions, use_cache=False)
    loss = any_model(ids, position_ids=positions, labels=ids).loss
    total = count = 0.0
    for row, start, document in documents(ids):
        alone = any_model(document, use_cache=False).logits[0]
        length = document.shape[1]
        assert (out.logits[row, start : start + length] - alone).abs().max() <= TOLERANCE
        total += any_model(document, labels=document).loss * (length - 1)
        count += length - 1
    assert abs(loss - total / count) <= TOLERANCE


def test_logits_in_bfloat16(bf16_model):
    ids = tokens(2, 23, seed=4)
    packed = bf16_model(ids, position_ids=packed_positions(*LENGTHS), use_cache=False).logits.float()
    for row, start, document in documents(ids):
        alone = bf16_model(document, use_cache=False).logits[0].float()
        assert (packed[row, start : start + document.shape[1]] - alone).abs().max() <= BF16_TOLERANCE


def test_another_document_changes_nothing(any_model):
    ids, positions = tokens(2, 23, seed=4), packed_positions(*LENGTHS)
    before = any_model(ids, position_ids=positions, use_cache=False).logits
    changed = ids.clone()
    changed[0, 8:20] = tokens(1, 12, seed=9)[0]
    after = any_model(changed, position_ids=positions, use_cache=False).logits
    assert (after[0, :8] - before[0, :8]).abs().max() <= TOLERANCE / 10
    assert (after[0, 20:] - before[0, 20:]).abs().max() <= TOLERANCE / 10
    assert (after[1] - before[1]).abs().max() <= TOLERANCE / 10


@pytest.mark.parametrize("shape", ["[T]", "[1, T]"])
def test_positions_shared_by_the_rows(some_model, shape):
    ids, positions = tokens(2, 23, seed=4), packed_positions(LENGTHS[0], LENGTHS[0])
    want = some_model(ids, position_ids=positions, use_cache=False).logits
    given = positions[0] if shape == "[T]" else positions[:1]
    assert torch.equal(some_model(ids, position_ids=given, use_cache=False).logits, want)
