"""What a run would need, without running it: parameters by component and memory per device.

Parameters are counted on the meta device. Activations are measured on fake tensors, which know their size and hold
nothing: one layer and two layers of each kind go forward and backward, and the difference is what a layer adds.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusiontree.data.curriculum import LengthSchedule, Stage
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.ops.cross_entropy import DEFAULT_CHUNK_SIZE
from fusiontree.train.settings import RunSettings, SystemSettings
from fusiontree.train.setup import enable_gradient_checkpointing

#: Longest row that is really traced; longer ones are scaled up, since activations grow linearly with the length.
TRACED_LENGTH = 2048

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
    "merged": "merged maps",
    "constant": "constants",
    "ln_input": "norms",
    "ln_output": "norms",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device. The activations are those of one micro-batch at its peak, forward or backward."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Upper bound of what exists at a time, allocator overhead and communication buffers left out."""
        return self.parameters + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class DryRun:
    """What `fusiontree train --dry-run` prints."""

    components: dict[str, int]
    """Parameters by component, largest first."""
    parameters: int
    devices: int
    tokens_per_step: int
    lengths: LengthSchedule
    """Of the rows; the tokens are the same at every length."""
    memory: MemoryEstimate


def dry_run(settings: RunSettings, config: HybridLanguageModelConfig, devices: int) -> DryRun:
    """Count and estimate without allocating.

    Args:
        settings: the run; its zero_stage and offloading are taken as asked for, whether or not this version runs them.
        config: of the model.
        devices: that share a step.
    """
    with torch.device("meta"):
        model = HybridLanguageModel(config)
    components: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if name.startswith("layers.") else name.split(".")[0]
        components[_COMPONENTS[part]] += parameter.numel()
    t = settings.training
    return DryRun(
        components=dict(components.most_common()),
        parameters=components.total(),
        devices=devices,
        tokens_per_step=t.batch_size * t.gradient_accumulation_steps * t.max_seq_length * devices,
        lengths=settings.length_schedule(devices),
        memory=estimate_memory(
            settings.system,
            parameters=components.total(),
            activations=estimate_activations(settings, config),
            devices=devices,
        ),
    )


def estimate_memory(system: SystemSettings, *, parameters: int, activations: int, devices: int) -> MemoryEstimate:
    """Bytes per device: float32 parameters and gradients, two float32 moments, activations; ZeRO shards by stage.

    Args:
        parameters: number of them in the whole model.
        activations: bytes, see `estimate_activations`.
        devices: that share the work.
    """
    weights = gradients = 4 * parameters
    moments = 8 * parameters
    if system.zero_stage >= 1:
        moments //= devices
    if system.zero_stage >= 2:
        gradients //= devices
    if system.zero_stage >= 3:
        weights //= devices
    return MemoryEstimate(
        parameters=0 if system.offload_params else weights,
        gradients=gradients,
        optimizer=0 if system.offload_optimizer else moments,
        activations=activations,
    )


def estimate_activations(settings: RunSettings, config: HybridLanguageModelConfig) -> int:
    """Bytes that live at the peak of one micro-batch beside parameters, their gradients and optimizer state.

    Every stage of a length curriculum has as many tokens, but shorter rows take a little more memory for them: what
    counts is the stage that takes most.
    """
    return max(_activations_at(settings, config, stage) for stage in settings.length_schedule().stages)


def _activations_at(settings: RunSettings, config: HybridLanguageModelConfig, stage: Stage) -> int:
    length = min(stage.length, TRACED_LENGTH)
    # The first layer of each kind stands for the others.
    first: dict[tuple, int] = {}
    kinds: Counter[int] = Counter()
    for layer in range(config.num_layers):
        kinds[first.setdefault((config.branch(layer), config.layer_window(layer), config.heads(layer)), layer)] += 1
    kept = peak = 0
    for layer, count in kinds.items():
        one, two = (_trace(settings, config, layer, layers, stage.batch_size, length) for layers in (1, 2))
        a_layer = two.kept - one.kept
        # What the model holds outside its layers is counted with the first kind alone.
        kept += a_layer * count + (one.kept - a_layer if kept == 0 else 0)
        peak = max(peak, one.peak - one.kept)
    scale = stage.length / length
    loss = _loss_bytes(config, stage.batch_size * stage.length)
    return round((kept + peak) * scale) + loss


def _loss_bytes(config: HybridLanguageModelConfig, tokens: int) -> int:
    """The loss computes its gradients along with itself: float32 [V,H], [tokens,H], and one chunk's logits thrice."""
    chunk = min(DEFAULT_CHUNK_SIZE, tokens)
    return 4 * (config.vocab_size * config.hidden_size + tokens * config.hidden_size + 3 * chunk * config.vocab_size)


@dataclass(frozen=True)
class _Trace:
    kept: int
    """Bytes that the forward pass leaves for the backward pass."""
    peak: int
    """Most bytes that existed in either pass, gradients of parameters left out."""


def _trace(
    settings: RunSettings,
    config: HybridLanguageModelConfig,
    layer: int,
    layers: int,
    rows: int,
    length: int,
) -> _Trace:
    """A model of so many layers like the given one."""
    fields = config.to_diff_dict() | {
        "num_layers": layers,
        "layer_branches": [config.branch(layer)] * layers,
        "layer_gates": None,
        "layer_merges": None,
        "layer_heads": [config.heads(layer).entry()] * layers,
        "window_size": config.layer_window(layer),
        "attention_type": "local_global",
        "num_kv_heads": config.num_kv_heads,
        "mamba_state_size": config.mamba_state_size,
        # The head is accounted for by `_loss_bytes`; a small vocabulary keeps its gradient out of the trace.
        "vocab_size": 8,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = HybridLanguageModel(HybridLanguageModelConfig(**_own_fields(fields)))
        model.train()
        enable_gradient_checkpointing(model, settings.training.checkpointing_scope)
        # Gradients exist beforehand, as in every micro-batch but the first, so that none is counted here.
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        input_ids = torch.zeros(rows, length, dtype=torch.long)
        is_bf16 = settings.training.mixed_precision == "bf16"
        with LiveBytes() as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                hidden = model.backbone(input_ids=input_ids).last_hidden_state
            kept = live.now
            hidden.sum().backward()
        return _Trace(kept=kept, peak=live.peak)


def _own_fields(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name in HybridLanguageModelConfig.__dataclass_fields__}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that ops made and that are still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._track(leaf.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
