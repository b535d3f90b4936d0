"""What context costs in decoding: seconds per token by length of the state, beside the reading of the global keys.

    python benchmarks/decoding.py                                # 20M, bf16, 1k to 32k tokens of context
    python benchmarks/decoding.py --contexts 1024 4096 --rounds 5

The shortest context is read, the longer ones are made from it with random keys for the global heads. Then the states
take turns, round after round, each with `--steps` tokens through the model alone (forward pass and choice of the
likeliest token). A round also copies a large buffer. The record replaces that of the same processor and settings in
`benchmarks/results/decoding.jsonl`, with a table in the `.md` beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

import records
import torch
from candidates import OURS, SIZES, build

from fusiontree.models import HybridCache, HybridLanguageModel

COPIED_BYTES = 2**28
SPARE = 4096  # tokens that the timed steps may add


def make_states(model: HybridLanguageModel, contexts: list[int]) -> tuple[dict[int, HybridCache], dict[int, int]]:
    """A state for each of the increasing lengths, and the bytes of it that are in use.

    Each has room for the longest, so that no buffer grows while steps are timed.
    """
    tokens = torch.randint(1, model.config.vocab_size, (1, contexts[0]), generator=torch.Generator().manual_seed(0))
    cache, states, used = HybridCache(model.config, capacity=contexts[-1] + SPARE), {}, {}
    model(tokens, past_key_values=cache, logits_to_keep=1)
    for context in contexts:
        lengthen(cache, context)
        states[context], used[context] = cache.clone(), cache.snapshot().nbytes
    return states, used


def lengthen(cache: HybridCache, context: int) -> None:
    """Pretend that more tokens were read: random keys and values for the global heads, the rest as it is."""
    more = context - cache.max_length
    for layer in cache.layers:
        for stored in (layer.global_keys, layer.global_values):
            if stored is not None:
                stored[:, :, cache.max_length : context].normal_()
    cache.lengths, cache.next_position, cache.read = (
        counts + more for counts in (cache.lengths, cache.next_position, cache.read)
    )
    cache.seen, cache.max_length, cache.max_position = cache.seen + more, context, context


def decode(model: HybridLanguageModel, state: HybridCache, steps: int) -> tuple[float, float]:
    """Median seconds and CPU seconds of a step, after one that warms up."""
    token = torch.ones(1, 1, dtype=torch.long)
    wall, cpu = [], []
    for _ in range(1 + steps):
        started, started_cpu = time.perf_counter(), time.process_time()
        token = model(token, past_key_values=state, logits_to_keep=1).logits.argmax(-1)
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - started_cpu)
    return median(wall[1:]), median(cpu[1:])


def copy_seconds(source: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """Seconds and CPU seconds of one copy of `source`."""
    started, started_cpu = time.perf_counter(), time.process_time()
    target.copy_(source)
    return time.perf_counter() - started, time.process_time() - started_cpu


def global_bytes_per_token(model: HybridLanguageModel) -> int:
    """Bytes of the keys and values that the global heads keep of one token, over all layers."""
    config = model.config
    layers = sum(config.branch(layer) != "mamba" for layer in range(config.num_layers))
    kv_heads = config.global_heads * config.num_kv_heads // config.num_heads
    return 2 * layers * kv_heads * config.head_dim * model.dtype.itemsize


@torch.inference_mode()
def measure(options: argparse.Namespace) -> dict:
    """Medians over the rounds; `*_cpu` in CPU seconds."""
    torch.set_num_threads(options.threads)
    model = build(OURS, SIZES[options.size], seed=0).model.eval()
    model = model.to(torch.bfloat16) if options.dtype == "bf16" else model
    contexts = sorted(options.contexts)
    states, used = make_states(model, contexts)
    source = torch.ones(COPIED_BYTES, dtype=torch.int8)
    target = torch.zeros_like(source)
    times: dict[int, list[tuple[float, float]]] = {context: [] for context in contexts}
    copies, loads = [], []
    for number in range(options.rounds):
        loads.append(round(os.getloadavg()[0], 2))
        copies.append(copy_seconds(source, target))
        turn = number % len(contexts)
        for context in contexts[turn:] + contexts[:turn]:
            times[context].append(decode(model, states[context], options.steps))
        print(f"round {number + 1} of {options.rounds}, load {loads[-1]}", flush=True)
    per_token = global_bytes_per_token(model)
    found: dict = {"global_bytes_per_token": per_token, "loads": loads, "contexts": []}
    bandwidth = {}
    for part, suffix in enumerate(("", "_cpu")):
        bandwidth[suffix] = COPIED_BYTES / median(pair[part] for pair in copies)
        found[f"copy_bytes_per_second{suffix}"] = round(bandwidth[suffix])
    for context in contexts:
        entry: dict = {"context": context, "state_bytes": used[context]}
        more_bytes = (context - contexts[0]) * per_token
        for part, suffix in enumerate(("", "_cpu")):
            entry[f"token_seconds{suffix}"] = median(pair[part] for pair in times[context])
            # Neighbours in time share what else the machine was doing.
            extra = median(own[part] - base[part] for own, base in zip(times[context], times[contexts[0]], strict=True))
            entry[f"extra_over_copy{suffix}"] = (
                round(extra / (more_bytes / bandwidth[suffix]), 3) if more_bytes else None
            )
        found["contexts"].append(entry)
    return found


def table(record: dict) -> str:
    lines = [
        "| context | ms per token | tok/s | CPU ms per token | extra time / copying the global keys | CPU | state MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in record["contexts"]:
        ratios = [entry["extra_over_copy"], entry["extra_over_copy_cpu"]]
        shown = " | ".join("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)
        lines.append(
            f"| {entry['context']} | {entry['token_seconds'] * 1e3:.2f} | {1 / entry['token_seconds']:.0f} "
            f"| {entry['token_seconds_cpu'] * 1e3:.2f} | {shown} | {entry['state_bytes'] / 1e6:.1f} |"
        )
    settings, loads = record["settings"], record["loads"]
    lines.append(
        f"\n{settings['size']} parameters, {settings['dtype']}, {settings['threads']} thread(s); {record['cpu']}; "
        f"medians of {settings['rounds']} rounds of {settings['steps']} tokens; copies "
        f"{record['copy_bytes_per_second'] / 1e9:.1f} GB/s ({record['copy_bytes_per_second_cpu'] / 1e9:.1f} per CPU "
        f"second); torch {record['versions']['torch']}; commit {record['commit']}, code revision {record['revision']}; "
        f"{record['date']}; `{record['command']}`. Load average before the rounds: {min(loads)} to {max(loads)}.\n"
    )
    return "\n".join(lines)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 8192, 16384, 32768])
    parser.add_argument("--size", choices=SIZES, default="20M")
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--steps", type=int, default=16, help="timed tokens of a round and context, after one to warm up"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = arguments(argv)
    settings = {name: value for name, value in vars(options).items() if name != "results"}
    record = {
        "settings": settings,
        **measure(options),
        **records.provenance(),
        "revision": records.code_revision("models", "ops"),
        "command": " ".join(["python benchmarks/decoding.py", *records.shown_arguments(argv)]),
    }
    path = options.results / "decoding.jsonl"
    records.keep_records(path, lambda old: (old["cpu"], old["settings"]) != (record["cpu"], settings))
    records.append_record(path, record)
    parts = ["# Decoding by length of context\n", *map(table, records.read_records(path))]
    path.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main(sys.argv[1:])
