"""What is settled before the first step: sizes that fit, a device, a run directory, a place to resume from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusiontree.data.tokenizer import load_tokenizer, vocab_size_of
from fusiontree.errors import InputError, SettingError
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.models.configuration import EARLIER_VALUES
from fusiontree.train.checkpoint_files import STATE_DIRECTORY, check_files, newest_checkpoint, newest_whole
from fusiontree.train.launch import launched_processes
from fusiontree.train.settings import RunSettings

#: Settings that may differ from machine to machine: paths, and what the main process alone shows and writes.
_OWN_SETTINGS: dict[str, Any] = {
    "output_dir": True,
    "logging": True,
    "data": {
        **dict.fromkeys(("train_paths", "eval_paths", "static_dir", "cache_dir", "tokenizer"), True),
        "train_sources": {"__all__": {"paths"}},
        "hf_streaming_sources": {"__all__": {"path"}},
    },
    "training": {"init_from"},
    "loss": {"teacher"},
    "system": {"deepspeed_config"},
}

#: Vocabularies that are not given are rounded up to this: matrix kernels like whole tiles.
VOCABULARY_MULTIPLE = 64


def tokenizer_of(settings: RunSettings) -> Any:
    """The tokenizer of the data section.

    Raises:
        InputError: none is named, or it cannot be loaded.
    """
    if settings.data.tokenizer is None:
        raise InputError("data.tokenizer is missing: name a tokenizer folder or a hub name")
    return load_tokenizer(settings.data.tokenizer)


def model_config(settings: RunSettings, tokenizer: Any | None = None) -> HybridLanguageModelConfig:
    """The model's configuration, completed from the tokenizer.

    `vocab_size`, where it is omitted, becomes the tokenizer's rounded up to a multiple of 64; omitted `bos`, `eos` and
    `pad` token ids are the tokenizer's. Without a tokenizer the configuration's own defaults stand.

    Raises:
        SettingError: an unknown field or impossible sizes.
        InputError: a tokenizer with more ids than `vocab_size`, or rows longer than a learned time encoding.
    """
    fields = dict(settings.model)
    # A run's config.yaml names every field, but for those that came after it.
    if HybridLanguageModelConfig.__annotations__.keys() - EARLIER_VALUES.keys() <= fields.keys():
        fields = EARLIER_VALUES | fields
    if tokenizer is not None:
        needed = vocab_size_of(tokenizer)
        fields.setdefault("vocab_size", -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields.setdefault(name, getattr(tokenizer, name))
    try:
        config = HybridLanguageModelConfig(**fields)
    except (TypeError, ValueError) as error:
        sentence = " ".join(str(error).split())
        # A configuration's message quotes the fields at fault.
        named = [f"model.{name}" for name in re.findall(r"`(\w+)", sentence) if name in fields]
        raise SettingError(f"model: {sentence}", *(named or ["model"])) from error
    if tokenizer is not None and needed > config.vocab_size:
        raise InputError(
            f"the tokenizer {settings.data.tokenizer} has ids up to {needed - 1} but model.vocab_size is "
            f"{config.vocab_size}: set it to at least {needed}, or leave it out"
        )
    length = settings.training.max_seq_length
    if config.srte_encoding == "learned" and length > config.max_position_embeddings:
        raise InputError(
            f"training.max_seq_length {length} is longer than the learned time encoding: raise "
            f"model.max_position_embeddings from {config.max_position_embeddings}, or use model.srte_encoding sincos"
        )
    return config


def enable_gradient_checkpointing(model: HybridLanguageModel, scope: str | None) -> None:
    """Recompute `scope` in the backward pass, nothing if None.

    It does not re-enter autograd, which DDP and autocast need.

    Raises:
        InputError: a scope that the model does not know.
    """
    if scope is None:
        return
    with warnings.catch_warnings():
        # The old name works in every supported transformers; the newer ones only warn that it will go.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "scope": scope})


def autocast(settings: RunSettings, device: torch.device) -> torch.autocast:
    """What forward passes of the run compute in; parameters are float32 always."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.training.mixed_precision == "bf16")


def seed_model(seed: int) -> None:
    """Seed what initialises a model: equal in every process."""
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed what a step draws (dropout) from where it stands, so that no state of a generator has to be kept.

    A step draws the same numbers whatever came before it: resumed, repeated, with another engine. Processes differ,
    since their rows do.
    """
    words = np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]))


def holds_run(directory: Path) -> bool:
    """Whether a run in `directory` got as far as leaving anything to go on from or to look at."""
    return (directory / "metrics.jsonl").exists() or newest_checkpoint(directory) is not None


def checkpoint_to_resume(directory: Path, resume: str | None, report: Callable[[str], None]) -> Path | None:
    """Where to go on from: a checkpoint whose files are whole.

    Args:
        directory: the run directory.
        resume: None = a new run; "auto" = the run's newest checkpoint that is whole, or from the beginning if it has
            none; else the path of a checkpoint or of another run.
        report: is told of each damaged checkpoint that is passed over.

    Raises:
        InputError: a new run in a directory that holds one, nothing to resume at the path, or nothing whole.
    """
    if resume is None:
        if holds_run(directory):
            raise InputError(
                f"{directory} already holds a run: continue it with --resume auto, or choose another output_dir"
            )
        return None
    if resume == "auto":
        return newest_whole(directory, report)
    path = Path(resume)
    if not path.is_dir():
        raise InputError(f"--resume {resume}: there is no such directory")
    is_checkpoint = (path / STATE_DIRECTORY).is_dir()
    if is_checkpoint:
        check_files(path)
    found = path if is_checkpoint else newest_whole(path, report)
    if found is None:
        raise InputError(f"--resume {resume} is neither a training checkpoint nor a run that has one")
    if not _is_of(found, directory) and holds_run(directory):
        raise InputError(f"{directory} already holds another run than {found}: choose another output_dir")
    return found


def common_facts(settings: RunSettings) -> dict[str, Any]:
    """What all processes of a run must agree on before they read anything: their number and all settings but paths.

    Data may lie elsewhere on each machine: its fingerprint is compared instead.
    """
    facts: dict[str, Any] = {"the number of processes (WORLD_SIZE)": launched_processes()}
    for section, values in settings.model_dump(mode="json", exclude=_OWN_SETTINGS).items():
        keys = values if isinstance(values, dict) else {"": values}
        facts |= {f"{section}.{key}".rstrip("."): value for key, value in keys.items()}
    return facts


def initial_weights(settings: RunSettings) -> Path | None:
    """The folder that a new run's weights come from, if any: of a run directory its newest checkpoint.

    Raises:
        InputError: `training.init_from` holds no model.
    """
    if settings.training.init_from is None:
        return None
    folder = Path(settings.training.init_from).expanduser()
    if (folder / "config.json").is_file():
        return folder
    newest = newest_checkpoint(folder)
    if newest is None or not (newest / "config.json").is_file():
        raise InputError(
            f"training.init_from: {folder} holds no model (it has no config.json) and is no run directory with a "
            "checkpoint"
        )
    return newest


def require_steps_left(settings: RunSettings, checkpoint: Path, step: int) -> None:
    """A run that is complete may be asked for again; one that leads on from a checkpoint needs a later end than it.

    Raises:
        InputError: `checkpoint` lies beyond `training.max_steps`, or at it and belongs to another run.
    """
    last = settings.training.max_steps
    if step > last or (step == last and not _is_of(checkpoint, Path(settings.output_dir))):
        raise InputError(
            f"checkpoint {checkpoint} is at step {step} and training.max_steps is {last}: raise it to train on"
        )


def _is_of(checkpoint: Path, directory: Path) -> bool:
    """Whether `checkpoint` belongs to the run in `directory`."""
    return checkpoint.resolve().parent.parent == directory.resolve()
