"""Train short, read long: loss by position far past the training length, for each way of telling positions.

    python benchmarks/long_context.py                             # every variant: what is missing
    python benchmarks/long_context.py --variants sincos learned
    python benchmarks/long_context.py --report

Every variant is trained on rows of `--length` tokens, then reads the validation documents, joined into rows of 8 times
that length that are each one document, in one pass. Because the rows are cut anywhere, each range of positions holds
text of the same kind: a loss that rises from range to range is the model's doing. The same rows read as pieces of the
training length, each from position 0, show what the tokens cost without the longer context.

Each finished run is one line of `benchmarks/results/long_context_<corpus>.jsonl`; a run that is there is skipped, an
interrupted one goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import candidates
import numpy as np
import records
import torch
from candidates import OURS, Candidate, Size
from packed_text import END_ID, load_streams, pack
from torch.nn import functional as F
from training_run import CURVE_ROWS, Recipe, train

from fusiontree.eval.peers import count_parameters

OUR_CODE = ("models", "ops", "train/losses.py")
RANGES = 8  # the reading length in training lengths

SIZES = {
    "1.8M": Size(
        hidden_size=128,
        num_layers=4,
        parameters=1_770_000,
        ours={"num_layers": 4, "num_heads": 4, "mamba_expand": 1, "gate_rank": 32},
    ),
    "tiny": candidates.SIZES["tiny"],
}
VARIANTS = (
    *("sincos", "learned", "none", "attention", "mamba", "sincos-theta-1e6", "attention-theta-1e6"),
    *("sincos-theta-1e5", "attention-theta-1e5"),
)


def overrides(variant: str, size: Size, length: int) -> dict[str, Any]:
    """What `variant` changes in the default configuration.

    A layer of one branch is smaller: three of them have the parameters of two layers of both.
    """
    kind, _, theta = variant.partition("-theta-")
    changed: dict[str, Any] = {"rope_theta": float(theta)} if theta else {}
    if kind == "learned":
        return changed | {"srte_encoding": "learned", "max_position_embeddings": RANGES * length}
    if kind in ("attention", "mamba"):
        layers = 3 * size.ours["num_layers"] // 2
        return changed | {"num_layers": layers, "layer_branches": [kind] * layers}
    return changed


def make(variant: str, size: Size, length: int, seed: int) -> Candidate:
    """The freshly initialised model; in `none` the time encoding's projection stays 0, so that it encodes nothing."""
    if variant == "learned":
        size = replace(size, tolerance=0.35)  # its table is long, though only rows up to the training length are used
    candidate = candidates.build(OURS, size, seed=seed, overrides=overrides(variant, size, length))
    if variant == "none":
        torch.nn.init.zeros_(candidate.model.srte.proj.weight).requires_grad_(False)
    return candidate


def long_rows(stream: np.ndarray, length: int, most: int) -> torch.Tensor:
    """[R, length] int64: the stream's documents joined without their end tokens; R is at most `most`."""
    tokens = stream[stream != END_ID].astype(np.int64)
    count = min(most, len(tokens) // length)
    if count < 1:
        raise SystemExit(f"error: the validation file holds {len(tokens)} tokens, fewer than one row of {length}")
    return torch.from_numpy(tokens[: count * length].reshape(count, length))


@torch.no_grad()
def losses(candidate: Candidate, rows_RT: torch.Tensor, recipe: Recipe, at_once: int) -> torch.Tensor:
    """[R, T] float64: loss of each token given those before it in its row, each row one document; 0 at position 0."""
    candidate.model.eval()
    found_RT = torch.zeros(rows_RT.shape, dtype=torch.float64)
    for start in range(0, len(rows_RT), at_once):
        ids = rows_RT[start : start + at_once]
        with recipe.autocast():
            logits = candidate.model(input_ids=ids, use_cache=False).logits
        wrong = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        found_RT[start : start + at_once, 1:] = wrong.view(len(ids), -1).double()
    candidate.model.train()
    return found_RT


def by_range(candidate: Candidate, rows_RT: torch.Tensor, recipe: Recipe, length: int) -> dict:
    """Mean loss in each range of `length` positions, read in one pass and read anew in every range.

    The first token of each range is left out of both, since a fresh piece cannot predict it.
    """
    whole = losses(candidate, rows_RT, recipe, 1).view(-1, RANGES, length)
    fresh = losses(candidate, rows_RT.reshape(-1, length), recipe, RANGES).view(-1, RANGES, length)
    return {
        "loss_by_range": [round(loss, 4) for loss in whole[:, :, 1:].mean((0, 2)).tolist()],
        "loss_of_fresh_pieces": [round(loss, 4) for loss in fresh[:, :, 1:].mean((0, 2)).tolist()],
        "tokens_in_a_range": len(rows_RT) * (length - 1),
    }


def report(path: Path) -> str:
    """The tables of the recorded runs, saved beside them as Markdown."""
    runs = records.recorded_runs(path)
    parts = [f"# Train short, read long: {path.stem.removeprefix('long_context_')}\n"]
    same = ("size", "length", "steps", "batch_size", "learning_rate", "dtype", "seed", "rows")
    for setting in dict.fromkeys(json.dumps([r["run"][key] for key in same]) for r in runs):
        size, length, steps, batch_size, rate, dtype, seed, _ = json.loads(setting)
        group = [r for r in runs if json.dumps([r["run"][key] for key in same]) == setting]
        parts.append(
            f"## {size} parameters, {steps} steps of {batch_size} x {length} tokens, {dtype}, rate {rate:g}, seed "
            f"{seed}; {group[0]['tokens_in_a_range']} tokens in each range\n"
        )
        ends = [f"{k * length}–{(k + 1) * length - 1}" for k in range(RANGES)]
        lines = [
            f"| variant | parameters | {' | '.join(ends)} | past training | the same in fresh pieces |",
            "|" + "---|" * (RANGES + 4),
        ]
        for r in group:
            whole, fresh = r["loss_by_range"], r["loss_of_fresh_pieces"]
            figures = [*whole, sum(whole[1:]) / (RANGES - 1), sum(fresh[1:]) / (RANGES - 1)]
            lines.append(
                f"| {r['run']['variant']} | {r['parameters'] / 1e6:.2f} M | {' | '.join(f'{f:.3f}' for f in figures)} |"
            )
        parts.append("\n".join(lines) + "\n")
        parts.append(records.origin(group))
    text = "\n".join(parts)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = records.REPOSITORY.parent / "shared" / "data" / "wikitext2"
    parser.add_argument("--train", type=Path, default=data / "train.jsonl", help="JSONL with a `text` per line")
    parser.add_argument("--valid", type=Path, default=data / "valid.jsonl")
    parser.add_argument("--corpus", default="wikitext2", help="names the results files")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="directory of the records")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache", help="tokens, unfinished runs")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--size", choices=SIZES, default="1.8M")
    parser.add_argument("--length", type=int, default=512, help="of a training row; 8 times that is read")
    parser.add_argument("--rows", type=int, default=32, help="most rows to read")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=8, help="rows at a time; speed and memory only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only write the tables of the recorded runs")
    parser.add_argument("--discard-old-revisions", action="store_true", help="drop the runs of older code")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = arguments(argv)
    path = options.results / f"long_context_{options.corpus}.jsonl"
    if options.report:
        print(report(path))
        return
    torch.set_num_threads(options.threads)
    revision = records.code_revision(*OUR_CODE)
    if options.discard_old_revisions:
        records.keep_records(path, lambda r: r["revision"] == revision)
    size, length = SIZES[options.size], options.length
    train_stream, valid_stream, data = load_streams(
        options.train, options.valid, vocab_size=size.vocab_size, cache=options.cache
    )
    rows_RT = long_rows(valid_stream, RANGES * length, options.rows)
    valid_rows = pack(valid_stream, length).select(slice(0, CURVE_ROWS))
    recipe = Recipe(
        **{key: getattr(options, key) for key in ("learning_rate", "steps", "warmup", "batch_size", "micro_batch")},
        seed=options.seed,
        dtype=options.dtype,
    )
    for variant in options.variants:
        run = {
            "variant": variant,
            "data": data,
            **{
                key: getattr(recipe, key) for key in ("learning_rate", "steps", "warmup", "batch_size", "seed", "dtype")
            },
            **{key: getattr(options, key) for key in ("size", "length", "rows")},
        }
        records.check_revisions(path, revision, lambda r: True)
        if any(r["run"] == run for r in records.read_records(path)):
            print(f"{variant}: recorded already", flush=True)
            continue
        candidate = make(variant, size, length, options.seed)
        key = hashlib.sha256(json.dumps(run | {"revision": revision}, sort_keys=True).encode()).hexdigest()[:12]
        print(f"{variant}: training", flush=True)
        measured = train(candidate, recipe, pack(train_stream, length), valid_rows, options.cache / f"long_{key}.pt")
        record = {
            "run": run,
            "revision": revision,
            "parameters": count_parameters(candidate.model),
            **measured,
            **by_range(candidate, rows_RT, recipe, length),
            "threads": options.threads,
            **records.provenance(),
            "command": f"python benchmarks/long_context.py --variants {variant} --size {options.size} "
            f"--length {length} --steps {options.steps} --learning-rate {options.learning_rate:g} "
            f"--dtype {options.dtype} --threads {options.threads}",
        }
        records.append_record(path, record)
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
