"""What one document of a packed batch says changes the losses of no other, however rows are packed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fusiontree import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.data.packing import Place, Row, pack, pack_best_fit
from fusiontree.models.layout import shift_labels
from tiny_models import TINY

LENGTH = 24
LENGTHS = [7, 11, 30, 2, 16, 5, 9, 21, 1, 13]


@pytest.fixture(scope="module")
def model() -> HybridLanguageModel:
    torch.manual_seed(0)
    model = HybridLanguageModel(HybridLanguageModelConfig(**TINY)).eval()
    with torch.no_grad():  # large enough that every token depends on what came before
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.endswith("A_log"):
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return model


def packed(packer: Callable, documents: list[np.ndarray]) -> list[Row]:
    return list(
        packer(
            ((Place(0, i), ids) for i, ids in enumerate(documents)),
            length=LENGTH if packer is pack_best_fit else lambda: LENGTH,
            pad_id=0,
        )
    )


@torch.no_grad()
def losses(model: HybridLanguageModel, rows: list[Row]) -> torch.Tensor:
    """[B, T]: entry t is the loss of token t + 1, 0 where none counts."""
    ids, labels, positions = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
        for name in ("input_ids", "labels", "position_ids")
    )
    logits = model(ids, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.transpose(1, 2), shift_labels(labels, positions), reduction="none")


@pytest.mark.parametrize("packer", [pack, pack_best_fit])
def test_a_changed_document_leaves_the_losses_of_the_others(model, packer):
    draw = np.random.default_rng(0)
    documents = [draw.integers(1, TINY["vocab_size"], length, dtype=np.int32) for length in LENGTHS]
    owners = packed(packer, [np.full(length, i + 1, dtype=np.int32) for i, length in enumerate(LENGTHS)])
    owner = torch.from_numpy(np.stack([row.input_ids for row in owners]))  # whose the token is, from 1; 0 = padding
    before = losses(model, packed(packer, documents))
    assert before.count_nonzero() >= sum(LENGTHS) - len(LENGTHS) - 2 * len(owners)
    for changed in range(len(LENGTHS)):
        other = [ids if i != changed else ids % (TINY["vocab_size"] - 1) + 1 for i, ids in enumerate(documents)]
        after = losses(model, packed(packer, other))
        is_other = owner[:, 1:] != changed + 1
        torch.testing.assert_close(after[:, :-1][is_other], before[:, :-1][is_other], rtol=1e-6, atol=0)
        if LENGTHS[changed] > 1:
            assert (after[:, :-1][~is_other] != before[:, :-1][~is_other]).any()
