"""The bfloat16 backward pass of attention against float64, also where the CPU would not take it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fusiontree.ops.attention_gradients import TILE_KEYS, TILE_QUERIES, block_gradients


def window_mask(queries: int, keys: int, window: int) -> torch.Tensor:
    query, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    visible = (key <= query) & (key > query - window)
    return torch.zeros(1, 1, queries, keys).masked_fill_(~visible, -math.inf).bfloat16()


def mask_by_row(queries: int, keys: int) -> torch.Tensor:
    """Two rows that see the keys up to another place each."""
    last = torch.tensor([keys - 1, keys // 3])[:, None, None, None]
    return torch.zeros(2, 1, queries, keys).masked_fill_(torch.arange(keys) > last, -math.inf).bfloat16()


@pytest.mark.parametrize("spread", [0.3, 2.0, 10.0], ids=["flat", "peaked", "hard"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "width", "mask", "causal"),
    [
        (128, 383, 4, 4, 64, window_mask(128, 383, 256), False),
        (100, 155, 4, 2, 48, window_mask(100, 155, 56), False),
        (60, TILE_KEYS + 40, 2, 1, 128, mask_by_row(60, TILE_KEYS + 40), False),
        (TILE_QUERIES + 70, TILE_QUERIES + 70, 2, 1, 128, None, True),
        (1, 7, 2, 2, 32, None, False),
        (60, TILE_KEYS + 40, 2, 1, 64, None, False),
    ],
    ids=["window", "grouped", "mask-tiles", "causal-tiles", "one-query", "key-tiles"],
)
def test_gradients_are_those_of_float64(
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    width: int,
    mask: torch.Tensor | None,
    causal: bool,
    spread: float,
) -> None:
    torch.manual_seed(0)
    q, dout = (torch.randn(2, queries, heads, width).bfloat16().transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, keys, kv_heads, width).bfloat16().transpose(1, 2) for _ in range(2))
    q = q * spread
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    scores = exact[0] @ exact[1].repeat_interleave(heads // kv_heads, 1).transpose(-1, -2) / width**0.5
    if mask is not None:
        scores = scores + mask.double()
    if causal:
        scores = scores.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1), -math.inf)
    out = F.softmax(scores, -1) @ exact[2].repeat_interleave(heads // kv_heads, 1)
    expected = torch.autograd.grad(out, exact, dout.double())
    logsumexp = scores.detach().logsumexp(-1).float()
    found = block_gradients(dout, q, k, v, out.detach().bfloat16(), logsumexp, mask, causal)
    for name, mine, theirs in zip("qkv", found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine.double() - theirs).norm() < 0.01 * theirs.norm(), name
