"""What `--dry-run` predicts beside what a run takes: peak memory of each engine at three sizes, on the CPU.

    python benchmarks/memory_prediction.py                        # every engine at every size
    python benchmarks/memory_prediction.py --sizes small --engines single zero2

A run is two real steps of the training engine, in one process or under torchrun in two. Its peak is that of the bytes
that torch's allocator has handed out since before the model was built, as `torch.cuda.max_memory_allocated` would count
them on a GPU: tensors, communication buffers, and what kernels allocate inside. Library code, gloo and the fragments of
the C allocator are in neither figure; resident memory stands beside them. Records go to
`results/memory_prediction_<cpu>.json`, with a table in the `.md` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import records
import torch

from fusiontree.data.bpe import train_bpe
from fusiontree.train.memory import dry_run
from fusiontree.train.settings import RunSettings, load_run_settings
from fusiontree.train.setup import model_config

STEPS = 2  # from the second on moments and buckets are there
#: Models and rows: parameters weigh most in the first, activations in the last.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "model": {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "gate_rank": 32, "srte_rank": 32},
        "training": {"batch_size": 1, "max_seq_length": 128, "gradient_accumulation_steps": 1},
    },
    "medium": {
        "model": {"hidden_size": 256, "num_layers": 8, "num_heads": 4, "gate_rank": 32, "srte_rank": 32},
        "training": {"batch_size": 2, "max_seq_length": 512, "gradient_accumulation_steps": 2},
    },
    "large": {
        "model": {"hidden_size": 384, "num_layers": 8, "num_heads": 6, "gate_rank": 48, "srte_rank": 64},
        "training": {"batch_size": 4, "max_seq_length": 512, "gradient_checkpointing": True},
    },
}
ENGINES: dict[str, dict[str, Any]] = {
    "single": {},
    "ddp": {},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "fsdp2": {"fsdp": True},
}
#: DeepSpeed's default buckets hold 500 M numbers, which would hide everything else here.
BUCKET = 2_000_000
TOLERANCE = 0.15
PARTS = ("weights", "gradients", "optimizer", "buffers", "activations")
RECIPE = records.REPOSITORY / "configs" / "pretrain_wikipedia.yaml"
RECIPE_LIMIT_GB = 35


def sections(size: str, engine: str, dtype: str, work: Path) -> dict[str, Any]:
    """The settings of one run; `work` holds its text and tokenizer."""
    system: dict[str, Any] = {"device": "cpu", "num_threads": 1, **ENGINES[engine]}
    if "zero_stage" in system:
        file = work / f"zero{system['zero_stage']}.json"
        zero = {"stage": system["zero_stage"], "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        file.write_text(json.dumps({"zero_optimization": zero}))
        system["deepspeed_config"] = str(file)
    training = {
        "max_steps": STEPS,
        "warmup_steps": 1,
        "eval_interval": 0,
        "mixed_precision": "bf16" if dtype == "bf16" else "no",
    }
    training |= SIZES[size]["training"]
    return {
        "model": {"vocab_size": 4096, "window_size": 64, **SIZES[size]["model"]},
        "data": {"train_paths": str(work / "train.jsonl"), "tokenizer": str(work / "tokenizer")},
        "training": training,
        "gate_monitor": {"enabled": False},
        "logging": {"progress": "none"},
        "system": system,
        "output_dir": str(work / f"{size}-{engine}-{dtype}"),
    }


def prepare(work: Path) -> None:
    """Text enough for the longest run, and a tokenizer."""
    lines = [json.dumps({"text": " ".join(str(n * i) for n in range(400))}) for i in range(60)]
    (work / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    train_bpe([str(work / "train.jsonl")], 300, str(work / "tokenizer"), "text")


def peak_of_run(settings: dict[str, Any]) -> dict[str, int]:
    """Train in this process: peak bytes of torch's allocator, and the growth of resident memory."""
    from fusiontree.train.engine import TrainingEngine
    from fusiontree.train.throughput import peak_memory_bytes

    before = peak_memory_bytes(torch.device("cpu")) or 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine = TrainingEngine(RunSettings.parse(settings))
        engine.saver.save = lambda warn: None  # type: ignore[method-assign]  # the steps alone
        engine.run()
    trace = Path(settings["output_dir"]) / f"trace-{os.environ.get('RANK', '0')}.json"
    profiler.export_chrome_trace(str(trace))
    # The allocator's own total: what gloo's threads give back leaves no event, but is missing from the next one's.
    events = (event.get("args", {}) for event in json.loads(trace.read_text())["traceEvents"])
    peak = max(event["Total Allocated"] for event in events if event.get("Device Type") == 0)
    return {"peak": peak, "resident": (peak_memory_bytes(torch.device("cpu")) or 0) - before}


def measure(settings: dict[str, Any], processes: int) -> dict[str, int]:
    """`peak_of_run` in fresh processes; the largest of several."""
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(settings))
        done = subprocess.run(
            [sys.executable, *launch, __file__, "--job", str(job)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise SystemExit(f"error: {settings['output_dir']}: {done.stderr[-3000:]}")
        found = [json.loads(path.read_text()) for path in Path(folder).glob("peak-*.json")]
    assert len(found) == processes
    return {name: max(one[name] for one in found) for name in found[0]}


def predict(settings: RunSettings, devices: int) -> dict[str, int]:
    """What `fusiontree train --dry-run` says, in bytes."""
    estimate = dry_run(settings, model_config(settings), devices)
    parts = dict(vars(estimate.memory))
    return {"weights": parts.pop("parameters"), **parts, "parameters": estimate.parameters}


def compare(options: argparse.Namespace, work: Path) -> list[dict]:
    """One row for each size and engine."""
    found = []
    for size in options.sizes:
        for engine in options.engines:
            wanted = sections(size, engine, options.dtype, work)
            processes = 1 if engine == "single" else 2
            measured = measure(wanted, processes)
            predicted = predict(RunSettings.parse(wanted), processes)
            found.append({"size": size, "engine": engine, "predicted": predicted, "measured": measured})
            print(f"{size} {engine}: predicted {ratio(found[-1]):.3f} of measured", flush=True)
    return found


def ratio(row: dict) -> float:
    return row["predicted"]["peak"] / row["measured"]["peak"]


def recipe() -> dict[str, int]:
    """Prediction for a GPU of the 8-GPU recipe."""
    settings = load_run_settings(RECIPE)
    assert settings.system.num_devices is not None
    return predict(settings, settings.system.num_devices)


def report(runs: list[dict]) -> str:
    """Markdown tables of the records."""
    lines = ["# Peak memory: predicted and measured", ""]
    for run in runs:
        lines += [
            f"MB a process, {run['settings']['dtype']}, {STEPS} steps; two processes but for `single`.",
            "",
            "| size | engine | parameters | predicted | measured | predicted / measured | growth of resident memory |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in run["rows"]:
            predicted, measured = row["predicted"], row["measured"]
            lines.append(
                f"| {row['size']} | {row['engine']} | {predicted['parameters'] / 1e6:.1f} M "
                f"| {predicted['peak'] / 1e6:.0f} | {measured['peak'] / 1e6:.0f} | {ratio(row):.2f} "
                f"| {measured['resident'] / 1e6:.0f} |"
            )
        worst = max(abs(ratio(row) - 1) for row in run["rows"])
        lines += ["", f"Farthest off: {100 * worst:.0f} % (bar: {100 * TOLERANCE:.0f} %).", ""]
        parts = run["recipe"]
        split = ", ".join(f"{name} {parts[name] / 1e9:.1f}" for name in PARTS)
        lines += [
            f"`configs/{RECIPE.name}` on each of its GPUs: {parts['peak'] / 1e9:.1f} GB predicted ({split}); the "
            f"original recipe says less than {RECIPE_LIMIT_GB}.",
            "",
        ]
    return "\n".join(lines) + records.origin(runs)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="directory of the records")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # what the runs themselves are started with
    options = parser.parse_args(argv)
    if options.job is not None:
        found = peak_of_run(json.loads(options.job.read_text()))
        (options.job.parent / f"peak-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        rows = compare(options, Path(folder))
    record = {
        "settings": {"sizes": options.sizes, "engines": options.engines, "dtype": options.dtype},
        "rows": rows,
        "recipe": recipe(),
        "threads": 1,
        "revision": records.code_revision("models", "ops", "train"),
        "command": " ".join(["python benchmarks/memory_prediction.py", *records.shown_arguments(argv)]),
        **records.provenance(),
    }
    path = records.save_for_cpu(options.results, "memory_prediction", record, report)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
