"""Checkpoints: a `from_pretrained` directory with the training state beside the model, in files that hold only data.

    checkpoints/step_00000500/
        config.json, generation_config.json, model*.safetensors, tokenizer files
        training_state/state.json                   step, counters, place in the data
        training_state/manifest.json                the run's, as it was when the checkpoint was written
        training_state/process-00000.safetensors    that process's share of the optimizer's moments, each one whole
        training_state/files.json                   sizes and checksums

Tensors are in safetensors and the rest in JSON: nothing that is loaded can execute. Moments lie whole under their
parameter's name, so that another engine and any number of processes can go on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from fusiontree.artifacts import atomic_directory, checkpoint_name
from fusiontree.errors import InputError, first_line
from fusiontree.models.configuration import EARLIER_VALUES, HybridLanguageModelConfig
from fusiontree.models.hybrid_model import HybridLanguageModel
from fusiontree.train.checkpoint_files import (
    LATEST,
    MANIFEST,
    STATE_DIRECTORY,
    list_files,
    newest_checkpoint,
    point,
)
from fusiontree.train.parallel import Parallel
from fusiontree.train.processes import Processes

FORMAT_VERSION = 2
#: Configuration fields that fix the shapes of the weights or what they mean.
SHAPE_FIELDS = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "global_heads", "window_size"),
    *("attention_type", "mamba_version", "mamba_expand", "mamba_head_dim", "mamba_state_size", "conv_kernel"),
    *("gate_rank", "use_alignment", "mlp", "srte_encoding", "srte_rank", "rope_theta", "norm_eps"),
    *("layer_branches", "layer_gates", "layer_heads", "layer_merges", "tie_word_embeddings"),
)
# With this value they leave a fingerprint as it was before there were such fields; `layer_gates` is in all of them.
_LATER_FIELDS = {name: value for name, value in EARLIER_VALUES.items() if name != "layer_gates"}


@dataclass
class TrainingState:
    """What the next step depends on beside weights and moments: JSON values."""

    step: int
    """Optimizer steps taken."""
    meter: dict[str, Any]
    """`StepMeter.state_dict()`: tokens, elapsed seconds, the open row."""
    loader: dict[str, Any]
    """`Loader.state_dict()` after the last batch of `step`; one for all processes."""
    gate_monitor: dict[str, Any]
    guard: dict[str, Any]
    """`StepGuard.state_dict()`."""
    best: dict[str, Any] | None = None
    """Step and loss of the best evaluation so far."""


class SavedMoments(Mapping[str, torch.Tensor]):
    """The moments of a checkpoint by name, each read from its process's file when asked for."""

    def __init__(self, path: Path):
        self._files = {}
        for file in sorted((path / STATE_DIRECTORY).glob("process-*.safetensors")):
            opened = safe_open(file, framework="pt")
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def save_checkpoint(run: Path, parallel: Parallel, processes: Processes, tokenizer: Any, state: TrainingState) -> Path:
    """Write `run/checkpoints/step_XXXXXXXX` whole or not at all, and point `latest` to it.

    All processes call it; each writes its share of the moments, the main one the rest.

    Raises:
        InputError: disk full, file too large or no permission; earlier checkpoints are untouched.
    """
    path = run / "checkpoints" / checkpoint_name(state.step)
    weights, moments = parallel.weights(), parallel.moments()
    with ExitStack() as unfinished:

        def begin() -> Path:
            with _saving(path):
                target = unfinished.enter_context(atomic_directory(path))
                (target / STATE_DIRECTORY).mkdir()
            return target

        def write_share() -> None:
            with _saving(path):
                save_file(moments, target / STATE_DIRECTORY / f"process-{processes.index:05d}.safetensors")

        def finish() -> None:
            with _saving(path):
                with no_progress_bar():
                    parallel.module.save_pretrained(target, state_dict=weights)
                tokenizer.save_pretrained(target)
                plain = {"version": FORMAT_VERSION, **vars(state)}
                (target / STATE_DIRECTORY / "state.json").write_text(json.dumps(plain), encoding="utf-8")
                if (run / MANIFEST).exists():
                    shutil.copyfile(run / MANIFEST, target / STATE_DIRECTORY / MANIFEST)
                list_files(target)
                unfinished.close()
                point(run / LATEST, path)

        target = processes.on_main(begin)
        processes.on_all(write_share)
        processes.on_main(finish)
    return path


def weights_fingerprint(config: HybridLanguageModelConfig, parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hexadecimal digest of sizes and weights: what a plan is bound to. The same on every device.

    Args:
        parameters: (name, value) of each, in the order of the names.
    """
    fields = [(name, getattr(config, name)) for name in SHAPE_FIELDS]
    known = [str(value) for name, value in fields if name not in _LATER_FIELDS or value != _LATER_FIELDS[name]]
    digest = hashlib.sha256(json.dumps(known).encode())
    for name, parameter in parameters:
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]


def saved_fingerprint(path: Path, model: HybridLanguageModel) -> str:
    """`weights_fingerprint` of a checkpoint directory of this model, whose own weights may be spread over processes."""
    files = [safe_open(file, framework="pt") for file in sorted(path.glob("model*.safetensors"))]
    place = {name: file for file in files for name in file.keys()}
    names = sorted(name for name, _ in model.named_parameters())
    return weights_fingerprint(model.config, ((name, place[name].get_tensor(name)) for name in names))


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(_saving_failed(path, error)) from error


def _saving_failed(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or first_line(error)
    full = (errno.ENOSPC, errno.EDQUOT)
    if getattr(error, "errno", None) in full or any(os.strerror(number) in reason for number in full):
        reason += "; free some space"
    kept = newest_checkpoint(path.parent.parent)
    rest = f"{kept} is whole, go on from it with --resume auto" if kept else "no earlier checkpoint exists"
    return f"checkpoint {path} could not be saved: {reason}; {rest}"


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


def load_state(path: Path) -> TrainingState:
    """The training state of a checkpoint directory (`check_files` says whether it is whole).

    Raises:
        InputError: no checkpoint there, damaged, or of another format.
    """
    file = path / STATE_DIRECTORY / "state.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.pop("version", None)
        if version == FORMAT_VERSION:
            return TrainingState(**content)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"checkpoint {path} is damaged: {file.name}: {error}") from error
    raise InputError(f"checkpoint {path} has training state of format {version}, this version reads {FORMAT_VERSION}")


def load_moments(path: Path) -> SavedMoments:
    """The optimizer's moments of a checkpoint directory.

    Raises:
        InputError: a file cannot be read.
    """
    try:
        return SavedMoments(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint {path} is damaged: {error}") from error


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
                advice = f"set model.{name}={have} to go on from it, or start a new run from random weights"
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
        raise InputError(f"checkpoint {path} cannot be loaded: {first_line(error)}") from error
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, names in wrong.items():
        if names:
            raise InputError(f"checkpoint {path} does not fit the model: {kind.replace('_', ' ')}: {names[0]}")
    return model
