"""How much of the device a run uses: floating-point operations, their share of the device's peak, and memory.

Counted is what the model asks for, not what an implementation does for it: a multiplication with its addition is two
operations, the backward pass is twice the forward pass, and what is computed again to save memory counts once. So

    operations = 3 x (2 x weights x tokens + 4 x head width x visible pairs + 4 x states x tokens)

with `weights` those of all linear maps (the head's for the tokens whose label counts), `visible pairs` of a query and a
key in one document and one window, summed over heads, and `states` those of the scans: each of their elements is
written and read once a token. Element-wise work, norms and the short convolutions are left out, as is a teacher.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from fusiontree.data.batch import Batch
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.models.layout import count_labels
from fusiontree.train.settings import RunSettings

#: Dense bf16 products with float32 sums, TFLOP/s, from NVIDIA's data sheets; the first name found in the device's wins.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
}


def known_peak_tflops(device: torch.device, mixed_precision: str) -> float | None:
    """The peak of a device in the precision of a run, None where it is not known."""
    if device.type != "cuda" or mixed_precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a part of a device
        return None
    return next((peak for part, peak in PEAK_TFLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory held at once so far: what torch allocated on a CUDA device, else what was resident; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not `ru_maxrss` where there is a choice: on Linux that begins with what the parent process held.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class FlopCount:
    """Operations of training steps, forward and backward, of one process."""

    def __init__(self, model: HybridLanguageModel):
        config: HybridLanguageModelConfig = model.config
        # The sizes that a layer was built with stand, also where its parameters are spread over processes.
        weights = {
            name: module.in_features * module.out_features
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        self._head = 2 * weights.pop("lm_head")
        # Branch dropout leaves one branch out, either as often.
        kept = 1 - config.drop_branch_prob / 2
        self._per_token = 0.0
        for name, size in weights.items():
            _, _, rest = name.partition("layers.")
            layer, _, part = rest.partition(".")
            is_dropped = part.startswith(("mamba.", "attention.")) and config.branch(int(layer)) == "both"
            self._per_token += 2 * size * (kept if is_dropped else 1)
        # Operations of one visible pair, by window; None: the whole document.
        self._per_pair: defaultdict[int | None, float] = defaultdict(float)
        for layer in range(config.num_layers):
            branch, heads = config.branch(layer), config.heads(layer)
            share = kept if branch == "both" else 1.0
            if branch in ("both", "mamba"):
                self._per_token += share * 4 * config.mamba_width(layer) * config.mamba_state_size
            per_head = share * 4 * config.head_dim
            self._per_pair[config.layer_window(layer)] += per_head * heads.local
            self._per_pair[None] += per_head * heads.globals

    def __call__(self, batches: Sequence[Batch]) -> float:
        """Operations of one step of this process's micro-batches; padding counts as the document that it poses as."""
        forward = 0.0
        for batch in batches:
            forward += self._per_token * batch.input_ids.numel()
            forward += self._head * int(count_labels(batch.labels, batch.position_ids))
            visible_BT = batch.position_ids + 1  # keys of a query's document up to its own
            for window, operations in self._per_pair.items():
                pairs = visible_BT if window is None else visible_BT.clamp(max=window)
                forward += operations * int(pairs.sum())
        return 3 * forward


class Throughput:
    """The numbers of a row of metrics.jsonl that say how well a device is used."""

    def __init__(self, model: HybridLanguageModel, device: torch.device, settings: RunSettings):
        self.flops = FlopCount(model)
        self._device = device
        self._peak = settings.system.peak_tflops or known_peak_tflops(device, settings.training.mixed_precision)

    def row(self, flops: float, seconds: float) -> dict[str, Any]:
        """`tflops` a second of this device, `mfu` where its peak is known, `peak_memory_gib` where it can be found."""
        tflops = flops / seconds / 1e12
        numbers = {"tflops": tflops}
        if self._peak is not None:
            numbers["mfu"] = tflops / self._peak
        memory = peak_memory_bytes(self._device)
        if memory is not None:
            numbers["peak_memory_gib"] = memory / 2**30
        return numbers
