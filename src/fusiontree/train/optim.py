"""AdamW, beside it Muon for the matrices; their parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusiontree.errors import InputError
from fusiontree.train.settings import TrainingSettings

#: Parameters of the recurrence and of the gates' vectors that decay would pull to a meaningless value.
NEVER_DECAYED = ("A_log", "D", "dt_bias")

#: Devices on which torch ships a fused AdamW (one kernel per group instead of one per tensor).
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")

#: What an optimizer keeps for each parameter beside the step.
MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are updated alike."""

    optimizer: str
    """A key of `MOMENTS`."""
    weight_decay: float
    names: tuple[str, ...]
    parameters: int
    """Numbers in them, of the whole model."""

    def patterns(self) -> list[str]:
        """The names, layers taken together: `layers.*.gate.up.weight`."""
        return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in self.names))

    def __str__(self) -> str:
        decay = f"weight decay {self.weight_decay:g}" if self.weight_decay else "no weight decay"
        return f"{self.optimizer}, {decay}: {self.parameters:,} parameters in {len(self.names)} tensors"


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


def parameter_groups(model: nn.Module, settings: TrainingSettings) -> list[ParameterGroup]:
    """AdamW with and without weight decay; with Muon, first the weight matrices between embeddings and head.

    Muon is for maps from one hidden space to another (Jordan et al. 2024): the head, whose rows are tokens, and the
    convolutions' kernels, whose rows are channels, stay AdamW's.
    """
    parameters = dict(model.named_parameters())
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    maps = linear - {"lm_head.weight"} if settings.optimizer == "muon" else set()
    wanted: dict[tuple[str, float], list[str]] = {}
    for name, is_decayed in decayed(model).items():
        optimizer = "Muon" if name in maps else "AdamW"
        wanted.setdefault((optimizer, settings.weight_decay if is_decayed else 0.0), []).append(name)
    return [
        ParameterGroup(optimizer, decay, tuple(names), sum(parameters[name].numel() for name in names))
        for (optimizer, decay), names in sorted(wanted.items(), reverse=True)
    ]


def check_optimizer(settings: TrainingSettings) -> None:
    """Raises InputError where Muon is asked for of a torch without it."""
    if settings.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise InputError(
            f"training.optimizer: muon needs torch 2.9 or later, this is {torch.__version__}: set it to adamw"
        )


def build_optimizers(model: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """AdamW, fused on the devices that have it, and before it Muon if asked for; `names` lists a group's parameters.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that one learning rate and
    one weight decay serve both.

    Raises:
        InputError: Muon is asked for of a torch without it.
    """
    parameters = dict(model.named_parameters())
    groups: dict[str, list[dict[str, Any]]] = {"Muon": [], "AdamW": []}
    for group in parameter_groups(model, settings):
        tensors = [parameters[name] for name in group.names]
        groups[group.optimizer].append(
            {"params": tensors, "weight_decay": group.weight_decay, "names": list(group.names)}
        )
    found: list[torch.optim.Optimizer] = []
    if groups["Muon"]:
        check_optimizer(settings)
        found.append(torch.optim.Muon(groups["Muon"], lr=settings.learning_rate, adjust_lr_fn="match_rms_adamw"))
    device = next(model.parameters()).device
    adamw = torch.optim.AdamW(
        groups["AdamW"],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=device.type in FUSED_DEVICES,
    )
    return [*found, adamw]


def never_warm(settings: TrainingSettings) -> str | None:
    """What to tell of a warm-up that outlasts the run."""
    warmup, steps = settings.warmup_steps, settings.max_steps
    if warmup < steps or steps == 1:
        return None
    return (
        f"training.warmup_steps {warmup} is not below training.max_steps {steps}: the learning rate rises to the last "
        f"step, to {learning_rate_at(steps, settings):.3g} of {settings.learning_rate:.3g}, and never comes down"
    )


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """Learning rate of the `step`-th update (from 1): linear warm-up, then down to `min_lr_ratio` at `max_steps`.

    `cosine` and `linear` come down all the way; `wsd` (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) stays
    at the peak and comes down in a straight line in the last `lr_decay_ratio` of the steps. A function of the step
    alone, so that it needs no state, resumes exactly and is the same in every engine.
    """
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    start = settings.warmup_steps
    if settings.lr_schedule == "wsd":
        start = max(start, settings.max_steps - round(settings.lr_decay_ratio * settings.max_steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, settings.max_steps - start)))
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if settings.lr_schedule == "cosine" else 1.0 - progress
    return settings.learning_rate * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group, for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
