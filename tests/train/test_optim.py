"""Which parameters decay, and the learning rate at every step."""

from __future__ import annotations

import math

import pytest
import torch

from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.train.optim import build_optimizers, decayed, learning_rate_at, parameter_groups, set_learning_rate
from fusiontree.train.settings import TrainingSettings
from tiny_models import needs_muon

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
    (optimizer,) = build_optimizers(model, TrainingSettings(weight_decay=0.3))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    assert optimizer.defaults["fused"]


def test_weight_decay_shrinks_only_what_decays() -> None:
    model = HybridLanguageModel(HybridLanguageModelConfig(**SIZES))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = TrainingSettings(weight_decay=0.5, learning_rate=0.1)
    (optimizer,) = build_optimizers(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if decayed(model)[name] else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


@needs_muon
def test_muon_takes_the_maps_between_hidden_spaces_and_adamw_the_rest() -> None:
    model = HybridLanguageModel(HybridLanguageModelConfig(**SIZES))
    settings = TrainingSettings(optimizer="muon", weight_decay=0.3)
    muon, adamw = build_optimizers(model, settings)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owned = [{names[id(p)] for group in optimizer.param_groups for p in group["params"]} for optimizer in (muon, adamw)]
    assert owned[0] | owned[1] == set(names.values()) and not owned[0] & owned[1]
    assert {"layers.0.fusion_proj.weight", "layers.0.gate.up.weight", "srte.proj.weight"} <= owned[0]
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    convolution = next(name for name in names.values() if "conv" in name and name.endswith("weight"))
    assert {"embed_tokens.weight", "lm_head.weight", convolution, "layers.0.mamba.A_log"} <= owned[1]
    assert {group["weight_decay"] for group in muon.param_groups} == {0.3}
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.3, 0.0}


@needs_muon
def test_muon_turns_a_matrix_and_keeps_the_size_of_an_adamw_step() -> None:
    """Its update is nearly orthogonal, at the root mean square that AdamW's steps have (0.2 of the rate)."""
    model = HybridLanguageModel(HybridLanguageModelConfig(**SIZES))
    settings = TrainingSettings(optimizer="muon", weight_decay=0.0, learning_rate=0.01)
    weight = model.layers[0].fusion_proj.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    for optimizer in build_optimizers(model, settings):
        optimizer.step()
    update = before - weight.detach()
    spread = [values[0] / values[-1] for values in map(torch.linalg.svdvals, (update, weight.grad))]
    assert spread[0] < 5 < spread[1]
    assert update.pow(2).mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)


def test_muon_is_refused_by_a_torch_without_it(monkeypatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    model = HybridLanguageModel(HybridLanguageModelConfig(**SIZES))
    with pytest.raises(InputError, match=r"muon needs torch 2\.9 or later, this is .*: set it to adamw"):
        build_optimizers(model, TrainingSettings(optimizer="muon"))


def test_groups_say_what_is_in_them() -> None:
    model = HybridLanguageModel(HybridLanguageModelConfig(**(SIZES | {"num_layers": 3})))
    groups = parameter_groups(model, TrainingSettings())
    assert [(group.optimizer, group.weight_decay) for group in groups] == [("AdamW", 0.1), ("AdamW", 0.0)]
    assert sum(group.parameters for group in groups) == sum(p.numel() for p in model.parameters())
    assert "layers.*.gate.up.weight" in groups[0].patterns() and "layers.*.ln_input.weight" in groups[1].patterns()
    assert sum(len(group.names) for group in groups) == len(list(model.parameters()))
    tensors = len(groups[1].names)
    assert str(groups[1]) == f"AdamW, no weight decay: {groups[1].parameters:,} parameters in {tensors} tensors"
    assert [group.optimizer for group in parameter_groups(model, TrainingSettings(optimizer="muon"))] == [
        "Muon",
        "AdamW",
        "AdamW",
    ]


def test_warm_up_then_cosine_to_the_minimum() -> None:
    settings = TrainingSettings(learning_rate=2.0, warmup_steps=4, max_steps=24, min_lr_ratio=0.1)
    assert [learning_rate_at(step, settings) for step in (1, 2, 4)] == [0.5, 1.0, 2.0]
    assert learning_rate_at(14, settings) == pytest.approx(0.2 + 1.8 * 0.5)
    assert learning_rate_at(9, settings) == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate_at(24, settings) == pytest.approx(0.2)
    assert learning_rate_at(30, settings) == pytest.approx(0.2)
    rates = [learning_rate_at(step, settings) for step in range(4, 25)]
    assert rates == sorted(rates, reverse=True)


def test_linear_comes_down_in_a_straight_line() -> None:
    settings = TrainingSettings(lr_schedule="linear", learning_rate=2.0, warmup_steps=4, max_steps=24, min_lr_ratio=0.1)
    assert [learning_rate_at(step, settings) for step in (1, 2, 4)] == [0.5, 1.0, 2.0]
    found = [learning_rate_at(step, settings) for step in (9, 14, 24, 30)]
    assert found == pytest.approx([0.2 + 1.8 * 0.75, 0.2 + 1.8 * 0.5, 0.2, 0.2])


def test_wsd_stays_at_the_peak_until_it_comes_down() -> None:
    fields = {"lr_schedule": "wsd", "learning_rate": 2.0, "warmup_steps": 4, "min_lr_ratio": 0.1}
    settings = TrainingSettings(**fields, max_steps=40, lr_decay_ratio=0.25)
    assert [learning_rate_at(step, settings) for step in (2, 4, 5, 17, 30)] == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert [learning_rate_at(step, settings) for step in (35, 40)] == pytest.approx([0.2 + 1.8 * 0.5, 0.2])
    # Lengthened before the way down began, a run has lost nothing: its steps so far were those of the longer one.
    longer = TrainingSettings(**fields, max_steps=80, lr_decay_ratio=0.25)
    assert all(learning_rate_at(step, settings) == learning_rate_at(step, longer) for step in range(1, 31))
    # A way down that would begin during warm-up begins after it.
    short = TrainingSettings(**fields, max_steps=6, lr_decay_ratio=1.0)
    assert [learning_rate_at(step, short) for step in (4, 5, 6)] == pytest.approx([2.0, 1.1, 0.2])


def test_without_warm_up_the_first_step_is_not_idle() -> None:
    settings = TrainingSettings(learning_rate=1.0, warmup_steps=0, max_steps=10)
    assert learning_rate_at(1, settings) > 0.9


def test_the_learning_rate_reaches_every_group() -> None:
    (optimizer,) = build_optimizers(HybridLanguageModel(HybridLanguageModelConfig(**SIZES)), TrainingSettings())
    set_learning_rate(optimizer, 0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
