"""A corpus, a tokenizer and a model small enough that a whole training run takes a second."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C and its children inherit that: what a test starts is to hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = (
    "the quick brown fox jumps over a lazy dog while seven silver birds sing about rivers and cities of glass".split()
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.jsonl, eval.jsonl and a BPE tokenizer of 300 tokens in `tokenizer`."""
    from fusiontree.data.bpe import train_bpe

    directory = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for name, documents in (("train", 200), ("eval", 12)):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(4, 100))) for _ in range(documents)]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (directory / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    train_bpe([str(directory / "train.jsonl")], 300, str(directory / "tokenizer"), "text")
    return directory


@pytest.fixture(scope="session")
def run_settings(corpus: Path) -> Callable[..., dict[str, Any]]:
    """A function that gives the sections of a tiny run; its keyword arguments update a section's keys or replace it."""

    def build(**changes: Any) -> dict[str, Any]:
        sections: dict[str, Any] = {
            "model": {
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 4,
                "global_heads": 1,
                "window_size": 8,
                "mamba_head_dim": 8,
                "mamba_state_size": 8,
                "gate_rank": 4,
                "srte_rank": 8,
            },
            "data": {
                "train_paths": str(corpus / "train.jsonl"),
                "eval_paths": str(corpus / "eval.jsonl"),
                "tokenizer": str(corpus / "tokenizer"),
                "cache_dir": str(corpus / "cache"),
            },
            "training": {
                "batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_seq_length": 24,
                "max_steps": 6,
                "warmup_steps": 2,
                "learning_rate": 3e-3,
                "mixed_precision": "no",
                "log_interval": 1,
                "eval_interval": 3,
                "eval_batches": 2,
                "save_interval": 3,
            },
            "gate_monitor": {"interval": 2},
            "logging": {"progress": "none"},
            "system": {"device": "cpu", "num_threads": 1},
            "output_dir": "runs/never",
        }
        for name, value in changes.items():
            if isinstance(value, dict):
                sections[name] = sections.get(name, {}) | value
            else:
                sections[name] = value
        return sections

    return build
