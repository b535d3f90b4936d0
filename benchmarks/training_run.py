"""One training run of the quality study: the same loop for every model, resumable."""

from __future__ import annotations

import argparse
import math
import re
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from candidates import Candidate, lm_loss
from packed_text import Rows, batches
from torch import nn

from fusiontree.train.losses import StepTotals

EVAL_EVERY = 50
CURVE_ROWS = 32  # rows of the validation set that the curve is measured on; the last figure uses all of them
UNDECAYED = ("A_log", "D", "dt_bias")
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every model is trained. `micro_batch` (rows at a time) concerns speed and memory only."""

    learning_rate: float
    steps: int
    warmup: int
    batch_size: int
    micro_batch: int
    seed: int
    dtype: str
    device: str = "cpu"
    optimizer: str = "adamw"

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16) if self.dtype == "bf16" else nullcontext()

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 1: linear warm-up, then a cosine down to 10 %."""
        if step <= self.warmup:
            return self.learning_rate * step / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module) -> list[dict]:
    """Weight decay on matrices only; norms, biases and the Mamba dynamics go without."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and name.rpartition(".")[2] not in UNDECAYED
        (decayed if is_matrix else others).append(parameter)
    return [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def build_optimizers(model: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the linear maps but the head and AdamW for the rest, as `training.optimizer` has it."""
    linear = {id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    groups, maps = parameter_groups(model), []
    if name == "muon":
        maps = [p for p in groups[0]["params"] if id(p) in linear]
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in linear]
    adamw = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    if not maps:
        return [adamw]
    return [torch.optim.Muon(maps, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"), adamw]


def count_labels(rows: Rows) -> int:
    return int((rows.labels[:, 1:] != -100).sum())


@torch.no_grad()
def validation_loss(candidate: Candidate, rows: Rows, recipe: Recipe) -> float:
    """Mean loss over all counted labels of `rows`."""
    candidate.model.eval()
    total = 0.0
    for start in range(0, len(rows), recipe.micro_batch):
        batch = rows.select(slice(start, start + recipe.micro_batch)).to(recipe.device)
        with recipe.autocast():
            total += lm_loss(candidate.logits(batch), batch).item()
    candidate.model.train()
    return total / count_labels(rows)


def accumulate(candidate: Candidate, batch: Rows, recipe: Recipe) -> float:
    """Gradient of one batch in pieces of `micro_batch` rows; the pieces' losses add up to the whole's, returned."""
    totals = StepTotals(labels=count_labels(batch), rows=len(batch), tokens=batch.input_ids.numel())
    total = 0.0
    for start in range(0, len(batch), recipe.micro_batch):
        with recipe.autocast():
            rows = batch.select(slice(start, start + recipe.micro_batch)).to(recipe.device)
            loss = candidate.training_loss(rows, totals)
        loss.backward()
        total += loss.item()
    return total


def update(model: nn.Module, optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    """One step of the optimizers with the gradients at hand, clipped and then dropped."""
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Shape(str):
    """`TxB` of a command line, T tokens x B rows; in a record its text."""

    length: int
    rows: int

    def __new__(cls, text: str) -> Shape:
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if found is None:
            raise argparse.ArgumentTypeError(f"must look like 4096x1, got {text}")
        shape = super().__new__(cls, text)
        shape.length, shape.rows = map(int, found.groups())
        return shape


class RepeatedStep:
    """A training step on the same rows again and again, [B, T] ids, each row one document: what speed and memory are
    measured on."""

    def __init__(self, candidate: Candidate, input_ids: torch.Tensor, dtype: str):
        batch, length = input_ids.shape
        positions = torch.arange(length).repeat(batch, 1)
        self.candidate = candidate
        self.rows = Rows(input_ids, positions, input_ids.masked_fill(positions == 0, -100))
        self.recipe = Recipe(
            learning_rate=1e-4, steps=1000, warmup=1, batch_size=batch, micro_batch=batch, seed=0, dtype=dtype
        )
        self.optimizers = build_optimizers(candidate.model, self.recipe.optimizer)

    def __call__(self) -> tuple[float, float]:
        """Seconds and CPU seconds of forward, loss, backward, clipping and AdamW."""
        started, started_cpu = time.perf_counter(), time.process_time()
        accumulate(self.candidate, self.rows, self.recipe)
        update(self.candidate.model, self.optimizers, self.recipe.learning_rate)
        return time.perf_counter() - started, time.process_time() - started_cpu


def train(candidate: Candidate, recipe: Recipe, train_rows: Rows, valid_rows: Rows, unfinished: Path) -> dict:
    """Train `candidate` and return what was measured.

    Args:
        unfinished: where the run's state is kept every `EVAL_EVERY` steps and looked for at the start.

    Returns:
        val_curve [[step, loss]] on the first `CURVE_ROWS` validation rows; val_loss on all of them, None if the loss
        left the finite numbers; train_tokens_per_second of wall clock, and per second of CPU time, which says more
        where the machine is shared.
    """
    model = candidate.model.to(recipe.device)
    optimizers = build_optimizers(model, recipe.optimizer)
    state = {"step": 0, "curve": [], "wall": 0.0, "cpu": 0.0}
    if unfinished.exists():
        stored = torch.load(unfinished, map_location=recipe.device, weights_only=True)
        model.load_state_dict(stored["model"])
        for optimizer, its_state in zip(optimizers, stored["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        state = stored["state"]
        print(f"{candidate.title}: going on from step {state['step']}", flush=True)
    source, loss, tokens = batches(train_rows, recipe.batch_size, seed=recipe.seed), 0.0, 0
    for step in range(1, recipe.steps + 1):
        batch = next(source)
        tokens = step * batch.input_ids.numel()
        if step <= state["step"]:
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        loss = accumulate(candidate, batch, recipe)
        update(model, optimizers, recipe.rate(step))
        state["wall"] += time.perf_counter() - wall
        state["cpu"] += time.process_time() - cpu
        state["step"] = step
        if not math.isfinite(loss):
            break
        if step % EVAL_EVERY == 0:
            if step < recipe.steps:
                point = validation_loss(candidate, valid_rows.select(slice(0, CURVE_ROWS)), recipe)
                state["curve"].append([step, round(point, 4)])
            states = [optimizer.state_dict() for optimizer in optimizers]
            _store(unfinished, {"model": model.state_dict(), "optimizers": states, "state": state})
        if step % 10 == 0 or step == recipe.steps:
            last = f" val {state['curve'][-1][1]:.3f}" if state["curve"] else ""
            rate = f"{tokens / state['wall']:.0f} tok/s, {tokens / state['cpu']:.0f} per CPU second"
            print(f"{candidate.title} {recipe.learning_rate:g} step {step} loss {loss:.3f}{last} {rate}", flush=True)
    finite = math.isfinite(loss)
    measured = {
        "val_curve": state["curve"],
        "val_loss": round(validation_loss(candidate, valid_rows, recipe), 4) if finite else None,
        "train_tokens_per_second": round(tokens / state["wall"]),
        "train_tokens_per_cpu_second": round(tokens / state["cpu"]),
    }
    unfinished.unlink(missing_ok=True)
    return measured


def _store(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)
