"""From a folder to a model that is ready to use, every tensor accounted for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusiontree.artifacts import checkpoint_step
from fusiontree.data import load_tokenizer, vocab_size_of
from fusiontree.data.tokenizer import holds_tokenizer
from fusiontree.errors import InputError, first_line
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.train.checkpoint import newest_checkpoint, no_progress_bar

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HybridLanguageModel:
    """Loads a model for use: in evaluation mode, its tokenizer attached as `model.tokenizer` (None if there is none).

    Only safetensors and JSON are read, so nothing that is loaded can execute.

    Args:
        path: a checkpoint or an exported model (a folder with `config.json`), or a run directory, whose newest
            checkpoint is taken.
        device: where to put the model; None = CUDA where there is a device, else the CPU.
        dtype: of the weights, None = as saved; `A_log`, `D` and `dt_bias` stay float32 beside narrower types.

    Raises:
        InputError: there is no model at `path`; a file of it is missing, truncated or not what it should be; tensors
            are missing, left over or of another shape than the configuration says; the tokenizer is broken or has more
            tokens than the model has embeddings; there is no such device.
    """
    folder = find_model(path)
    config = _read_config(folder)
    _check_weights(folder, config)
    device = resolve_device(device)
    try:
        with no_progress_bar():
            model, info = HybridLanguageModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype or config.dtype or torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"the model in {folder} cannot be loaded: {first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            # The headers were compared above; this says so should transformers see it otherwise.
            first = sorted(map(str, info[kind]))[0]
            raise InputError(f"the model in {folder} does not fit its {_CONFIG}: {kind.replace('_', ' ')}: {first}")
    model.to(device).eval()
    model.tokenizer = _read_tokenizer(folder, config)
    return model


def loaded_step(model: PreTrainedModel) -> int | None:
    """The optimizer steps of the checkpoint that a model was loaded from; None where it was from no checkpoint."""
    return checkpoint_step(Path(model.name_or_path).resolve()) if model.name_or_path else None


def find_model(path: str | os.PathLike[str]) -> Path:
    """The folder with `config.json` that `path` means: itself, or the newest checkpoint of a run directory.

    Raises:
        InputError: there is none.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise InputError(f"model folder {path} does not exist")
    if not folder.is_dir():
        raise InputError(f"{path} is a file; name the model's folder (the one with {_CONFIG}) or a run directory")
    if (folder / _CONFIG).is_file():
        return folder
    newest = newest_checkpoint(folder)
    if newest is None:
        raise InputError(f"{path} is neither a model (it has no {_CONFIG}) nor a run directory with a checkpoint")
    if not (newest / _CONFIG).is_file():
        raise InputError(f"{newest}, the newest checkpoint of {path}, has no {_CONFIG}")
    return newest


def _read_config(folder: Path) -> HybridLanguageModelConfig:
    file = folder / _CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is truncated or not JSON: {first_line(error)}") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != HybridLanguageModelConfig.model_type:
        raise InputError(f"{file} describes a model of type {kind!r}, not a FusionTree model")
    try:
        return HybridLanguageModelConfig.from_dict(content)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: {first_line(error)}") from error


def _check_weights(folder: Path, config: HybridLanguageModelConfig) -> None:
    """Compares names and shapes in the files' headers with those that `config` asks for, before anything is read.

    transformers would initialise what is missing and go on.
    """
    with torch.device("meta"):
        model = HybridLanguageModel(config)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    found = set()
    for file, name, shape in _headers(folder):
        if name not in wanted:
            raise InputError(f"{file} holds the tensor {name}, which the model of {folder / _CONFIG} does not have")
        if shape != wanted[name]:
            raise InputError(
                f"{file}: the tensor {name} has shape {shape}, but {folder / _CONFIG} asks for {wanted[name]}; "
                "the two belong to different models"
            )
        found.add(name)
    missing = sorted(wanted.keys() - found - optional)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"the weights in {folder} lack the tensor {missing[0]}{more} that {_CONFIG} asks for")


def _headers(folder: Path) -> Iterator[tuple[Path, str, list[int]]]:
    """(file, tensor name, shape) of every tensor in the model's safetensors files."""
    for file in _weight_files(folder):
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for name in tensors.keys():
                    yield file, name, list(tensors.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{file} is truncated or not a safetensors file ({first_line(error)}); copy or export the model again"
            ) from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is truncated or not an index of weight files") from error
        files = [folder / name for name in names]
    else:
        files = [folder / _WEIGHTS]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} does not exist: the model's weights must lie beside its {_CONFIG} as safetensors")
    return files


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None means CUDA where there is a device, else the CPU.

    Raises:
        InputError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = isinstance(device, torch.device) or device.partition(":")[0] in ("cpu", "cuda")
        problem = first_line(error) if known else "name cpu or cuda"
        raise InputError(f"device {str(device)!r} cannot be used here: {problem}") from error
    return resolved


def _read_tokenizer(folder: Path, config: HybridLanguageModelConfig) -> PreTrainedTokenizerBase | None:
    if not holds_tokenizer(folder):
        return None
    tokenizer = load_tokenizer(folder)
    needed = vocab_size_of(tokenizer)
    if needed > config.vocab_size:
        raise InputError(
            f"the tokenizer in {folder} has ids up to {needed - 1}, but the model's vocab_size is {config.vocab_size}; "
            "it belongs to another model"
        )
    return tokenizer
