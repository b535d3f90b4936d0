"""Law 1: changing token t changes nothing before t."""

from __future__ import annotations

import pytest
import torch
from conftest_laws import TOLERANCE, VOCAB, packed_positions, tokens


@pytest.mark.parametrize("positions", [None, packed_positions([9, 14], [17, 6])], ids=["plain", "packed"])
def test_later_tokens_do_not_reach_back(any_model, positions):
    ids = tokens(2, 23)
    reference = any_model(ids, position_ids=positions, use_cache=False).logits
    for t in (1, 8, 9, 16, 22):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] - 3 + 7) % (VOCAB - 3) + 3
        logits = any_model(changed, position_ids=positions, use_cache=False).logits
        assert (logits[:, :t] - reference[:, :t]).abs().max() <= TOLERANCE / 10
        assert (logits[:, t] - reference[:, t]).abs().max() > TOLERANCE  # the change itself must be seen


def test_later_tokens_do_not_reach_back_in_bfloat16(bf16_model):
    ids, positions = tokens(2, 23), packed_positions([9, 14], [17, 6])
    changed = ids.clone()
    changed[:, 16:] = tokens(2, 7, seed=8)
    before, after = (bf16_model(x, position_ids=positions, use_cache=False).logits.float() for x in (ids, changed))
    assert torch.equal(after[:, :16], before[:, :16])
    assert (after[:, 16:] - before[:, 16:]).abs().max() > 1


def test_padding_content_does_not_matter(any_model):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0  # right
    mask[1, :3] = 0  # left
    other = torch.where(mask.bool(), ids, 5)
    a = any_model(ids, attention_mask=mask, use_cache=False).logits
    b = any_model(other, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    assert torch.equal(a[real], b[real])
