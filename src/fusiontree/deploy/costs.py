"""What models cost on this machine: parameters, bytes, the time of reading a prompt and of decoding after it.

All models take turns, round after round, so that what the machine does besides hits them alike; medians count.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from fusiontree.artifacts import processor
from fusiontree.deploy.quantized import weight_bytes
from fusiontree.models import HybridCache, HybridLanguageModel, HybridLanguageModelConfig

#: Of a prompt whose reading and continuing are timed, and of the state that counts as memory.
DEFAULT_CONTEXT = 4096
_DECODED = 16  # tokens of one round


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        parameters: each shared one counted once.
        weight_bytes: of them.
        state_bytes: of the cache of one sequence of `context` tokens.
        prefill_seconds: of one forward pass over `context` tokens that keeps the state.
        decode_seconds: of one more token after them.
    """

    parameters: int
    weight_bytes: int
    state_bytes: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def memory_bytes(self) -> int:
        """Weights and state of one sequence."""
        return self.weight_bytes + self.state_bytes

    def against(self, parent: Cost) -> dict[str, float]:
        """By the names of a plan's targets: how many times as fast, and the share that is left."""
        return {
            "decode": parent.decode_seconds / self.decode_seconds,
            "prefill": parent.prefill_seconds / self.prefill_seconds,
            "memory": self.memory_bytes / parent.memory_bytes,
            "parameters": self.parameters / parent.parameters,
        }


def measure_costs(
    models: Mapping[str, HybridLanguageModel],
    *,
    context: int = DEFAULT_CONTEXT,
    rounds: int = 3,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Cost]:
    """Costs of each model, by name, in their own dtypes.

    Args:
        models: all on one device.
        context: tokens of the prompt; fewer where that is more than `timed_context`.
        rounds: measured ones, after one that only warms up.
        progress: called with what is measured next.
    """
    context = min(timed_context(model.config, context) for model in models.values())
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    state_bytes: dict[str, int] = {}
    names = list(models)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            progress(f"{'warm-up' if turn == 0 else f'round {turn} of {rounds}'}: {name}")
            prefill, decode, state_bytes[name] = _time(models[name], context)
            if turn:
                seconds[name].append((prefill, decode))
    return {
        name: Cost(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            weight_bytes=weight_bytes(model),
            state_bytes=state_bytes[name],
            prefill_seconds=median(prefill for prefill, _ in seconds[name]),
            decode_seconds=median(decode for _, decode in seconds[name]),
        )
        for name, model in models.items()
    }


def timed_context(config: HybridLanguageModelConfig, asked: int) -> int:
    """How many tokens are really read where `asked` are wanted: a learned time encoding has no more positions."""
    return min(asked, config.max_position_embeddings - _DECODED) if config.srte_encoding == "learned" else asked


@torch.no_grad()
def _time(model: HybridLanguageModel, context: int) -> tuple[float, float, int]:
    """Seconds of the prompt and of a token (median), and the state's bytes after the prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, context + _DECODED), generator=generator).to(model.device)
    cache = HybridCache(model.config)
    start = _now(model)
    model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
    prefill = _now(model) - start
    held, steps = cache.nbytes, []
    for token in ids[:, context:].split(1, dim=1):
        start = _now(model)
        model(token, past_key_values=cache)
        steps.append(_now(model) - start)
    return prefill, median(steps), held


def _now(model: HybridLanguageModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: processor, threads, and the GPU if it is one; nothing that names the machine."""
    machine: dict[str, Any] = {
        "processor": processor()[0],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "device": device.type,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine
