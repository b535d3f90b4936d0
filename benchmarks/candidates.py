"""The models of a comparison behind one interface: FusionTree and the peers, at one size.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from packed_text import Rows
from torch import nn
from torch.nn import functional as F
from variants import VARIANTS, Variant

from fusiontree.eval.peers import PEERS, PeerSize, build_peer, count_parameters
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.train.losses import HybridModelLoss, StepTotals
from fusiontree.train.settings import LossSettings

OURS = "fusiontree"
MODELS = (OURS, *PEERS)


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size at which models are compared: the peers' common shape and ours.

    parameters: aimed at by all; each model lies within `tolerance` (a fraction) of it.
    ours: what differs from the default configuration; sizes alone.
    """

    vocab_size: int = 4096
    hidden_size: int
    num_layers: int
    parameters: int
    tolerance: float = 0.03
    ours: Mapping[str, int]


SIZES = {
    "6.6M": Size(
        hidden_size=256,
        num_layers=6,
        parameters=6_600_000,
        ours={"num_layers": 4, "num_heads": 4, "gate_rank": 64},
    ),
    "20M": Size(
        hidden_size=384,
        num_layers=8,
        parameters=20_300_000,
        ours={"num_layers": 6, "num_heads": 6},
    ),
    "tiny": Size(
        vocab_size=300,
        hidden_size=128,
        num_layers=2,
        parameters=670_000,
        tolerance=0.1,  # Mamba-2 grows by whole layers
        ours={"num_layers": 2, "num_heads": 4, "mamba_expand": 1, "gate_rank": 32, "window_size": 16},
    ),
}


@dataclass(frozen=True)
class Candidate:
    """A model and the two ways a benchmark calls it.

    logits: rows -> [B, T, V].
    training_loss: (rows, totals of the optimizer step these rows belong to) -> their share of the step's loss.
    """

    title: str
    model: nn.Module
    logits: Callable[[Rows], torch.Tensor]
    training_loss: Callable[[Rows, StepTotals], torch.Tensor]


def lm_loss(logits_BTV: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Cross entropy of each token given those before it in the row, summed over the labels that count."""
    return F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), rows.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def log_partition_loss(logits_BTV: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Squared logarithm of the softmax's denominator, summed over the labels that count: the z-loss of Chowdhery et al.
    2022 (arXiv 2204.02311, section 5)."""
    log_partition_BT = logits_BTV[:, :-1].float().logsumexp(-1)
    return log_partition_BT[rows.labels[:, 1:] != -100].square().sum()


def our_config(size: Size, overrides: Mapping[str, Any]) -> HybridLanguageModelConfig:
    """The default configuration at `size`, changed by `overrides`.

    Raises:
        ValueError: the number of parameters is not within the size's tolerance.
    """
    settings = {
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        **size.ours,
        **overrides,
    }
    config = HybridLanguageModelConfig(**settings)
    with torch.device("meta"):
        found = count_parameters(HybridLanguageModel(config))
    if abs(found / size.parameters - 1) > size.tolerance:
        raise ValueError(
            f"FusionTree has {found} parameters here, more than {size.tolerance:.0%} away from {size.parameters}; "
            "change a size with --ours, such as --ours num_layers=6"
        )
    return config


def build(
    name: str,
    size: Size,
    *,
    seed: int,
    state_size: int = 64,
    chunk_size: int = 32,
    overrides: Mapping[str, Any] | None = None,
    variant: str | None = None,
    z_loss: float = 0.0,
) -> Candidate:
    """Model `name` at `size`, freshly initialised from `seed`, float32, in training mode.

    Args:
        state_size, chunk_size: of the peers' Mamba layers.
        overrides: settings of our configuration, for studies of its choices.
        variant: one of `VARIANTS`: our block with one choice made otherwise.
        z_loss: weight of `log_partition_loss` in the training loss of our model.

    Raises:
        ValueError: the number of parameters is not within the size's tolerance.
    """
    if name == OURS:
        torch.manual_seed(seed)
        chosen = VARIANTS[variant] if variant else Variant()
        model = HybridLanguageModel(our_config(size, {**chosen.settings, **(overrides or {})}))
        for edit in chosen.edits:
            edit(model)
        return _ours(model.train(), z_loss)
    peer_size = PeerSize(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_layers=size.num_layers,
        num_heads=size.hidden_size // 64,
        parameters=size.parameters,
        state_size=state_size,
        chunk_size=chunk_size,
    )
    return _peer(name, build_peer(name, peer_size, seed=seed, tolerance=size.tolerance))


def _ours(model: HybridLanguageModel, z_loss: float) -> Candidate:
    composite = HybridModelLoss(LossSettings())
    model.config.return_logits_with_loss |= z_loss > 0

    def logits(rows: Rows) -> torch.Tensor:
        return model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits

    def training_loss(rows: Rows, totals: StepTotals) -> torch.Tensor:
        output = model(input_ids=rows.input_ids, position_ids=rows.position_ids, labels=rows.labels)
        loss = composite(output, rows, totals).total
        return loss + z_loss * log_partition_loss(output.logits, rows) / totals.labels if z_loss else loss

    return Candidate("FusionTree", model, logits, training_loss)


def _peer(name: str, model: nn.Module) -> Candidate:
    def logits(rows: Rows) -> torch.Tensor:
        # Llama alone can be told of document boundaries on the torch path (positions that restart make `transformers`
        # mask attention across them); the Mamba scans there carry their state over.
        positions = {"position_ids": rows.position_ids} if name == "llama" else {}
        return model(input_ids=rows.input_ids, use_cache=False, **positions).logits

    def training_loss(rows: Rows, totals: StepTotals) -> torch.Tensor:
        return lm_loss(logits(rows), rows) / totals.labels

    return Candidate(PEERS[name].title, model, logits, training_loss)
