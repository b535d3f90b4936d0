"""The DeepSpeed configuration of a run: its own JSON file, or the `system` section, completed from the settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fusiontree.errors import InputError, first_line, nearest
from fusiontree.train.settings import RunSettings

_PRECISION = "parameters stay float32 and compute in bf16 autocast: remove it, and set training.mixed_precision"
#: Sections that would train something else than the settings say, and what to do instead.
_REFUSED = {
    "optimizer": "the optimizer is that of the training section: remove it",
    "scheduler": "the learning rate is that of the training section: remove it",
    "amp": "compute precision is training.mixed_precision: remove it",
    "fp16": _PRECISION,
    "bf16": _PRECISION,
}
#: One setting: 16-bit weights would be what DeepSpeed gathers.
_GATHERED_AS_16_BIT = (
    "stage3_gather_16bit_weights_on_model_save",
    "gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)
OFFLOADS = ("offload_optimizer", "offload_param")


def deepspeed_config(settings: RunSettings, processes: int) -> dict[str, Any]:
    """What DeepSpeed is initialised with.

    In the file, `"auto"` stands for the value of the settings. Parameters stay float32 in every stage: autocast is
    DeepSpeed's own (`torch_autocast`), without modules whose gradients would travel in bf16.

    Raises:
        InputError: the file is missing or broken, or contradicts the settings.
    """
    system, training = settings.system, settings.training
    given = read_deepspeed_json(system.deepspeed_config) if system.deepspeed_config else {}
    where = _source(settings)
    for section, advice in _REFUSED.items():
        content = given.pop(section, None)
        is_on = content.get("enabled", True) if isinstance(content, dict) else content
        if is_on not in (None, "auto", False):
            raise InputError(f"{where}: {section}: {advice}")
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
    fixed: dict[str, Any] = {
        "torch_autocast": {
            "enabled": training.mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "zero_allow_untested_optimizer": True,
        # torch's AdamW steps wherever its parameters lie; DeepSpeed's own for offloaded ones rounds in another way.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    for key, found, value in _contradictions(given, fixed):
        raise InputError(f"{where}: {key} is {json.dumps(found)} but a run has {json.dumps(value)}: remove it")
    return {
        **given,
        **wanted,
        "zero_optimization": _zero_optimization(given.get("zero_optimization", {}), settings, where),
        **fixed,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }


def _source(settings: RunSettings) -> str:
    return settings.system.deepspeed_config or "system"


def _contradictions(given: dict[str, Any], fixed: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in the file, value of every run) where the two differ."""
    for key, value in fixed.items():
        found = given.get(key, "auto")
        if isinstance(value, dict) and isinstance(found, dict):
            yield from ((f"{key}.{name}", has, wants) for name, has, wants in _contradictions(found, value))
        elif found not in ("auto", value):
            yield key, found, value


def _zero_optimization(content: Any, settings: RunSettings, where: str) -> dict[str, Any]:
    """The section of that name."""
    system = settings.system
    if not isinstance(content, dict):
        raise InputError(f'{where}: zero_optimization is {json.dumps(content)}, not a section: write {{"stage": 2}}')
    zero = {key: value for key, value in content.items() if value != "auto"}
    stage = zero.setdefault("stage", system.zero_stage)
    if stage not in (1, 2, 3):
        raise InputError(f"{where}: zero_optimization.stage is {json.dumps(stage)}: set it to 1, 2 or 3")
    if system.zero_stage not in (0, stage):
        raise InputError(
            f"{where}: zero_optimization.stage is {stage} but system.zero_stage is {system.zero_stage}: keep one"
        )
    asked_for = (system.offload_optimizer, system.offload_params)
    for key, older, asked in zip(OFFLOADS, ("cpu_offload", "cpu_offload_param"), asked_for, strict=True):
        if zero.pop(older, False):
            raise InputError(f'{where}: zero_optimization.{older} is now called {key}: write {{"device": "cpu"}} there')
        offload = zero.pop(key, None) or {"device": "auto"}
        if not isinstance(offload, dict) or not (asked or "device" in offload):
            raise InputError(
                f'{where}: zero_optimization.{key} is {json.dumps(offload)}: write {{"device": "cpu"}} or leave it out'
            )
        device = offload.get("device", "auto")
        if device == "auto":
            device = "cpu" if asked else "none"
        if device == "nvme":
            raise InputError(
                f"{where}: zero_optimization.{key}.device is nvme: moments on disk cannot be saved, use cpu"
            )
        if asked and device != "cpu":
            raise InputError(f"{where}: zero_optimization.{key} contradicts the system section: keep one")
        if device != "none":
            zero[key] = {"pin_memory": torch.cuda.is_available(), **offload, "device": device}
    if stage != 3 and "offload_param" in zero:
        raise InputError(f"{where}: zero_optimization.offload_param needs stage 3 but stage is {stage}")
    for key in _GATHERED_AS_16_BIT:
        if zero.pop(key, False):
            raise InputError(
                f"{where}: zero_optimization.{key}: checkpoints hold float32 weights, gathered one by one: set it to "
                "false"
            )
    return zero


class _AskedFor(dict[str, Any]):
    """Notes in `keys_asked` which keys DeepSpeed asks for: it takes no notice of any other."""

    def __init__(self, content: dict[str, Any]):
        super().__init__(content)
        self.keys_asked: dict[str, None] = {}

    def _note(self, key: Any) -> Any:
        self.keys_asked.pop(key, None)
        self.keys_asked[key] = None
        return key

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self._note(key))

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self._note(key))

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(self._note(key), default)

    def keys(self) -> Any:
        return self


def check_with_deepspeed(config: dict[str, Any], settings: RunSettings) -> None:
    """Let DeepSpeed read a configuration of `deepspeed_config`, before anything is loaded.

    Raises:
        InputError: it refuses a value, or takes no notice of a key.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    where = _source(settings)
    # DeepSpeed multiplies with the number of processes that it sees now.
    asked = _AskedFor({key: value for key, value in config.items() if key != "train_batch_size"})
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        section, (key, *inner) = _last_of(asked), map(str, detail["loc"])
        path = ".".join((key, *inner) if key in config else (section, key, *inner))
        if detail["type"] != "extra_forbidden":
            raise InputError(f"{where}: {path}: {detail['msg']}") from error
        known = DeepSpeedZeroConfig.model_fields if path == f"zero_optimization.{key}" else {}
        names = {name for field, info in known.items() for name in (field, info.alias or field)}
        raise InputError(f"{where}: {path} {_unknown(key, names)}") from error
    except Exception as error:  # assertions, its own, or of types that it took for granted
        raise InputError(f"{where}: {_last_of(asked)}: DeepSpeed does not accept it: {first_line(error)}") from error
    unknown = [key for key in dict.keys(asked) if key not in asked.keys_asked]
    if unknown:
        raise InputError(f"{where}: {unknown[0]} {_unknown(unknown[0], map(str, asked.keys_asked))}")


def _unknown(key: str, known: Iterable[str]) -> str:
    close = nearest(key, known)
    return f"is no key of DeepSpeed's{f'; did you mean {close}?' if close else ': remove it'}"


def _last_of(asked: _AskedFor) -> str:
    """The key of the configuration that was asked for last."""
    return next(str(key) for key in reversed(asked.keys_asked) if dict.__contains__(asked, key))


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
