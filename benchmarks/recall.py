"""Associative recall (MQAR): the hybrid beside its own branches alone, at equal parameters, trained here.

    python benchmarks/recall.py                                # both branches, Mamba alone, attention alone
    python benchmarks/recall.py --branches both --steps 500
    python benchmarks/recall.py --report

Each finished run is one line of `benchmarks/results/recall.jsonl`; a run that is there is skipped. Every model meets
the same rows in the same order, and is judged on rows that it has never seen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import records
import torch
from training_run import BETAS, Recipe, parameter_groups, update

from fusiontree.eval.mqar import MQARTask, mqar_accuracy
from fusiontree.eval.peers import count_parameters
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig

# A layer of one branch is smaller: three of them have the parameters of two layers of both (within 2 %).
LAYERS = {"both": 2, "mamba": 3, "attention": 3}
SIZES = {"hidden_size": 128, "num_heads": 4, "gate_rank": 32, "window_size": 64, "tie_word_embeddings": True}
RATES = (1e-3, 3e-3)
OUR_CODE = ("models", "ops", "eval/mqar.py")
TEST_ROWS, TEST_SEED = 500, 10**6


def build(branches: str, task: MQARTask, seed: int) -> HybridLanguageModel:
    layers = LAYERS[branches]
    torch.manual_seed(seed)
    config = HybridLanguageModelConfig(
        vocab_size=-(-task.vocab_size // 64) * 64, num_layers=layers, layer_branches=[branches] * layers, **SIZES
    )
    return HybridLanguageModel(config).train()


def accuracy(model: HybridLanguageModel, task: MQARTask, recipe: Recipe, rows: int) -> float:
    model.eval()
    with recipe.autocast():
        found = mqar_accuracy(lambda batch: model(batch.input_ids).logits, task, rows=rows, seed=TEST_SEED)
    model.train()
    return found


def train(branches: str, task: MQARTask, recipe: Recipe) -> dict:
    """Train one model and return what was measured: `accuracy` on unseen rows (None if the loss left the finite
    numbers), and its `curve` [[step, accuracy]]."""
    model = build(branches, task, recipe.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=BETAS, fused=True)
    generator = torch.Generator().manual_seed(recipe.seed)
    curve, started = [], time.process_time()
    for step in range(1, recipe.steps + 1):
        batch = task.batch(recipe.batch_size, generator)
        with recipe.autocast():
            loss = model(batch.input_ids, position_ids=batch.position_ids, labels=batch.labels).loss
        loss.backward()
        update(model, optimizer, recipe.rate(step))
        if step % max(1, recipe.steps // 20) == 0:
            curve.append([step, round(accuracy(model, task, recipe, TEST_ROWS // 5), 3)])
            print(f"{branches} {recipe.learning_rate:g} step {step} loss {loss.item():.3f} {curve[-1][1]}", flush=True)
        if not math.isfinite(loss.item()):
            break
    finite = math.isfinite(loss.item())
    return {
        "parameters": count_parameters(model),
        "accuracy": round(accuracy(model, task, recipe, TEST_ROWS), 4) if finite else None,
        "curve": curve,
        "cpu_seconds": round(time.process_time() - started),
    }


def report(path: Path) -> str:
    """The tables of the recorded runs, each kind of layers at its best learning rate, saved beside them as Markdown."""
    runs = records.read_records(path)
    if not runs:
        raise SystemExit(f"error: {path} holds no runs yet: run this script without --report first")
    parts = ["# Associative recall\n"]
    same = ("task", "steps", "batch_size", "dtype")
    for setting in dict.fromkeys(json.dumps([r["run"][key] for key in same]) for r in runs):
        task, steps, batch_size, dtype = json.loads(setting)
        group = [r for r in runs if json.dumps([r["run"][key] for key in same]) == setting]
        parts.append(
            f"## {task['pairs']} pairs in {task['length']} tokens of {task['vocab_size']} ids, {steps} steps of "
            f"{batch_size} rows, {dtype}; {TEST_ROWS} unseen rows judge\n"
        )
        lines = [
            "| layers | seed | parameters | accuracy | rates tried | CPU seconds |",
            "|---|---|---|---|---|---|",
        ]
        for branches, seed in dict.fromkeys((r["run"]["branches"], r["run"]["seed"]) for r in group):
            tried = [r for r in group if (r["run"]["branches"], r["run"]["seed"]) == (branches, seed)]
            tried.sort(key=lambda r: r["run"]["learning_rate"])
            best = max(tried, key=lambda r: r["accuracy"] or 0.0)
            rates = ", ".join(f"{r['run']['learning_rate']:g}: {_percent(r['accuracy'])}" for r in tried)
            lines.append(
                f"| {LAYERS[branches]} x {branches} | {seed} | {best['parameters'] / 1e6:.3f} M "
                f"| {_percent(best['accuracy'])} | {rates} | {best['cpu_seconds']} |"
            )
        parts.append("\n".join(lines) + "\n")
        where = {f"{r['cpu']}, {r['threads']} thread(s), torch {r['versions']['torch']}" for r in group}
        code = {f"code revision {r['revision']} (commit {r['commit']})" for r in group}
        days = sorted(r["date"] for r in group)
        parts.append(f"{'; '.join(sorted(where | code))}; {days[0]} to {days[-1]}; `{group[-1]['command']}`.\n")
    text = "\n".join(parts)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def _percent(accuracy: float | None) -> str:
    return "diverged" if accuracy is None else f"{100 * accuracy:.1f} %"


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--branches", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--learning-rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--report", action="store_true", help="only write the tables of the recorded runs")
    parser.add_argument("--discard-old-revisions", action="store_true", help="drop the runs of older code")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = arguments(argv)
    path = options.results / "recall.jsonl"
    if options.report:
        print(report(path))
        return
    torch.set_num_threads(options.threads)
    task = MQARTask(length=options.length, pairs=options.pairs, vocab_size=options.vocab_size)
    revision = records.code_revision(*OUR_CODE)
    if options.discard_old_revisions:
        records.keep_records(path, lambda r: r["revision"] == revision)
    records.check_revisions(path, revision, lambda r: True)
    for branches in options.branches:
        for rate in options.learning_rates:
            recipe = Recipe(
                learning_rate=rate,
                steps=options.steps,
                warmup=min(100, options.steps // 10),
                batch_size=options.batch_size,
                micro_batch=options.batch_size,
                seed=options.seed,
                dtype=options.dtype,
            )
            run = {
                "branches": branches,
                "task": {"length": task.length, "pairs": task.pairs, "vocab_size": task.vocab_size},
                **{key: getattr(recipe, key) for key in ("learning_rate", "steps", "batch_size", "seed", "dtype")},
            }
            if any(r["run"] == run for r in records.read_records(path)):
                print(f"{branches} {rate:g}: recorded already", flush=True)
                continue
            records.append_record(
                path,
                {
                    "run": run,
                    **train(branches, task, recipe),
                    "threads": options.threads,
                    "cpu": records.cpu_model(),
                    "versions": records.versions(),
                    "commit": records.git_commit(),
                    "revision": revision,
                    "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
                    "command": f"python benchmarks/recall.py --branches {branches} --learning-rates {rate:g} "
                    f"--steps {options.steps} --batch-size {options.batch_size} --length {options.length} "
                    f"--pairs {options.pairs} --vocab-size {options.vocab_size} --seed {options.seed} "
                    f"--dtype {options.dtype} --threads {options.threads}",
                },
            )


if __name__ == "__main__":
    main(sys.argv[1:])
