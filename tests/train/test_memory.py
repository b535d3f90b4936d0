"""The dry run against the thing itself."""

from __future__ import annotations

import pytest
import torch

from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.train.memory import LiveBytes, MemoryEstimate, dry_run, estimate_activations, estimate_memory
from fusiontree.train.settings import RunSettings, SystemSettings
from fusiontree.train.setup import enable_gradient_checkpointing

SIZES = {"hidden_size": 64, "num_layers": 5, "num_heads": 4, "global_heads": 1, "window_size": 32, "vocab_size": 96}
SIZES |= {"mamba_head_dim": 16, "mamba_state_size": 16, "gate_rank": 8, "srte_rank": 8}


def settings(**training: object) -> RunSettings:
    return RunSettings.parse({"training": {"batch_size": 2, "max_seq_length": 128, "mixed_precision": "no"} | training})


def test_components_add_up_to_the_model() -> None:
    config = HybridLanguageModelConfig(**SIZES, srte_encoding="learned")
    result = dry_run(settings(gradient_accumulation_steps=3), config, devices=2)
    model = HybridLanguageModel(config)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert sum(result.components.values()) == result.parameters
    assert result.components["gates"] == sum(p.numel() for layer in model.layers for p in layer.gate.parameters())
    assert result.tokens_per_step == 2 * 3 * 128 * 2
    assert result.memory.parameters == result.memory.gradients == 4 * result.parameters
    assert result.memory.optimizer == 8 * result.parameters


@pytest.mark.parametrize("fields", [{}, {"layer_branches": ["both", "mamba", "attention", "both", "mamba"]}])
@pytest.mark.parametrize("checkpointing", [False, "mamba", "attention", True, "block"])
def test_activations_are_those_of_a_real_step(fields: dict[str, object], checkpointing: bool | str) -> None:
    config = HybridLanguageModelConfig(**SIZES, **fields)
    run = settings(gradient_checkpointing=checkpointing)
    model = HybridLanguageModel(config).train()
    enable_gradient_checkpointing(model, run.training.checkpointing_scope)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    input_ids = torch.zeros(2, 128, dtype=torch.long)
    with LiveBytes() as live:
        model(input_ids=input_ids, labels=input_ids).loss.backward()
    assert estimate_activations(run, config) == pytest.approx(live.peak, rel=0.15)


def test_zero_shards_and_offloading_leaves_the_device() -> None:
    def memory(**system: object) -> MemoryEstimate:
        return estimate_memory(SystemSettings.parse(system), parameters=1000, activations=50, devices=4)

    assert memory() == MemoryEstimate(parameters=4000, gradients=4000, optimizer=8000, activations=50)
    assert memory(zero_stage=1) == MemoryEstimate(parameters=4000, gradients=4000, optimizer=2000, activations=50)
    assert memory(zero_stage=2) == MemoryEstimate(parameters=4000, gradients=1000, optimizer=2000, activations=50)
    assert memory(zero_stage=3) == MemoryEstimate(parameters=1000, gradients=1000, optimizer=2000, activations=50)
    assert memory(zero_stage=2, offload_optimizer=True).optimizer == 0
    assert memory(zero_stage=3, offload_params=True).parameters == 0
    assert memory().total == 16050
