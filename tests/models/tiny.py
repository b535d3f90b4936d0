"""One small model for the tests of this folder."""

from __future__ import annotations

import torch

from fusiontree import HybridLanguageModel, HybridLanguageModelConfig

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "global_heads": 2,
    "window_size": 5,
    "mamba_head_dim": 8,
    "mamba_state_size": 8,
    "gate_rank": 4,
    "srte_rank": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_config(**overrides) -> HybridLanguageModelConfig:
    return HybridLanguageModelConfig(**(SIZES | overrides))


def tiny_model(**overrides) -> HybridLanguageModel:
    torch.manual_seed(0)
    return HybridLanguageModel(tiny_config(**overrides)).eval()


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))
