"""Where the time of a training step goes: its operations by kind, beside what its matrix products would take at best.

    python benchmarks/breakdown.py                               # 20M, bf16 autocast, 1024x4 and 4096x1
    python benchmarks/breakdown.py --models fusiontree --shapes 16384x1

torch's profiler watches `--steps` steps of each model in one process, after two that warm up. Attention, scan, loss
and the like count with all they call but matrix products, any other operation with the time that is its own. The floor
is the floating-point operations of the matrix products (torch counts them) at the rate of one large product, measured
in the same process. The record replaces that of the same settings in `benchmarks/results/breakdown_<cpu>.json`, with a
table in the `.md` beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import records
import torch
from candidates import MODELS, OURS, SIZES, build
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from training_run import RepeatedStep, Shape

from fusiontree.eval.bench_ops import measure_rates

# In this order: the first of which a part is in an operation's name counts it; torch's own are named whole.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear"),
    "attention": ("Attention", "scaled_dot_product", "flash_attention"),
    "scan": ("Scan",),
    "convolution": ("Conv", "conv1d", "convolution"),
    "loss": ("CrossEntropy", "cross_entropy", "nll_loss", "log_softmax"),
    "optimizer and clipping": ("adam", "Optimizer", "aten::linalg_vector_norm", "_foreach"),
    "norms": ("LayerNorm", "native_layer_norm", "RMSNorm", "rms_norm"),
    "gated mix and product": ("GatedMix", "SwiGLU"),
    "rotary": ("Rotary", "rotary"),
    "copies": ("aten::copy", "aten::cat", "aten::clone", "aten::fill", "aten::zero", "aten::flip"),
    "element-wise operations and sums": (
        *("aten::add", "aten::mul", "aten::sub", "aten::div", "aten::neg", "aten::sum", "aten::exp", "aten::rsqrt"),
        *("aten::pow", "aten::mean", "aten::cumsum", "aten::masked_fill", "aten::index", "aten::index_select"),
        *("silu", "sigmoid", "tanh", "softmax", "softplus", "embedding", "AccumulateGrad"),
    ),
}
OTHERS = "autograd, Python, the rest"
# Of these an operation that calls others is one thing, matrix products within it apart.
WHOLE = KINDS.keys() - {"matrix products", "copies", "element-wise operations and sums"}


def kind_of(name: str) -> str:
    def is_part(part: str) -> bool:
        return name.rstrip("_") == part if part.startswith("aten::") else part in name

    return next((kind for kind, parts in KINDS.items() if any(map(is_part, parts))), OTHERS)


def kind_of_event(event: FunctionEvent) -> str:
    """The kind of the operation, or of the outermost one that it is a piece of."""
    kind, caller = kind_of(event.name), event.cpu_parent
    if kind == "matrix products":
        return kind
    while caller is not None:
        outer, caller = kind_of(caller.name), caller.cpu_parent
        kind = outer if outer in WHOLE else kind
    return kind


def measure(name: str, shape: Shape, options: argparse.Namespace) -> dict:
    """Seconds of a step by kind, in all, and of the matrix products at best."""
    size = SIZES[options.size]
    candidate = build(name, size, seed=0)
    ids = torch.randint(1, size.vocab_size, (shape.rows, shape.length), generator=torch.Generator().manual_seed(0))
    step = RepeatedStep(candidate, ids, options.dtype)
    step()
    step()
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as watched:
        seconds = sum(step()[0] for _ in range(options.steps)) / options.steps
    kinds = dict.fromkeys((*KINDS, OTHERS), 0.0)
    operations = 0
    for event in watched.events():
        kind = kind_of_event(event)
        kinds[kind] += event.self_cpu_time_total / 1e6 / options.steps
        operations += event.flops or 0 if kind == "matrix products" else 0
    kinds[OTHERS] += max(0.0, seconds - sum(kinds.values()))  # what runs between the operations
    rates = measure_rates(torch.device("cpu"), torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    return {
        "model": candidate.title,
        "shape": shape,
        "seconds": seconds,
        "kinds": {kind: round(value, 5) for kind, value in kinds.items()},
        "floor_seconds": operations / options.steps / rates.operations,
        "operations_per_second": rates.operations,
    }


def table(record: dict) -> str:
    found = record["found"]
    lines = [
        "| seconds of a step | " + " | ".join(f"{one['model']} {one['shape']}" for one in found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for kind in (*KINDS, OTHERS):
        cells = (f"{one['kinds'][kind]:.3f} ({one['kinds'][kind] / one['seconds']:.0%})" for one in found)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    for title, key in (("**the step**", "seconds"), ("the matrix products at best", "floor_seconds")):
        cells = (f"{one[key]:.3f}" for one in found)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    rates = [one["operations_per_second"] / 1e9 for one in found]
    settings = record["settings"]
    lines.append(
        f"\n{settings['size']} parameters, {settings['dtype']}, {settings['threads']} thread(s), {settings['steps']} "
        f"steps under the profiler; {record['cpu']}; one large product makes {min(rates):.0f} to "
        f"{max(rates):.0f} GFLOP/s; torch {record['versions']['torch']}; commit {record['commit']}, code revision "
        f"{record['revision']}; {record['date']}; `{record['command']}`.\n"
    )
    return "\n".join(lines)


def report(found: list[dict]) -> str:
    return "\n".join(["# Where the time of a training step goes\n", *map(table, found)])


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[OURS, "llama"])
    shapes = [Shape("1024x4"), Shape("4096x1")]
    parser.add_argument("--shapes", nargs="+", type=Shape, default=shapes, metavar="TxB", help="tokens x rows")
    parser.add_argument("--size", choices=SIZES, default="20M")
    parser.add_argument("--dtype", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    found = []
    for shape in options.shapes:
        found += [measure(name, shape, options) for name in options.models]
    record = {
        "settings": {name: value for name, value in vars(options).items() if name != "results"},
        "found": found,
        **records.provenance(),
        "revision": records.code_revision("models", "ops"),
        "command": " ".join(["python benchmarks/breakdown.py", *records.shown_arguments(argv)]),
    }
    records.save_for_cpu(options.results, "breakdown", record, report)
    print(table(record))


if __name__ == "__main__":
    main(sys.argv[1:])
