"""Bytes that forward and backward of a micro-batch hold, traced on fake tensors, which know their size and are empty.

One layer and two layers of each kind go forward and backward: the difference is what a layer adds.
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

from fusiontree.data.curriculum import Stage
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.ops.cross_entropy import DEFAULT_CHUNK_SIZE
from fusiontree.train.settings import RunSettings
from fusiontree.train.setup import enable_gradient_checkpointing

#: Longest row that is really traced; longer ones are scaled up, since activations grow linearly with the length.
TRACED_LENGTH = 2048


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch, parameters and their gradients left out."""

    kept: int
    """Alive at the end of the forward pass."""
    loss: int
    """What head and loss add to that at their peak, the head's gradient included, which they compute on the way."""
    layer: int
    """What the backward pass of a layer adds at its peak."""
    last: int
    """Alive at the peak of the last layer that the backward pass comes to, the model's first."""

    @property
    def peak(self) -> int:
        return self.kept + max(self.loss, self.layer)


def estimate_activations(settings: RunSettings, config: HybridLanguageModelConfig) -> Activations:
    """What lives beside parameters, their gradients and optimizer state.

    Every stage of a length curriculum has as many tokens, but shorter rows take a little more memory for them: what
    counts is the stage that takes most.
    """
    stages = settings.length_schedule().stages
    return max((_activations_at(settings, config, stage) for stage in stages), key=lambda found: found.peak)


def _activations_at(settings: RunSettings, config: HybridLanguageModelConfig, stage: Stage) -> Activations:
    length = min(stage.length, TRACED_LENGTH)
    # The first layer of each kind stands for the others.
    first: dict[tuple, int] = {}
    kinds: Counter[int] = Counter()
    for index in range(config.num_layers):
        kinds[first.setdefault((config.branch(index), config.layer_window(index), config.heads(index)), index)] += 1
    kept = layer = last = grown = 0
    for index, count in kinds.items():
        one, two = (_trace(settings, config, index, layers, stage.batch_size, length) for layers in (1, 2))
        a_layer = two.kept - one.kept
        # What the model holds outside its layers is counted with the first kind alone.
        kept += a_layer * count + (one.kept - a_layer if kept == 0 else 0)
        layer = max(layer, one.peak - one.kept)
        # What is recomputed for one layer may in part outlive its backward pass.
        grown += (two.peak - one.peak - a_layer) * count
        last = max(last, one.peak)
    scale = stage.length / length
    tokens = stage.batch_size * stage.length
    is_bf16 = settings.training.mixed_precision == "bf16"
    return Activations(
        kept=round(kept * scale),
        loss=_loss_bytes(config, tokens, is_bf16),
        # The gradient of the last hidden states goes in.
        layer=round((layer + max(0, grown)) * scale) + 4 * tokens * config.hidden_size,
        last=round(last * scale),
    )


def _loss_bytes(config: HybridLanguageModelConfig, tokens: int, is_bf16: bool) -> int:
    """The loss computes its gradients along with itself, in float32: [V,H] and [tokens,H].

    In its forward pass beside them one chunk's logits and probabilities, and in bf16 a copy of the head and one chunk's
    share of its gradient; in its backward pass both gradients once more, scaled.
    """
    head, hidden = 4 * config.vocab_size * config.hidden_size, 4 * tokens * config.hidden_size
    chunk = 8 * min(DEFAULT_CHUNK_SIZE, tokens) * config.vocab_size
    return max(head + hidden + chunk + (head if is_bf16 else 0), 2 * head + 2 * hidden)


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
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given:  # a view, such as of a parameter, is made of what was there
                self._track(storage)
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


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
