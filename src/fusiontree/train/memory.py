"""What a run would need, without running it: parameters by component and memory per device, engine by engine.

Parameters are counted on the meta device, activations on fake tensors (`train/activations.py`). What an engine holds
beside them follows from how it divides parameters, gradients and moments; `benchmarks/memory_prediction.py` compares
the sum with what runs take.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusiontree.data.curriculum import LengthSchedule
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.train.activations import Activations, estimate_activations
from fusiontree.train.deepspeed_config import deepspeed_config
from fusiontree.train.launch import checked_deepspeed_config, has_deepspeed
from fusiontree.train.optim import MOMENTS, ParameterGroup, never_warm, parameter_groups
from fusiontree.train.settings import RunSettings
from fusiontree.train.teacher import teacher_parameters

_COMPONENTS = {
    "embed_tokens": "embeddings",
    "lm_head": "language-model head",
    "srte": "time encoding (SRTE)",
    "mamba": "Mamba branches",
    "attention": "attention branches",
    "alignment": "alignment",
    "gate": "gates",
    "fusion_proj": "fusion projections",
    "small_mlp": "small MLPs",
    "residual_mlp": "residual MLPs",
    "merged": "merged maps",
    "constant": "constants",
    "ln_input": "norms",
    "ln_output": "norms",
}


#: DeepSpeed's own where its configuration says nothing.
_ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}


@dataclass(frozen=True)
class ModelSize:
    """Numbers in parameters."""

    whole: int
    largest_block: int
    outside_blocks: int
    small: int = 0
    """In parameters that ZeRO-3 leaves whole in every process."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, allocator overhead left out. Not all of it exists at one time."""

    parameters: int
    gradients: int
    optimizer: int
    """Moments, and the copy of the parameters that ZeRO updates."""
    buffers: int
    """What engines gather parameters and exchange gradients in."""
    activations: int
    """Of one micro-batch at its peak, forward or backward."""
    peak: int
    """Most that exists at a time."""
    teacher: int = 0
    """Weights of the model to distil from, whole on every device."""


@dataclass(frozen=True)
class DryRun:
    """What `fusiontree train --dry-run` prints."""

    components: dict[str, int]
    """Parameters by component, largest first."""
    parameters: int
    groups: list[ParameterGroup]
    """Of the optimizers' parameters."""
    devices: int
    engine: str
    """What trains, in words."""
    tokens_per_step: int
    lengths: LengthSchedule
    """Of the rows; the tokens are the same at every length."""
    memory: MemoryEstimate
    warning: str | None
    """What to tell beside it."""


def dry_run(settings: RunSettings, config: HybridLanguageModelConfig, devices: int) -> DryRun:
    """Count and estimate without allocating.

    Args:
        settings: the run; its engine is taken as asked for, whether or not it is installed here.
        config: of the model.
        devices: that share a step.

    Raises:
        InputError: a DeepSpeed file that is missing, broken or contradicts the settings; where DeepSpeed is installed,
            also one that it does not accept; a teacher that is not there.
    """
    if settings.system.uses_deepspeed and has_deepspeed():
        checked_deepspeed_config(settings, devices)
    with torch.device("meta"):
        model = HybridLanguageModel(config)
    components: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if name.startswith("layers.") else name.split(".")[0]
        components[_COMPONENTS[part]] += parameter.numel()
    t = settings.training
    groups = parameter_groups(model, t)
    return DryRun(
        components=dict(components.most_common()),
        parameters=components.total(),
        groups=groups,
        devices=devices,
        engine=settings.system.engine,
        tokens_per_step=t.batch_size * t.gradient_accumulation_steps * t.max_seq_length * devices,
        lengths=settings.length_schedule(devices),
        memory=_with_teacher(
            settings,
            estimate_memory(
                settings,
                model_size(model, settings, devices),
                moments=sum(4 * len(MOMENTS[group.optimizer]) * group.parameters for group in groups),
                activations=estimate_activations(settings, config),
                devices=devices,
            ),
        ),
        warning=never_warm(t),
    )


def _with_teacher(settings: RunSettings, memory: MemoryEstimate) -> MemoryEstimate:
    if settings.loss.teacher is None:
        return memory
    teacher = 4 * teacher_parameters(settings.loss.teacher)
    return replace(memory, teacher=teacher, peak=memory.peak + teacher)


def model_size(model: HybridLanguageModel, settings: RunSettings, devices: int) -> ModelSize:
    """The sizes of a model, which may lie on the meta device, that matter to the engine of the settings."""
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.layers]
    whole = sum(parameter.numel() for parameter in model.parameters())
    threshold = _zero(settings, devices)["stage3_param_persistence_threshold"] if settings.system.uses_deepspeed else 0
    small = sum(parameter.numel() for parameter in model.parameters() if parameter.numel() < threshold)
    return ModelSize(whole, max(blocks), whole - sum(blocks), small)


def _zero(settings: RunSettings, devices: int) -> dict[str, Any]:
    return _ZERO_DEFAULTS | deepspeed_config(settings, devices)["zero_optimization"]


def estimate_memory(
    settings: RunSettings, size: ModelSize, *, moments: int, activations: Activations, devices: int
) -> MemoryEstimate:
    """Bytes per device: float32 parameters and gradients, the optimizer's moments, activations.

    The peak comes when the backward pass begins, or when the optimizer steps, whichever holds more. With several
    micro-batches gradients exist when activations do, with a single one they come as activations go.

    Args:
        moments: bytes of the optimizer's, of the whole model.
        devices: that share the work.
    """
    if settings.system.uses_deepspeed:
        return _zero_memory(settings, size, moments, activations, devices)
    if settings.system.fsdp:
        return _fsdp_memory(settings, size, moments, activations, devices)
    weights = gradients = 4 * size.whole
    # DDP exchanges gradients in buckets, which are where they lie, always.
    overlap = settings.training.gradient_accumulation_steps > 1 or devices > 1
    return MemoryEstimate(
        parameters=weights,
        gradients=gradients,
        optimizer=moments,
        buffers=0,
        activations=activations.peak,
        peak=weights + moments + _backward_peak(activations, gradients, size, overlap=overlap),
    )


def _backward_peak(activations: Activations, gradients: int, size: ModelSize, *, overlap: bool) -> int:
    """Activations and gradients together.

    Args:
        gradients: bytes, at the end of the backward pass.
        overlap: they are all there from its beginning.
    """
    if overlap:
        return activations.peak + gradients
    # In the model's first layer most gradients are there; its own and those of the embeddings come after its peak.
    before_last = gradients - min(gradients, 4 * (size.largest_block + size.outside_blocks // 2))
    return max(activations.peak, before_last + activations.last, gradients)


def _zero_memory(
    settings: RunSettings, size: ModelSize, moments: int, activations: Activations, devices: int
) -> MemoryEstimate:
    zero = _zero(settings, devices)
    stage, whole = zero["stage"], 4 * size.whole
    share = whole // devices
    # On one device too, the parameters that are updated are a copy of those that compute.
    optimizer = moments // devices + share
    gradients = whole if stage == 1 else share
    bucket = 4 * zero["reduce_bucket_size"]
    if stage == 3:
        large = size.whole - size.small
        # A bucket is gathered in one piece and then copied, parameter by parameter.
        gathered = min(large, zero["stage3_max_live_parameters"]) + min(large, zero["stage3_prefetch_bucket_size"])
        weights, buffers = share + 4 * size.small, bucket + 4 * gathered + (bucket if _is_copied(settings) else 0)
        beside_step = bucket
    else:
        weights, buffers = whole, bucket * (2 if zero.get("overlap_comm") else 1)
        beside_step = 0
    if zero.get("offload_optimizer"):  # gradients then go to host memory as they come
        optimizer = gradients = 0
    if zero.get("offload_param"):
        weights = 0
    held = weights + optimizer + gradients
    # The step flattens its share of the gradients once more.
    step = beside_step + (0 if zero.get("offload_optimizer") else share)
    return MemoryEstimate(
        parameters=weights,
        gradients=gradients,
        optimizer=optimizer,
        buffers=buffers,
        activations=activations.peak,
        peak=held + max(buffers + activations.peak, step),
    )


def _is_copied(settings: RunSettings) -> bool:
    """Whether gradients that are reduced and divided lie in memory twice meanwhile: gloo, on CPU, reduces a copy."""
    return settings.system.device == "cpu"


def _fsdp_memory(
    settings: RunSettings, size: ModelSize, moments: int, activations: Activations, devices: int
) -> MemoryEstimate:
    share = 4 * size.whole // devices
    accumulates = settings.training.gradient_accumulation_steps > 1
    # Gradients that are yet to be exchanged are whole.
    gradients = 4 * size.whole if accumulates else share
    # What lies outside the blocks stays gathered; of the blocks one computes and one is on its way, and the gradients
    # of one are exchanged.
    buffers = 4 * (size.outside_blocks + 4 * size.largest_block)
    if _is_copied(settings):
        buffers += 4 * (size.outside_blocks + size.largest_block)
    return MemoryEstimate(
        parameters=share,
        gradients=gradients,
        optimizer=moments // devices,
        buffers=buffers,
        activations=activations.peak,
        peak=share + moments // devices + buffers + _backward_peak(activations, gradients, size, overlap=accumulates),
    )
