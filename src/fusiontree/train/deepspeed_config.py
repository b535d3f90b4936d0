"""The DeepSpeed configuration of a run: its own JSON file, or the `system` section, completed from the settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from fusiontree.errors import InputError
from fusiontree.train.settings import RunSettings

#: Sections that would train something else than the settings say, and what to do instead.
_REFUSED = {
    "optimizer": "the optimizer is that of the training section: remove it",
    "scheduler": "the learning rate is that of the training section: remove it",
    "amp": "compute precision is training.mixed_precision: remove it",
    "fp16": "parameters stay float32 and compute in bf16 autocast: remove it, and set training.mixed_precision",
    "bf16": "parameters stay float32 and compute in bf16 autocast: remove it, and set training.mixed_precision",
}


def deepspeed_config(settings: RunSettings, processes: int) -> dict[str, Any]:
    """What DeepSpeed is initialised with.

    In the file, `"auto"` stands for the value of the settings. Parameters stay float32 in every stage: autocast is
    DeepSpeed's own (`torch_autocast`), without modules whose gradients would travel in bf16.

    Raises:
        InputError: the file is missing or broken, or contradicts the settings.
    """
    system, training = settings.system, settings.training
    given = read_deepspeed_json(system.deepspeed_config) if system.deepspeed_config else {}
    where = system.deepspeed_config or "system"
    for section, advice in _REFUSED.items():
        content = given.get(section)
        if content not in (None, "auto") and not (isinstance(content, dict) and content.get("enabled") in (False,)):
            raise InputError(f"{where}: {section}: {advice}")
    zero = dict(given.get("zero_optimization", {}))
    wanted: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "train_batch_size": training.batch_size * training.gradient_accumulation_steps * processes,
        "gradient_clipping": training.grad_clip,
    }
    for key, value in wanted.items():
        if given.get(key, "auto") not in ("auto", value):
            raise InputError(
                f"{where}: {key} is {given[key]} but the training section makes it {value}: set it to auto"
            )
    stage = zero.get("stage", "auto")
    if stage == "auto":
        stage = system.zero_stage
    if stage not in (1, 2, 3):
        raise InputError(f"{where}: zero_optimization.stage is {stage}: set it to 1, 2 or 3")
    if system.zero_stage not in (0, stage):
        raise InputError(
            f"{where}: zero_optimization.stage is {stage} but system.zero_stage is {system.zero_stage}: keep one"
        )
    zero["stage"] = stage
    for key, asked in (("offload_optimizer", system.offload_optimizer), ("offload_param", system.offload_params)):
        offload = zero.get(key)
        if asked:
            if offload not in (None, "auto") and offload.get("device") != "cpu":
                raise InputError(f"{where}: zero_optimization.{key} contradicts system.{key}: keep one")
            zero[key] = {"device": "cpu", "pin_memory": torch.cuda.is_available()} | (
                offload if isinstance(offload, dict) else {}
            )
        elif offload == "auto":
            del zero[key]
        elif isinstance(offload, dict) and offload.get("device") == "nvme":
            raise InputError(
                f"{where}: zero_optimization.{key}.device is nvme: moments on disk cannot be saved, use cpu"
            )
    # 16-bit weights would be what DeepSpeed gathers: checkpoints hold float32 ones, gathered one at a time.
    zero["stage3_gather_16bit_weights_on_model_save"] = False
    return {
        **given,
        **wanted,
        "zero_optimization": {key: value for key, value in zero.items() if value != "auto"},
        "torch_autocast": {
            "enabled": training.mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        # torch's AdamW steps wherever its parameters lie; DeepSpeed's own for offloaded ones rounds in another way.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def read_deepspeed_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a DeepSpeed JSON file.

    Raises:
        InputError: it is missing, no JSON, or no object.
    """
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"system.deepspeed_config: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"system.deepspeed_config: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"system.deepspeed_config: {path} holds no JSON object")
    return content


def forget_in_transformers() -> None:
    """A plugin of accelerate tells transformers to build and load every model in shards, from then on in this process.

    Ours is built whole, loaded, and then sharded, and a checkpoint that is gone back to is loaded whole too. Under
    ZeRO-3 `from_pretrained` would return parts of parameters.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
