"""Law 5: state saved and loaded, forked, rolled back, reordered = never having done so."""

from __future__ import annotations

import pytest
import torch
from conftest_laws import (
    BF16_TOLERANCE,
    COMBINATIONS,
    FEW,
    TOLERANCE,
    assert_states_equal,
    build,
    packed_positions,
    tokens,
)

from fusiontree import HybridCache
from fusiontree.errors import InputError

POSITIONS = packed_positions([6, 17], [15, 8])


def read(model, packed: bool):
    """A state after 17 tokens, and the 6 that follow."""
    ids = tokens(2, 23, seed=6)
    cache = HybridCache(model.config)
    positions = POSITIONS if packed else None
    model(ids[:, :17], position_ids=None if positions is None else positions[:, :17], past_key_values=cache)
    rest = {"position_ids": positions[:, 17:]} if packed else {}
    return cache, ids[:, 17:], rest


@pytest.fixture(params=[False, True], ids=["plain", "packed"])
def packed(request):
    return request.param


def test_save_and_load(any_model, packed, tmp_path):
    cache, more, rest = read(any_model, packed)
    cache.save(tmp_path / "state.safetensors")
    loaded = HybridCache.load(tmp_path / "state.safetensors")
    want = any_model(more, past_key_values=cache, **rest).logits
    got = any_model(more, past_key_values=loaded, **rest).logits
    assert (got - want).abs().max() <= TOLERANCE / 10
    assert_states_equal(loaded, cache)
    assert loaded.get_seq_length() == cache.get_seq_length() == 23


def test_fork(any_model, packed):
    cache, more, rest = read(any_model, packed)
    fork = cache.clone()
    assert fork.nbytes == cache.nbytes
    other = tokens(2, more.shape[1], seed=99)
    any_model(other, past_key_values=fork, **rest)
    fresh, _, _ = read(any_model, packed)
    assert torch.equal(
        any_model(more, past_key_values=cache, **rest).logits, any_model(more, past_key_values=fresh, **rest).logits
    )


def test_roll_back(any_model, packed):
    cache, more, rest = read(any_model, packed)
    point = cache.snapshot()
    want = any_model(more, past_key_values=cache, **rest).logits
    for _ in range(2):  # the snapshot stays valid
        cache.rollback(point)
        assert cache.get_seq_length() == 17
        any_model(tokens(2, 40, seed=7), past_key_values=cache)
        cache.rollback(point)
        assert (any_model(more, past_key_values=cache, **rest).logits - want).abs().max() <= TOLERANCE / 10


def test_reorder_in_place(any_model, packed):
    cache, more, rest = read(any_model, packed)
    same = cache
    cache.reorder_cache(torch.tensor([1, 1]))
    assert same is cache
    ids = tokens(2, 23, seed=6)[[1, 1]]
    expected = HybridCache(any_model.config)
    first = {"position_ids": POSITIONS[[1, 1], :17]} if packed else {}
    any_model(ids[:, :17], past_key_values=expected, **first)
    second = {"position_ids": POSITIONS[[1, 1], 17:]} if packed else {}
    want = any_model(ids[:, 17:], past_key_values=expected, **second).logits
    got = any_model(more[[1, 1]], past_key_values=cache, **second).logits
    assert (got - want).abs().max() <= TOLERANCE


def test_saved_forked_and_reordered_in_bfloat16(bf16_model, packed, tmp_path):
    cache, more, rest = read(bf16_model, packed)
    cache.save(tmp_path / "state.safetensors")
    loaded, fork = HybridCache.load(tmp_path / "state.safetensors"), cache.clone()
    want = bf16_model(more, past_key_values=cache, **rest).logits.float()
    for other in (loaded, fork):
        other.reorder_cache(torch.tensor([1, 0]))
        swapped = {name: value[[1, 0]] for name, value in rest.items()}
        got = bf16_model(more[[1, 0]], past_key_values=other, **swapped).logits.float()
        assert (got[[1, 0]] - want).abs().max() <= BF16_TOLERANCE


def test_select_and_repeat(some_model):
    cache, more, _ = read(some_model, False)
    repeated = cache.clone()
    repeated.batch_repeat_interleave(3)
    assert repeated.batch_size == 6
    repeated.batch_select_indices(torch.tensor([5, 0]))
    want = some_model(more, past_key_values=cache).logits
    got = some_model(more[[1, 0]], past_key_values=repeated).logits
    assert (got[[1, 0]] - want).abs().max() <= TOLERANCE


def test_reset_is_new(some_model):
    cache, more, _ = read(some_model, False)
    cache.reset()
    assert cache.get_seq_length() == 0
    want = some_model(more, use_cache=False).logits
    assert (some_model(more, past_key_values=cache).logits - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", FEW)
def test_beams_equal_beams_without_a_cache(name):
    model = build(**COMBINATIONS[name])
    model.generation_config.eos_token_id = None
    ids = tokens(2, 9)
    kwargs = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **kwargs), model.generate(ids, use_cache=False, **kwargs))


def test_wrong_states_are_refused(tmp_path):
    model, other = build(), build(window_size=7)
    cache, more, _ = read(model, False)
    with pytest.raises(InputError, match="another geometry"):
        other(more, past_key_values=cache)
    with pytest.raises(InputError, match="2 rows"):
        model(more[:1], past_key_values=cache)
    with pytest.raises(InputError, match="cropped"):
        cache.crop(1)
    from transformers import DynamicCache

    with pytest.raises(InputError, match="HybridCache"):
        model(more, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(InputError, match="HybridCache"):
        model.generate(more, past_key_values=DynamicCache(config=model.config), max_new_tokens=2)
    cut = tmp_path / "cut.safetensors"
    cache.save(cut)
    cut.write_bytes(cut.read_bytes()[:-50])
    with pytest.raises(InputError, match="cut.safetensors"):
        HybridCache.load(cut)
    with pytest.raises(InputError, match="missing"):
        HybridCache.load(tmp_path / "missing")


def test_state_size_grows_with_global_keys_alone():
    model = build(global_heads=0)
    sizes = []
    for length in (40, 90):
        cache = HybridCache(model.config)
        model(tokens(1, length), past_key_values=cache)
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1]
