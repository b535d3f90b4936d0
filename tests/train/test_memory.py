"""The dry run against the thing itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.train.activations import Activations, LiveBytes, estimate_activations
from fusiontree.train.memory import MemoryEstimate, ModelSize, dry_run, estimate_memory
from fusiontree.train.settings import RunSettings, load_run_settings
from fusiontree.train.setup import enable_gradient_checkpointing

CONFIGS = Path(__file__).parents[2] / "configs"
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


@pytest.mark.parametrize(
    "fields", [{}, {"layer_branches": ["both", "mamba", "attention", "both", "mamba"], "mlp": "aligned"}]
)
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
    assert estimate_activations(run, config).peak == pytest.approx(live.peak, rel=0.15)


def test_views_of_what_was_there_take_no_memory() -> None:
    weight = torch.zeros(100, 100)
    with LiveBytes() as live:
        kept = weight.t()
        assert live.now == 0 and kept.shape == (100, 100)
        made = kept + 1
        assert live.now == made.nbytes
        del made
        assert (live.now, live.peak) == (0, weight.nbytes)


ACTIVATIONS = Activations(kept=50, loss=20, layer=30, last=60)
#: DeepSpeed's default bucket, in bytes.
BUCKET = 4 * 500_000_000


def memory(accumulation: int = 1, devices: int = 4, **system: object) -> MemoryEstimate:
    run = RunSettings.parse({"training": {"gradient_accumulation_steps": accumulation}, "system": system})
    size = ModelSize(whole=1000, largest_block=200, outside_blocks=400, small=100)
    return estimate_memory(run, size, moments=8000, activations=ACTIVATIONS, devices=devices)


def test_a_single_process_holds_everything() -> None:
    one = memory(devices=1)
    assert (one.parameters, one.gradients, one.optimizer, one.buffers, one.activations) == (4000, 4000, 8000, 0, 80)
    # Gradients come as activations go, unless an earlier micro-batch or DDP's buckets have left them there.
    assert one.peak == 4000 + 8000 + 4000
    assert memory(devices=1, accumulation=2).peak == memory(devices=4).peak == 4000 + 8000 + 4000 + 80


def test_engines_hold_what_they_divide() -> None:
    def held(**system: object) -> tuple[int, int, int]:
        found = memory(**system)
        return found.parameters, found.gradients, found.optimizer

    # ZeRO updates a copy of its share of the parameters.
    assert held(zero_stage=1) == (4000, 4000, 2000 + 1000)
    assert held(zero_stage=2) == (4000, 1000, 2000 + 1000)
    assert held(zero_stage=3) == (1000 + 400, 1000, 2000 + 1000)
    assert held(fsdp=True) == (1000, 1000, 2000)
    assert held(fsdp=True, accumulation=2)[1] == 4000
    assert held(zero_stage=2, offload_optimizer=True) == (4000, 0, 0)
    assert held(zero_stage=3, offload_params=True, offload_optimizer=True) == (0, 0, 0)


def test_buckets_and_gathered_parameters_are_part_of_the_peak(tmp_path) -> None:
    assert memory(zero_stage=2).buffers == BUCKET
    assert memory(zero_stage=3).buffers == BUCKET + 2 * 4 * 900  # gathered in one piece, then copied
    # gloo copies what it reduces and divides, and nothing else.
    assert memory(zero_stage=3, device="cpu").buffers == memory(zero_stage=3).buffers + BUCKET
    assert memory(fsdp=True, device="cpu").buffers == memory(fsdp=True).buffers + 4 * (400 + 200)
    assert memory(zero_stage=2, device="cpu") == memory(zero_stage=2)
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true, "reduce_bucket_size": 25}}')
    small = memory(deepspeed_config=str(file))
    assert small.buffers == 2 * 4 * 25
    assert small.peak == 4000 + 3000 + 1000 + 1000  # the step takes more than a backward pass with such buckets
    file.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}')
    assert memory(deepspeed_config=str(file)).peak == 4000 + 3000 + 1000 + 4000 + 80


def test_muon_keeps_one_moment() -> None:
    config = HybridLanguageModelConfig(**SIZES)
    adamw, muon = (dry_run(settings(optimizer=name), config, devices=1) for name in ("adamw", "muon"))
    (maps,) = [group.parameters for group in muon.groups if group.optimizer == "Muon"]
    assert adamw.memory.optimizer - muon.memory.optimizer == 4 * maps > 0


def test_the_original_recipe_fits_its_gpus() -> None:
    """35 GB of the 48 GB of each of eight."""
    run = load_run_settings(CONFIGS / "pretrain_wikipedia.yaml")
    config = HybridLanguageModelConfig(**run.model)
    assert dry_run(run, config, devices=8).memory.peak < 35e9
