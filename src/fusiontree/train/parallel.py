"""The engines behind the one training loop: one process or DDP, DeepSpeed ZeRO, FSDP2.

All of them hold float32 parameters and compute in the autocast that the loop enters. They differ in who holds which
part of parameters, gradients and moments; weights and moments are handed out whole, by parameter name, so that a
checkpoint of one engine goes on in any other and with any number of processes.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from fusiontree.errors import ElsewhereError, InputError
from fusiontree.models import HybridLanguageModel
from fusiontree.train.deepspeed_config import OFFLOADS, deepspeed_config, forget_in_transformers
from fusiontree.train.optim import MOMENTS, build_optimizers, set_learning_rate
from fusiontree.train.settings import RunSettings


class Parallel:
    """One process, or DDP: every process holds everything.

    Attributes:
        module: the model itself, whatever wraps it.
        model: what runs the forward pass.
    """

    def __init__(self, accelerator: Accelerator, module: HybridLanguageModel, settings: RunSettings):
        self.accelerator = accelerator
        self.module = module
        self.max_norm = settings.training.grad_clip or math.inf
        self.model: nn.Module = self._wrap()
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        self.optimizers = build_optimizers(module, settings.training)
        self._optimizer_of = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def _wrap(self) -> nn.Module:
        if self.accelerator.num_processes == 1:
            return self.module
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 renames `broadcast_buffers`, in words of each process; the older ones know no other name.
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                self.module,
                device_ids=devices,
                # Running means are averaged (`average_running_means`), not overwritten by the main process's.
                broadcast_buffers=False,
                # Branch dropout leaves parameters out, the same ones in every process but not in every step.
                find_unused_parameters=self.module.config.drop_branch_prob > 0,
                gradient_as_bucket_view=True,
            )

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; gradients are exchanged in that of the last one alone."""
        if is_last or self.model is self.module:
            return contextlib.nullcontext()
        return self.model.no_sync()  # type: ignore[operator]

    def gathered(self, parameter: torch.Tensor) -> AbstractContextManager[Any]:
        """Within it a parameter outside the blocks is whole in every process, between forward and backward pass.

        FSDP2 keeps those gathered from the one to the other.
        """
        return contextlib.nullcontext()

    def backward(self, share: torch.Tensor) -> None:
        """Add the gradients of a micro-batch's share of the step's loss; shares add up over all processes."""
        (share * self.accelerator.num_processes).backward()  # which the exchange divides by

    def update(self, learning_rate: float) -> float:
        """Clip the gradients, step with them unless they are not finite, and forget them.

        Returns:
            Their L2 norm before clipping.
        """
        for parameter in self.names:
            # A branch that was dropped in every micro-batch. In flat shards it has zeros: so has it here.
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        norm = float(self._clip())
        for optimizer in self.optimizers:
            if math.isfinite(norm):
                set_learning_rate(optimizer, learning_rate)
                optimizer.step()
            optimizer.zero_grad()
        return norm

    def _clip(self) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(self.module.parameters(), self.max_norm)

    @torch.no_grad()
    def average_running_means(self) -> None:
        """Make the running means of branch dropout those of all processes' tokens, after each micro-batch."""
        if self.accelerator.num_processes == 1 or self.module.config.drop_branch_prob == 0:
            return
        for name, buffer in self.module.named_buffers():
            if name.endswith(("mamba_mean", "attention_mean")):
                buffer.copy_(self.accelerator.reduce(buffer, reduction="mean"))

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, gradient) of what this process holds between `backward` and `update`."""
        for parameter, name in self.names.items():
            if parameter.grad is not None:
                yield name, parameter.grad

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(self._shape(parameter).numel() for parameter in self.names)

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's state dict, whole, in the main process's host memory; empty elsewhere."""
        whole = {}
        for name, value in self.module.state_dict().items():
            value = self._whole_weight(name, value)
            if self.accelerator.is_main_process:
                # Alone on a CPU nothing is copied: who writes it does so before the next step.
                whole[name] = value.detach().cpu()
        return whole

    def _whole_weight(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return value

    def restore_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put a whole state dict back, in every process."""
        self.module.load_state_dict(dict(weights))

    def moments(self) -> dict[str, torch.Tensor]:
        """This process's share of the optimizer's state: `step`, and `<parameter>.<moment>` whole, in host memory."""
        if not self._adamw.state:
            self._make_room(torch.tensor(0.0))  # no step was finite so far
        share = {"step": next(iter(self._adamw.state.values()))["step"].detach().cpu().clone()}
        for index, (parameter, name) in enumerate(self._trained()):
            for moment in self._moments_of(parameter):
                value = self._whole_moment(parameter, moment)
                if index % self.accelerator.num_processes == self.accelerator.process_index:
                    share[f"{name}.{moment}"] = value.detach().cpu()
        return share

    def _trained(self) -> list[tuple[nn.Parameter, str]]:
        return [(parameter, name) for parameter, name in self.names.items() if parameter.requires_grad]

    def _state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        return self._optimizer_of[parameter].state[parameter]

    def _moments_of(self, parameter: nn.Parameter) -> tuple[str, ...]:
        return MOMENTS[type(self._optimizer_of[parameter]).__name__]

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        """The one that counts steps: Muon does not."""
        return self.optimizers[-1]

    def _whole_moment(self, parameter: nn.Parameter, moment: str) -> torch.Tensor:
        return self._state_of(parameter)[moment]

    def restore_moments(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Put the moments of all processes back; hyperparameters stay as the settings have them.

        Args:
            saved: the shares of `moments` together; any mapping that loads what is asked of it.

        Raises:
            InputError: a parameter has none, or of another shape.
        """
        self._make_room(saved["step"])
        for parameter, name in self._trained():
            for moment in self._moments_of(parameter):
                key = f"{name}.{moment}"
                shape = self._shape(parameter)
                value = saved[key] if key in saved else None
                if value is None or value.shape != shape:
                    found = "none" if value is None else f"shape {list(value.shape)}"
                    raise InputError(
                        f"the checkpoint's optimizer state does not fit parameter {name} {list(shape)}: "
                        f"{moment} has {found}; training.optimizer must be what it was"
                    )
                self._restore_moment(parameter, moment, value)

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def _make_room(self, step: torch.Tensor) -> None:
        """Moments of zeros after `step` updates."""
        for parameter, optimizer in self._optimizer_of.items():
            optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in self._moments_of(parameter)}
            if optimizer is self._adamw:
                # The fused kernels want the step where the parameter is.
                optimizer.state[parameter]["step"] = step.to(parameter.device, copy=True)

    def _restore_moment(self, parameter: nn.Parameter, moment: str, value: torch.Tensor) -> None:
        self._state_of(parameter)[moment].copy_(value)


class FullyShardedDataParallel2(Parallel):
    """FSDP2 (torch's `fully_shard`): parameters, gradients and moments in shards, gathered block by block."""

    def _wrap(self) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        for block in self.module.layers:
            fully_shard(block, mesh=mesh)
        # No mixed-precision policy: A_log, D and dt_bias are float32 always, and autocast does the rest.
        fully_shard(self.module, mesh=mesh)
        return self.module

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[Any]:
        self.module.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    def _clip(self) -> torch.Tensor:
        return super()._clip().full_tensor()  # type: ignore[attr-defined]

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, gradient in super().gradients():
            yield name, gradient.to_local()  # type: ignore[attr-defined]

    def _whole_weight(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return _whole(value)

    @torch.no_grad()
    def restore_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, value in self.module.state_dict().items():
            value.copy_(_sharded_like(value, weights[name]))

    def _whole_moment(self, parameter: nn.Parameter, moment: str) -> torch.Tensor:
        return _whole(super()._whole_moment(parameter, moment))

    @torch.no_grad()
    def _restore_moment(self, parameter: nn.Parameter, moment: str, value: torch.Tensor) -> None:
        own = self._state_of(parameter)[moment]
        own.copy_(_sharded_like(own, value))


def _whole(value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def _sharded_like(own: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


class ZeroRedundancy(Parallel):
    """DeepSpeed ZeRO: moments (stage 1), gradients too (2), parameters too (3) are divided among the processes."""

    def __init__(self, accelerator: Accelerator, module: HybridLanguageModel, settings: RunSettings):
        super().__init__(accelerator, module, settings)
        (adamw,) = self.optimizers
        engine, _ = accelerator.prepare(module, adamw)
        forget_in_transformers()
        self.model, self._zero = engine, engine.optimizer
        self.stage = int(engine.zero_optimization_stage())
        asked = deepspeed_config(settings, accelerator.num_processes)["zero_optimization"]
        wanted = {"stage": asked["stage"]} | {key: asked.get(key, {}).get("device", "none") for key in OFFLOADS}
        if self.what_runs != wanted:
            kind = InputError if accelerator.is_main_process else ElsewhereError
            raise kind(f"{_words(wanted)} was asked for but DeepSpeed would run {_words(self.what_runs)}")

    @property
    def what_runs(self) -> dict[str, Any]:
        """As DeepSpeed has it: the stage, and the devices that optimizer state and parameters are offloaded to."""
        offloads = (self.model.zero_offload_optimizer(), self.model.zero_offload_param())  # type: ignore[operator]
        devices = [str(offload.device) if offload else "none" for offload in offloads]
        return {"stage": self.stage} | dict(zip(OFFLOADS, devices, strict=True))

    def _wrap(self) -> nn.Module:
        return self.module  # DeepSpeed takes the optimizer along

    def accumulate(self, *, is_last: bool) -> AbstractContextManager[Any]:
        self.model.set_gradient_accumulation_boundary(is_last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def gathered(self, parameter: torch.Tensor) -> AbstractContextManager[Any]:
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([parameter], enabled=self.stage == 3)

    def backward(self, share: torch.Tensor) -> None:
        self.model.backward(share * self.accelerator.num_processes, scale_wrt_gas=False)  # type: ignore[operator]

    def update(self, learning_rate: float) -> float:
        set_learning_rate(self._adamw, learning_rate)
        self.model.step()  # type: ignore[operator]  # clips, and leaves out what is not finite, as told by the norm
        if self.stage == 3 and self.module.config.drop_branch_prob > 0:
            # Where a branch was dropped, the next step would add to this one's gradients, or take them once more.
            self._zero.grad_partitions_flat_buffer.zero_()
        return float(self.model.get_global_grad_norm())  # type: ignore[operator]

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_grad

        for parameter, name in self._trained():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                yield name, gradient

    def _whole_weight(self, name: str, value: torch.Tensor) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self._by_name().get(name)
        return value if parameter is None else safe_get_full_fp32_param(parameter)

    def _by_name(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def restore_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, buffer in self.module.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        for parameter, name in self.names.items():
            # Both what computes and the optimizer's own copy.
            if self.stage < 3:
                parameter.copy_(weights[name])
                safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))
                continue
            part = self._own_part(parameter, weights[name])
            parameter.ds_tensor.copy_(part)
            if parameter.numel() > 0:  # small ones stay whole in every process
                parameter.copy_(weights[name])
            safe_set_local_fp32_param(parameter, part)

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        return self._zero.optimizer

    def moments(self) -> dict[str, torch.Tensor]:
        if self._adamw.state:
            self._link()
        return super().moments()

    def _whole_moment(self, parameter: nn.Parameter, moment: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment).view(self._shape(parameter))

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def _make_room(self, step: torch.Tensor) -> None:
        flat = (
            self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        for part in flat:
            self._adamw.state[part] = {
                "step": step.to(part.device, copy=True),
                **{moment: torch.zeros_like(part) for moment in MOMENTS["AdamW"]},
            }
        self._link()

    def _link(self) -> None:
        """Point each parameter of stages 1 and 2 to its place in the flat moments.

        DeepSpeed does so during the first group's first update, before the second group has moments.
        """
        if self.stage < 3:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _restore_moment(self, parameter: nn.Parameter, moment: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), moment)

    def _own_part(self, parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole tensor, as ZeRO-3 divides it: equal parts, the last one filled with zeros."""
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = F.pad(value.flatten(), (0, size * self.accelerator.num_processes - value.numel()))
        return padded.narrow(0, size * self.accelerator.process_index, size)


def _words(zero: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in zero.items())


def open_parallel(accelerator: Accelerator, module: HybridLanguageModel, settings: RunSettings) -> Parallel:
    """The engine that the settings ask for, around a model whose weights are loaded."""
    kind = Parallel
    if settings.system.fsdp:
        kind = FullyShardedDataParallel2
    elif settings.system.uses_deepspeed:
        kind = ZeroRedundancy
    return kind(accelerator, module, settings)
