"""Train on real text through the command line and evaluate on held-out files.

    python benchmarks/real_text.py --data DATA [--steps 300] [--runs wikitext2-gpt2 …]

Each run is what a user types: `fusiontree data tokenizer` where it needs a tokenizer, `fusiontree train`,
`fusiontree eval`. The figures go to results/real_text.json and results/real_text.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from records import RESULTS, cpu_model, git_commit, versions

MODEL = ["model.hidden_size=192", "model.num_layers=4", "model.num_heads=6", "model.mamba_head_dim=32"]
MODEL += ["model.window_size=64", "model.gate_rank=24", "model.srte_rank=48", "model.tie_word_embeddings=true"]
EVERY_NTH_HELD_OUT = 20


@dataclass(frozen=True)
class Run:
    """One training run: where its text, held-out text and tokenizer come from (below the data folder)."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]  # empty: every 20th line of the training files is held out
    tokenizer: str  # a folder, or the vocabulary size of a BPE trained on the training text


RUNS = {
    "wikitext2-gpt2": Run(("wikitext2/train.jsonl",), ("wikitext2/test.jsonl",), "gpt2_tokenizer"),
    "wikitext2-bpe4096": Run(("wikitext2/train.jsonl",), ("wikitext2/test.jsonl",), "4096"),
    "zh-bpe4096": Run(("zh/classical.jsonl", "zh/modern_docs.jsonl"), (), "4096"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the files named in RUNS")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.results / "real_text.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    for name in options.runs:
        with tempfile.TemporaryDirectory() as work:
            records[name] = measure(name, RUNS[name], options.data, options.steps, Path(work))
        options.results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, indent=1) + "\n")
        (options.results / "real_text.md").write_text(table(records))
    print(table(records))


def measure(name: str, run: Run, data: Path, steps: int, work: Path) -> dict:
    train = [data / file for file in run.train]
    held_out = [data / file for file in run.held_out]
    if not held_out:
        train, held_out = split(train, work)
    tokenizer = data / run.tokenizer
    if run.tokenizer.isdigit():
        tokenizer = work / "tokenizer"
        command("data", "tokenizer", *train, "--vocab-size", run.tokenizer, "--out", tokenizer)
    config = work / "config.yaml"
    config.write_text("{}\n")
    # The last held-out file judges; in training a prefix of it is watched.
    settings = [
        f"output_dir={work / 'run'}",
        f"data.tokenizer={tokenizer}",
        f"data.train_paths=[{','.join(map(str, train))}]",
        f"data.eval_paths=[{','.join(map(str, held_out))}]",
        *("training.batch_size=8", "training.max_seq_length=256", f"training.max_steps={steps}"),
        *("training.learning_rate=3e-3", "training.warmup_steps=30", "training.mixed_precision=no"),
        *(f"training.eval_interval={steps}", "training.eval_batches=16", f"training.save_interval={steps}"),
        *MODEL,
    ]
    started = time.monotonic()
    command("train", "--config", config, *settings)
    seconds = time.monotonic() - started
    command("eval", work / "run", "--data", *held_out, "--out", work)
    report = json.loads((work / "eval_report.json").read_text())
    metrics = list(read_jsonl(work / "run" / "metrics.jsonl"))
    losses = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    return {
        "train_files": [str(Path(file)) for file in run.train],
        "held_out": list(run.held_out) or f"every {EVERY_NTH_HELD_OUT}th line",
        "tokenizer": run.tokenizer,
        "steps": steps,
        "first_validation_loss": losses[0],
        "last_validation_loss": losses[-1],
        "held_out_tokens": report["tokens"],
        "held_out_loss": report["loss"],
        "held_out_perplexity": report["perplexity"],
        "train_seconds": round(seconds),
        "command": f"python benchmarks/real_text.py --data DATA --steps {steps} --runs {name}",
        "cpu": cpu_model(),
        "versions": versions(),
        "commit": git_commit(),
        "date": datetime.date.today().isoformat(),
    }


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "fusiontree", *map(str, words)], check=True, stdout=sys.stderr)


def read_jsonl(path: Path) -> Iterator[dict]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def split(files: list[Path], work: Path) -> tuple[list[Path], list[Path]]:
    """Copies of the files in two parts: every 20th line is held out."""
    train, held_out = [], []
    for file in files:
        parts = work / f"train-{file.name}", work / f"held-out-{file.name}"
        with file.open(encoding="utf-8") as source, parts[0].open("w") as kept, parts[1].open("w") as out:
            for number, line in enumerate(source):
                (out if number % EVERY_NTH_HELD_OUT == 0 else kept).write(line)
        train.append(parts[0])
        held_out.append(parts[1])
    return train, held_out


def table(records: dict) -> str:
    lines = [
        "# Real text through the command line",
        "",
        "Default architecture in small (H=192, 4 layers), 8 rows of 256 tokens a step, float32; `fusiontree eval` reads"
        " every held-out token once with its whole document before it.",
        "",
        "| run | steps | validation loss, start → end | held-out tokens | held-out loss | perplexity | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in records.items():
        lines.append(
            f"| {name} | {r['steps']} | {r['first_validation_loss']:.3f} → {r['last_validation_loss']:.3f} |"
            f" {r['held_out_tokens']:,} | {r['held_out_loss']:.3f} | {r['held_out_perplexity']:.1f} |"
            f" {r['train_seconds']} |"
        )
    last = next(reversed(records.values()))
    lines += ["", f"{last['cpu']}; {last['versions']}; commit {last['commit']}; {last['date']}; `{last['command']}`"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
