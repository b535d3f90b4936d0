"""Recall: the hybrid beside its own branches alone, at equal parameters, trained here.

    python benchmarks/recall.py                                # MQAR: both branches, Mamba alone, attention alone
    python benchmarks/recall.py --task passkey                 # trained at 256 tokens, read up to 8 times as long
    python benchmarks/recall.py --branches both --steps 500
    python benchmarks/recall.py --report

Each finished run is one line of `benchmarks/results/recall.jsonl`; a run that is there is skipped. Every model meets
the same rows in the same order, the easy ones of `stages` first, and is judged on rows that it has never seen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import records
import torch
from training_run import Recipe, build_optimizers, update

from fusiontree.data.batch import Batch
from fusiontree.eval.mqar import MQARTask, mqar_accuracy
from fusiontree.eval.needle import PasskeyTask, passkey_accuracy
from fusiontree.eval.peers import count_parameters
from fusiontree.models import HybridLanguageModel, HybridLanguageModelConfig

Task = MQARTask | PasskeyTask

# A layer of one branch is smaller: three of them, with these ranks of the gate, have the parameters of two layers of
# both (within 3 %).
KINDS = {
    "both": {"num_layers": 2, "gate_rank": 32},
    "mamba": {"num_layers": 3, "gate_rank": 12},
    "attention": {"num_layers": 3, "gate_rank": 48},
}
SIZES = {
    "hidden_size": 64,
    "num_heads": 4,
    "global_heads": 2,
    "window_size": 64,
    "mamba_expand": 1,
    "mamba_head_dim": 32,
    "srte_rank": 32,
    # Heads of 16 channels: at a base of 1e4 only 3 of their 8 frequencies turn by less than a radian in 256 tokens.
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
RATES = (3e-3, 1.5e-3)
OUR_CODE = ("models", "ops", "eval/mqar.py", "eval/needle.py")
TEST_ROWS, TEST_SEED = 500, 10**6
STAGE_ENDS = (0.4, 0.6, 0.8, 1.0)  # of the steps
GRID_TIMES, GRID_DEPTHS, GRID_ROWS = (1, 2, 4, 8), (0.0, 0.25, 0.5, 0.75, 1.0), 20


def stages(task: Task) -> tuple[Task, ...]:
    """Four tasks from easy to the one that is asked: a quarter of the pairs, half, all, each in rows as short as they
    can be, then `task`; a passkey in rows of a 16th, an 8th and a quarter of the length first."""
    if isinstance(task, MQARTask):
        counts = [max(1, task.pairs // part) for part in (4, 2, 1)]
        return *(replace(task, pairs=pairs, length=4 * pairs) for pairs in counts), task
    shortest = 2 * task.needle
    return *(replace(task, length=max(shortest, task.length // part)) for part in (16, 8, 4)), task


def draw(task: Task, rows: int, step: int, seed: int) -> Batch:
    """The rows of a training step."""
    if isinstance(task, MQARTask):
        return task.batch(rows, torch.Generator().manual_seed(seed * 10**5 + step))
    return task.batch(range(step * 10**4, step * 10**4 + rows), seed=seed)


def build(branches: str, task: Task, seed: int) -> HybridLanguageModel:
    kind = KINDS[branches]
    torch.manual_seed(seed)
    ids = task.vocab_size if isinstance(task, MQARTask) else max(task.alphabet) + 1
    config = HybridLanguageModelConfig(
        vocab_size=-(-ids // 64) * 64, layer_branches=[branches] * kind["num_layers"], **kind, **SIZES
    )
    return HybridLanguageModel(config).train()


def accuracy(model: HybridLanguageModel, task: Task, recipe: Recipe, rows: int) -> float:
    """On `rows` unseen rows of the task as it is asked."""

    def logits(batch: Batch) -> torch.Tensor:
        return model(batch.input_ids).logits

    model.eval()
    with recipe.autocast():
        if isinstance(task, MQARTask):
            found = mqar_accuracy(logits, task, rows=rows, seed=TEST_SEED)
        else:
            depths = {"lengths": (task.length,), "depths": GRID_DEPTHS, "rows": rows // len(GRID_DEPTHS)}
            grid = passkey_accuracy(logits, task, **depths, seed=TEST_SEED)
            found = sum(depth[0] for depth in grid) / len(grid)
    model.train()
    return found


def grid(model: HybridLanguageModel, task: PasskeyTask, recipe: Recipe) -> dict:
    """Passkeys found by depth, at the length of training and beyond."""
    lengths = [times * task.length for times in GRID_TIMES]
    model.eval()
    with recipe.autocast():
        found = passkey_accuracy(
            lambda batch: model(batch.input_ids).logits,
            task,
            lengths=lengths,
            depths=GRID_DEPTHS,
            rows=GRID_ROWS,
            seed=TEST_SEED,
        )
    return {"lengths": lengths, "depths": GRID_DEPTHS, "found": found}


def train(branches: str, task: Task, recipe: Recipe) -> dict:
    """Train one model and return what was measured: `accuracy` on unseen rows (None if the loss left the finite
    numbers), its `curve` [[step, accuracy]], and for passkeys the `grid`. A step reads `batch_size` rows of the task
    as it is asked, and as many tokens of shorter rows."""
    model = build(branches, task, recipe.seed)
    optimizers = build_optimizers(model, recipe.optimizer)
    curve, started, loss = [], time.process_time(), torch.tensor(0.0)
    for step in range(1, recipe.steps + 1):
        easy = next(
            stage for end, stage in zip(STAGE_ENDS, stages(task), strict=True) if step <= round(end * recipe.steps)
        )
        batch = draw(easy, recipe.batch_size * task.length // easy.length, step, recipe.seed)
        with recipe.autocast():
            loss = model(batch.input_ids, position_ids=batch.position_ids, labels=batch.labels).loss
        loss.backward()
        update(model, optimizers, recipe.rate(step))
        if step % max(1, recipe.steps // 20) == 0:
            curve.append([step, round(accuracy(model, task, recipe, TEST_ROWS // 10), 3)])
            print(f"{branches} {recipe.learning_rate:g} step {step} loss {loss.item():.3f} {curve[-1][1]}", flush=True)
        if not math.isfinite(loss.item()):
            break
    finite = math.isfinite(loss.item())
    return {
        "parameters": count_parameters(model),
        "accuracy": round(accuracy(model, task, recipe, TEST_ROWS), 4) if finite else None,
        "curve": curve,
        **({"grid": grid(model, task, recipe)} if finite and isinstance(task, PasskeyTask) else {}),
        "cpu_seconds": round(time.process_time() - started),
    }


def report(path: Path) -> str:
    """The tables of the recorded runs, each kind of layers at its best learning rate, saved beside them as Markdown."""
    runs = records.recorded_runs(path)
    parts = ["# Recall\n"]
    same = ("task", "steps", "batch_size", "dtype")
    for setting in dict.fromkeys(json.dumps([r["run"][key] for key in same]) for r in runs):
        task, steps, batch_size, dtype = json.loads(setting)
        group = [r for r in runs if json.dumps([r["run"][key] for key in same]) == setting]
        asked = (
            f"{task['pairs']} pairs in {task['length']} tokens of {task['vocab_size']} ids"
            if "pairs" in task
            else f"a passkey of {task['digits']} tokens in {task['length']}, of {task['ids']} ids"
        )
        rows = f"{steps} steps of {batch_size} x {task['length']} tokens, {dtype}; {TEST_ROWS} unseen rows judge"
        parts.append(f"## {asked[0].upper() + asked[1:]}; {rows}\n")
        lines = [
            "| layers | seed | parameters | accuracy | rates tried | CPU seconds |",
            "|---|---|---|---|---|---|",
        ]
        best = []
        for branches, seed in dict.fromkeys((r["run"]["branches"], r["run"]["seed"]) for r in group):
            tried = [r for r in group if (r["run"]["branches"], r["run"]["seed"]) == (branches, seed)]
            tried.sort(key=lambda r: r["run"]["learning_rate"])
            best.append(max(tried, key=lambda r: r["accuracy"] or 0.0))
            rates = ", ".join(f"{r['run']['learning_rate']:g}: {_percent(r['accuracy'])}" for r in tried)
            lines.append(
                f"| {_layers(branches)} | {seed} | {best[-1]['parameters'] / 1e6:.3f} M "
                f"| {_percent(best[-1]['accuracy'])} | {rates} | {best[-1]['cpu_seconds']} |"
            )
        parts.append("\n".join(lines) + "\n")
        if grids := [r for r in best if "grid" in r]:
            parts.append(f"Passkeys found at each length ({GRID_ROWS} at each of the depths {list(GRID_DEPTHS)}):\n")
            lengths = grids[0]["grid"]["lengths"]
            lines = [f"| layers | {' | '.join(f'{n} tokens' for n in lengths)} |", "|" + "---|" * (1 + len(lengths))]
            for r in grids:
                by_length = [sum(column) / len(column) for column in zip(*r["grid"]["found"], strict=True)]
                lines.append(f"| {_layers(r['run']['branches'])} | {' | '.join(map(_percent, by_length))} |")
            parts.append("\n".join(lines) + "\n")
        parts.append(records.origin(group))
    text = "\n".join(parts)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def _layers(branches: str) -> str:
    return f"{KINDS[branches]['num_layers']} x {branches}"


def _percent(accuracy: float | None) -> str:
    return "diverged" if accuracy is None else f"{100 * accuracy:.1f} %"


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--branches", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--task", choices=("mqar", "passkey"), default="mqar")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--digits", type=int, default=4, help="tokens of a passkey")
    parser.add_argument("--vocab-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="bf16")
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
    task: Task
    if options.task == "mqar":
        task = MQARTask(length=options.length, pairs=options.pairs, vocab_size=options.vocab_size)
        asked = asdict(task)
        sizes = f"--pairs {options.pairs}"
    else:
        task = PasskeyTask(length=options.length, digits=options.digits, alphabet=range(1, options.vocab_size))
        asked = {"length": task.length, "digits": task.digits, "ids": options.vocab_size}
        sizes = f"--digits {options.digits}"
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
                "task": asked,
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
                    **records.provenance(),
                    "revision": revision,
                    "command": f"python benchmarks/recall.py --task {options.task} --branches {branches} "
                    f"--learning-rates {rate:g} --steps {options.steps} --batch-size {options.batch_size} "
                    f"--length {options.length} {sizes} --vocab-size {options.vocab_size} --seed {options.seed} "
                    f"--dtype {options.dtype} --threads {options.threads}",
                },
            )


if __name__ == "__main__":
    main(sys.argv[1:])
