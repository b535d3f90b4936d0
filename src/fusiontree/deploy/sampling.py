"""Drawing tokens so that a row's draws depend on its own seed alone.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class KnownTokens(LogitsProcessor):
    """Rules out the ids that no token has: embeddings are often padded past the tokenizer's vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.vocabulary :] = -torch.inf
        return scores


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to [B, V] logits: the largest is then a draw from their softmax (Gumbel 1954).

    Sampling becomes taking the maximum, and each row draws from a generator of its own: its tokens are the same
    whatever stands beside it in the batch, and no other random state is read or changed.

    Args:
        seed: row i draws from a generator seeded with `seed + i`.
        rows: B.
    """

    def __init__(self, seed: int, rows: int, device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed((seed + row) % 2**63) for row in range(rows)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()


def build_processors(
    *,
    vocabulary: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    rows: int,
    device: torch.device,
) -> LogitsProcessorList:
    """What happens to the logits before the largest is taken; temperature 0 leaves them as they are."""
    processors = LogitsProcessorList([KnownTokens(vocabulary)])
    if temperature == 0:
        return processors
    processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(float(top_p)))
    processors.append(GumbelNoise(seed, rows, device))
    return processors
