"""How fast models are, and what they take."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from fusiontree.artifacts.base import Artifact, Record, library_versions


class ShapeFigures(Record):
    """Medians over the rounds of one model at one length and batch, each as of `ModelFigures`."""

    context: int
    """Tokens of the prompt."""
    batch: int
    """Sequences at a time."""
    state_bytes: int
    prefill_tokens_per_second: float
    first_token_seconds: float
    decode_tokens_per_second: float
    rounds: dict[str, list[float]] = Field(default_factory=dict)


class ModelFigures(Record):
    """Medians over the rounds of one model; `rounds` holds every single value. What depends on them is of the first
    length and batch of the settings."""

    name: str
    parameters: int
    """Each shared one counted once."""
    parameter_bytes: int
    """Of the weights that generate."""
    state_bytes: int
    """Allocated for one sequence of `context + new_tokens` tokens, measured on the tensors of the cache itself."""
    prefill_tokens_per_second: float
    """Tokens of all prompts / time of one forward pass over them that keeps the state."""
    first_token_seconds: float
    """From the call of `generate` to its first token."""
    decode_tokens_per_second: float
    """Of all sequences together, from the times at which `generate` hands out its tokens, the first one left out."""
    train_tokens_per_second: float | None = None
    """Forward, backward, clipping and AdamW on full rows."""
    peak_bytes: int | None = None
    """Most GPU memory in use while the model trained, or generated if it did not; None on a CPU."""
    rounds: dict[str, list[float]] = Field(default_factory=dict)
    """Measure -> seconds (decode: tokens per second) of each round."""
    more: list[ShapeFigures] = []
    """At the settings' other lengths and batches."""


class BenchReport(Artifact):
    """Speed and memory of models, measured side by side."""

    KIND: ClassVar[str] = "bench_report"
    VERSION: ClassVar[int] = 3  # 1 knows one length and batch alone; 2 no `step`

    settings: dict[str, Any]
    machine: dict[str, Any]
    models: list[ModelFigures]
    step: int | None = None
    """Optimizer steps of the run's checkpoint that the first model is; None where it is none, or is not known."""
    git_revision: str | None = None
    versions: dict[str, str] = Field(default_factory=lambda: library_versions())
