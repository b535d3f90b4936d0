"""What a step of decoding must not do: wait for the device, allocate state, reduce gates that nobody reads."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from fusiontree import HybridCache

WAITS = (
    "aten.item",
    "aten._local_scalar_dense",
    "aten.is_nonzero",
    "aten.nonzero",
    "aten.equal",
)


class Operations(TorchDispatchMode):
    """Counts what the model asks torch for, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))

    def waits(self) -> list[str]:
        return [name for name in self.counts if name.startswith(WAITS)]


def state_after(model, rows: int = 2, tokens: int = 9, capacity: int = 40, **inputs) -> HybridCache:
    return model(token_ids(rows, tokens), past_key_values=HybridCache(model.config, capacity), **inputs).past_key_values


@pytest.mark.parametrize("version", [1, 2])
@torch.inference_mode()
def test_a_step_reads_no_number_back_from_the_device(version):
    model = tiny_model(mamba_version=version)
    for tokens in (3, 9):  # the ring not yet full, and full
        cache = state_after(model, tokens=tokens, attention_mask=torch.ones(2, tokens))
        with Operations() as operations:
            for _ in range(8):
                model(token_ids(2, 1), past_key_values=cache)
        assert operations.counts["aten.linear.default"] > 0
        assert operations.waits() == []
    # The counter sees a wait where there is one.
    with Operations() as operations:
        model(token_ids(2, 2), attention_mask=torch.tensor([[0, 1], [1, 1]]))
    assert operations.waits()


@torch.inference_mode()
def test_steps_write_into_the_same_memory():
    model = tiny_model()
    cache = state_after(model)
    before = {(layer, name): t.data_ptr() for layer, s in enumerate(cache.layers) for name, t in s.tensors().items()}
    assert len(before) == 2 * 6
    size = cache.nbytes
    for _ in range(40 - 9):
        model(token_ids(2, 1), past_key_values=cache)
    after = {(layer, name): t.data_ptr() for layer, s in enumerate(cache.layers) for name, t in s.tensors().items()}
    assert after == before and cache.nbytes == size


@torch.inference_mode()
def test_gates_of_a_step_are_reduced_when_they_are_read():
    model = tiny_model()
    cache = state_after(model)
    asked = model(token_ids(2, 1), past_key_values=cache.clone(), output_gates=True).gate_stats
    with Operations() as operations:
        stats = model(token_ids(2, 1), past_key_values=cache).gate_stats
    assert not any(name.startswith(("aten.mean", "aten.stack")) for name in operations.counts)
    assert torch.equal(stats.mean, asked.mean) and torch.equal(stats.entropy, asked.entropy)
    assert torch.equal(stats.tokens, asked.tokens) and torch.equal(stats.active, asked.active)
    assert stats.details is None and asked.details.tokens.tolist() == [2, 2]
    with pytest.raises(AttributeError, match="channel_means"):
        _ = stats.channel_means


@torch.no_grad()
def test_rows_of_one_length_need_no_masks_and_keep_it_known(tmp_path):
    model = tiny_model()
    even = state_after(model, attention_mask=torch.ones(2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    uneven = state_after(model, attention_mask=mask)
    packed = state_after(model, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]))
    assert even.even and not uneven.even and not packed.even
    snapshot = even.snapshot()
    model(token_ids(2, 1), position_ids=torch.zeros(2, 1, dtype=torch.long), past_key_values=even)
    assert not even.even
    even.rollback(snapshot)
    for cache in (even, uneven):
        cache.save(tmp_path / "state.safetensors")
        assert HybridCache.load(tmp_path / "state.safetensors").even is cache.even is cache.clone().even
    uneven.reset()
    assert uneven.even


@torch.no_grad()
def test_an_even_state_decodes_as_one_that_is_not_known_to_be():
    model = tiny_model()
    even = state_after(model)
    masked = even.clone()
    masked.even = False
    for step in range(12):  # around the ring and past the buffer's first growth
        token = token_ids(2, 1, seed=step)
        left, right = (model(token, past_key_values=cache).logits for cache in (even, masked))
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
    assert even.even and not masked.even
    for name, value in even.state().items():
        torch.testing.assert_close(value, masked.state()[name], rtol=0, atol=1e-6)
