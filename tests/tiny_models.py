"""Model folders small enough to generate from and to evaluate in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.data import load_tokenizer

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")

TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "global_heads": 2,
    "window_size": 8,
    "gate_rank": 4,
    "srte_rank": 8,
    "mamba_head_dim": 8,
    "mamba_state_size": 8,
    "max_position_embeddings": 96,
}


def save_tiny_model(folder: Path, tokenizer: Path | None, *, broken: bool = False, **fields: Any) -> Path:
    """A random model in `folder`, with weights large enough that every token depends on what came before, and whose
    greedy texts do not end by themselves; `broken`: one that gives NaN to a token."""
    texts = None if tokenizer is None else load_tokenizer(tokenizer)
    torch.manual_seed(0)
    model = HybridLanguageModel(HybridLanguageModelConfig(**(TINY | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.endswith("A_log"):
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
        if texts is not None:
            model.lm_head.weight[texts.eos_token_id] = 0  # its logit, where the largest is well above
    if broken:
        torch.nn.init.constant_(model.lm_head.weight[0], torch.nan)
    model.save_pretrained(folder)
    if texts is not None:
        texts.save_pretrained(folder)
    return folder
