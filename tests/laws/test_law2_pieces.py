"""Law 2: one pass = token by token = every way of cutting the sequence into cached pieces; values and final state."""

from __future__ import annotations

import pytest
import torch
from conftest_laws import (
    BF16_TOLERANCE,
    TOLERANCE,
    assert_states_equal,
    packed_positions,
    random_cuts,
    tokens,
)

from fusiontree import HybridCache

LENGTH = 29
LAYOUTS = {
    "plain": None,
    "packed": packed_positions([11, 1, 17], [3, 20, 6]),
    "short documents": packed_positions([1] * 9 + [20], [2, 3, 4, 5, 6, 9]),
}


def read_in_pieces(model, ids, sizes, positions=None, mask=None):
    cache, logits, start = HybridCache(model.config), [], 0
    for size in sizes:
        end = start + size
        out = model(
            ids[:, start:end],
            position_ids=None if positions is None else positions[:, start:end],
            attention_mask=None if mask is None else mask[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        assert out.past_key_values is cache  # updated in place and returned
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_cut_equals_one_pass(any_model, layout):
    positions, ids = LAYOUTS[layout], tokens(2, LENGTH, seed=1)
    uncached = any_model(ids, position_ids=positions, use_cache=False).logits
    whole, state = read_in_pieces(any_model, ids, [LENGTH], positions)
    assert (whole - uncached).abs().max() <= TOLERANCE
    generator = torch.Generator().manual_seed(3)
    for sizes in ([1] * LENGTH, random_cuts(LENGTH, 4, generator), random_cuts(LENGTH, 7, generator)):
        logits, cut_state = read_in_pieces(any_model, ids, sizes, positions)
        assert (logits - uncached).abs().max() <= TOLERANCE, sizes
        assert_states_equal(cut_state, state)


def test_pieces_longer_than_the_window_and_the_chunk(some_model):
    ids = tokens(1, 90, seed=2)
    uncached = some_model(ids, use_cache=False).logits
    logits, _ = read_in_pieces(some_model, ids, [1, 70, 1, 18])
    assert (logits - uncached).abs().max() <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_cut_equals_one_pass_in_bfloat16(bf16_model, layout):
    positions, ids = LAYOUTS[layout], tokens(2, LENGTH)
    uncached = bf16_model(ids, position_ids=positions, use_cache=False).logits.float()
    for sizes in ([1] * LENGTH, [7, 1, 21]):
        logits, _ = read_in_pieces(bf16_model, ids, sizes, positions)
        assert (logits.float() - uncached).abs().max() <= BF16_TOLERANCE


def test_inputs_embeds_equal_ids(some_model):
    ids = tokens(2, 13)
    embeds = some_model.get_input_embeddings()(ids)
    assert torch.equal(some_model(inputs_embeds=embeds).logits, some_model(ids).logits)
