"""Losses of short runs, kept in `golden_losses.json`: a change that is to leave the numbers alone leaves these alone.

After a change that is meant to change them: `python tests/train/test_golden_losses.py` writes the new ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fusiontree import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.data.batch import Batch
from fusiontree.train.losses import HybridModelLoss, StepTotals
from fusiontree.train.optim import build_optimizers
from fusiontree.train.settings import LossSettings, TrainingSettings

GOLDEN = Path(__file__).with_name("golden_losses.json")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8, "mamba_head_dim": 16}
SIZES |= {"mamba_state_size": 16, "gate_rank": 8, "srte_rank": 8}
CASES = {
    "mamba2": {},
    "mamba1": {"mamba_version": 1},
    "learned-pyramidal-tied": {"srte_encoding": "learned", "attention_type": "pyramidal", "tie_word_embeddings": True},
    "pruned": {"layer_branches": ["mamba", "attention"]},
    "aligned": {"mlp": "aligned"},
}


def losses(case: str) -> list[float]:
    """Ten steps on packed rows of a sequence that can be learned."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = HybridLanguageModel(HybridLanguageModelConfig(**(SIZES | CASES[case]))).train()
    (optimizer,) = build_optimizers(model, TrainingSettings(learning_rate=3e-3))
    composite, generator, found = HybridModelLoss(LossSettings()), torch.Generator().manual_seed(0), []
    positions = torch.cat([torch.arange(19), torch.arange(45)]).expand(4, -1)
    for _ in range(10):
        ids = (torch.randint(64, (4, 1), generator=generator) + 3 * torch.arange(64)) % 64
        batch = Batch(ids, ids, positions)
        output = model(ids, position_ids=positions, labels=ids)
        loss = composite(output, batch, StepTotals.of(StepTotals.local([batch]))).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_are_what_they_were(case: str) -> None:
    found, golden = losses(case), json.loads(GOLDEN.read_text())[case]
    assert found == pytest.approx(golden, abs=2e-4)
    assert found[-1] < found[0] - 0.1


if __name__ == "__main__":
    written = {case: [round(value, 6) for value in losses(case)] for case in CASES}
    GOLDEN.write_text(json.dumps(written, indent=1) + "\n")
