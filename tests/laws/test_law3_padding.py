"""Law 3: a row alone = the same row in a batch, left- or right-padded, also when continued or generated from."""

from __future__ import annotations

import pytest
import torch
from conftest_laws import BF16_TOLERANCE, COMBINATIONS, FEW, TOLERANCE, build, tokens

from fusiontree import HybridCache, InputError

LENGTHS = (13, 4, 9, 1)


def padded_batch(side: str):
    width = max(LENGTHS)
    rows = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return rows, ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_in_a_batch(any_model, side):
    rows, ids, mask = padded_batch(side)
    logits = any_model(ids, attention_mask=mask, use_cache=False).logits
    ends = torch.tensor([[len(row) - 1 if side == "right" else ids.shape[1] - 1] for row in rows])
    last = any_model(ids, attention_mask=mask, use_cache=False, logits_to_keep=ends).logits
    kept = any_model(ids, attention_mask=mask, use_cache=False, logits_to_keep=3).logits
    assert (kept - logits[:, -3:]).abs().max() <= TOLERANCE
    for i, row in enumerate(rows):
        alone = any_model(row[None], use_cache=False).logits[0]
        assert (logits[i][mask[i].bool()] - alone).abs().max() <= TOLERANCE
        assert (last[i, 0] - alone[-1]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_a_batch_and_continued_in_bfloat16(bf16_model, side):
    rows, ids, mask = padded_batch(side)
    cache, more = HybridCache(bf16_model.config), tokens(len(rows), 3, seed=50)
    logits = bf16_model(ids, attention_mask=mask, past_key_values=cache).logits.float()
    continued = bf16_model(more, past_key_values=cache).logits.float()
    for i, row in enumerate(rows):
        alone = bf16_model(torch.cat((row, more[i]))[None], use_cache=False).logits[0].float()
        assert (logits[i][mask[i].bool()] - alone[:-3]).abs().max() <= BF16_TOLERANCE
        assert (continued[i] - alone[-3:]).abs().max() <= BF16_TOLERANCE


@pytest.mark.parametrize("cached", [False, True])
def test_positions_that_do_not_start_at_zero(any_model, cached):
    """The mask decides what is padding, whatever positions the caller counts there."""
    rows, ids, mask = padded_batch("left")
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    out = any_model(ids, attention_mask=mask, position_ids=positions, use_cache=cached, labels=ids, logits_to_keep=99)
    losses = []
    for i, row in enumerate(rows):
        own = positions[i][None, -len(row) :]
        alone = any_model(row[None], position_ids=own, use_cache=False, labels=row[None], logits_to_keep=99)
        assert (out.logits[i, -len(row) :] - alone.logits[0]).abs().max() <= TOLERANCE
        losses.append(alone.loss * (len(row) - 1))
    assert abs(out.loss - sum(losses) / (sum(LENGTHS) - len(LENGTHS))) <= TOLERANCE


def test_masks_that_no_state_can_honour(some_model):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 6:9] = 0
    with pytest.raises(InputError, match="zeros between real tokens"):
        some_model(ids, attention_mask=mask)
    cache = HybridCache(some_model.config)
    some_model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
    with pytest.raises(InputError, match="zeros between real tokens"):
        some_model(ids[:, 6:], attention_mask=mask, past_key_values=cache)
    some_model(ids[:, 6:8], attention_mask=torch.ones(2, 8), past_key_values=cache)
    with pytest.raises(InputError, match="hides tokens that the cache has read"):
        some_model(ids[:, 8:9], attention_mask=mask[:, :9], past_key_values=cache)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3,), (8,)], ids=str)
def test_continued_after_padding(any_model, side, sizes):
    """Continue every row with pieces, in which rows may be padded again."""
    rows, ids, mask = padded_batch(side)
    cache = HybridCache(any_model.config)
    any_model(ids, attention_mask=mask, past_key_values=cache)
    histories = list(rows)
    for step, size in enumerate(sizes):
        more = tokens(len(rows), size, seed=50 + step)
        fresh = torch.ones_like(more)
        fresh[2, size // 2 :] = 0  # this row reads only part of the piece, perhaps nothing
        mask = torch.cat((mask, fresh), dim=1)
        logits = any_model(more, attention_mask=mask, past_key_values=cache).logits
        for i in range(len(rows)):
            kept = more[i][fresh[i].bool()]
            histories[i] = torch.cat((histories[i], kept))
            if len(kept):
                alone = any_model(histories[i][None], use_cache=False).logits[0, -len(kept) :]
                assert (logits[i][fresh[i].bool()] - alone).abs().max() <= TOLERANCE
    for i, history in enumerate(histories):
        alone = HybridCache(any_model.config)
        any_model(history[None], past_key_values=alone)
        row = cache.clone()
        row.batch_select_indices(torch.tensor([i]))
        want, got = alone.state(), row.state()
        for name, value in want.items():
            assert (value.float() - got[name].float()).abs().max() <= TOLERANCE * 10, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_left_padding_in_pieces(some_model, side):
    """Pieces in which a row is nothing but padding."""
    rows, ids, mask = padded_batch(side)
    cache, logits = HybridCache(some_model.config), []
    for start in range(0, ids.shape[1], 3):
        piece = ids[:, start : start + 3]
        out = some_model(piece, attention_mask=mask[:, : start + 3], past_key_values=cache)
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    for i, row in enumerate(rows):
        alone = some_model(row[None], use_cache=False).logits[0]
        assert (logits[i][mask[i].bool()] - alone).abs().max() <= TOLERANCE


def assert_same_continuation(model, history: torch.Tensor, got: torch.Tensor, want: torch.Tensor) -> int:
    """Equal ids; where they first differ, the two candidates' logits must lie within 1e-3. Returns such near ties."""
    for t, (a, b) in enumerate(zip(got.tolist(), want.tolist(), strict=True)):
        if a != b:
            prefix = torch.cat((history, want[:t]))[None]
            logits = model(prefix, use_cache=False).logits[0, -1]
            assert abs(logits[a] - logits[b]) < 1e-3
            return 1
    return 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FEW)
def test_generated_from(name, side):
    model = build(**COMBINATIONS[name])
    model.generation_config.eos_token_id = None
    rows, ids, mask = padded_batch(side)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    ties = 0
    for i, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=12, do_sample=False)[0, len(row) :]
        ties += assert_same_continuation(model, row, out[i, ids.shape[1] :], alone)
    assert ties <= 1


@pytest.mark.parametrize("chunk", [1, 4])
def test_prompts_read_in_chunks(some_model, chunk):
    some_model.generation_config.eos_token_id = None
    _, ids, mask = padded_batch("left")
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    whole = some_model.generate(ids, attention_mask=mask, **settings)
    chunked = some_model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **settings)
    assert (chunked.logits[0] - whole.logits[0]).abs().max() <= TOLERANCE
    _, ids, mask = padded_batch("right")
    with pytest.raises(InputError, match="pad prompts on the left"):
        some_model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **settings)


def test_loss_counts_real_tokens_alone(some_model):
    rows, ids, mask = padded_batch("right")
    padded = some_model(ids, attention_mask=mask, labels=ids).loss
    losses = [some_model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    expected = sum(losses) / sum(len(row) - 1 for row in rows)
    assert abs(padded - expected) <= TOLERANCE


def test_gate_statistics_ignore_padding(some_model):
    rows, ids, mask = padded_batch("left")
    stats = some_model(ids, attention_mask=mask, output_gates=True).gate_stats
    assert stats.tokens.tolist() == [float(n) for n in LENGTHS]
    for i, row in enumerate(rows):
        alone = some_model(row[None]).gate_stats
        assert (stats.mean[:, i] - alone.mean[:, 0]).abs().max() <= TOLERANCE
        assert (stats.entropy[:, i] - alone.entropy[:, 0]).abs().max() <= TOLERANCE
    assert stats.details is not None
    active = stats.active
    assert stats.details.tokens[active].tolist() == [float(sum(LENGTHS))] * int(active.sum())
