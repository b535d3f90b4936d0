"""AdamW with its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fusiontree.train.settings import TrainingSettings

#: Parameters of the recurrence and of the gates' vectors that decay would pull to a meaningless value.
NEVER_DECAYED = ("A_log", "D", "dt_bias")

#: Devices on which torch ships a fused AdamW (one kernel per group instead of one per tensor).
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def decayed(model: nn.Module) -> dict[str, bool]:
    """Whether weight decay applies, per trainable parameter, in the model's own order.

    It applies to the weight matrices and convolution kernels. It spares vectors (norms, biases), `A_log` (which has two
    dimensions in Mamba 1), `D`, `dt_bias`, and embeddings, tied output included: a row is updated only when its token
    occurs, while decay would shrink it at every step.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: parameter.ndim >= 2 and id(parameter) not in embeddings and name.rpartition(".")[2] not in NEVER_DECAYED
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups, with and without weight decay; `names` lists each group's parameters in order."""
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = []
    decays = decayed(model)
    for wanted, decay in ((True, weight_decay), (False, 0.0)):
        names = [name for name, is_decayed in decays.items() if is_decayed is wanted]
        if names:
            groups.append({"params": [parameters[name] for name in names], "weight_decay": decay, "names": names})
    return groups


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused on the devices that have it."""
    device = next(model.parameters()).device
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=device.type in FUSED_DEVICES,
    )


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """Learning rate of the `step`-th update (from 1): linear warm-up, then a cosine to `min_lr_ratio` at `max_steps`.

    A function of the step alone, so that it needs no state, resumes exactly and is the same in every engine.
    """
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.learning_rate * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group, for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
