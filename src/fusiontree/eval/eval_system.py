"""How fast and how large models are: reading a prompt, the first token, decoding, training; state and parameters.

All models take turns, round after round, so that what the machine does besides hits them alike; medians are reported.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import torch
from pydantic import Field
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from fusiontree.artifacts import BenchReport, ModelFigures, ShapeFigures, git_revision
from fusiontree.config import Settings
from fusiontree.deploy.costs import describe_machine
from fusiontree.deploy.loading import loaded_step
from fusiontree.deploy.quantized import quantize_weights, weight_bytes
from fusiontree.eval.peers import count_parameters
from fusiontree.models import HybridLanguageModel


class BenchSettings(Settings):
    """What is measured, and how often."""

    context: int = Field(1024, ge=1, description="tokens of the prompt that is read and decoded from")
    new_tokens: int = Field(64, ge=2, description="tokens decoded")
    batch: int = Field(1, ge=1, description="sequences that are read and decoded at a time")
    more: list[tuple[int, int]] = Field([], description="further contexts and batches that are read and decoded from")
    train_length: int = Field(1024, ge=2, description="tokens of a row in training")
    train_batch: int = Field(4, ge=0, description="rows of a training step; 0 = do not train")
    rounds: int = Field(3, ge=1, description="measured rounds, after one that only warms up")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="of the weights that generate; training keeps float32 ones and computes in this type"
    )
    weights: str | None = Field(
        None, description="round those of FusionTree models that generate to int8 or int4; None = leave them"
    )
    seed: int = Field(0, ge=0, description="of the random token ids")


def measure(
    models: dict[str, PreTrainedModel],
    settings: BenchSettings,
    progress: Callable[[str], None] = lambda what: None,
) -> BenchReport:
    """Measures causal language models of transformers, ours among them, in turns.

    Args:
        models: by name, on the device to measure on. They are trained on random tokens: hand over what may be spoilt.
        progress: called with what is measured next.

    Raises:
        InputError: weights are to be rounded, as `quantize_weights`.
    """
    subjects = [_Subject(name, model, settings) for name, model in models.items()]
    for turn in range(settings.rounds + 1):
        for subject in subjects:
            progress(f"{'warm-up' if turn == 0 else f'round {turn} of {settings.rounds}'}: {subject.name}")
            subject.take_turn(record=turn > 0)
    return BenchReport(
        settings=settings.model_dump(mode="json"),
        machine=describe_machine(subjects[0].device),
        models=[subject.figures() for subject in subjects],
        step=loaded_step(next(iter(models.values()))),
        git_revision=git_revision(),
    )


@dataclass
class _Shape:
    """Prompts [B, T] of one length and batch, and what was measured with them."""

    prompts: torch.Tensor
    state_bytes: int = 0
    values: dict[str, list[float]] = field(default_factory=lambda: {"prefill": [], "first_token": [], "decode": []})

    def figures(self) -> ShapeFigures:
        batch, context = self.prompts.shape
        middle = {name: median(values) for name, values in self.values.items()}
        return ShapeFigures(
            context=context,
            batch=batch,
            state_bytes=self.state_bytes,
            prefill_tokens_per_second=self.prompts.numel() / middle["prefill"],
            first_token_seconds=middle["first_token"],
            decode_tokens_per_second=middle["decode"],
            rounds=self.values,
        )


class _Subject:
    """One model with what is needed to measure it again and again."""

    def __init__(self, name: str, model: PreTrainedModel, settings: BenchSettings) -> None:
        self.name, self.settings, self.device = name, settings, model.device
        dtype = getattr(torch, settings.dtype)
        generator = torch.Generator().manual_seed(settings.seed)

        def tokens(rows: int, length: int) -> torch.Tensor:
            return torch.randint(model.config.vocab_size, (rows, length), generator=generator).to(self.device)

        shapes = [(settings.context, settings.batch), *settings.more]
        self.shapes = [_Shape(tokens(batch, context)) for context, batch in shapes]
        self.rows = tokens(settings.train_batch, settings.train_length) if settings.train_batch else None
        # Training gets a copy of its own: its parameters are float32, those that generate often are not.
        self.learner = copy.deepcopy(model).float().train() if self.rows is not None else None
        self.optimizer = torch.optim.AdamW(self.learner.parameters()) if self.learner is not None else None
        self.model = model.to(dtype).eval()
        if settings.weights is not None and isinstance(self.model, HybridLanguageModel):
            quantize_weights(self.model, settings.weights)
        self.train_seconds: list[float] = []
        self.peak_bytes = 0

    def take_turn(self, *, record: bool) -> None:
        """Every measurement once."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        taken = [{"prefill": self._prefill(shape), **self._decode(shape)} for shape in self.shapes]
        seconds = self._train() if self.learner is not None else None
        if self.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self.device))
        if not record:
            return
        for shape, found in zip(self.shapes, taken, strict=True):
            for name, value in found.items():
                shape.values[name].append(value)
        if seconds is not None:
            self.train_seconds.append(seconds)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.no_grad()
    def _prefill(self, shape: _Shape) -> float:
        """Seconds."""
        started = self._now()
        self.model(input_ids=shape.prompts, use_cache=True, logits_to_keep=1)
        return self._now() - started

    def _decode(self, shape: _Shape) -> dict[str, float]:
        """Seconds to the first token, and tokens per second after it."""
        stamps, state = stream_stamps(self.model, shape.prompts, self.settings.new_tokens)
        shape.state_bytes = state // len(shape.prompts)
        rate = len(shape.prompts) * (len(stamps) - 2) / (stamps[-1] - stamps[1])
        return {"first_token": stamps[1] - stamps[0], "decode": rate}

    def _train(self) -> float:
        """Seconds of one step."""
        assert self.learner is not None and self.optimizer is not None
        started = self._now()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            loss = self.learner(input_ids=self.rows, labels=self.rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - started

    def figures(self) -> ModelFigures:
        settings, seconds = self.settings, self.train_seconds
        first, *more = (shape.figures() for shape in self.shapes)
        trained = settings.train_batch * settings.train_length
        return ModelFigures(
            name=self.name,
            parameters=count_parameters(self.model),
            parameter_bytes=weight_bytes(self.model),
            train_tokens_per_second=trained / median(seconds) if seconds else None,
            peak_bytes=self.peak_bytes or None,
            rounds=first.rounds | ({"train": seconds} if seconds else {}),
            more=more,
            **first.model_dump(exclude={"context", "batch", "rounds"}),
        )


def stream_stamps(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[list[float], int]:
    """Times at which `generate` was called and at which it handed out each new token; and bytes of the final state.

    Args:
        prompt: [B, T] ids.

    Returns:
        `new_tokens + 1` times in seconds, and the bytes that the state of all rows has allocated.
    """
    clock = _Clock()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
        ),
        streamer=clock,
    )
    return clock.stamps, sum(tensor_bytes(output.past_key_values).values())


class _Clock(BaseStreamer):
    """Notes when tokens arrive; transformers hands over the prompt first, at the call, and tokens on the CPU."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


def tensor_bytes(state: object) -> dict[tuple[str, int], int]:
    """Bytes of every memory block behind the tensors that `state` holds, however deep; no block counts twice."""
    found: dict[tuple[str, int], int] = {}
    seen: set[int] = set()

    def visit(item: object) -> None:
        if id(item) in seen or isinstance(item, (str, bytes, int, float, type(None))):
            return
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            block = item.untyped_storage()
            found[str(item.device), block.data_ptr()] = block.nbytes()
            return
        for inner in _parts(item):
            visit(inner)

    visit(state)
    return found


def _parts(item: object) -> Iterator[object]:
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, (list, tuple, set)):
        yield from item
    elif hasattr(item, "__dict__") and not isinstance(item, type) and not callable(item):
        yield from vars(item).values()
