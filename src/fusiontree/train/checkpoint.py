"""Checkpoints: a `from_pretrained` directory with the training state beside the model, in files that hold only data.

    checkpoints/step_00000500/
        config.json, generation_config.json, model*.safetensors, tokenizer files
        training_state/state.json            step, counters, data position, Python's RNG, sizes of all files
        training_state/tensors.safetensors   optimizer moments and the RNG states of torch, CUDA and numpy

Tensors are in safetensors and the rest in JSON: nothing that is loaded can execute.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging as transformers_logging

from fusiontree.artifacts import atomic_directory, checkpoint_name, checkpoint_step
from fusiontree.errors import InputError
from fusiontree.models.configuration import HybridLanguageModelConfig
from fusiontree.models.hybrid_model import HybridLanguageModel

FORMAT_VERSION = 1
LATEST = "latest"
STATE_DIRECTORY = "training_state"
#: Configuration fields that fix the shapes of the weights or what they mean.
SHAPE_FIELDS = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "global_heads", "window_size"),
    *("attention_type", "mamba_version", "mamba_expand", "mamba_head_dim", "mamba_state_size", "conv_kernel"),
    *("gate_rank", "use_alignment", "srte_encoding", "srte_rank", "rope_theta", "norm_eps", "layer_branches"),
    *("layer_gates", "tie_word_embeddings"),
)


@dataclass
class TrainingState:
    """Everything but the weights that the next step depends on. Only JSON values and tensors."""

    step: int
    """Optimizer steps taken."""
    meter: dict[str, Any]
    """`StepMeter.state_dict()`: tokens, elapsed seconds, the open row."""
    loader: list[dict[str, Any]]
    """Each rank's `Loader.state_dict()` after the last batch of `step`."""
    gate_monitor: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    """Optimizer moments `optimizer.<parameter>.<key>` and RNG states `rng.<library>`."""
    python_rng: list[Any] = field(default_factory=list)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's moments by parameter name (groups list their `names`, see train/optim.py)."""
    return {
        f"optimizer.{name}.{key}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put the moments of `optimizer_tensors` back. Hyperparameters stay as the current settings have them.

    Raises:
        InputError: a parameter has no moments, or moments of another shape.
    """
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"optimizer.{name}.{key}")
                if value is None or (key != "step" and value.shape != parameter.shape):
                    found = "none" if value is None else f"shape {list(value.shape)}"
                    raise InputError(
                        f"the checkpoint's optimizer state does not fit parameter {name} {list(parameter.shape)}: "
                        f"{key} has {found}"
                    )
                # Only the moments follow the parameter; the fused kernels want the step there too.
                optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def rng_state() -> tuple[dict[str, torch.Tensor], list[Any]]:
    """RNG states of torch, CUDA and numpy as tensors, and of Python as JSON values."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    tensors = {
        "rng.torch": torch.get_rng_state(),
        "rng.numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "rng.numpy_place": torch.tensor(
            [numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]], dtype=torch.float64
        ),
    }
    for index in range(torch.cuda.device_count()):
        tensors[f"rng.cuda.{index}"] = torch.cuda.get_rng_state(index)
    version, words, gauss = random.getstate()
    return tensors, [version, list(words), gauss]


def restore_rng(tensors: dict[str, torch.Tensor], python_rng: list[Any]) -> None:
    """Put the states of `rng_state` back (CUDA states of devices that this machine lacks are left out)."""
    torch.set_rng_state(tensors["rng.torch"])
    pos, has_gauss, gauss = tensors["rng.numpy_place"].tolist()
    key = tensors["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, int(pos), int(has_gauss), gauss))
    for index in range(torch.cuda.device_count()):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)
    version, words, gauss = python_rng
    random.setstate((version, tuple(words), gauss))


def save_checkpoint(directory: Path, model: nn.Module, tokenizer: Any, state: TrainingState, limit: int | None) -> Path:
    """Write `directory/step_XXXXXXXX` whole or not at all, point `latest` to it, then drop what exceeds `limit`.

    Args:
        directory: the run's `checkpoints` directory; `latest` lies beside it in the run directory.
        limit: checkpoints to keep, this one included; None keeps all.

    Raises:
        InputError: disk full, file too large or no permission; earlier checkpoints are untouched.
    """
    path = directory / checkpoint_name(state.step)
    try:
        with atomic_directory(path) as target:
            with no_progress_bar():
                model.save_pretrained(target)  # type: ignore[operator]
            tokenizer.save_pretrained(target)
            _write_state(target / STATE_DIRECTORY, state)
            _write_sizes(target)
        _point_latest(directory.parent, path)
    except (OSError, SafetensorError) as error:
        raise InputError(_saving_failed(path, error)) from error
    if limit is not None:
        _drop_old(directory, keep=path, limit=limit)
    return path


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for the shards it writes and loads, across the run's own display."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _point_latest(run: Path, path: Path) -> None:
    """`latest`, a relative symbolic link, replaced in one step."""
    temporary = run / f".{LATEST}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.relative_to(run))
    if (run / LATEST).is_dir() and not (run / LATEST).is_symlink():
        # A copy of the run that followed the link has a whole checkpoint here, which lies in its place as well.
        shutil.rmtree(run / LATEST)
    os.replace(temporary, run / LATEST)


def _write_state(target: Path, state: TrainingState) -> None:
    target.mkdir()
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.tensors.items()}
    save_file(tensors, target / "tensors.safetensors")
    plain = {key: value for key, value in vars(state).items() if key != "tensors"}
    (target / "state.json").write_text(json.dumps({"version": FORMAT_VERSION, **plain}), encoding="utf-8")


def _write_sizes(target: Path) -> None:
    """Sizes of all files, so that a truncated copy is told before anything is read from it."""
    sizes = {str(f.relative_to(target)): f.stat().st_size for f in sorted(target.rglob("*")) if f.is_file()}
    (target / STATE_DIRECTORY / "files.json").write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _saving_failed(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += "; free some space"
    kept = newest_checkpoint(path.parent.parent)
    rest = f"{kept} is whole, go on from it with --resume auto" if kept else "no earlier checkpoint exists"
    return f"checkpoint {path} could not be saved: {reason}; {rest}"


def _drop_old(directory: Path, keep: Path, limit: int) -> None:
    newest = checkpoint_step(keep) or 0
    others = [(step, p) for p in directory.iterdir() if p != keep and (step := checkpoint_step(p)) is not None]
    # First those of later steps: a run that went back to an earlier checkpoint has given them up.
    steps = sorted(others, key=lambda entry: (entry[0] < newest, entry[0]))
    for _, path in steps[: max(0, len(steps) - (limit - 1))]:
        shutil.rmtree(path)


def remove_unfinished(directory: Path) -> None:
    """Clear away what a process that was killed while saving left in a run's `checkpoints` directory.

    A checkpoint that it had set aside to replace it, and did not get to replace, is put back.
    """
    for path in directory.glob(".step_*.old"):
        destination = directory / path.name[1:].partition(".")[0]
        if not destination.exists():
            path.rename(destination)
    for path in [*directory.glob(".step_*.old"), *directory.glob(".step_*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that the run's `latest` points to; without the link that of the highest step; None if none."""
    pointed = run / "checkpoints" / (run / LATEST).resolve().name
    if checkpoint_step(pointed) is not None and pointed.is_dir():
        return pointed
    found = [p for p in (run / "checkpoints").glob("step_*") if checkpoint_step(p) is not None]
    return max(found, key=lambda p: checkpoint_step(p) or 0, default=None)


def load_state(path: Path) -> TrainingState:
    """The training state of a checkpoint directory.

    Raises:
        InputError: no checkpoint there, a file missing or truncated, or a newer format.
    """
    check_files(path)
    file = path / STATE_DIRECTORY / "state.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tensors = load_file(path / STATE_DIRECTORY / "tensors.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"checkpoint {path} is damaged: {error}") from error
    version = content.pop("version", None)
    if version != FORMAT_VERSION:
        raise InputError(
            f"checkpoint {path} has training state of format {version}, this version reads {FORMAT_VERSION}"
        )
    try:
        return TrainingState(**content, tensors=tensors)
    except TypeError as error:
        raise InputError(f"checkpoint {path} is damaged: {file.name}: {error}") from error


def check_files(path: Path) -> None:
    """Compare a checkpoint's files with the sizes written beside them.

    Raises:
        InputError: names the first file that is missing or of another size.
    """
    if not path.is_dir():
        raise InputError(f"checkpoint {path} does not exist")
    listing = path / STATE_DIRECTORY / "files.json"
    try:
        sizes = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole training checkpoint: {listing} is missing or truncated") from error
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            raise InputError(f"checkpoint {path} is not whole: {name} is missing; resume from an earlier checkpoint")
        if file.stat().st_size != size:
            raise InputError(
                f"checkpoint {path} is truncated: {name} has {file.stat().st_size} bytes instead of {size}; "
                "resume from an earlier checkpoint"
            )


def load_model(path: Path, config: HybridLanguageModelConfig | None = None) -> HybridLanguageModel:
    """The model of a checkpoint, float32, every tensor accounted for.

    Args:
        config: what the run's settings ask for; the checkpoint must have the same shape.

    Raises:
        InputError: the checkpoint is truncated, of another shape, or lacks tensors.
    """
    saved = HybridLanguageModelConfig.from_pretrained(path)
    if config is not None:
        learned = ("max_position_embeddings",) if config.srte_encoding == "learned" else ()
        for name in SHAPE_FIELDS + learned:
            have, want = getattr(saved, name), getattr(config, name)
            if have != want:
                advice = "resume with the run's own config.yaml, or start a new run"
                if name == "vocab_size":
                    advice = f"data.tokenizer may have changed since (the checkpoint's own is in {path}); or {advice}"
                raise InputError(
                    f"checkpoint {path} was trained with model.{name} {have}, the configuration asks for {want}: "
                    f"{advice}"
                )
        saved = config
    try:
        with no_progress_bar():
            model, info = HybridLanguageModel.from_pretrained(
                path, config=saved, dtype=torch.float32, output_loading_info=True, use_safetensors=True
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"checkpoint {path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, names in wrong.items():
        if names:
            raise InputError(f"checkpoint {path} does not fit the model: {kind.replace('_', ' ')}: {names[0]}")
    return model
