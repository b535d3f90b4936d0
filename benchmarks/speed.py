"""Speed and memory at equal parameters: FusionTree beside `transformers`' models, in turns, in one run.

    python benchmarks/speed.py                                   # training, bf16 autocast, 1024x4 and 4096x1
    python benchmarks/speed.py --dtype float32 --shapes 1024x4
    python benchmarks/speed.py --tasks generate --shapes 4096x1  # prefill and decoding through `generate`

Every measurement is a process of its own, so that one model's memory is never counted against another; the models take
turns, in another order each round. The record replaces that of the same settings in
`benchmarks/results/speed_<cpu>.json`, and the tables of all of them go to the `.md` beside it. Rules and reading:
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import records
import speed_report
import torch
import yaml
from candidates import MODELS, OURS, SIZES, Candidate, build
from training_run import RepeatedStep, Shape
from transformers.generation.streamers import BaseStreamer

from fusiontree.eval.peers import count_parameters

TASKS = ("train", "generate")
NEW_TOKENS = 33


def resident_bytes() -> int:
    """Memory this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Most memory this process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stamps(BaseStreamer):
    """The time at which `generate` hands over each token; the prompt comes first and is not one."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        pass


def measure(job: dict) -> dict:
    """One measurement, in this process. Memory is counted from after the imports, the model included.

    Returns:
        train: seconds and CPU seconds of the median step, peak bytes.
        generate: seconds to the first token (prefill) and median seconds per later token, peak bytes.
    """
    torch.set_num_threads(job["threads"])
    baseline = resident_bytes()
    size = SIZES[job["size"]]
    candidate = build(job["model"], size, seed=0, chunk_size=job["chunk_size"], overrides=job["ours"])
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, size.vocab_size, (job["batch"], job["length"]), generator=generator)
    timed = _train(candidate, input_ids, job) if job["task"] == "train" else _generate(candidate, input_ids, job)
    return {
        **timed,
        "title": candidate.title,
        "parameters": count_parameters(candidate.model),
        "peak_bytes": peak_bytes() - baseline,
        "peak_bytes_of_process": peak_bytes(),
    }


def _train(candidate: Candidate, input_ids: torch.Tensor, job: dict) -> dict:
    step = RepeatedStep(candidate, input_ids, job["dtype"])
    wall, cpu = zip(*(step() for _ in range(1 + job["steps"])), strict=True)
    # The first step also warms up the allocator and the kernels.
    return {"seconds": median(wall[1:]), "cpu_seconds": median(cpu[1:])}


def _generate(candidate: Candidate, input_ids: torch.Tensor, job: dict) -> dict:
    model = candidate.model.eval()
    if job["dtype"] == "bf16":
        model = model.to(torch.bfloat16)
    stamps = Stamps()
    settings = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    if job.get("compiled", False) and job["model"] == OURS:
        model.compile_decoding()
    with torch.inference_mode():
        model.generate(input_ids[:, :64], **settings)
        started = time.perf_counter()
        model.generate(input_ids, streamer=stamps, **settings)
    gaps = [later - earlier for earlier, later in pairwise(stamps.times)]
    return {"prefill_seconds": stamps.times[0] - started, "token_seconds": median(gaps)}


def run_apart(job: dict) -> dict:
    """`measure` in a fresh process."""
    load = os.getloadavg()[0]
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "MKL_NUM_THREADS": str(job["threads"])}
    finished = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(job)], capture_output=True, text=True, env=environment
    )
    if finished.returncode:
        raise SystemExit(f"error: measuring {job['model']} failed\n{finished.stderr[-2000:]}")
    return {**job, **json.loads(finished.stdout.splitlines()[-1]), "load_before": round(load, 2)}


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["fusiontree", "llama", "falcon_h1"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["train"])
    shapes = [Shape("1024x4"), Shape("4096x1")]
    parser.add_argument("--shapes", nargs="+", type=Shape, default=shapes, metavar="TxB", help="tokens x rows")
    parser.add_argument("--size", choices=SIZES, default="20M")
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="settings of our configuration")
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--compiled", action="store_true", help="our decoding as one program, `compile_decoding`")
    parser.add_argument("--rounds", type=int, default=5, help="at least 1; each one is recorded")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a round, after one to warm up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--chunk-size", type=int, default=64, help="of the peers' scans")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.ours = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.ours)}
    return options


def main(argv: list[str]) -> None:
    options = arguments(argv)
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return
    measurements = []
    for number in range(options.rounds):
        turn = number % len(options.models)
        for task in options.tasks:
            for shape in options.shapes:
                for model in options.models[turn:] + options.models[:turn]:
                    job = {
                        "task": task,
                        "model": model,
                        "length": shape.length,
                        "batch": shape.rows,
                        "dtype": options.dtype,
                        "size": options.size,
                        "threads": options.threads,
                        "steps": options.steps,
                        "chunk_size": options.chunk_size,
                        "ours": options.ours,
                        "compiled": options.compiled,
                    }
                    found = run_apart(job) | {"round": number}
                    measurements.append(found)
                    print(speed_report.one_line(found), flush=True)
        # Each round's end leaves a complete record: a long run that is stopped keeps what it measured.
        shown = speed_report.save(options.results, _record(options, argv, number + 1, measurements))
    print(shown)


def _record(options: argparse.Namespace, argv: list[str], rounds: int, measurements: list[dict]) -> dict:
    return {
        "settings": {
            "size": options.size,
            "dtype": options.dtype,
            "threads": options.threads,
            "chunk_size": options.chunk_size,
            "ours": options.ours,
            "tasks": options.tasks,
            "shapes": options.shapes,
            **({"compiled": True} if options.compiled else {}),
        },
        "rounds": rounds,
        **records.provenance(),
        "revision": records.code_revision("models", "ops", "train/losses.py"),
        "command": "python benchmarks/speed.py " + " ".join(records.shown_arguments(argv)),
        "summary": speed_report.summarise(measurements),
        "measurements": measurements,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
