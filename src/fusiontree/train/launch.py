"""From the `system` section and the launcher's environment to devices and processes: what is asked for is what runs."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs

from fusiontree.errors import ElsewhereError, InputError
from fusiontree.train.deepspeed_config import (
    OFFLOADS,
    check_with_deepspeed,
    deepspeed_config,
    forget_in_transformers,
)
from fusiontree.train.optim import check_optimizer
from fusiontree.train.settings import RunSettings

_TRUE = ("1", "true", "yes", "on")
#: NCCL ends the process at a timeout, without a word: later than `train/watch.py` names who is waited for.
_NCCL_GRACE_S = 60
_USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"


def launched_processes() -> int:
    """How many processes the launcher (torchrun, accelerate launch, deepspeed) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this is the process of the run that prints and draws."""
    return os.environ.get("RANK", "0") == "0"


def has_deepspeed() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("deepspeed") is not None


def check_launch(settings: RunSettings) -> None:
    """Compare what the settings ask for with how this process was launched and what is installed.

    Raises:
        InputError: they contradict each other, or something is missing here; nothing is replaced in silence
            (`ElsewhereError` in all processes of a machine but its first).
    """
    with told_once():
        _check_launch(settings)


@contextmanager
def told_once() -> Iterator[None]:
    """Around what all processes of a machine find out alike, each for itself: its first one alone tells it."""
    try:
        yield
    except InputError as error:
        if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
            raise
        raise ElsewhereError(str(error)) from error


def _check_launch(settings: RunSettings) -> None:
    system, launched = settings.system, launched_processes()
    if system.num_devices is not None and system.num_devices != launched:
        runs = "1 process runs" if launched == 1 else f"{launched} processes run"
        raise InputError(
            f"system.num_devices is {system.num_devices} but {runs}: start it with torchrun "
            f"--nproc_per_node={system.num_devices} -m fusiontree train …, or set system.num_devices={launched}"
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if launched > 1 and missing:
        raise InputError(
            f"WORLD_SIZE is {launched} but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start "
            "it with torchrun, which sets them all, or unset WORLD_SIZE"
        )
    zero: dict[str, Any] = {}
    if system.uses_deepspeed:
        key = "system.deepspeed_config" if system.deepspeed_config else "system.zero_stage"
        if not has_deepspeed():
            raise InputError(
                f"{key} asks for DeepSpeed, which is not installed: pip install 'fusiontree[deepspeed]', or set it to "
                f"{'null' if system.deepspeed_config else 0}"
            )
        zero = checked_deepspeed_config(settings, launched)["zero_optimization"]
    elif _is_set(_USE_DEEPSPEED):
        raise InputError(
            f"the launcher asks for DeepSpeed ({_USE_DEEPSPEED}) but system.zero_stage is 0 and there is no "
            "system.deepspeed_config: set one of them, or launch with torchrun"
        )
    if not system.fsdp and _is_set("ACCELERATE_USE_FSDP"):
        raise InputError(
            "the launcher asks for FSDP (ACCELERATE_USE_FSDP) but system.fsdp is false: set it, or launch with torchrun"
        )
    check_optimizer(settings.training)
    _check_launcher(settings, zero)
    wanted = settings.training.mixed_precision
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", wanted):
        raise InputError(
            f"the launcher asks for {precision} (ACCELERATE_MIXED_PRECISION) but training.mixed_precision is {wanted}: "
            "make them equal"
        )
    _check_devices(settings)


def _check_launcher(settings: RunSettings, zero: Mapping[str, Any]) -> None:
    """Compare what `accelerate launch` was told of DeepSpeed with the run, which is made from its settings alone.

    Args:
        zero: the section `zero_optimization` of DeepSpeed's configuration; empty where another engine runs.
    """
    training, file = settings.training, settings.system.deepspeed_config
    runs: dict[str, tuple[str, Any]] = {
        "GRADIENT_ACCUMULATION_STEPS": ("training.gradient_accumulation_steps", training.gradient_accumulation_steps),
        "GRADIENT_CLIPPING": ("training.grad_clip", training.grad_clip),
    }
    if zero:
        runs |= {f"DEEPSPEED_{key.upper()}_DEVICE": (key, zero.get(key, {}).get("device", "none")) for key in OFFLOADS}
        runs["DEEPSPEED_ZERO_STAGE"] = ("the ZeRO stage", zero["stage"])
        runs["DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = ("saving 16-bit weights", "false")
        runs["DEEPSPEED_CONFIG_FILE"] = ("system.deepspeed_config", os.path.realpath(file) if file else "none")
    for name, (key, value) in runs.items():
        variable = f"ACCELERATE_{name}"
        asked = os.environ.get(variable, "auto")
        given = os.path.realpath(asked) if name.endswith("FILE") and asked != "none" else asked
        if asked != "auto" and not _is_same(given, value):
            raise InputError(f"the launcher asks for {asked} ({variable}) but {key} is {value}: make them equal")


def _is_same(written: str, value: Any) -> bool:
    try:
        return float(written) == float(value)
    except (TypeError, ValueError):
        return written == value


def checked_deepspeed_config(settings: RunSettings, processes: int) -> dict[str, Any]:
    """What DeepSpeed is initialised with, once it has read and accepted it itself; it must be installed.

    Raises:
        InputError: as `deepspeed_config` and `check_with_deepspeed`.
    """
    config = deepspeed_config(settings, processes)
    if not uses_cuda(settings):
        os.environ["DS_ACCELERATOR"] = "cpu"  # which it looks for when it is imported
    check_with_deepspeed(config, settings)
    return config


def _check_devices(settings: RunSettings) -> None:
    if settings.system.device == "cuda" and not torch.cuda.is_available():
        raise InputError("system.device is cuda but torch sees no CUDA device: use cpu or auto")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if uses_cuda(settings) and local > torch.cuda.device_count():
        raise InputError(
            f"{local} processes were launched on this machine but torch sees {torch.cuda.device_count()} CUDA devices: "
            "launch one process per device, or set system.device to cpu"
        )


def uses_cuda(settings: RunSettings) -> bool:
    """Whether the run trains on CUDA devices."""
    device = settings.system.device
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def open_accelerator(settings: RunSettings) -> Accelerator:
    """Join the other processes of the run, on the device that the settings ask for.

    Raises:
        InputError: as `check_launch`; or accelerate would run something else than what was asked for.
    """
    check_launch(settings)
    system, on_cuda = settings.system, uses_cuda(settings)
    if system.num_threads is not None:
        torch.set_num_threads(system.num_threads)
    plugin = None
    if system.uses_deepspeed:
        if not on_cuda:
            _leave_communication_to_gloo()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed calls torch by names that torch 2.13 wants changed, which each process would say.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(settings, launched_processes()))
    if system.is_sharded and "RANK" not in os.environ:
        os.environ.update(_single_launch())  # and left so: DeepSpeed reads it when it wraps the model
    with _environment({_USE_DEEPSPEED: str(system.uses_deepspeed).lower()}):
        accelerator = Accelerator(
            # With `cpu`, accelerate ignores DeepSpeed in silence; without, it takes the CPU where there is no GPU.
            cpu=not on_cuda and not system.uses_deepspeed,
            # Autocast is entered around the forward pass by the engine, alike everywhere; parameters stay float32.
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=settings.training.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            deepspeed_plugin=plugin,
            kwargs_handlers=[
                InitProcessGroupKwargs(
                    # Left to itself, accelerate takes a run of DeepSpeed on CPUs for a single process.
                    backend="gloo" if system.uses_deepspeed and not on_cuda else None,
                    timeout=timedelta(seconds=system.timeout + (_NCCL_GRACE_S if on_cuda else 0)),
                )
            ],
        )
    if system.uses_deepspeed:
        forget_in_transformers()
    if torch.distributed.is_initialized():
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)
    _check_what_runs(accelerator, settings)
    return accelerator


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def close_accelerator() -> None:
    """Forget accelerate's state, so that this process can open another engine; the group of processes stays."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _check_what_runs(accelerator: Accelerator, settings: RunSettings) -> None:
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if is_deepspeed != settings.system.uses_deepspeed or accelerator.num_processes != launched_processes():
        raise InputError(
            f"{settings.system.engine} with {launched_processes()} processes was asked for but accelerate would run "
            f"{accelerator.distributed_type.value} with {accelerator.num_processes}: start it in a fresh process, with "
            "torchrun"
        )
    wanted = "cuda" if uses_cuda(settings) else "cpu"
    if accelerator.device.type != wanted:
        raise InputError(
            f"device {wanted} was asked for but accelerate would run on {accelerator.device.type}: set system.device"
        )


def _single_launch() -> dict[str, str]:
    """What a launcher would set for a single process: sharding needs a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _leave_communication_to_gloo() -> None:
    """DeepSpeed would compile an operation of its own on the first start, for a minute and with a C++ compiler.

    A start that is killed meanwhile leaves a lock behind that every later one waits for without an end.
    """
    from deepspeed.ops import __compatible_ops__ as operations

    operations["deepspeed_shm_comm"] = False


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in _TRUE
