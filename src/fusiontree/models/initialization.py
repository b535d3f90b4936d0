"""How every parameter starts, on one page.

Linear maps: normal with standard deviation 0.5 / sqrt(fan-in); biases 0; norms 1 and 0. The two maps that write to the
residual stream are divided by sqrt(2 L), so that its growth does not depend on the depth (Radford et al. 2019).
Embeddings and head: standard deviation 0.02 / 4, and the norm that the head reads starts at 4 instead of 1. The logits
start as they would without the two factors, but a step of Adam, as large for a small weight as for a large one, moves
them 4 times as far: tables want a higher learning rate than matrices do (Yang et al. 2022, "Tensor Programs V"). The
table of a learned time encoding stays at 0.02.
Mamba: time steps softplus(dt_bias) log-uniform in [1e-3, 1e-1]; A = -(1 … N) per channel for version 1 (S4D-real, Gu et
al. 2022) and -uniform(1, 16) per head for version 2 (Dao & Gu 2024); D = 1; convolution uniform within 1/sqrt(K).
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from transformers import initialization as init

from fusiontree.models.configuration import HybridLanguageModelConfig
from fusiontree.models.hybrid_block import HybridBlock
from fusiontree.models.mamba_block import MambaBlock

TABLE_STD = 0.02
LINEAR_STD = 0.5  # times 1 / sqrt(fan-in)
HEAD_GAIN = 4.0
DT_MIN, DT_MAX = 1e-3, 1e-1
A_MIN, A_MAX = 1.0, 16.0


def initialize(module: nn.Module, config: HybridLanguageModelConfig) -> None:
    """Initialise the parameters that `module` itself owns (transformers calls this for every submodule, children
    first, and leaves tensors that were loaded alone)."""
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, std=_linear_std(module, config))
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=TABLE_STD / (1 if getattr(module, "holds_positions", False) else HEAD_GAIN))
    elif isinstance(module, nn.LayerNorm):
        init.constant_(module.weight, HEAD_GAIN if getattr(module, "feeds_head", False) else 1.0)
        init.zeros_(module.bias)
    elif isinstance(module, MambaBlock):
        _initialize_mamba(module)
    elif isinstance(module, HybridBlock):
        if module.branch == "constant":
            init.zeros_(module.constant)
        for buffer in module.buffers(recurse=False):
            init.zeros_(buffer)


def _linear_std(module: nn.Linear, config: HybridLanguageModelConfig) -> float:
    if getattr(module, "is_head", False):
        return TABLE_STD / HEAD_GAIN
    depth = 2 * config.num_layers if getattr(module, "writes_residual", False) else 1
    return LINEAR_STD / math.sqrt(module.in_features * depth)


def _initialize_mamba(module: MambaBlock) -> None:
    bound = module.conv_weight.shape[1] ** -0.5
    init.uniform_(module.conv_weight, -bound, bound)
    init.uniform_(module.conv_bias, -bound, bound)
    dt = torch.empty_like(module.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
    init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    if module.version == 2:
        init.ones_(module.norm_weight)
        init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(A_MIN, A_MAX).log())
    else:
        rows = torch.arange(1, module.state_size + 1, dtype=torch.float32, device=module.A_log.device)
        init.copy_(module.A_log, rows.log().expand_as(module.A_log))
        scale = module.dt_rank**-0.5
        init.uniform_(module.dt_proj.weight, -scale, scale)
    init.ones_(module.D)
