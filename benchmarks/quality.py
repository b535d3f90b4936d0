"""Loss at equal parameters, tokens, data order and optimizer: FusionTree beside `transformers`' models.

    python benchmarks/quality.py                              # every model, every learning rate, what is missing
    python benchmarks/quality.py --models llama --learning-rates 2e-3 --threads 1
    python benchmarks/quality.py --report                     # the table, from the recorded runs

Each finished run is one line of `benchmarks/results/quality_<corpus>.jsonl`; a run that is there is skipped, so
the study can be stopped, resumed and shared between processes. See benchmarks/README.md for the rules.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import peers
import records
import torch
from packed_text import Rows, batches, load_streams, pack
from torch import nn
from torch.nn import functional as F

PEER_RATES = (1e-3, 2e-3, 4e-3)
EVAL_EVERY = 50
CURVE_ROWS = 32  # rows of the validation set that the curve is measured on; the last figure uses all of them
UNDECAYED = ("A_log", "D", "dt_bias")


def lm_loss(logits_BTV: torch.Tensor, rows: Rows, reduction: str) -> torch.Tensor:
    """Cross entropy of each token given those before it in the row, over the labels that count."""
    return F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), rows.labels[:, 1:].flatten(), ignore_index=-100, reduction=reduction
    )


def peer_logits(name: str, model: nn.Module, rows: Rows) -> torch.Tensor:
    """Logits [B, T, V]. Llama alone can be told of document boundaries on the torch path (positions that restart
    make `transformers` mask attention across them); the Mamba scans there carry their state over."""
    positions = {"position_ids": rows.position_ids} if name == "llama" else {}
    return model(input_ids=rows.input_ids, use_cache=False, **positions).logits


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only; norms, biases and the Mamba dynamics go without."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and name.rpartition(".")[2] not in UNDECAYED
        (decayed if is_matrix else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def rate_factor(step: int, *, steps: int, warmup: int, floor: float = 0.1) -> float:
    """Linear warm-up, then a cosine from 1 down to `floor` at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Candidate:
    """A model and the two ways the loop calls it.

    logits: rows -> [B, T, V].
    training_loss: (rows, counted labels of the whole step, rows of the whole step) -> this piece's share of the loss.
    """

    title: str
    model: nn.Module
    logits: Callable[[Rows], torch.Tensor]
    training_loss: Callable[[Rows, int, int], torch.Tensor]


def build(name: str, options: argparse.Namespace) -> Candidate:
    size = peers.PeerSize(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        parameters=options.parameters,
        state_size=options.state_size,
        chunk_size=options.chunk_size,
    )
    model = peers.build_peer(name, size, seed=options.seed)

    def logits(rows: Rows) -> torch.Tensor:
        return peer_logits(name, model, rows)

    def training_loss(rows: Rows, counted: int, batch_rows: int) -> torch.Tensor:
        return lm_loss(logits(rows), rows, "sum") / counted

    return Candidate(peers.peer_title(name), model, logits, training_loss)


def count_labels(rows: Rows) -> int:
    return int((rows.labels[:, 1:] != -100).sum())


def autocast(dtype: str) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext()


@torch.no_grad()
def validation_loss(candidate: Candidate, rows: Rows, options: argparse.Namespace) -> float:
    """Mean loss over all counted labels of `rows`."""
    candidate.model.eval()
    total = 0.0
    for start in range(0, len(rows), options.micro_batch):
        batch = rows.select(slice(start, start + options.micro_batch))
        with autocast(options.dtype):
            total += lm_loss(candidate.logits(batch), batch, "sum").item()
    candidate.model.train()
    return total / count_labels(rows)


def train_step(candidate: Candidate, batch: Rows, micro_batch: int) -> float:
    """Accumulate the gradient of one batch in pieces of `micro_batch` rows; the pieces add up to the whole."""
    counted, total = count_labels(batch), 0.0
    for start in range(0, len(batch), micro_batch):
        loss = candidate.training_loss(batch.select(slice(start, start + micro_batch)), counted, len(batch))
        loss.backward()
        total += loss.item()
    return total


def run(name: str, learning_rate: float, options: argparse.Namespace, train: Rows, valid: Rows) -> dict:
    """Train one model and return what was measured."""
    torch.manual_seed(options.seed)
    candidate = build(name, options)
    model, seconds, curve = candidate.model, 0.0, []
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, steps=options.steps, warmup=options.warmup)
    )
    source = batches(train, options.batch_size, seed=options.seed)
    for step in range(1, options.steps + 1):
        batch = next(source)
        started = time.perf_counter()
        with autocast(options.dtype):
            loss = train_step(candidate, batch, options.micro_batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        seconds += time.perf_counter() - started
        if not math.isfinite(loss):
            break
        if step % EVAL_EVERY == 0 and step < options.steps:
            curve.append([step, validation_loss(candidate, valid.select(slice(0, CURVE_ROWS)), options)])
        if step % 10 == 0 or step == options.steps:
            rate = step * batch.input_ids.numel() / seconds
            last = f" val {curve[-1][1]:.3f}" if curve else ""
            print(f"{name} lr {learning_rate:g} step {step} loss {loss:.3f}{last} {rate:.0f} tok/s", flush=True)
    diverged = not math.isfinite(loss)
    return {
        "title": candidate.title,
        "parameters": peers.count_parameters(model),
        "val_curve": [[step, round(point, 4)] for step, point in curve],
        "val_loss": None if diverged else round(validation_loss(candidate, valid, options), 4),
        "train_tokens_per_second": round(step * options.batch_size * options.length / seconds),
    }


def identity(name: str, learning_rate: float, options: argparse.Namespace, data: str) -> dict:
    """The settings that make two runs the same run."""
    return {
        "model": name,
        "learning_rate": learning_rate,
        "steps": options.steps,
        "seed": options.seed,
        "dtype": options.dtype,
        "length": options.length,
        "batch_size": options.batch_size,
        "warmup": options.warmup,
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "num_layers": options.num_layers,
        "parameters_aimed_at": options.parameters,
        "state_size": options.state_size,
        "data": data,
    }


def report(path: Path, group: dict) -> str:
    """Markdown of the recorded runs that agree with `group`, each model at its best learning rate."""
    runs = [r for r in records.read_records(path) if all(r["run"][key] == value for key, value in group.items())]
    lines = [
        "| model | parameters | validation loss | learning rate | all rates tried | train tok/s |",
        "|---|---|---|---|---|---|",
    ]
    rows = []
    for name in dict.fromkeys(r["run"]["model"] for r in runs):
        own = sorted((r for r in runs if r["run"]["model"] == name), key=lambda r: r["run"]["learning_rate"])
        done = [r for r in own if r["val_loss"] is not None]
        if not done:
            continue
        best = min(done, key=lambda r: r["val_loss"])
        tried = ", ".join(f"{r['run']['learning_rate']:g}: {r['val_loss'] or 'diverged'}" for r in own)
        rows.append((best["val_loss"], best, tried))
    for _, best, tried in sorted(rows, key=lambda row: row[0]):
        lines.append(
            f"| {best['title']} | {best['parameters'] / 1e6:.2f} M | {best['val_loss']:.3f} "
            f"| {best['run']['learning_rate']:g} | {tried} | {best['train_tokens_per_second']} |"
        )
    return "\n".join(lines) + "\n"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = records.REPOSITORY.parent / "shared" / "data" / "wikitext2"
    parser.add_argument("--train", type=Path, default=data / "train.jsonl", help="JSONL with a `text` per line")
    parser.add_argument("--valid", type=Path, default=data / "valid.jsonl")
    parser.add_argument("--corpus", default="wikitext2", help="names the results files")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="directory of the records")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache", help="tokenised text")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--learning-rates", nargs="+", type=float, help=f"default: {PEER_RATES} for every peer")
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4, help="rows at a time; speed and memory only")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--parameters", type=int, default=6_600_000)
    parser.add_argument("--state-size", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=32, help="of the peers' scans; speed only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only write the table of the recorded runs")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    results = options.results / f"quality_{options.corpus}.jsonl"
    train, valid, data = load_streams(options.train, options.valid, vocab_size=options.vocab_size, cache=options.cache)
    train, valid = pack(train, options.length), pack(valid, options.length)
    print(
        f"{len(train)} rows to train on, {len(valid)} to validate on, of {options.length} tokens; data {data}",
        flush=True,
    )
    for learning_rate in options.learning_rates or PEER_RATES:
        for name in options.models:
            wanted = identity(name, learning_rate, options, data)
            if any(record["run"] == wanted for record in records.read_records(results)):
                print(f"{name} lr {learning_rate:g}: recorded already")
                continue
            measured = run(name, learning_rate, options, train, valid)
            record = {
                "run": wanted,
                **measured,
                "threads": options.threads,
                "cpu": records.cpu_model(),
                "versions": records.versions(),
                "commit": records.git_commit(),
                "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
                "command": f"python benchmarks/quality.py --models {name} --learning-rates {learning_rate:g} "
                f"--steps {options.steps} --threads {options.threads}",
            }
            records.append_record(results, record)
            print(json.dumps(record), flush=True)


MODELS = peers.PEER_NAMES

if __name__ == "__main__":
    main(sys.argv[1:])
