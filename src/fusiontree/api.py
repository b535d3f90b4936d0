"""The Python interface to a trained model: `fusiontree.load` and `fusiontree.generate`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusiontree.data import load_tokenizer
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel
from fusiontree.train.checkpoint import load_model, newest_checkpoint


def load(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> HybridLanguageModel:
    """Loads a model for inference.

    Args:
        path: a checkpoint, an exported model, or a run directory, whose latest checkpoint is taken.
        device: where to put it.
        dtype: of the weights; those of the recurrence (`A_log`, `D`, `dt_bias`) stay float32.

    Raises:
        InputError: there is no model at `path`, or it is truncated or of another shape.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        newest = newest_checkpoint(folder)
        if newest is None:
            raise InputError(f"{path} is neither a model (no config.json) nor a run directory with a checkpoint")
        folder = newest
    return load_model(folder).to(device=device, dtype=dtype).eval()


def generate(
    model: HybridLanguageModel,
    prompts: str | Sequence[str],
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[str]:
    """Continues each prompt; the prompts run as one batch. `model.generate` offers more, on token ids.

    Args:
        model: what `load` returned.
        prompts: one or several texts.
        tokenizer: by default the one saved with the model.
        max_new_tokens: at most this many tokens per prompt; generation stops earlier at the end-of-text token.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        top_p: draw among the likeliest tokens that hold this much probability together.
        seed: makes the draws repeatable, and leaves the global random state alone.

    Returns:
        The continuations, without the prompts, in their order.

    Raises:
        InputError: no tokenizer is known, or a prompt is empty and the tokenizer has no token to start from.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise InputError("temperature must be at least 0, top_p in (0, 1] and max_new_tokens at least 1")
    if tokenizer is None:
        if not model.name_or_path:
            raise InputError("this model was not loaded from a folder: pass its tokenizer")
        tokenizer = load_tokenizer(model.name_or_path)
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    rows = []
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        ids = tokenizer(prompt)["input_ids"] or ([start] if start is not None else [])
        if not ids:
            raise InputError("a prompt is empty and the tokenizer has no token to start a text with")
        rows.append(ids)
    if not rows:
        return []
    length = max(len(row) for row in rows)
    pad = next((t for t in (tokenizer.pad_token_id, start) if t is not None), 0)
    input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = model.generate(
            input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling
        )
    texts: list[str] = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return texts
