"""Which parameters decay, and the learning rate at every step."""

from __future__ import annotations

import math

import pytest
import torch

from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.train.optim import build_optimizer, decayed, learning_rate_at, set_learning_rate
from fusiontree.train.settings import TrainingSettings

SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "global_heads": 1, "window_size": 4, "vocab_size": 32}
SIZES |= {"mamba_head_dim": 8, "mamba_state_size": 4, "gate_rank": 4, "srte_rank": 4}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_spares_vectors_recurrence_and_embeddings(version: int, tied: bool) -> None:
    config = HybridLanguageModelConfig(
        **SIZES, mamba_version=version, tie_word_embeddings=tied, srte_encoding="learned"
    )
    model = HybridLanguageModel(config)
    decays = decayed(model)
    assert set(decays) == {name for name, _ in model.named_parameters()}
    for name, is_decayed in decays.items():
        last = name.rpartition(".")[2]
        if last in ("A_log", "D", "dt_bias", "bias") or "norm" in name or name.startswith(("layers.0.ln_", "embed")):
            assert not is_decayed, name
    for name in ("srte.table.weight", "embed_tokens.weight"):
        assert not decays[name]
    for name in ("layers.0.fusion_proj.weight", "layers.0.gate.up.weight", "srte.proj.weight"):
        assert decays[name]
    assert decays.get("lm_head.weight", False) is not tied  # a tied head is the embedding, listed once


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = HybridLanguageModel(HybridLanguageModelConfig(**SIZES))
    optimizer = build_optimizer(model, TrainingSettings(weight_decay=0.3))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    assert optimizer.defaults["fused"]


def test_weight_decay_shrinks_only_what_decays() -> None:
    model = HybridLanguageModel(HybridLanguageModelConfig(**SIZES))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = TrainingSettings(weight_decay=0.5, learning_rate=0.1)
    optimizer = build_optimizer(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if decayed(model)[name] else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_warm_up_then_cosine_to_the_minimum() -> None:
    settings = TrainingSettings(learning_rate=2.0, warmup_steps=4, max_steps=24, min_lr_ratio=0.1)
    assert [learning_rate_at(step, settings) for step in (1, 2, 4)] == [0.5, 1.0, 2.0]
    assert learning_rate_at(14, settings) == pytest.approx(0.2 + 1.8 * 0.5)
    assert learning_rate_at(9, settings) == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate_at(24, settings) == pytest.approx(0.2)
    assert learning_rate_at(30, settings) == pytest.approx(0.2)
    rates = [learning_rate_at(step, settings) for step in range(4, 25)]
    assert rates == sorted(rates, reverse=True)


def test_without_warm_up_the_first_step_is_not_idle() -> None:
    settings = TrainingSettings(learning_rate=1.0, warmup_steps=0, max_steps=10)
    assert learning_rate_at(1, settings) > 0.9


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(HybridLanguageModel(HybridLanguageModelConfig(**SIZES)), TrainingSettings())
    set_learning_rate(optimizer, 0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
