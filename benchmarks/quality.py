"""Loss at equal parameters, tokens, data order and optimizer: FusionTree beside `transformers`' models.

    python benchmarks/quality.py                              # every model at its learning rates: what is missing
    python benchmarks/quality.py --models llama --learning-rates 2e-3 --threads 1
    python benchmarks/quality.py --variants all --steps 200   # our block beside itself with one choice made otherwise
    python benchmarks/quality.py --report                     # the table, from the recorded runs

Each finished run is one line of `benchmarks/results/quality_<corpus>.jsonl`; a run that is there is skipped and an
interrupted one goes on where it was, so the study can be stopped and shared between processes. Rules and reading:
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path

import records
import torch
import yaml
from candidates import MODELS, OURS, SIZES, build
from packed_text import load_streams, pack
from training_run import OPTIMIZERS, Recipe, train
from variants import VARIANTS

from fusiontree.atomic import atomic_write
from fusiontree.eval.peers import count_parameters

PEER_RATES = (1e-3, 2e-3, 4e-3)
OUR_RATES = (2e-3,)
OUR_CODE = ("models", "ops", "train/losses.py")


def identity(name: str, learning_rate: float, variant: str | None, options: argparse.Namespace, data: str) -> dict:
    """The settings that make two runs the same run."""
    run = {
        "model": name,
        "learning_rate": learning_rate,
        "steps": options.steps,
        "seed": options.seed,
        "dtype": options.dtype,
        "length": options.length,
        "batch_size": options.batch_size,
        "warmup": options.warmup,
        "size": options.size,
        "data": data,
    }
    if options.optimizer != "adamw":  # which the records do not name
        run["optimizer"] = options.optimizer
    if name == OURS:
        if options.z_loss:
            run["z_loss"] = options.z_loss
        return run | {"overrides": options.ours} | ({"variant": variant} if variant else {})
    return run | {"state_size": options.state_size}


def report(path: Path, *, steps: int, size: str) -> str:
    """Markdown table of the recorded runs of `steps` steps at `size`, each model at its best learning rate."""
    runs = [r for r in records.read_records(path) if r["run"]["steps"] == steps and r["run"]["size"] == size]
    groups: dict[tuple, list[dict]] = {}
    for record in runs:
        overrides = " ".join(f"{k}={v}" for k, v in record["run"].get("overrides", {}).items())
        variant = f": {record['run']['variant']}" if "variant" in record["run"] else ""
        optimizer = f", {record['run']['optimizer']}" if "optimizer" in record["run"] else ""
        z_loss = f", z-loss {record['run']['z_loss']:g}" if "z_loss" in record["run"] else ""
        title = f"{record['title']}{variant} {overrides}".strip() + optimizer + z_loss
        groups.setdefault((title, record["run"]["dtype"], record["run"]["seed"]), []).append(record)
    rows = []
    for (title, dtype, seed), group in groups.items():
        tried = ", ".join(
            f"{r['run']['learning_rate']:g}: " + (f"{r['val_loss']:.3f}" if r["val_loss"] is not None else "diverged")
            for r in sorted(group, key=lambda r: r["run"]["learning_rate"])
        )
        finished = [r for r in group if r["val_loss"] is not None]
        if finished:
            best = min(finished, key=lambda r: r["val_loss"])
            rows.append((best["val_loss"], title, dtype, seed, best, tried))
    lines = [
        "| model | seed | dtype | parameters | val loss | perplexity | best rate | rates tried | tokens / CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for loss, title, dtype, seed, best, tried in sorted(rows, key=lambda row: row[:4]):
        lines.append(
            f"| {title} | {seed} | {dtype} | {best['parameters'] / 1e6:.2f} M | {loss:.3f} "
            f"| {torch.tensor(loss).exp():.1f} | {best['run']['learning_rate']:g} | {tried} "
            f"| {best['train_tokens_per_cpu_second']} |"
        )
    return "\n".join(lines + equal_time([row[-2] for row in rows])) + "\n"


def equal_time(runs: list[dict]) -> list[str]:
    """For each run of a peer, how far our default came in the CPU time that the peer took for all of its steps.

    Ours is read off its curve (the first validation rows, every 50 steps), at the last point within that time; its
    learning rate had not come down by then, so the figure is an upper bound of what a run of that length reaches.
    """
    ours = [r for r in runs if r["run"]["model"] == OURS and not r["run"]["overrides"] and "variant" not in r["run"]]
    ours = [r for r in ours if "optimizer" not in r["run"] and "z_loss" not in r["run"]]
    lines = []
    for mine in ours:
        for peer in runs:
            same = all(peer["run"][key] == mine["run"][key] for key in ("dtype", "seed", "data"))
            if peer["run"]["model"] == OURS or not same or any(peer.get(k) != mine.get(k) for k in ("cpu", "gpu")):
                continue
            share = mine["train_tokens_per_cpu_second"] / peer["train_tokens_per_cpu_second"]
            within = [point for point in mine["val_curve"] if point[0] <= share * mine["run"]["steps"]]
            if share < 1 and within and peer["val_loss"] is not None:
                step, loss = within[-1]
                lines.append(
                    f"- In the CPU time of {peer['title']}'s run ({mine['run']['dtype']}, seed {mine['run']['seed']}) "
                    f"FusionTree comes to step {share * mine['run']['steps']:.0f}; at step {step} its loss is "
                    f"{loss:.3f}, {peer['title']}'s at the end {peer['val_loss']:.3f}."
                )
    return ["", *lines] if lines else []


def write_report(path: Path) -> str:
    """The tables of every size and length of run in `path`, saved beside it as Markdown."""
    runs = records.recorded_runs(path)
    parts = [f"# Validation loss: {path.stem.removeprefix('quality_')}\n"]
    for size, steps in dict.fromkeys((r["run"]["size"], r["run"]["steps"]) for r in runs):
        group = [r for r in runs if (r["run"]["size"], r["run"]["steps"]) == (size, steps)]
        first = group[0]["run"]
        batch = f"{first['batch_size']} x {first['length']} tokens"
        parts.append(f"## {size} parameters, {steps} steps of {batch}\n")
        parts.append(report(path, steps=steps, size=size))
        where = {
            (
                r.get("gpu") or f"{r['cpu']}, {r['threads']} thread(s)",
                r["versions"]["torch"],
                r["versions"]["transformers"],
            )
            for r in group
        }
        parts += [f"{machine}, torch {t}, transformers {tf}.\n" for machine, t, tf in sorted(where)]
        ours = sorted({(r["revision"], r["commit"]) for r in group if r["run"]["model"] == OURS})
        parts += [f"FusionTree code revision {revision} (commit {commit}).\n" for revision, commit in ours]
        days = sorted(r["date"] for r in group)
        parts.append(f"Run {days[0]} to {days[-1]}, for example by `{group[-1]['command']}`.\n")
    text = "\n".join(parts)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def held_out(path: Path, every: int, cache: Path) -> tuple[Path, Path]:
    """The texts of `path` in two files, for training and, every so many, for validation."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    files = cache / f"{path.stem}_{digest}_{every}_train.jsonl", cache / f"{path.stem}_{digest}_{every}_valid.jsonl"
    with path.open(encoding="utf-8") as source:
        lines = list(source)
    for file, kept in zip(files, ([line for i, line in enumerate(lines) if i % every], lines[::every]), strict=True):
        if not file.exists():
            atomic_write(file, "".join(kept).encode())
    return files


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = records.REPOSITORY.parent / "shared" / "data" / "wikitext2"
    parser.add_argument("--train", type=Path, default=data / "train.jsonl", help="JSONL with a `text` per line")
    parser.add_argument("--valid", type=Path, default=data / "valid.jsonl")
    parser.add_argument(
        "--hold-out", type=int, metavar="N", help="every N-th text of --train is for validation, in place of --valid"
    )
    parser.add_argument("--corpus", default="wikitext2", help="names the results files")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="directory of the records")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache", help="tokens, unfinished runs")
    parser.add_argument("--models", nargs="+", default=[name for name in MODELS if name != "bamba"], choices=MODELS)
    parser.add_argument("--learning-rates", nargs="+", type=float, help=f"default: {OUR_RATES}, peers {PEER_RATES}")
    parser.add_argument("--size", choices=SIZES, default="6.6M")
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="settings of our configuration")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=("all", "default", *VARIANTS),
        default=["default"],
        help="our block with one choice made otherwise",
    )
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4, help="rows at a time; speed and memory only")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--z-loss", type=float, default=0.0, help="of our model: weight of the squared log-partition")
    parser.add_argument("--state-size", type=int, default=64, help="of the peers' Mamba layers")
    parser.add_argument("--chunk-size", type=int, default=32, help="of the peers' scans; speed only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="one device for all runs compared")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only write the tables of the recorded runs")
    parser.add_argument("--discard-old-revisions", action="store_true", help="drop FusionTree runs of older code")
    options = parser.parse_args(argv)
    options.ours = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.ours)}
    return options


def main(argv: list[str]) -> None:
    options = arguments(argv)
    results = options.results / f"quality_{options.corpus}.jsonl"
    if options.report:
        print(write_report(results))
        return
    torch.set_num_threads(options.threads)
    revision = records.code_revision(*OUR_CODE)
    if options.discard_old_revisions:
        records.keep_records(results, lambda r: r["run"]["model"] != OURS or r["revision"] == revision)
    size = SIZES[options.size]
    if options.hold_out is not None and options.hold_out < 2:
        raise SystemExit("error: --hold-out must be 2 or more, or nothing is left to train on")
    if options.hold_out:
        options.train, options.valid = held_out(options.train, options.hold_out, options.cache)
    train_stream, valid_stream, data = load_streams(
        options.train, options.valid, vocab_size=size.vocab_size, cache=options.cache
    )
    train_rows, valid_rows = pack(train_stream, options.length), pack(valid_stream, options.length)
    print(f"{len(train_rows)} training and {len(valid_rows)} validation rows of {options.length} tokens", flush=True)
    variants = ("default", *VARIANTS) if "all" in options.variants else options.variants
    plan = [
        (name, rate, None if variant == "default" else variant)
        for name in options.models
        for variant in (variants if name == OURS else ("default",))
        for rate in options.learning_rates or (OUR_RATES if name == OURS else PEER_RATES)
    ]
    for name, rate, variant in plan:
        run = identity(name, rate, variant, options, data)
        if name == OURS:
            records.check_revisions(results, revision, lambda r: r["run"]["model"] == OURS)
        if any(record["run"] == run for record in records.read_records(results)):
            print(f"{name} {variant or ''} {rate:g}: recorded already", flush=True)
            continue
        torch.manual_seed(options.seed)
        candidate = build(
            name,
            size,
            seed=options.seed,
            state_size=options.state_size,
            chunk_size=options.chunk_size,
            overrides=options.ours,
            variant=variant,
            z_loss=options.z_loss,
        )
        recipe = Recipe(
            learning_rate=rate,
            steps=options.steps,
            warmup=options.warmup,
            batch_size=options.batch_size,
            micro_batch=options.micro_batch,
            seed=options.seed,
            dtype=options.dtype,
            device=options.device,
            optimizer=options.optimizer,
        )
        code = {"revision": revision} if name == OURS else {}
        key = hashlib.sha256(json.dumps(run | code, sort_keys=True).encode()).hexdigest()[:12]
        measured = train(candidate, recipe, train_rows, valid_rows, options.cache / f"run_{key}.pt")
        record = {
            "run": run,
            "title": candidate.title,
            **code,
            "parameters": count_parameters(candidate.model),
            **measured,
            "threads": options.threads,
            **records.provenance(),
            "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
            "command": shlex.join(["python", "benchmarks/quality.py", *records.shown_arguments(argv)]),
        }
        records.append_record(results, record)
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
