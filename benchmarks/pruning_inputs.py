"""What `pruning.py` starts from: sizes of models, and text in sections short enough for a row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from fusiontree.deploy.budget import sizes
from fusiontree.eval.peers import count_parameters
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig

_256X6 = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2, "gate_rank": 64}
# Sizes alone differ from the defaults.
SIZES: dict[str, dict[str, Any]] = {
    "256x6": {**_256X6, "vocab_size": 4096},
    # The same text is more than twice as many tokens: of those a step sees less text, and layers still pay.
    "256x6-512": {**_256X6, "vocab_size": 512},
    "tiny": {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "mamba_head_dim": 8,
        "mamba_state_size": 8,
        "gate_rank": 4,
        "srte_rank": 8,
        "window_size": 16,
        "vocab_size": 320,
    },
}


def nearest_in_layers(size: dict[str, Any], parameters: int) -> dict[str, Any]:
    """The size with as many layers as come nearest to that many parameters."""

    def distance(layers: int) -> int:
        with torch.device("meta"):
            config = HybridLanguageModelConfig(**size | {"num_layers": layers, "tie_word_embeddings": True})
            return abs(count_parameters(HybridLanguageModel(config)) - parameters)

    return size | {"num_layers": min(range(1, size["num_layers"] + 1), key=distance)}


def most_layers_within(size: dict[str, Any], share: float, context: int) -> dict[str, Any]:
    """The size with the most layers of which weights and state of `context` tokens take that share of its own bytes."""

    def needed(layers: int) -> int:
        config = HybridLanguageModelConfig(**size | {"num_layers": layers, "tie_word_embeddings": True})
        _, weights, state = sizes(config, torch.float32, context)
        return weights + state

    limit = share * needed(size["num_layers"])
    layers = [one for one in range(1, size["num_layers"]) if needed(one) <= limit]
    return size | {"num_layers": max(layers, default=1)}


def write_sections(source: Path, destination: Path, size: int, *, shortened: bool = False) -> None:
    """The texts of a JSONL file as sections of at most `size` characters (of a longer word, one), cut between words.

    shortened: the first section of each text alone.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with source.open(encoding="utf-8") as file:
        texts = [_cut(json.loads(line)["text"], size) for line in file]
    kept = [section for sections in texts for section in (sections[:1] if shortened else sections)]
    destination.write_text("".join(json.dumps({"text": section}) + "\n" for section in kept), encoding="utf-8")


def _cut(text: str, size: int) -> list[str]:
    sections = [""]
    for word in re.findall(r"\s*\S+", text):
        if sections[-1] and len(sections[-1]) + len(word) > size:
            sections.append("")
        sections[-1] += word
    return [section for section in sections if section]
