"""How fast text becomes batches: each data mode alone, and what a large file costs before the first batch.

    python benchmarks/loading.py --files ../shared/data/wikitext2/train.jsonl
    python benchmarks/loading.py --files ... --gigabytes 5      # and one file of that size, made by repetition
    python benchmarks/loading.py --report

Peers in the same run: `datasets` reading the same JSONL with its own reader, tokenised with the same tokenizer by `map`
(what most training scripts do), and for the large file the time to read and hash it (the floor of an index).
Every measurement is a process of its own; its memory is counted from after the imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import records
from speed import peak_bytes, resident_bytes

from fusiontree.data import DataSettings, build_loader, train_bpe
from fusiontree.data.corpus import Corpus
from fusiontree.data.lazy import LazyDataset
from fusiontree.data.static import tokenise
from fusiontree.data.tokenizer import DocumentEncoder, load_tokenizer

ROWS, LENGTH, VOCABULARY = 8, 1024, 4096


def measure(job: dict) -> dict:
    """One measurement, in this process: seconds to the first batch, tokens per second after it, peak bytes."""
    baseline = resident_bytes()
    started = time.perf_counter()
    found = {"lazy": _loader, "static": _loader, "hf_streaming": _loader, "datasets": _datasets, "read": _read}[
        job["mode"]
    ](job, started)
    return found | {"peak_bytes": peak_bytes() - baseline}


def _settings(job: dict) -> DataSettings:
    return DataSettings(
        data_mode=job["mode"],
        train_paths=tuple(job["files"]),
        static_dir=job["static_dir"],
        num_workers=job["workers"],
        cache_dir=job["cache"],
    )


def _loader(job: dict, started: float) -> dict:
    loader = build_loader(_settings(job), load_tokenizer(job["tokenizer"]), batch_size=ROWS, max_seq_length=LENGTH)
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    count = sum(1 for _ in islice(batches, job["batches"]))
    return {
        "first_batch_seconds": first - started,
        "tokens_per_second": count * ROWS * LENGTH / (time.perf_counter() - first),
    }


def _datasets(job: dict, started: float) -> dict:
    import datasets

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(job["tokenizer"])
    rows = datasets.load_dataset("json", data_files=job["files"], split="train", cache_dir=job["cache"])
    loaded = time.perf_counter()
    ids = rows.map(
        lambda batch: {"input_ids": tokenizer(batch["text"], verbose=False)["input_ids"]},
        batched=True,
        remove_columns=rows.column_names,
        num_proc=job["workers"] or None,
    )
    tokens = sum(len(row) for row in ids["input_ids"])
    return {
        "first_batch_seconds": time.perf_counter() - started,
        "tokens_per_second": tokens / (time.perf_counter() - loaded),
    }


def _read(job: dict, started: float) -> dict:
    digest = hashlib.sha256()
    with open(job["files"][0], "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"first_batch_seconds": time.perf_counter() - started, "tokens_per_second": None}


def run_apart(job: dict) -> dict:
    """`measure` in a fresh process."""
    finished = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(job)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"},
    )
    if finished.returncode:
        raise SystemExit(f"error: measuring {job['mode']} failed\n{finished.stderr[-2000:]}")
    return {**job, **json.loads(finished.stdout.splitlines()[-1])}


def _jobs(files: list[str], folder: Path, batches: int) -> list[dict]:
    common = {
        "files": files,
        "static_dir": str(folder / "tokens"),
        "tokenizer": str(folder / "bpe"),
        "batches": batches,
        "what": "corpus",
    }
    return [
        {**common, "mode": mode, "workers": workers}
        for mode, choices in (("lazy", (0, 1, 2)), ("static", (0, 1, 2)), ("hf_streaming", (0,)), ("datasets", (0, 2)))
        for workers in choices
    ]


def repeated(files: list[str], target: Path, gigabytes: float) -> None:
    """Write a file of about that size: the lines of `files` over and over."""
    lines = b"".join(Path(file).read_bytes() for file in files)
    with target.open("wb") as output:
        while output.tell() < gigabytes * 1e9:
            output.write(lines)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="+", help="JSONL files with a `text` per line")
    parser.add_argument("--gigabytes", type=float, default=0, help="also one file of this size")
    parser.add_argument("--batches", type=int, default=60, help="timed batches of 8 x 1024 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.measure and not options.files:
        parser.error("name --files")
    return options


def main(argv: list[str]) -> None:
    options = arguments(argv)
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_bpe(options.files, VOCABULARY, folder / "bpe", cache_dir=str(folder))
        encoder = DocumentEncoder(tokenizer, tokenizer.eos_token_id)
        corpus = LazyDataset(Corpus(options.files, cache_dir=str(folder)), encoder)
        list(tokenise(corpus, folder / "tokens" / "train", vocab_size=VOCABULARY))
        jobs = _jobs(options.files, folder, options.batches)
        if options.gigabytes:
            large = folder / "large.jsonl"
            repeated(options.files, large, options.gigabytes)
            jobs += [
                {**jobs[0], "files": [str(large)], "mode": mode, "workers": 0, "what": what}
                for mode, what in (("read", "large"), ("lazy", "large"), ("lazy", "large again"))
            ]
        for number in range(options.rounds):
            for job in jobs:
                cache = folder / ("cache" if job["what"] == "corpus" else f"cache{number}")
                if job["mode"] == "datasets":
                    cache = folder / f"datasets{number}-{job['workers']}"  # its caches would answer the second time
                found.append(run_apart({**job, "cache": str(cache)}) | {"round": number})
                print(_one_line(found[-1]), flush=True)
    record = {
        "settings": {
            "files": [Path(file).name for file in options.files],
            "bytes": sum(os.path.getsize(file) for file in options.files),
            "gigabytes": options.gigabytes,
        },
        "rounds": options.rounds,
        **records.provenance(),
        "command": "python benchmarks/loading.py " + " ".join(records.shown_arguments(argv)),
        "measurements": [
            {k: v for k, v in one.items() if k not in ("files", "static_dir", "tokenizer", "cache")} for one in found
        ],
    }
    heading = "# Loading data\n"
    records.save_for_cpu(options.results, "loading", record, lambda kept: "\n".join([heading, *map(table, kept)]))
    print(table(record))


def _one_line(one: dict) -> str:
    speed = f", {one['tokens_per_second']:,.0f} tok/s" if one["tokens_per_second"] else ""
    return (
        f"round {one['round']} {one['what']}, {one['mode']}, {one['workers']} workers: first batch after "
        f"{one['first_batch_seconds']:.2f} s{speed}, {one['peak_bytes'] / 1e6:.0f} MB"
    )


def table(record: dict) -> str:
    groups: dict[tuple, list[dict]] = {}
    for one in record["measurements"]:
        groups.setdefault((one["what"], one["mode"], one["workers"]), []).append(one)
    peer = [one["tokens_per_second"] for one in groups.get(("corpus", "datasets", 0), [])]
    floor = [one["first_batch_seconds"] for one in groups.get(("large", "read", 0), [])]
    lines = [
        "| what | mode | workers | first batch, s | tokens / s | to `datasets` | memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (what, mode, workers), group in groups.items():
        seconds = median(one["first_batch_seconds"] for one in group)
        ratio = f" ({seconds / median(floor):.2f}x reading and hashing)" if floor and what != "corpus" else ""
        speeds = [one["tokens_per_second"] for one in group if one["tokens_per_second"]]
        shown = f"{median(speeds):,.0f}" if speeds else ""
        to_peer = f"{median(speeds) / median(peer):.2f}x" if speeds and peer and what == "corpus" else ""
        memory = median(one["peak_bytes"] for one in group) / 1e6
        lines.append(f"| {what} | {mode} | {workers} | {seconds:.2f}{ratio} | {shown} | {to_peer} | {memory:.0f} |")
    size = record["settings"]
    lines.append("")
    lines.append(
        f"`corpus`: {', '.join(size['files'])}, {size['bytes'] / 1e6:.1f} MB"
        + (f"; `large`: {size['gigabytes']:g} GB of it" if size["gigabytes"] else "")
        + f"; rows of {LENGTH} tokens, a byte-level BPE of {VOCABULARY}. {record['cpu']}; medians of "
        f"{record['rounds']} rounds; commit {record['commit']}; {record['date']}; `{record['command']}`.\n"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
