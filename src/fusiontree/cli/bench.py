"""`fusiontree bench`."""

from __future__ import annotations

from enum import Enum
from itertools import groupby, product
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import typer

from fusiontree.cli._options import was_given, whole_numbers
from fusiontree.errors import InputError, nearest

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from fusiontree.eval.bench_ops import Measured
    from fusiontree.eval.eval_system import BenchReport, BenchSettings
    from fusiontree.models import HybridLanguageModel


class Dtype(str, Enum):
    bfloat16 = "bfloat16"
    float32 = "float32"


# The vocabulary of a configuration that names neither its size nor a tokenizer that is there.
_VOCABULARY = 4096
# Columns of the names of backends, with their indent.
_NAMES = 16


def bench(
    context_of_call: typer.Context,
    what: list[str] = typer.Argument(
        None,
        metavar="[MODEL | ops] [KEY=VALUE]...",
        help="Model folder or run directory; `ops` for the backends alone.",
    ),
    config: Path = typer.Option(None, "--config", help="YAML file of a run: its model, freshly initialised."),
    peers: str = typer.Option(
        "", "--peers", help="Also measure llama, falcon_h1, mamba2, bamba (commas between) of equal size."
    ),
    context: str = typer.Option("1024", "--context", help="Tokens of the prompt; several with commas between."),
    new_tokens: int = typer.Option(64, "--new-tokens", min=2, help="Tokens decoded after it."),
    batch: str = typer.Option("1", "--batch", help="Sequences at a time; several with commas between."),
    train_batch: int = typer.Option(4, "--train-batch", min=0, help="Rows of a training step; 0 = do not train."),
    train_length: int = typer.Option(1024, "--train-length", min=2, help="Tokens of a row in training."),
    rounds: int = typer.Option(3, "--rounds", min=1, help="Measured rounds, after one that only warms up."),
    dtype: Dtype = typer.Option(Dtype.bfloat16, "--dtype", help="Of the weights, and of training's autocast."),
    device: str = typer.Option(None, "--device", help="cpu or cuda; default: cuda where there is a device."),
    weights: str = typer.Option(None, "--weights", help="int8 or int4: round the blocks' linear layers (torchao)."),
    out: Path = typer.Option(None, "--out", help="Where to write the report; default: bench.json here or in MODEL."),
) -> None:
    """Measure speed and memory: reading a prompt, first token, decoding, training, state and weights.

    Without MODEL or --config it measures the quickstart's model. All models take turns, round after round, and medians
    are shown; bench.json holds every round. `fusiontree bench ops` times the backends of each op instead.
    """
    words = what or []
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise InputError(f"bench measures one model: name one of {', '.join(names)}")
    if names and nearest(names[0], ["ops"]) and names != ["ops"] and not Path(names[0]).exists():
        raise InputError(f"there is no model folder {names[0]}; did you mean ops?")
    if names and names != ["ops"] and (config or overrides):
        raise InputError("a trained MODEL has its own configuration: leave out --config and KEY=VALUE")
    from fusiontree.deploy.loading import resolve_device

    place = resolve_device(device)
    shapes = list(product(whole_numbers(context, "--context"), whole_numbers(batch, "--batch")))
    if names == ["ops"]:
        if len(shapes) > 1:
            raise InputError("bench ops takes one --context and one --batch")
        _refuse_what_ops_ignores(context_of_call, overrides)
        _bench_ops(place, dtype.value, shapes[0][1], shapes[0][0])
        return
    from fusiontree.artifacts import directory_for_results
    from fusiontree.eval.eval_system import BenchSettings

    settings = BenchSettings.parse(
        {
            "context": shapes[0][0],
            "new_tokens": new_tokens,
            "batch": shapes[0][1],
            "more": shapes[1:],
            "train_batch": train_batch,
            "train_length": train_length,
            "rounds": rounds,
            "dtype": dtype.value,
            "weights": weights,
        }
    )
    destination = out or (Path(names[0]) if names else Path())
    if out is None or out.is_dir():
        destination /= "bench.json"
    model = _trained(names[0], place) if names else _fresh(config, overrides, place)
    with directory_for_results(destination.parent, "--out"):
        report = _measure(model, names[0] if names else str(config or "quickstart"), peers, settings)
        _print_report(report)
        report.save(destination)
    print(destination)


def _refuse_what_ops_ignores(call: typer.Context, overrides: list[str]) -> None:
    given = [
        option.opts[0]
        for option in call.command.params
        if option.name not in ("what", "dtype", "device", "batch", "context") and was_given(call, option.name or "")
    ]
    if given or overrides:
        surplus = ", ".join([*given, *overrides])
        raise InputError(f"bench ops takes --context, --batch, --dtype and --device alone: leave out {surplus}")


def _trained(path: str, device: torch.device) -> HybridLanguageModel:
    from fusiontree.deploy.loading import load

    return load(path, device=device)


def _fresh(config: Path | None, overrides: list[str], device: torch.device) -> HybridLanguageModel:
    """The model of a run's settings, with random weights."""
    import torch

    from fusiontree.cli._quickstart import QUICKSTART
    from fusiontree.config import apply_overrides
    from fusiontree.models import HybridLanguageModel
    from fusiontree.train.settings import RunSettings, load_run_settings, placing_mistakes
    from fusiontree.train.setup import model_config

    if config is not None:
        settings = load_run_settings(config, overrides)
    else:
        settings = RunSettings.parse(apply_overrides(QUICKSTART, overrides))
    if "vocab_size" not in settings.model:
        # Speed depends on the size of the vocabulary, not on its words: no tokenizer is needed.
        settings = settings.model_copy(update={"model": {**settings.model, "vocab_size": _VOCABULARY}})
        if config is not None:
            print(f"{config} leaves model.vocab_size to its tokenizer: measuring with {_VOCABULARY}")
    with placing_mistakes(config, overrides):
        model = model_config(settings)
    torch.manual_seed(settings.seed)
    return HybridLanguageModel(model).to(device)


def _measure(model: HybridLanguageModel, name: str, peers: str, settings: BenchSettings) -> BenchReport:
    from rich.console import Console

    from fusiontree.eval.eval_system import measure
    from fusiontree.eval.peers import PeerSize, build_peer

    config = model.config
    context = max(settings.context, *(context for context, _ in settings.more), 0)
    longest = max(context + settings.new_tokens - 1, settings.train_length if settings.train_batch else 0)
    if config.srte_encoding == "learned" and longest > config.max_position_embeddings:
        raise InputError(
            f"{longest} positions are needed, but the model's learned time encoding (SRTE) ends after "
            f"{config.max_position_embeddings}: choose a smaller --context, --new-tokens or --train-length"
        )
    models: dict[str, Any] = {name: model}
    for peer in dict.fromkeys(part.strip() for part in peers.split(",") if part.strip()):
        models[peer] = build_peer(peer, PeerSize.of(config)).to(model.device)
    console = Console(stderr=True)
    with console.status("bench") as status:
        return measure(models, settings, progress=lambda what: status.update(what))


def _print_report(report: BenchReport) -> None:
    from rich.console import Console
    from rich.table import Table

    s, first = report.settings, report.models[0]
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    weights = s["dtype"] if s["weights"] is None else f"{s['weights']}, computing in {s['dtype']}"
    context = f"{s['context']:,} tokens" + (f" x {s['batch']}" if s["batch"] > 1 else "")
    rounds = "1 round" if s["rounds"] == 1 else f"medians of {s['rounds']} rounds"
    beside = f"; in brackets: times {first.name}" if len(report.models) > 1 else ""
    if beside and s["weights"] is not None:
        beside += ", whose weights alone are rounded"
    table = Table(title=f"{rounds}{beside}")
    table.add_column("")
    for model in report.models:
        table.add_column(model.name, justify="right")
    rows = [
        ("parameters", "parameters", "{:,.0f}", 1.0),
        (f"weights, {weights}, MB", "parameter_bytes", "{:,.1f}", 1e-6),
        (f"state per sequence of {s['context'] + s['new_tokens']:,} tokens, kB", "state_bytes", "{:,.0f}", 1e-3),
        (f"reading {context}, tokens/s", "prefill_tokens_per_second", "{:,.0f}", 1.0),
        (f"first token after {context}, ms", "first_token_seconds", "{:,.0f}", 1e3),
        ("decoding, tokens/s", "decode_tokens_per_second", "{:,.1f}", 1.0),
        (f"training {s['train_length']:,} x {s['train_batch']}, tokens/s", "train_tokens_per_second", "{:,.0f}", 1.0),
        ("peak GPU memory, GB", "peak_bytes", "{:,.2f}", 1e-9),
    ]
    for label, field, form, unit in rows:
        values = [getattr(model, field) for model in report.models]
        if values[0] is None:
            continue
        cells = [form.format(value * unit) for value in values]
        ratios = ["", *(f" ({value / values[0]:.2f}x)" for value in values[1:])]
        table.add_row(label, *(cell + ratio for cell, ratio in zip(cells, ratios, strict=True)))
    console.print(table)
    if first.more:
        console.print(_table_of_shapes(report))
    m = report.machine
    where = m.get("gpu") or f"{m['processor']}, {m['threads']} threads, {m['kernels']}"
    print(f"{where}; torch {report.versions['torch']}, transformers {report.versions['transformers']}")


def _table_of_shapes(report: BenchReport) -> Table:
    """A row for each length, batch and model."""
    from rich.table import Table

    several = len(report.models) > 1
    table = Table(title="by length of the prompt and sequences at a time")
    heads = ["tokens", "sequences", "reading, tokens/s", "first token, ms", "decoding, tokens/s", "state of one, kB"]
    for head in heads[:2] + ["model"] * several + heads[2:]:
        table.add_column(head, justify="left" if head == "model" else "right")
    for shape in range(1 + len(report.models[0].more)):
        for model in report.models:
            found = model if shape == 0 else model.more[shape - 1]
            place = report.settings if shape == 0 else model.more[shape - 1].model_dump()
            table.add_row(
                f"{place['context']:,}",
                f"{place['batch']:,}",
                *[model.name] * several,
                f"{found.prefill_tokens_per_second:,.0f}",
                f"{1e3 * found.first_token_seconds:,.1f}",
                f"{found.decode_tokens_per_second:,.1f}",
                f"{1e-3 * found.state_bytes:,.0f}",
                end_section=model is report.models[-1],
            )
    return table


def _bench_ops(device: torch.device, dtype: str, batch: int, tokens: int) -> None:
    import torch

    from fusiontree.eval.bench_ops import SIZES, time_ops

    timings, rates = time_ops(device, getattr(torch, dtype), batch=batch, tokens=tokens)
    print(f"Op backends on {device.type}, {dtype}, {batch} x {tokens} tokens")
    print(f"{'':{_NAMES}}{'forward':^31}{'with backward':^31}".rstrip())
    print(f"{'':{_NAMES}}" + 2 * f"{'ms':>9}{'floor':>7}{'MB':>8}{'floor':>7}")
    for op, timings_of_op in groupby(timings, key=lambda timing: timing.op):
        print(op)
        for timing in timings_of_op:
            name = f"  {timing.backend}"
            if timing.forward is not None:
                print(f"{name:{_NAMES}}{_against_floor(timing.forward)}{_against_floor(timing.training)}".rstrip())
                name = ""
            if timing.reason:
                print(fill(timing.reason, 80, initial_indent=f"{name:{_NAMES}}", subsequent_indent=" " * _NAMES))
    held = "the most they hold at a time" if device.type == "cuda" else "what their operations read and write"
    note = (
        f"ms: medians of up to 5 calls; MB: {held}; floor: how many times the least time, or bytes, that is. "
        f"Here a matrix product reaches {rates.operations / 1e9:.0f} GFLOP/s and a copy {rates.bytes / 1e9:.1f} GB/s. "
        f"{SIZES}"
    )
    print(fill(note, 80))


def _against_floor(measured: Measured | None) -> str:
    """Milliseconds, MB, and each against the floor."""
    if measured is None:
        return ""
    size = f"{'–':>15}"
    if measured.bytes is not None:
        size = f"{measured.bytes / 1e6:8.1f}{_times(measured.bytes / measured.floor_bytes):>7}"
    return f"{1e3 * measured.seconds:9.2f}{_times(measured.seconds / measured.floor_seconds):>7}{size}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 100 else f"{ratio:.0f}x"
